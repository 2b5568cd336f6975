"""The files of a model's version: moved into a repository and removed from it, by publish, release and rollback.

Contract: a version enters the repository before its `config.pbtxt`, which names it, so no server sees half a version or
one under another's configuration. A kill in between leaves a version that is served with its own copy of the
configuration (`deepseek.spec.files.repository.config_path`). On a full disk the error is one line and nothing is left
behind. The caller holds the lock of the repository.
"""

import errno
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek.spec.command import PLACE_ERRORS, InputError
from deepseek.spec.files.folders import SCRATCH, let_all_read, onto_disk
from deepseek.spec.files.repository import CONFIG, retired

WARMUP = "warmup"


def add_version(staged: Path, version: int, model: Path) -> None:
    """Moves a version with its warm-up files and configuration from the folder `staged` into a model's folder.

    Raises InputError if the disk is full, which leaves the model as before, or if another build has just added it.
    """
    let_all_read(staged)
    try:
        if not model.exists():
            move(staged, model)
            return
        (model / WARMUP).mkdir(exist_ok=True)
        for file in sorted((staged / WARMUP).iterdir()):
            move(file, model / WARMUP / file.name)
        # The version first: until the new configuration names it, NVIDIA's Triton serves the old version.
        move(staged / str(version), model / str(version))
        move(staged / CONFIG, model / CONFIG)
    except InputError:
        _remove_version(model, version)
        raise
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise InputError(f"{model}: version {version} was just added by another build; run it again") from None


def retire(model: Path) -> list[int]:
    """Removes versions too old for a rollback; returns their numbers."""
    old = retired(model)
    for version in old:
        _remove_version(model, version)
    return old


def _remove_version(model: Path, version: int) -> None:
    """Hides, then removes a version and its warm-up files, so that no server sees half of it."""
    if (model / str(version)).is_dir():
        shutil.rmtree(hide_version(model, version))
    for file in (model / WARMUP).glob(f"{version}-*"):
        file.unlink()


def hide_version(model: Path, version: int) -> Path:
    """Renames a version so that no server reads it; returns its path."""
    names = (model / f"{SCRATCH}{version}-{count}" for count in itertools.count())
    hidden = next(name for name in names if not name.exists())
    os.rename(model / str(version), hidden)
    return hidden


def move(source: Path, destination: Path) -> None:
    """Renames over an existing file; across file systems copies beside the destination first.

    Raises InputError if there is no room for the copy.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = destination.with_name(f"{SCRATCH}{destination.name}")
        shutil.rmtree(beside, ignore_errors=True)
        with whole(beside):
            copy(source, beside)
            let_all_read(beside)
        os.rename(beside, destination)
        hidden = source.with_name(f"{SCRATCH}{source.name}")
        os.rename(source, hidden)  # servers see all of it or nothing
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()


def copy(source: Path, destination: Path) -> None:
    """Copies a file or folder; raises the first OSError itself (shutil.copytree turns it into text)."""
    if source.is_file():
        shutil.copyfile(source, destination)
        return
    destination.mkdir()
    for each in sorted(source.iterdir()):
        if each.name != "__pycache__" and not each.name.startswith(SCRATCH):
            copy(each, destination / each.name)


@contextmanager
def whole(place: Path) -> Iterator[None]:
    """Wraps the writing of a file or folder: afterwards it is complete and on the disk, or removed.

    Raises InputError if the disk is full or read-only.
    """
    try:
        yield
        onto_disk(place)
    except BaseException as error:  # Ctrl-C too: NVIDIA's Triton would take half a copy in the repository for a model
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if not isinstance(error, OSError) or error.errno not in PLACE_ERRORS:
            raise
        raise InputError(f"{error.filename2 or place}: {error.strerror}; {PLACE_ERRORS[error.errno]}") from None

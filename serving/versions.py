"""Versions of a model as files: a candidate laid out beside the repository, put into it, taken out of it again.

Contract: what is judged is what is served later, byte for byte: a candidate is copied and given its number before the
first check, and moved by renames afterwards, once it is on the disk. In the repository a version comes before its
`config.pbtxt` and goes after it, so that a server that follows the repository sees at no time a version that is not
whole; who is killed in between leaves a version that is served under its own copy
(`deepseek.spec.repository.config_path`); where a disk is full, in one line, nothing is left of what was begun. To take
a version out needs no room. Only versions that `export.to_triton` made are handled.

Example:
    staged = stage(Path("other_repository/shop"), number=7, folder=Path("build/shop/release"))  # .../shop/7
    with brought(staged, Path("model_repository/shop")) as near:
        put_live(near, 7, Path("model_repository/shop"), before=6)
    take_out(Path("model_repository/shop"), 7, back_to=6, archive=Path("build/shop/release/withdrawn"))
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import GateFailed, InputError, PublishedManifest
from deepseek.spec.command import PLACE_ERRORS
from deepseek.spec.folders import SCRATCH, alone_in, let_all_read, onto_disk, scratch_in
from deepseek.spec.repository import CONFIG, retired, versions_of
from serving.repository import MANIFEST, check_config, check_version, config_of, read_config

WARMUP = "warmup"


def newest(model: Path) -> int | None:
    """The number of the newest version; None where there is none, or no model."""
    return next(iter(versions_of(model)), None)


def stage(source: Path, *, number: int, folder: Path) -> Path:
    """Copies the newest version of `source` into a repository in `folder`, as `number`; returns the model's folder.

    Raises InputError where there is nothing to copy.
    """
    version = newest(source)
    if version is None or not (source / str(version) / MANIFEST).is_file():
        what = (
            "no version" if version is None else f"version {version} has no {MANIFEST}, so was not made by make engine"
        )
        raise InputError(f"{source}: {what}; name a repository that make engine published into")
    return lay_out(source, version, number=number, folder=folder)


def lay_out(source: Path, version: int, *, number: int, folder: Path) -> Path:
    """One version of a model alone, as `number`, with its warm-up files and a configuration that names them."""
    model = folder / source.name
    shutil.rmtree(model, ignore_errors=True)
    with _whole(model):
        (model / WARMUP).mkdir(parents=True)
        _copy(source / str(version), model / str(number))
        config = config_of(source, version)
        for old, new in _renumber(config, version, number).items():
            if (source / WARMUP / old).is_file():
                _copy(source / WARMUP / old, model / WARMUP / new)
        text = text_format.MessageToString(config)
        for place in (model, model / str(number)):  # the version's own copy is what a return to it takes
            (place / CONFIG).write_text(text)
    return model


def _renumber(config: ModelConfig, old: int, new: int) -> dict[str, str]:
    """Names warm-up samples and their files after the version; returns new file names by old ones."""
    files: dict[str, str] = {}
    for sample in config.model_warmup:
        sample.name = _after(sample.name, old, new)
        for name in sample.inputs:
            entry = sample.inputs[name]
            if entry.input_data_file:
                files[entry.input_data_file] = _after(entry.input_data_file, old, new)
                entry.input_data_file = files[entry.input_data_file]
    return files


def _after(name: str, old: int, new: int) -> str:
    return f"{new}-{name.removeprefix(f'{old}-')}"


def same_as(staged: Path, number: int, model: Path, version: int) -> bool:
    """Whether a staged version is what a version of `model` is: the same files under the same configuration."""
    place = model / str(version) / MANIFEST
    if not place.is_file():
        return False
    config = config_of(model, version)
    _renumber(config, version, number)
    files = PublishedManifest.load(staged / str(number) / MANIFEST).files
    return files == PublishedManifest.load(place).files and config == read_config(staged / CONFIG)


@contextmanager
def brought(staged: Path, model: Path) -> Iterator[Path]:
    """A staged version on the repository's own disk, where no server reads it: `put_live` then only renames."""
    with scratch_in(model) as scratch:
        _move(staged, scratch / model.name)
        yield scratch / model.name


def put_live(staged: Path, number: int, model: Path, *, before: int | None) -> None:
    """Moves a staged version into the repository; a server that follows the repository takes it up from there.

    Raises InputError where `before` is no longer the newest there, since another build put one there meanwhile, or
    there is no room.
    """
    with alone_in(model.parent):
        if newest(model) != before:
            raise InputError(
                f"{model}: its newest version is {newest(model) or 'none'}, not {before or 'none'} as when the release "
                "began: another build changed it meanwhile; release again"
            )
        let_all_read(staged)
        if not model.exists():
            _move(staged, model)
            return
        (model / WARMUP).mkdir(exist_ok=True)
        try:
            for file in sorted((staged / WARMUP).iterdir()):
                _move(file, model / WARMUP / file.name)
            _move(staged / str(number), model / str(number))
            _move(staged / CONFIG, model / CONFIG)
        except InputError:
            _remove(model, number)
            raise


def retire(model: Path) -> list[int]:
    """Removes versions that are too old to go back to; returns their numbers."""
    old = retired(model)
    for version in old:
        _remove(model, version)
    return old


def _remove(model: Path, version: int) -> None:
    """Takes away what there is of a version, with its warm-up files; no server sees half of it while it goes."""
    if (model / str(version)).is_dir():
        shutil.rmtree(_hide(model, version))
    for file in (model / WARMUP).glob(f"{version}-*"):
        file.unlink()


def _hide(model: Path, version: int) -> Path:
    """Gives a version a name that no server reads; returns where it is then."""
    names = (model / f"{SCRATCH}{version}-{count}" for count in itertools.count())
    hidden = next(name for name in names if not name.exists())
    os.rename(model / str(version), hidden)
    return hidden


def earlier(model: Path) -> int:
    """The newest version before the one that is served that could be served now; GateFailed where there is none."""
    versions = versions_of(model)
    reasons = []
    for version in versions[1:]:
        wrong = _findings(model, version)
        if not wrong:
            return version
        reasons.append(wrong[0])
    raise GateFailed(
        f"{model}: no version before {versions[0]} to go back to" + "".join(f"; {each}" for each in reasons)
    )


def _findings(model: Path, version: int) -> list[str]:
    """What speaks against going back to a version."""
    manifest, wrong = check_version(model, version)
    if manifest is None or wrong:
        return [str(each) for each in wrong]
    try:
        config = read_config(model / str(version) / CONFIG)
    except InputError as error:
        return [f"{model.name}/{version}/{CONFIG} {error}"]
    return [str(each) for each in check_config(model, config, manifest)]


def take_out(
    model: Path, number: int, *, back_to: int, archive: Path, decided: Callable[[], object] = lambda: None
) -> list[str]:
    """Has `back_to` be the newest version again: takes `number` out, and what lies between and cannot be served.

    The configuration first and the newest last: cut off between, a second call ends what the first began. Until no
    server sees them there are only renames; then `decided` is called, and they are moved to `archive`. Returns a line
    for each that it has no room for.
    """
    with alone_in(model.parent):
        draft = model / f"{SCRATCH}{CONFIG}"
        _draw_up(model / str(back_to) / CONFIG, draft)
        os.replace(draft, model / CONFIG)
        draft.unlink(missing_ok=True)  # it stays where both names were the same file
        out = sorted(version for version in versions_of(model) if back_to < version <= number)
        hidden = {version: _hide(model, version) for version in out}
        decided()
        kept = [_archive(place, version, model, archive) for version, place in hidden.items()]
        return [said for said in kept if said]


def _draw_up(own: Path, draft: Path) -> None:
    """A version's configuration as a draft of the model's; on a full disk the same file under a second name."""
    draft.unlink(missing_ok=True)
    try:
        with _whole(draft):
            _copy(own, draft)
    except InputError:
        os.link(own, draft)


def _archive(hidden: Path, version: int, model: Path, archive: Path) -> str:
    """Moves what was taken out to where it is kept; where that fails it stays hidden, and a line says why."""
    try:
        _move(hidden, archive / str(version))
        for file in sorted((model / WARMUP).glob(f"{version}-*")):
            _move(file, archive / WARMUP / file.name)
    except (InputError, OSError) as error:
        where = hidden if hidden.exists() else model / WARMUP
        lies = f"it lies in {where}, read by no server, till the next release"
        return f"version {version} is out, and not kept: {error}; {lies}"
    return ""


def _move(source: Path, destination: Path) -> None:
    """Renames, over what is there where that is a file; across file systems it copies beside the destination first.

    Raises InputError where there is no room for the copy.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(source, destination)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        beside = destination.with_name(f"{SCRATCH}{destination.name}")
        shutil.rmtree(beside, ignore_errors=True)
        with _whole(beside):
            _copy(source, beside)
        os.replace(beside, destination)
        hidden = source.with_name(f"{SCRATCH}{source.name}")
        os.replace(source, hidden)  # a server sees all of it or nothing
        shutil.rmtree(hidden) if hidden.is_dir() else hidden.unlink()


def _copy(source: Path, destination: Path) -> None:
    """A file, or a folder with what is in it; raises what the system says of the first that cannot be copied.

    shutil.copytree goes on after an error, and has what the system says as a text.
    """
    if source.is_file():
        shutil.copyfile(source, destination)
        return
    destination.mkdir()
    for each in sorted(source.iterdir()):
        if each.name != "__pycache__" and not each.name.startswith(SCRATCH):
            _copy(each, destination / each.name)


@contextmanager
def _whole(place: Path) -> Iterator[None]:
    """What is written to a file or folder is whole and on the disk, or removed again.

    Raises InputError where the disk is full or not ours.
    """
    try:
        yield
        onto_disk(place)
    except OSError as error:
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        if error.errno not in PLACE_ERRORS:
            raise
        raise InputError(f"{error.filename2 or place}: {error.strerror}; {PLACE_ERRORS[error.errno]}") from None

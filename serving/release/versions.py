"""Versions of a model as files: a candidate is staged beside the repository, moved in, and moved out again.

Contract: the gates judge the exact bytes that are served later: a candidate is copied and numbered before the first
check, and after that only renamed. A version leaves the repository after the `config.pbtxt` that names it, as it enters
before (`deepseek.spec.files.version_files`). On a full disk the error is one line and nothing is left behind. Moving a
version out needs no disk space. Handles only versions that `export.stages.publish` made.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import GateFailed, InputError, PublishedManifest
from deepseek.spec.files.folders import SCRATCH, alone_in, let_all_read, scratch_in
from deepseek.spec.files.repository import CONFIG, versions_of
from deepseek.spec.files.version_files import WARMUP, add_version, copy, hide_version, move, whole
from serving.repository.checks import MANIFEST, config_of, read_config
from serving.repository.version_choice import check_under


def newest(model: Path) -> int | None:
    """The number of the newest version; None if there is no version or no model."""
    return next(iter(versions_of(model)), None)


def stage(source: Path, *, number: int, folder: Path) -> Path:
    """Copies the newest version of `source` into a repository in `folder`, as `number`; returns the model's folder.

    Raises InputError if there is nothing to copy.
    """
    version = newest(source)
    if version is None or not (source / str(version) / MANIFEST).is_file():
        what = (
            "no version" if version is None else f"version {version} has no {MANIFEST}: make engine did not publish it"
        )
        raise InputError(f"{source}: {what}; name a repository that make engine published into")
    return copy_version(source, version, number=number, folder=folder)


def copy_version(source: Path, version: int, *, number: int, folder: Path) -> Path:
    """Copies one version of a model, as `number`, with its warm-up files and a matching configuration."""
    model = folder / source.name
    shutil.rmtree(model, ignore_errors=True)
    with whole(model):
        (model / WARMUP).mkdir(parents=True)
        copy(source / str(version), model / str(number))
        config = config_of(source, version)
        for old, new in _renumber(config, version, number).items():
            if (source / WARMUP / old).is_file():
                copy(source / WARMUP / old, model / WARMUP / new)
        text = text_format.MessageToString(config)
        for place in (model, model / str(number)):  # a rollback takes the version's own copy
            (place / CONFIG).write_text(text)
    return model


def _renumber(config: ModelConfig, old: int, new: int) -> dict[str, str]:
    """Names the new version in a configuration, its warm-up too; returns old file name -> new file name."""
    files: dict[str, str] = {}
    config.version_policy.specific.versions[:] = [new]
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
    """Whether a staged version has the same files and configuration as a version of `model`."""
    place = model / str(version) / MANIFEST
    if not place.is_file():
        return False
    config = config_of(model, version)
    _renumber(config, version, number)
    files = PublishedManifest.load(staged / str(number) / MANIFEST).files
    return files == PublishedManifest.load(place).files and config == read_config(staged / CONFIG)


@contextmanager
def beside_repository(staged: Path, model: Path) -> Iterator[Path]:
    """Moves the staged version to the repository's disk, hidden from servers, so that `move_in` only renames."""
    with scratch_in(model) as scratch:
        move(staged, scratch / model.name)
        yield scratch / model.name


def move_in(staged: Path, number: int, model: Path, *, before: int | None) -> None:
    """Moves a staged version into the repository, where a server that follows it finds it.

    Raises InputError if `before` is no longer the newest version (another build published), or if the disk is full.
    """
    with alone_in(model.parent):
        if newest(model) != before:
            raise InputError(
                f"{model}: its newest version is {newest(model) or 'none'}, but was {before or 'none'} at the start: "
                "another build changed it; release again"
            )
        add_version(staged, number, model)


def previous_intact(model: Path) -> int:
    """The newest intact version before the served one.

    Raises InputError if the served version is the only one, GateFailed if all earlier ones are damaged.
    """
    versions = versions_of(model)
    if len(versions) == 1:
        raise InputError(
            f"{model}: no version before {versions[0]} to go back to; to serve another model, change it, then: "
            "make release"
        )
    reasons = []
    for version in versions[1:]:
        _, wrong = check_under(model, version, model / str(version) / CONFIG)
        if not wrong:
            return version
        reasons.append(str(wrong[0]))
    raise GateFailed(
        f"{model}: no version before {versions[0]} to go back to" + "".join(f"; {each}" for each in reasons)
    )


def move_out(
    model: Path, number: int, *, back_to: int, archive: Path, decided: Callable[[], object] = lambda: None
) -> list[str]:
    """Makes `back_to` the newest version again: moves out `number` and the damaged versions in between.

    The configuration changes first and the newest version goes last, so that a second call finishes after a kill. The
    versions are hidden by renames, then `decided` is called, then they are moved to `archive`. Returns a line for each
    one that does not fit there.
    """
    with alone_in(model.parent):
        draft = model / f"{SCRATCH}{CONFIG}"
        _draft_config(model / str(back_to) / CONFIG, draft)
        let_all_read(draft)
        os.replace(draft, model / CONFIG)
        draft.unlink(missing_ok=True)  # os.replace keeps it if both names are the same file
        out = sorted(version for version in versions_of(model) if back_to < version <= number)
        hidden = {version: hide_version(model, version) for version in out}
        decided()
        kept = [_archive(place, version, model, archive) for version, place in hidden.items()]
        return [said for said in kept if said]


def move_out_first(model: Path, number: int, *, archive: Path) -> None:
    """Moves a model whose only version is `number` out of the repository, to `archive`."""
    with alone_in(model.parent):
        if versions_of(model) == [number]:
            move(model, archive)


def _draft_config(own: Path, draft: Path) -> None:
    """Copies a version's configuration to `draft`; on a full disk links it instead."""
    draft.unlink(missing_ok=True)
    try:
        with whole(draft):
            copy(own, draft)
    except InputError:
        os.link(own, draft)


def _archive(hidden: Path, version: int, model: Path, archive: Path) -> str:
    """Moves a hidden version to the archive; if that fails, it stays hidden and a line says why."""
    try:
        move(hidden, archive / str(version))
        for file in sorted((model / WARMUP).glob(f"{version}-*")):
            move(file, archive / WARMUP / file.name)
    except (InputError, OSError) as error:
        where = hidden if hidden.exists() else model / WARMUP
        lies = f"until the next release it is in {where}, hidden from servers"
        return f"version {version} is withdrawn, but not archived: {error}; {lies}"
    return ""

"""The copy of a model repository that Triton reads: only versions that passed every check.

Contract: `VerifiedRepository` fills a folder that Triton reads in place of the repository, with hard links if the file
system allows them, else symbolic links. A version in it stays until a better one replaces it. A queue delay is served
as 0, with one warning. Models that `export.stages.publish` did not make are linked unchecked.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from google.protobuf import text_format

from deepseek.spec import GateFailed, InputError
from deepseek.spec.files.folders import SCRATCH
from deepseek.spec.files.repository import CONFIG, model_folders, versions_of
from serving.repository.checks import (
    Finding,
    check_layout,
    everything_in,
    made_here,
    models_in,
    not_ours,
    read_config,
)
from serving.repository.version_choice import VersionChoice, choose_versions

_SETTLED_S = 0.1  # a publisher's renames are less than this apart
Stamp = tuple[tuple[str, int, int, int], ...]  # path, inode, size and modification time of each file
UNKNOWN: Stamp = ()  # the next look reads the model again


@dataclass(frozen=True, kw_only=True)
class ModelChange:
    model: str
    action: Literal["load", "unload"]


@dataclass(frozen=True, kw_only=True)
class _Shown:
    versions: tuple[int, ...]
    config: bytes
    files: Stamp

    @classmethod
    def of(cls, choice: VersionChoice, stamp: Stamp) -> "_Shown":
        assert choice.config is not None
        shown = {*map(str, choice.versions)}

        def counts(path: str) -> bool:
            """False for other versions and for warm-up files: they do not change what is served."""
            folder = path.split(os.sep)[0]
            return folder in shown if folder.isdigit() else folder not in (CONFIG, "warmup")

        files = tuple(each for each in stamp if counts(each[0]))
        return cls(versions=choice.versions, config=choice.config.read_bytes(), files=files)


class VerifiedRepository:
    """Links the intact versions of `repository` into `folder`; reports each new finding once through `say`."""

    def __init__(self, repository: Path, folder: Path, say: Callable[[str], None]) -> None:
        self.repository = repository
        self.folder = folder
        self._say = say
        self._said: set[str] = set()
        self._stamps: dict[str, Stamp] = {}
        self._shown: dict[str, _Shown] = {}
        self._before: _Shown | None = None  # for `take_back`

    def fill(self) -> None:
        """Links all models; raises GateFailed with all reasons if a model has no version to serve."""
        self.folder.mkdir()
        refused: list[Finding] = []
        for model in models_in(self.repository):
            self._stamps[model.name] = _stamp(model)
            if not made_here(model):
                self._link_unchecked(model)
                continue
            choice = choose_versions(model)
            if choice.config is None:
                refused += choice.findings
            else:
                self._show(model, choice)
                self._report(choice, f"{model.name}: version {choice.versions[0]} is served")
        if refused:
            raise GateFailed("; ".join(map(str, refused)))

    @property
    def notes(self) -> list[Finding]:
        """A warning for each unchecked model, and for each folder that is not a model."""
        shown = [not_ours(self.repository / path.name) for path in sorted(self.folder.iterdir()) if path.is_symlink()]
        left_out = f"ignored: it has no {CONFIG}"
        strays = check_layout(self.repository)
        return shown + [Finding(level="warning", where=each.where, what=left_out) for each in strays]

    def changes(self) -> Iterator[ModelChange]:
        """Compares with the repository and yields changes; the folder is up to date before each one."""
        try:
            models = {path.name: path for path in model_folders(self.repository)}
        except OSError as error:  # such as a network disk that lost its server
            why = f"cannot be read ({error.strerror}); what is served keeps serving"
            self._say_once(f"warning   {self.repository}: {why}")
            return
        for name in self._stamps.keys() - models.keys():
            if not _is_gone(self.repository / name):
                self._say_once(
                    f"warning   {self.repository / name / CONFIG}: cannot be read; what is served keeps serving"
                )
                continue
            del self._stamps[name]
            if self._hide(name):
                yield ModelChange(model=name, action="unload")
        for name, model in models.items():
            before = self._stamps.get(name)
            try:
                stamp = _stamp(model)
                if stamp == before or not _settled(model, stamp):
                    continue
                self._stamps[name] = stamp
                change = self._follow(model)
            except (OSError, InputError) as error:  # it changed during the look
                if before == UNKNOWN:  # at the last look too: for example, the disk is full
                    self._say_once(f"refused   {name}: its files cannot be read or linked: {error}")
                self._stamps[name] = UNKNOWN
                continue
            if change:
                yield change

    def _follow(self, model: Path) -> ModelChange | None:
        """Links new intact versions of a model; without one, reports why and changes nothing."""
        if not made_here(model) and model.name not in self._shown:  # once checked, always checked
            self._link_unchecked(model)
            return ModelChange(model=model.name, action="load")
        choice, shown = choose_versions(model), self._shown.get(model.name)
        served = shown.versions[0] if shown else None
        older = served is not None and choice.versions[:1] < (served,) and (model / str(served)).is_dir()
        if (
            choice.config is None
            or older  # the served version was damaged on the disk, but in memory it is intact
            or shown == _Shown.of(choice, self._stamps[model.name])
        ):
            goes_on = f"version {served} keeps serving" if served else "it is not served"
            self._report(choice, f"{model.name}: {goes_on}")
            return None
        self._report(choice, f"{model.name}: version {choice.versions[0]} is served")
        self._show(model, choice)
        return ModelChange(model=model.name, action="load")

    def take_back(self, change: ModelChange, reason: str) -> None:
        """Undoes a change that Triton refused."""
        name, before = change.model, self._before
        self._say(f"refused   {name}: Triton cannot {change.action} it: {reason}")
        if name not in self._shown:  # it is linked unchecked
            return
        _remove(self.folder / name)
        del self._shown[name]
        if before is not None:
            (self.folder.parent / f"before-{name}").rename(self.folder / name)
            self._shown[name] = before
            self._say(f"          {name}: version {before.versions[0]} keeps serving")

    def _report(self, choice: VersionChoice, outcome: str) -> None:
        """Reports each finding once, and what is served as a result."""
        new = [line for line in map(str, choice.findings) if line not in self._said]
        self._said |= set(new)
        for line in new:
            self._say(f"refused   {line}")
        if new:
            self._say(f"          {outcome}")

    def _show(self, model: Path, choice: VersionChoice) -> None:
        """Builds the model's folder, then swaps it in; keeps the previous one for `take_back`."""
        assert choice.config is not None
        place, previous = self.folder / model.name, self.folder.parent / f"before-{model.name}"
        laid_out = self.folder.parent / f"next-{model.name}"
        _remove(laid_out)
        laid_out.mkdir()
        for path in model.iterdir():
            if path.name == CONFIG or path.name.startswith(SCRATCH):
                continue
            if not path.name.isdigit() or path.name in map(str, choice.versions):
                _mirror(path, laid_out / path.name)
        self._write_config(choice.config, laid_out / CONFIG)
        _remove(previous)
        if place.exists():
            place.rename(previous)
        laid_out.rename(place)
        self._before = self._shown.get(model.name)
        self._shown[model.name] = _Shown.of(choice, self._stamps[model.name])

    def _write_config(self, source: Path, target: Path) -> None:
        """Copies a configuration, without a queue delay.

        Before 26.08 a delay lets `InstanceQueue::Dequeue` join batches without counting their instances as free again.
        The batcher then waits for instances that are free (triton-inference-server/core pull request 509).
        """
        config = read_config(source)
        if not (delay_us := config.dynamic_batching.max_queue_delay_microseconds):
            shutil.copyfile(source, target)
            return
        config.dynamic_batching.ClearField("max_queue_delay_microseconds")
        target.write_text(text_format.MessageToString(config))
        line = (
            f"warning   {config.name}: max_queue_delay_us = {delay_us} is served as 0: with a delay, Triton before "
            "26.08 loses throughput (docs/triton.md)"
        )
        self._say_once(line)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def _link_unchecked(self, model: Path) -> None:
        self._hide(model.name)
        (self.folder / model.name).symlink_to(model.resolve())

    def _hide(self, name: str) -> bool:
        """Removes a model from the folder; False if it was not there."""
        self._shown.pop(name, None)
        self._before = None
        return _remove(self.folder / name)


def _mirror(source: Path, target: Path) -> None:
    """Copies a tree as links, which survive if the repository's owner removes the files.

    ONNX Runtime refuses external weights behind a link, so a folder with such a file is linked as a whole.
    """
    if any(source.glob("*.data")):
        target.symlink_to(source.resolve())
    elif source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", f"{SCRATCH}*")
        shutil.copytree(source, target, copy_function=_link, ignore=ignored)
    else:
        _link(str(source), str(target))


def _link(source: str, target: str) -> None:
    source = os.path.realpath(source)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        os.symlink(source, target)


def _remove(path: Path) -> bool:
    if path.is_symlink():
        path.unlink()
        return True
    if path.is_dir():
        shutil.rmtree(path)
        return True
    return False


def _is_gone(model: Path) -> bool:
    """Whether a model and its versions left the repository.

    False if that cannot be seen, as on a network disk that does not answer.
    """
    with suppress(OSError):
        try:
            (model / CONFIG).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return model.parent.is_dir() and not versions_of(model)
    return False


def _settled(model: Path, stamp: Stamp) -> bool:
    """Whether the publisher has finished; if not, the next look tries again."""
    time.sleep(_SETTLED_S)
    return _stamp(model) == stamp


def _stamp(model: Path) -> Stamp:
    found = []
    for path in everything_in(model):
        name = path.relative_to(model)
        if "__pycache__" not in name.parts and not name.parts[0].startswith(SCRATCH) and path.is_file():
            status = path.stat()
            found.append((str(name), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)

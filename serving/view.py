"""The part of a model repository that Triton is shown: checked versions under a configuration that fits them.

Contract: `ApprovedView` keeps a folder that Triton reads in place of the repository. A version gets in only with
nothing against it (`serving.repository`), by hard links where the file system allows and symbolic links elsewhere. What
was shown stays until something better is there. Models that `export.to_triton` did not make are shown as they are.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import GateFailed, InputError
from deepseek.spec.folders import SCRATCH
from deepseek.spec.repository import config_path, model_folders, versions_of
from serving.repository import (
    CONFIG,
    Finding,
    check_config,
    check_layout,
    check_version,
    everything_in,
    made_here,
    models_in,
    not_ours,
    publish_again,
    read_config,
    wanted_versions,
)

_SETTLED_S = 0.1  # a publisher's renames are less than this apart
Stamp = tuple[tuple[str, int, int, int], ...]  # path, inode, size and modification time of each file


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What of a model to show, and what was found against the rest."""

    config: Path | None = None
    """None: nothing of it can be shown."""
    versions: tuple[int, ...] = ()
    """Newest first."""
    warmup: frozenset[str] = frozenset()
    """Paths of the files that the configuration names."""
    findings: tuple[Finding, ...] = ()


def decide(model: Path) -> Decision:
    """The newest intact versions of a model that `export.to_triton` made, and the configuration that goes with them.

    Under a configuration that does not fit it a version counts as not intact.
    """
    versions = versions_of(model)
    findings: list[Finding] = []
    for number in versions:
        manifest, wrong = check_version(model, number)
        findings += wrong
        if manifest is None or wrong:
            continue
        path = config_path(model, number)
        config, wrong = _read(model, path)
        wrong = wrong or check_config(model, config, manifest)
        if wrong:
            findings += wrong
            continue
        others, more = _others(model, config, [version for version in versions if version <= number])
        samples = [entry for sample in config.model_warmup for entry in sample.inputs.values()]
        return Decision(
            config=path,
            versions=(number, *others),
            warmup=frozenset(f"warmup{os.sep}{entry.input_data_file}" for entry in samples),
            findings=(*findings, *more),
        )
    return Decision(findings=tuple(findings))


def _read(model: Path, path: Path) -> tuple[ModelConfig, list[Finding]]:
    try:
        return read_config(path), []
    except InputError as error:
        where = f"{model.name}/{path.relative_to(model)}"
        return ModelConfig(), [Finding(level="mismatch", where=where, what=str(error), fix=publish_again(model))]


def _others(model: Path, config: ModelConfig, versions: list[int]) -> tuple[list[int], list[Finding]]:
    """Those that the version policy serves beside the first of `versions`, if they are intact and fit, too."""
    good: list[int] = []
    findings: list[Finding] = []
    for version in wanted_versions(config, versions):
        if version == versions[0]:
            continue
        manifest, wrong = check_version(model, version)
        if manifest is not None and not wrong:
            wrong = check_config(model, config, manifest)
        findings += wrong
        if not wrong:
            good.append(version)
    return good, findings


@dataclass(frozen=True, kw_only=True)
class Change:
    """What Triton is to do about a model whose view has changed."""

    model: str
    action: Literal["load", "unload"]
    versions: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What of a model is in the view."""

    versions: tuple[int, ...]
    config: bytes
    files: Stamp

    @classmethod
    def of(cls, decision: Decision, stamp: Stamp) -> _Shown:
        """What a decision shows of a model whose files have the stamp."""
        assert decision.config is not None
        shown = {*map(str, decision.versions)}

        def counts(path: str) -> bool:
            """Other versions and their warm-up files come and go, and what serves does not change."""
            folder = path.split(os.sep)[0]
            if folder == "warmup":
                return path in decision.warmup
            return folder in shown if folder.isdigit() else path != CONFIG

        files = tuple(each for each in stamp if counts(each[0]))
        return cls(versions=decision.versions, config=decision.config.read_bytes(), files=files)


class ApprovedView:
    """Shows the good part of `repository` in `folder`; each new finding goes to `say`, in one line."""

    def __init__(self, repository: Path, folder: Path, say: Callable[[str], None]) -> None:
        self.repository = repository
        self.folder = folder
        self._say = say
        self._said: set[str] = set()
        self._stamps: dict[str, Stamp] = {}
        self._shown: dict[str, _Shown] = {}
        self._before: _Shown | None = None  # what the last change replaced

    def fill(self) -> None:
        """Shows all models; raises GateFailed with every reason where one has no version that can be served."""
        self.folder.mkdir()
        refused: list[Finding] = []
        for model in models_in(self.repository):
            self._stamps[model.name] = _stamp(model)
            if not made_here(model):
                self._show_as_it_is(model)
                continue
            decision = decide(model)
            if decision.config is None:
                refused += decision.findings
            else:
                self._show(model, decision)
                self._tell(decision, f"{model.name}: version {decision.versions[0]} is served")
        if refused:
            raise GateFailed("; ".join(map(str, refused)))

    @property
    def notes(self) -> list[Finding]:
        """A line for each model that is shown as it is, and for each folder that is no model."""
        shown = [not_ours(self.repository / path.name) for path in sorted(self.folder.iterdir()) if path.is_symlink()]
        strays = check_layout(self.repository)
        left_out = f"left out: no {CONFIG}"
        return shown + [
            each if each.level == "warning" else Finding(level="warning", where=each.where, what=left_out)
            for each in strays
        ]

    def changes(self) -> Iterator[Change]:
        """Follows the repository; after each change that it yields, the view is what Triton is to read."""
        models = {path.name: path for path in model_folders(self.repository)}
        for name in self._stamps.keys() - models.keys():
            del self._stamps[name]
            if self._hide(name):
                yield Change(model=name, action="unload")
        for name, model in models.items():
            try:
                stamp = _stamp(model)
                if stamp == self._stamps.get(name) or not _settled(model, stamp):
                    continue
                self._stamps[name] = stamp
                change = self._follow(model)
            except OSError:  # it changed while it was looked at
                self._stamps.pop(name, None)
                continue
            if change:
                yield change

    def _follow(self, model: Path) -> Change | None:
        """Shows what is new and good in a model; else says why not, and leaves what is shown."""
        if not made_here(model) and model.name not in self._shown:  # what was checked once is not let in unchecked
            self._show_as_it_is(model)
            return Change(model=model.name, action="load")
        decision, shown = decide(model), self._shown.get(model.name)
        served = shown.versions[0] if shown else None
        older = served is not None and decision.versions[:1] < (served,) and (model / str(served)).is_dir()
        if (
            decision.config is None
            or older  # the one that is served was damaged where it lies: in memory it is whole
            or shown == _Shown.of(decision, self._stamps[model.name])
        ):
            goes_on = f"version {served} goes on serving" if served else "it is not served"
            self._tell(decision, f"{model.name}: {goes_on}")
            return None
        self._tell(decision, f"{model.name}: version {decision.versions[0]} is served")
        self._show(model, decision)
        return Change(model=model.name, action="load", versions=decision.versions)

    def take_back(self, change: Change, reason: str) -> None:
        """Triton did not load what was shown: the view is again what it was before."""
        name, before = change.model, self._before
        self._say(f"refused   {name}: Triton does not {change.action} it: {reason}")
        if name not in self._shown:  # it is shown as it is
            return
        _remove(self.folder / name)
        del self._shown[name]
        if before is not None:
            (self.folder.parent / f"before-{name}").rename(self.folder / name)
            self._shown[name] = before
            self._say(f"          {name}: version {before.versions[0]} goes on serving")

    def _tell(self, decision: Decision, outcome: str) -> None:
        """Each finding once, and what came of them."""
        new = [line for line in map(str, decision.findings) if line not in self._said]
        self._said |= set(new)
        for line in new:
            self._say(f"refused   {line}")
        if new:
            self._say(f"          {outcome}")

    def _show(self, model: Path, decision: Decision) -> None:
        """Lays the model out beside its place and swaps it in; what was there is kept for `take_back`."""
        assert decision.config is not None
        place, previous = self.folder / model.name, self.folder.parent / f"before-{model.name}"
        laid_out = self.folder.parent / f"next-{model.name}"
        _remove(laid_out)
        laid_out.mkdir()
        for path in model.iterdir():
            if path.name == CONFIG or path.name.startswith(SCRATCH):
                continue
            if not path.name.isdigit() or path.name in map(str, decision.versions):
                _mirror(path, laid_out / path.name)
        shutil.copyfile(decision.config, laid_out / CONFIG)
        _remove(previous)
        if place.exists():
            place.rename(previous)
        laid_out.rename(place)
        self._before = self._shown.get(model.name)
        self._shown[model.name] = _Shown.of(decision, self._stamps[model.name])

    def _show_as_it_is(self, model: Path) -> None:
        self._hide(model.name)
        (self.folder / model.name).symlink_to(model.resolve())

    def _hide(self, name: str) -> bool:
        """Whether there was something to hide."""
        self._shown.pop(name, None)
        self._before = None
        return _remove(self.folder / name)


def _mirror(source: Path, target: Path) -> None:
    """The same tree over the same files. A link outlives what the repository's owner removes.

    ONNX Runtime reads weights of a file of their own only where they are no link: such a folder is one link.
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


def _settled(model: Path, stamp: Stamp) -> bool:
    """Whether nobody is changing a model's files any more; else the next look will see."""
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

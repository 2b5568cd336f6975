"""The current inputs of a stage, by name, and the cache key that follows from them.

Contract: `StageInputs.of` maps each input that `export.pipeline` declares to its value or digest; `key_of` digests them
all.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek.spec import DeploymentSpec, build_dir
from export.dependencies.digests import RememberedDigests
from export.dependencies.requirements import requirements_in
from export.dependencies.sources import ROOT, InstalledVersions, Sources, files_in
from export.pipeline import Stage
from export.plan import Plan

ABSENT = "-"


class StageInputs:
    """The current inputs of stages, by name; each file is digested once."""

    def __init__(self, plan: Plan, digests: RememberedDigests) -> None:
        self._plan, self._digests = plan, digests
        self._sources, self._versions = Sources(digests, plan.folder), InstalledVersions()
        self.foreseen: dict[Path, str] = {}
        """Digests of files that earlier stages would write."""
        untuned = DeploymentSpec.load(plan.folder, tuned="/dev/null")
        self._deploy = untuned.model_dump(mode="json")
        self._tuned = plan.spec.for_target(plan.target).model_dump(mode="json")

    def of(self, stage: Stage) -> dict[str, str]:
        """Each input of a stage by its name, with its value or digest."""
        found = dict(stage.settings)  # the first that changed is the reason: a key before the files that follow from it
        for key in stage.keys:
            value = _value_at(self._tuned if stage.tuned else self._deploy, key)
            found[f"deploy.toml {key}"] = json.dumps(value, sort_keys=True)
        for path in stage.reads:
            found |= self.files(path)
        code = self._sources.of_module(stage.module, stage.leaves_out)
        files, packages, needed = dict(code.files), set(code.packages), set(stage.packages)
        if stage.runs_model:
            imported = self._sources.of_model(("deepseek.spec",) if stage.leaves_out else ())
            files |= imported.files | self._model_folder()
            packages |= imported.packages
            needed |= {requirement.name for _, requirement in requirements_in(self._plan.folder)}
            found |= self._data()
        found |= {name: self._digest(path) for name, path in files.items()}
        if not (stage.on_compiler and self._plan.compiler in ("container", "inside")):
            found |= {f"package {name}": version for name, version in self._versions.of(packages, needed).items()}
        return found

    def files(self, path: Path) -> dict[str, str]:
        """Digests of a file and of files that extend its name by a dot, such as external weights."""
        near = {path, *path.parent.glob(f"{path.name}.*"), *(p for p in self.foreseen if str(p).startswith(f"{path}."))}
        return {named(each): self._digest(each) for each in sorted(near)}

    def _data(self) -> dict[str, str]:
        """The file that DATA names, or each file of the folder."""
        if not self._plan.data:
            return {"DATA": ABSENT}
        data = Path(self._plan.data)
        if data.is_dir():
            return {"DATA": "a folder"} | {f"DATA/{name}": self._digest(path) for name, path in files_in(data).items()}
        return {"DATA": self._digest(data) if data.exists() else "no file"}  # not ABSENT: model.py then refuses it

    def _model_folder(self) -> dict[str, Path]:
        skipped = {"deploy.toml", self._plan.spec.tuned}
        found = {name: path for name, path in files_in(self._plan.folder).items() if name not in skipped}
        return {f"models/{self._plan.model}/{name}": path for name, path in found.items()}

    def _digest(self, path: Path) -> str:
        return self.foreseen.get(path) or self._digests.of(path) or ABSENT


def named(path: Path) -> str:
    """A file's display name, the same in each clone: relative to the build folder or this repository."""
    for root in (build_dir(""), ROOT):
        if path.is_relative_to(root):
            return str(path.relative_to(root))
    return str(path)


def _value_at(table: Mapping[str, Any], key: str) -> Any:
    """The value of a dotted key; None without it, and for an empty table, which says as little."""
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return None if value == {} else value


def key_of(name: str, inputs: Mapping[str, str]) -> str:
    """Cache key of a stage's output: a digest of the stage's name and inputs."""
    return hashlib.sha256(json.dumps([name, inputs], sort_keys=True).encode()).hexdigest()

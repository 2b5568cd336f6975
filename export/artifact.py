"""Paths of build artifacts, atomic writes, and the manifest beside each artifact.

Contract: `build/<name>/<precision>/model.onnx` and `build/<name>/<precision>/<target>/model.plan`, each
with its `manifest.json`; `build/<name>/{calibration,evaluation}.npz` hold real inputs, one row per sample.
Files are written to a scratch folder and renamed into place: a killed build leaves no partial file.
"""

import contextlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from deepseek.spec import (
    DeploymentSpec,
    FileDigest,
    InputError,
    Manifest,
    Precision,
    Target,
    build_dir,
    flags_for,
    variables_for,
)
from deepseek.spec.files.folders import scratch_in
from deepseek.targets import TARGETS

# Packages whose version can change an artifact.
_TOOLS = (
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "nvidia-modelopt",
    "tensorrt",
    "tensorrt-rtx",
)


LAST = "last build"  # the record's entry for the options of the last build


def record_path(name: str) -> Path:
    """Path of the inputs and outputs of each stage, and the options of the last build."""
    return build_dir(name) / "pipeline.json"


def last_options(name: str) -> dict[str, str]:
    """DATA and PRUNE of the last build, by field of `Plan`; empty before the first."""
    with contextlib.suppress(OSError, ValueError):
        options: dict[str, str] = json.loads(record_path(name).read_text()).get(LAST, {}).get("options", {})
        return options
    return {}


def onnx_path(name: str, precision: str) -> Path:
    return build_dir(name) / precision / "model.onnx"


def engine_path(name: str, precision: str, target: Target) -> Path:
    """Path of the file that the target runs: the graph for ONNX Runtime, otherwise the compiled engine."""
    if TARGETS[target].is_graph:
        return onnx_path(name, precision)
    return build_dir(name) / precision / target / TARGETS[target].engine


def choice_path(name: str, target: Target) -> Path:
    """Path of the measurements and the choice of `export.stages.select_precision`."""
    return build_dir(name) / f"choice-{target}.json"


def weights_path(name: str) -> Path:
    """Path of the weights' digest and model.py's fingerprint, written by `export.stages.train`."""
    return build_dir(name) / "weights-digest.json"


def rows_path(name: str, split: str) -> Path:
    """Path of the real inputs; `split` is calibration or evaluation."""
    return build_dir(name) / f"{split}.npz"


def pruned_path(name: str) -> Path:
    """Path of the pruned module; without this file, stages use the unpruned one."""
    return build_dir(name) / "pruned.safetensors"


def pruning_path(name: str) -> Path:
    """Path of the pruning report: what was removed, and what accuracy that cost."""
    return build_dir(name) / "pruning.json"


def pruning_of(name: str) -> dict[str, Any]:
    """Contents of pruning.json; an empty dict if the module is not pruned."""
    if not pruned_path(name).is_file():
        return {}
    path = need(pruning_path(name), f"deepseek prune {flags_for(name)}")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); re-run: deepseek prune {flags_for(name)}") from None
    return found


def pruned_settings(name: str) -> dict[str, Any]:
    """The manifest settings that record pruning."""
    pruning = pruning_of(name)
    return {"pruned": pruning["ratio"]} if pruning else {}


def choice_of(name: str, target: Target) -> tuple[Precision, str | None]:
    """The precision that `export.stages.select_precision` chose, and the execution provider that it measured.

    Raises InputError if the engine has changed since.
    """
    again = f"deepseek select-precision {flags_for(name)} --target {target}"
    path = need(choice_path(name, target), again)
    choice = json.loads(path.read_text())
    precision, digests = choice["chosen"], choice["sha256"]
    engine = engine_path(name, precision, target)
    if engine.is_file() and digests[precision] != sha256(engine):
        raise InputError(f"{engine} has changed since {path} chose it; re-run: {again}")
    return precision, choice.get("provider")


def need(path: Path, made_by: str) -> Path:
    """`path`; raises InputError naming the command that makes it if the file is missing."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with: {made_by}")
    return path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A scratch path to write to; if the block succeeds, the file atomically replaces `path`."""
    with scratch_in(path.parent) as scratch:
        yield scratch / path.name
        os.replace(scratch / path.name, path)


def publish(files: Path, artifact: Path) -> None:
    """Moves all files of the folder `files` beside `artifact`, the artifact last.

    Removes files beside an earlier artifact (external weights) that this one does not have.
    """
    for stale in artifact.parent.glob(f"{artifact.name}.*"):
        if not (files / stale.name).exists():
            stale.unlink()
    for path in sorted(files.iterdir(), key=lambda path: (path.name == artifact.name, path.name)):
        os.replace(path, artifact.parent / path.name)


def refuse(artifact: Path, reason: str) -> None:
    """Records that an artifact cannot be made: an empty file in its place, the reason in refused.txt.

    For one of several candidate precisions: later stages read the refusal and continue with the others.
    """
    with scratch_in(artifact.parent) as scratch:
        (scratch / "refused.txt").write_text(reason)
        (scratch / artifact.name).touch()
        publish(scratch, artifact)


def refusal(artifact: Path) -> str | None:
    """The reason that `refuse` recorded; None if the artifact was made."""
    reason = artifact.parent / "refused.txt"
    refused = artifact.is_file() and artifact.stat().st_size == 0 and reason.is_file()
    return reason.read_text() if refused else None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest atomically; if it has no digests yet, adds those of the files beside it."""
    if not manifest.files:
        manifest = manifest.model_copy(update={"files": digests(path.parent)})
    with staged(path) as file:
        file.write_text(manifest.model_dump_json(indent=2) + "\n")


def digests(folder: Path) -> dict[str, FileDigest]:
    """Digests of the files in a folder, by name, without the manifest itself."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
    return {path.name: FileDigest.of(path) for path in files}


def read_manifest(artifact: Path) -> Manifest:
    """The manifest beside an artifact; raises InputError if it is missing or broken."""
    name = artifact.relative_to(build_dir("")).parts[0]
    path = need(artifact.parent / "manifest.json", f"make engine {variables_for(name)}")
    try:
        return Manifest.load(path)
    except InputError as error:
        raise InputError(f"{error}; build it again: make clean engine {variables_for(name)}") from None


def sha256(path: Path) -> str:
    return FileDigest.of(path).sha256


def tool_versions() -> dict[str, str]:
    """Installed versions of the packages that make artifacts, and the container's release inside one."""
    versions = {}
    for tool in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    if tag := os.environ.get("DEEPSEEK_INSIDE_TAG"):  # docker/export.Dockerfile sets it
        versions["triton_tag"] = tag
    return versions


def record_build(
    artifact: Path,
    spec: DeploymentSpec,
    precision: Precision,
    clock: "Stopwatch",
    *,
    settings: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    **facts: Any,
) -> None:
    """Writes the manifest beside a new artifact; `facts` are further fields of `Manifest`."""
    manifest = Manifest(
        model=spec.name,
        precision=precision,
        settings={**(settings or {}), **pruned_settings(spec.name)},
        axes=axes_of(spec),
        versions={**tool_versions(), **(versions or {})},
        size_bytes=sum(file.stat().st_size for file in artifact.parent.glob(f"{artifact.name}*")),
        build_s=clock.elapsed_s,
        **facts,
    )
    write_manifest(artifact.with_name("manifest.json"), manifest)


def axes_of(spec: DeploymentSpec) -> dict[str, dict[str, int]]:
    """The profile as a manifest stores it: min, opt and max of each axis."""
    return {name: axis.model_dump() for name, axis in spec.axes.items()}


class Stopwatch:
    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds, rounded to milliseconds."""
        return round(time.monotonic() - self._start, 3)


def json_text(result: dict[str, Any]) -> str:
    """Strict JSON: NaN and infinities become null."""
    return to_json(result, indent=2, inf_nan_mode="null").decode()


def human_bytes(value_bytes: float) -> str:
    """A size in bytes as text, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if value_bytes < 1024:
            return f"{value_bytes:.0f} {unit}" if unit == "B" else f"{value_bytes:.1f} {unit}"
        value_bytes /= 1024
    return f"{value_bytes:.2f} GiB"

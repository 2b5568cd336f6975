"""Where artifacts lie, how they are written, and what the manifest beside each one says.

Contract: `build/<name>/<precision>/model.onnx` and `build/<name>/<precision>/<target>/model.plan`, each
with its `manifest.json`; `build/<name>/{calibration,evaluation}.npz` hold real inputs, one row a sample.
Everything is written beside its place and renamed: a killed build leaves no half file.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deepseek.spec import DeploymentSpec, FileDigest, InputError, Manifest, Target, build_dir, flags_for, variables_for
from deepseek.spec.folders import scratch_in

Row = dict[str, np.ndarray]  # one sample: each input with a batch dimension of 1

EXTERNAL_DATA_BYTES = 1 << 30  # of weights: past this they lie in a file of their own
# Distributions whose version can change what an artifact holds.
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


def onnx_path(name: str, precision: str) -> Path:
    """Where the graph of a precision lies."""
    return build_dir(name) / precision / "model.onnx"


def engine_path(name: str, precision: str, target: Target) -> Path:
    """What the target runs: the graph itself for ONNX Runtime, else the compiled engine."""
    if target == "onnxruntime":
        return onnx_path(name, precision)
    return build_dir(name) / precision / target / ("model.pt" if target == "torchscript" else "model.plan")


def choice_path(name: str, target: Target) -> Path:
    """Where `export.compare` writes what it measured and chose."""
    return build_dir(name) / f"choice-{target}.json"


def pruned_path(name: str) -> Path:
    """The pruned module of `export.prune`; where there is none, stages work from the unpruned one."""
    return build_dir(name) / "pruned.safetensors"


def pruning_path(name: str) -> Path:
    """What pruning took and cost."""
    return build_dir(name) / "pruning.json"


def pruning_of(name: str) -> dict[str, Any]:
    """What pruning.json says where the module is pruned, else an empty dict."""
    if not pruned_path(name).is_file():
        return {}
    path = need(pruning_path(name), f"python -m export.prune {flags_for(name)}")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON ({error}); make it anew: python -m export.prune {flags_for(name)}"
        ) from None
    return found


def pruned_settings(name: str) -> dict[str, Any]:
    """What a manifest says of pruning, among its settings."""
    pruning = pruning_of(name)
    return {"pruned": pruning["ratio"]} if pruning else {}


def need(path: Path, made_by: str) -> Path:
    """`path`, or InputError that says which stage makes it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; make it with: {made_by}")
    return path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A path to write a file at; it takes the place of `path` when the block ends well."""
    with scratch_in(path.parent) as scratch:
        yield scratch / path.name
        os.replace(scratch / path.name, path)


def publish(files: Path, artifact: Path) -> None:
    """Moves all of the folder `files` beside `artifact`, which comes last: what Make waits for.

    What an earlier artifact had beside it (external weights) and this one has not goes.
    """
    for stale in artifact.parent.glob(f"{artifact.name}.*"):
        if not (files / stale.name).exists():
            stale.unlink()
    for path in sorted(files.iterdir(), key=lambda path: (path.name == artifact.name, path.name)):
        os.replace(path, artifact.parent / path.name)
    os.utime(artifact)  # newer than the rest, whenever it was written


def refuse(artifact: Path, reason: str) -> None:
    """Leaves word that an artifact cannot be made: an empty file in its place, the reason beside it.

    For one precision among several: what follows takes it as a result, and goes on with the others.
    """
    with scratch_in(artifact.parent) as scratch:
        (scratch / "refused.txt").write_text(reason)
        (scratch / artifact.name).touch()
        publish(scratch, artifact)


def refusal(artifact: Path) -> str | None:
    """Why an artifact could not be made; None where it was."""
    refused = artifact.is_file() and artifact.stat().st_size == 0
    return (artifact.parent / "refused.txt").read_text() if refused else None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes a manifest, atomically; one that is new gets the digests of the files beside it."""
    if not manifest.files:
        manifest = manifest.model_copy(update={"files": digests(path.parent)})
    with staged(path) as file:
        file.write_text(manifest.model_dump_json(indent=2) + "\n")


def digests(folder: Path) -> dict[str, FileDigest]:
    """What the files in a folder hold, by name; the manifest itself is left out."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != "manifest.json")
    return {path.name: FileDigest.of(path) for path in files}


def read_manifest(artifact: Path) -> Manifest:
    """The manifest beside an artifact; raises InputError where there is none or it is broken."""
    name = artifact.relative_to(build_dir("")).parts[0]
    path = need(artifact.parent / "manifest.json", f"make engine {variables_for(name)}")
    try:
        return Manifest.load(path)
    except InputError as error:
        raise InputError(f"{error}; build it again: make clean engine {variables_for(name)}") from None


def sha256(path: Path) -> str:
    """Digest of a file's content."""
    return FileDigest.of(path).sha256


def tool_versions() -> dict[str, str]:
    """Installed versions of the tools that make artifacts; the container's release where they run in one."""
    versions = {}
    for tool in _TOOLS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[tool] = importlib.metadata.version(tool)
    if tag := os.environ.get("DEEPSEEK_TRITON_TAG"):  # docker/export.Dockerfile sets it
        versions["triton_tag"] = tag
    return versions


def axes_of(spec: DeploymentSpec) -> dict[str, dict[str, int]]:
    """The profile as a manifest keeps it."""
    return {name: axis.model_dump() for name, axis in spec.axes.items()}


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Rounded to milliseconds."""
        return round(time.monotonic() - self._start, 3)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of a tensor's values, wherever they are stored."""
    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph; past what one protobuf can hold (2 GiB), with its weights in `<name>.data` beside it."""
    large = sum(map(tensor_bytes, model.graph.initializer)) > EXTERNAL_DATA_BYTES
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would write behind what is there
    onnx.save(model, path, save_as_external_data=large, location=data.name if large else None)
    if large:
        data.chmod(path.stat().st_mode)  # onnx writes it for its owner only
        onnx.load_external_data_for_model(model, str(path.parent))  # onnx took the weights out of `model`


def save_rows(path: Path, rows: Iterable[Row]) -> int:
    """Writes rows as `<row>/<input>` arrays; returns how many."""
    arrays = {f"{row:05d}/{name}": array for row, sample in enumerate(rows) for name, array in sample.items()}
    with staged(path) as file, file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return len({key.split("/")[0] for key in arrays})


def save_arrays(path: Path, arrays: Row) -> None:
    """An .npz of arrays by name; numpy.savez takes the names `file` and `allow_pickle` for its own."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def load_rows(path: Path) -> list[Row]:
    """What `save_rows` wrote."""
    rows: dict[str, Row] = {}
    with np.load(need(path, f"python -m export.to_onnx {flags_for(path.parent.name)}")) as arrays:
        for key in arrays.files:
            row, name = key.split("/", 1)
            rows.setdefault(row, {})[name] = arrays[key]
    return list(rows.values())


def batches(rows: Iterable[Row], size: int) -> Iterator[tuple[list[int], Row]]:
    """Rows of equal shapes put together, at most `size` at a time, with their places."""
    groups: dict[tuple, list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(tuple(array.shape for array in row.values()), []).append((place, row))
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield [place for place, _ in part], join([row for _, row in part])


def join(rows: list[Row]) -> Row:
    """One batch out of rows of equal shapes."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def filled(inputs: Row, least: int) -> Row:
    """A batch of at least `least` rows, the last one repeated: a profile may allow no fewer."""
    missing = max(0, least - len(next(iter(inputs.values()))))
    return {name: np.concatenate([array, *[array[-1:]] * missing]) for name, array in inputs.items()}


def json_text(result: dict[str, Any]) -> str:
    """JSON that every reader takes: null for a number that is none."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=2, allow_nan=False)


def human_bytes(value_bytes: float) -> str:
    """Bytes for people, in binary units."""
    for unit in ("B", "KiB", "MiB"):
        if value_bytes < 1024:
            return f"{value_bytes:.0f} {unit}" if unit == "B" else f"{value_bytes:.1f} {unit}"
        value_bytes /= 1024
    return f"{value_bytes:.2f} GiB"


def row_digests(rows: Iterable[Mapping[str, np.ndarray]]) -> list[bytes]:
    """One digest a row, of names, types, shapes and values, to find rows that two sets share."""
    return [row_digest(row) for row in rows]


def row_digest(row: Mapping[str, np.ndarray]) -> bytes:
    """Of one."""
    digest = hashlib.sha256()
    for name, array in sorted(row.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.digest()

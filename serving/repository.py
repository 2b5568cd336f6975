"""What is wrong with a model repository, told from its files alone: manifests, digests, `config.pbtxt`, the layout.

Contract: each finding is one line with one fix, and nothing is changed. The doctor, the container's preflight and the
embedded server all judge by these functions. A model without any `manifest.json` was not made by `export.to_triton`:
that is said, and Triton decides about it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelQueuePolicy

from deepseek.spec import BATCH, TRITON_DTYPES, FileDigest, InputError, PublishedManifest, TensorSpec
from deepseek.spec.folders import SCRATCH
from deepseek.spec.repository import CONFIG, config_path, model_folders, versions_of

MANIFEST = "manifest.json"
# Triton's backends by our target, the usual one first.
BACKENDS = {"onnxruntime": ("python", "onnxruntime"), "tensorrt": ("tensorrt",), "torchscript": ("pytorch",)}
# Bytes of a value by Triton's type.
BYTES = {f"TYPE_{triton}": np.dtype(dtype).itemsize for dtype, triton in TRITON_DTYPES.items()}
_TENSORRT, _TENSORRT_RTX = b"ptrt", b"vtrt"  # the first bytes of a plan

Level = Literal["info", "warning", "mismatch"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line: where, what is wrong with the value seen, and what to do about it."""

    level: Level
    where: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"; {self.fix}" if self.fix else "")


def everything_in(model: Path) -> Iterator[Path]:
    """Files and folders below a model's, in order; a version may be a link to a folder."""
    for each in sorted(model.iterdir()) if model.is_dir() else ():
        yield each
        if each.is_dir():
            yield from sorted(each.rglob("*"))


def models_in(repository: Path) -> list[Path]:
    """Folders of the models; raises InputError where the repository has none."""
    found = model_folders(repository)
    if not found:
        raise InputError(f"{repository}: no model in it (no */{CONFIG}); make one with: make engine")
    return found


def made_here(model: Path) -> bool:
    """Whether `export.to_triton` made the model: a version has a manifest, or a configuration beside the engine."""
    files = (model / str(version) / name for version in versions_of(model) for name in (MANIFEST, CONFIG))
    return any(file.is_file() for file in files)


def publish_again(model: Path) -> str:
    """The fix of whatever is wrong with a version."""
    return f"publish it again: python -m export.to_triton --model {model.name} --repository {model.parent}"


def read_config(path: Path) -> ModelConfig:
    """A `config.pbtxt`; raises InputError with the place and the reason where it cannot be parsed."""
    try:
        return text_format.Parse(path.read_text(), ModelConfig())
    except (OSError, UnicodeDecodeError, text_format.ParseError) as error:
        raise InputError(f"cannot be read: {' '.join(str(error).split())}") from None


def check_layout(repository: Path) -> list[Finding]:
    """Folders that are no models: without automatic completion Triton fails to start over each of them."""
    found = []
    for path in sorted(repository.iterdir()):
        level: Level = "mismatch"
        what = f"a folder without {CONFIG} in {repository}, over which Triton does not start"
        fix = f"move it elsewhere: mv '{path}' '{repository.parent}'"
        if path.name.startswith(SCRATCH):
            level, fix = "warning", f"if nothing publishes: rm -r '{path}'"
            what = f"a version in {repository} that is being published, or whose publisher was killed; it is not served"
        elif (path / CONFIG).is_file():
            continue
        if path.is_dir():
            found.append(Finding(level=level, where=path.name, what=what, fix=fix))
    return found


def config_of(model: Path, version: int | None = None) -> ModelConfig:
    """The configuration of a version (default: the newest); raises InputError with the file and the reason."""
    version = next(iter(versions_of(model)), None) if version is None else version
    path = model / CONFIG if version is None else config_path(model, version)
    try:
        return read_config(path)
    except InputError as error:
        raise InputError(f"{path} {error}") from None


def wanted_versions(config: ModelConfig, versions: list[int]) -> list[int]:
    """Those of `versions` (newest first) that the version policy serves."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return versions
    if choice == "specific":
        return [version for version in versions if version in policy.specific.versions]
    return versions[: max(1, policy.latest.num_versions)]


def served_manifests(model: Path) -> list[PublishedManifest]:
    """Those of the versions that are served; raises InputError for a file that cannot be read."""
    places = (model / str(version) / MANIFEST for version in wanted_versions(config_of(model), versions_of(model)))
    return [PublishedManifest.load(place) for place in places if place.is_file()]


def check_version(model: Path, version: int) -> tuple[PublishedManifest | None, list[Finding]]:
    """The manifest of a version and what is wrong with its files; the digests are computed over all of them."""
    folder, where = model / str(version), f"{model.name}/{version}"

    def mismatch(what: str, fix: str = publish_again(model)) -> Finding:
        return Finding(level="mismatch", where=where, what=what, fix=fix)

    if not (folder / MANIFEST).is_file():
        return None, [mismatch(f"{MANIFEST} is missing")]
    try:
        manifest = PublishedManifest.load(folder / MANIFEST)
    except (InputError, OSError) as error:
        return None, [mismatch(str(error).removeprefix(f"{folder}/"))]
    try:
        findings = [mismatch(what, fix or publish_again(model)) for what, fix in _file_errors(folder, manifest)]
    except PermissionError as error:
        return manifest, [mismatch(f"{error.filename} cannot be read: {error.strerror}", "make it readable")]
    if manifest.model != model.name:
        findings.append(mismatch(f"is an engine of {manifest.model!r}", f"move it to {model.parent / manifest.model}"))
    if not findings and (reason := _plan_error(folder, manifest)):
        findings.append(mismatch(reason))
    return manifest, findings


def _file_errors(folder: Path, manifest: PublishedManifest) -> Iterator[tuple[str, str]]:
    """What differs from the manifest and, where it is not to publish again, the fix."""
    for name, recorded in manifest.files.items():
        path = folder / name
        if not path.is_file():
            other = _same_file(folder, recorded, manifest)
            fix = f"rename it: mv '{other}' '{path}'" if other else ""
            yield f"{name} is missing" + (f", {other.name} has its content" if other else ""), fix
            continue
        size = path.stat().st_size
        if size != recorded.size_bytes:
            kind = "truncated" if size < recorded.size_bytes else "longer than it was"
            yield f"{name} is {kind}: {size} bytes, {recorded.size_bytes} were published", ""
        elif (found := FileDigest.of(path)) != recorded:
            yield f"{name} is damaged: sha256 {found.sha256[:12]}…, {recorded.sha256[:12]}… was published", ""


def _same_file(folder: Path, recorded: FileDigest, manifest: PublishedManifest) -> Path | None:
    """A file of another name with the content that was recorded."""
    others = (path for path in sorted(folder.iterdir()) if path.is_file() and path.name not in manifest.files)
    return next((path for path in others if FileDigest.of(path) == recorded), None)


def _plan_error(folder: Path, manifest: PublishedManifest) -> str | None:
    """Why `model.plan` is not what the manifest says, from its first 28 bytes: kind, length, TensorRT version."""
    path = folder / "model.plan"
    if manifest.target == "tensorrt_rtx":
        return "is an engine of TensorRT for RTX, which Triton cannot load"
    if manifest.target != "tensorrt" or not path.is_file():
        return None if manifest.target != "tensorrt" else "has no model.plan, and its target is tensorrt"
    header = plan_header(path)
    if header is None:
        return "model.plan is not a TensorRT plan"
    kind, length, version = header
    built_with = manifest.versions.get("tensorrt", "")
    if kind == "tensorrt_rtx":
        return f"model.plan is an engine of TensorRT for RTX {version}, which Triton cannot load"
    if length > path.stat().st_size:
        return f"model.plan is truncated: {path.stat().st_size} bytes, its header says {length}"
    if built_with and version.split(".")[:3] != built_with.split(".")[:3]:
        return f"model.plan was built by TensorRT {version}, its manifest says {built_with}"
    return None


def plan_header(path: Path) -> tuple[str, int, str] | None:
    """Kind, length in bytes and TensorRT version of a plan; None where the file is no plan.

    The version stands where trtexec's --getPlanVersionOnly reads it, at byte 24, in four bytes. The length, at byte 16,
    was found by looking at plans of TensorRT for RTX 1.7.
    """
    with path.open("rb") as file:
        head = file.read(28)
    if len(head) < 28 or head[:4] not in (_TENSORRT, _TENSORRT_RTX):
        return None
    (length,) = struct.unpack_from("<Q", head, 16)
    return ("tensorrt" if head[:4] == _TENSORRT else "tensorrt_rtx"), length, ".".join(map(str, head[24:28]))


def check_config(model: Path, config: ModelConfig, manifest: PublishedManifest) -> list[Finding]:
    """Where `config.pbtxt` asks for what the engine was not built for, or leaves its queue open."""
    lines = [
        *_naming(model, config, manifest),
        *_batching(config, manifest),
        *_queue(config),
        *_tensors("input", config, manifest),
        *_tensors("output", config, manifest),
        *_warmup(model, config),
    ]
    return [Finding(level="mismatch", where=f"{model.name}/{CONFIG}", what=what, fix=fix) for what, fix in lines]


def _naming(model: Path, config: ModelConfig, manifest: PublishedManifest) -> Iterator[tuple[str, str]]:
    if config.name not in ("", model.name):
        yield f"name is {config.name!r} in a folder {model.name!r}", f'set name: "{model.name}"'
    backends = BACKENDS.get(manifest.target, ())
    seen = config.backend or config.platform.partition("_")[0] or "none"  # platform: tensorrt_plan, pytorch_libtorch
    if backends and seen not in backends:
        yield f"backend is {seen!r}, the engine's target is {manifest.target}", f'set backend: "{backends[0]}"'
    file = config.default_model_filename
    if file and file not in manifest.files:
        names = ", ".join(sorted(manifest.files))
        yield f"default_model_filename is {file!r}, the version has {names}", "name one of them"


def _batching(config: ModelConfig, manifest: PublishedManifest) -> Iterator[tuple[str, str]]:
    largest = manifest.axes[BATCH]["max"]
    if config.max_batch_size > largest:
        yield (
            f"max_batch_size {config.max_batch_size} is above the profile's largest batch, {largest}",
            f"set max_batch_size: {largest}, or build with axes.batch.max = {config.max_batch_size}",
        )
    elif config.max_batch_size == 0:
        yield "max_batch_size 0 turns batching off", f"set max_batch_size: {largest}"
    elif largest > 1 and not config.WhichOneof("scheduling_choice"):
        yield "dynamic batching is off: every request runs alone", "add a dynamic_batching block"


def _queue(config: ModelConfig) -> Iterator[tuple[str, str]]:
    if not config.HasField("dynamic_batching"):
        return
    block = "dynamic_batching.default_queue_policy"
    policy = config.dynamic_batching.default_queue_policy
    if policy.max_queue_size == 0:
        yield "the queue is unbounded: an overload becomes waiting for all", f"set {block}.max_queue_size, e.g. 512"
    if policy.default_timeout_microseconds == 0:
        fix = f"set {block}.default_timeout_microseconds, e.g. 200000"
        yield "requests wait in the queue without a time-out", fix
    if policy.timeout_action == ModelQueuePolicy.DELAY:
        yield "timed-out requests are delayed, not refused", f"set {block}.timeout_action: REJECT"


def _tensors(
    kind: Literal["input", "output"], config: ModelConfig, manifest: PublishedManifest
) -> Iterator[tuple[str, str]]:
    built = manifest.inputs if kind == "input" else manifest.outputs
    configured = {entry.name: entry for entry in (config.input if kind == "input" else config.output)}
    for name in sorted(configured.keys() - built.keys()):
        yield f"{kind} {name!r} is not the engine's, which has {', '.join(built)}", "rename or remove it"
    for name, tensor in built.items():
        entry = configured.get(name)
        if entry is None:
            if kind == "input":  # an output that nobody wants may be left out
                yield f"{kind} {name!r} of the engine is missing", f"add it: {tensor.dtype} {list(tensor.shape[1:])}"
            continue
        wanted = "TYPE_" + TRITON_DTYPES[tensor.dtype]
        if DataType.Name(entry.data_type) != wanted:
            yield f"{kind} {name!r} is {DataType.Name(entry.data_type)}", f"set data_type: {wanted}"
        dims = list(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
        if reason := _dims_error(dims, tensor, manifest):
            right = [dim if isinstance(dim, int) else -1 for dim in tensor.shape[1:]]
            yield f"{kind} {name!r} has dims {dims}: {reason}", f"set dims: {right}"


def _dims_error(dims: list[int], tensor: TensorSpec, manifest: PublishedManifest) -> str | None:
    """Why `dims`, which leave the batch out, do not fit a tensor; None where they do."""
    shape = tensor.shape[1:]
    if len(dims) == len(shape) + 1:
        return "the batch axis is listed, which turns batching off"
    if len(dims) != len(shape):
        return f"the engine has {len(shape)} after the batch"
    for dim, built in zip(dims, shape, strict=True):
        if isinstance(built, int):
            if dim != built:
                return f"the engine has {built} where they have {dim}"
        elif dim != -1 and not manifest.axes[built]["min"] <= dim <= manifest.axes[built]["max"]:
            axis = manifest.axes[built]
            return f"{dim} is outside the profile of {built}, {axis['min']} to {axis['max']}"
    return None


def _warmup(model: Path, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """A warm-up file that is missing, or of another size, keeps the model from loading."""
    entries = {entry.input_data_file: entry for sample in config.model_warmup for entry in sample.inputs.values()}
    for name, entry in sorted(entries.items()):
        path = model / "warmup" / name
        if not name:  # zeros or random values
            continue
        if not path.is_file():
            yield f"warm-up file warmup/{name} is missing", publish_again(model)
            continue
        needed = math.prod(entry.dims) * BYTES.get(DataType.Name(entry.data_type), 0)
        if needed and path.stat().st_size != needed:
            yield (
                f"warm-up file warmup/{name} has {path.stat().st_size} bytes, a row has {needed}",
                publish_again(model),
            )


def not_ours(model: Path) -> Finding:
    """What is said of a model that somebody else put there."""
    return Finding(
        level="warning",
        where=model.name,
        what=f"not checked: no {MANIFEST}, so not made by export.to_triton; Triton decides whether it loads",
    )

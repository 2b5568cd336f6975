"""Checks that `config.pbtxt` fits the engine, from the files alone.

Contract: each finding is one line with one fix; `check_config` compares the configuration with the manifest.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig, ModelQueuePolicy

from deepseek.spec import BATCH, BUILT_DTYPES, TRITON_DTYPES, PublishedManifest, TensorSpec
from deepseek.spec.files.repository import CONFIG, ENGINE
from deepseek.spec.vocabulary import ADDED, VOCABULARY
from deepseek.targets import TARGETS
from serving.repository.checks import Finding, mismatch, publish_again

# Bytes per value, by Triton's type name.
BYTES = {f"TYPE_{TRITON_DTYPES[dtype]}": np.dtype(dtype).itemsize for dtype in BUILT_DTYPES}


def check_config(model: Path, config: ModelConfig, manifest: PublishedManifest) -> list[Finding]:
    """Findings where `config.pbtxt` asks for what the engine was not built for, or leaves its queue unbounded."""
    lines = [
        *_naming(model, config, manifest),
        *_batching(config, manifest),
        *_cuda_graphs(config),
        *_queue(config),
        *_tensors("input", config, manifest),
        *_tensors("output", config, manifest),
        *_warmup(model, config),
    ]
    return [mismatch(f"{model.name}/{CONFIG}", what, fix) for what, fix in lines]


def _naming(model: Path, config: ModelConfig, manifest: PublishedManifest) -> Iterator[tuple[str, str]]:
    if config.name not in ("", model.name):
        yield f"name is {config.name!r}, but the folder is {model.name!r}", f'set name: "{model.name}"'
    backends = TARGETS[manifest.target].backends
    seen = config.backend or config.platform.partition("_")[0] or "none"  # platform: tensorrt_plan, pytorch_libtorch
    if backends and seen not in (("python",) if ENGINE in config.parameters else backends):
        yield f"backend is {seen!r}, but the engine's target is {manifest.target}", f'set backend: "{backends[0]}"'
    file = config.default_model_filename
    if file and file not in manifest.files:
        names = ", ".join(sorted(manifest.files))
        yield f"default_model_filename is {file!r}, but the version has {names}", "name one of them"


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


def _cuda_graphs(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Batch sizes that the TensorRT backend refuses (ValidateGraphSpec in its instance_state.cc)."""
    most = config.max_batch_size
    seen = [spec.batch_size for spec in config.optimization.cuda.graph_spec]
    wrong = [size for size in seen if not min(1, most) <= size <= most]
    if wrong:
        what = f"CUDA graphs are asked for batches of {', '.join(map(str, wrong))}, but max_batch_size is {most}"
        yield what, "set tensorrt.cuda_graph_batches within it, or remove those of optimization.cuda.graph_spec"


def _queue(config: ModelConfig) -> Iterator[tuple[str, str]]:
    if not config.HasField("dynamic_batching"):
        return
    block = "dynamic_batching.default_queue_policy"
    policy = config.dynamic_batching.default_queue_policy
    if policy.max_queue_size == 0:
        yield "the queue is unbounded: in an overload all requests wait", f"set {block}.max_queue_size, e.g. 512"
    if policy.default_timeout_microseconds == 0:
        fix = f"set {block}.default_timeout_microseconds, e.g. 200000"
        yield "requests wait in the queue without a time-out", fix
    if policy.timeout_action == ModelQueuePolicy.DELAY:
        yield "timed-out requests are delayed, not refused", f"set {block}.timeout_action: REJECT"


def _tensors(
    kind: Literal["input", "output"], config: ModelConfig, manifest: PublishedManifest
) -> Iterator[tuple[str, str]]:
    """Tensors that differ from the engine's, apart from those that the backend adds for strings."""
    built = manifest.inputs if kind == "input" else manifest.outputs
    configured = {entry.name: entry for entry in (config.input if kind == "input" else config.output)}
    added = {name for parameter in ADDED.keys() & config.parameters.keys() for name in ADDED[parameter][kind]}
    cut = VOCABULARY in config.parameters and kind == "output"
    for name in sorted(configured.keys() - built.keys() - added):
        yield f"{kind} {name!r} is unknown to the engine, which has {', '.join(built)}", "rename or remove it"
    for name, tensor in built.items():
        entry = configured.get(name)
        if entry is None:
            if kind == "input":  # outputs may be left out
                yield f"{kind} {name!r} of the engine is missing", f"add it: {tensor.dtype} {list(tensor.triton_dims)}"
            continue
        wanted = "TYPE_" + TRITON_DTYPES[tensor.dtype]
        if DataType.Name(entry.data_type) != wanted:
            yield f"{kind} {name!r} is {DataType.Name(entry.data_type)}", f"set data_type: {wanted}"
        if cut and entry.dims == [-1]:  # callers say how many items they want
            continue
        dims = list(entry.reshape.shape if entry.HasField("reshape") else entry.dims)
        if reason := _dims_error(dims, tensor, manifest):
            right = [dim if isinstance(dim, int) else -1 for dim in tensor.triton_dims]
            reshape = "" if tensor.shape[1:] else " and reshape: { shape: [ ] }"
            yield f"{kind} {name!r} has dims {dims}: {reason}", f"set dims: {right}{reshape}"


def _dims_error(dims: list[int], tensor: TensorSpec, manifest: PublishedManifest) -> str | None:
    """Why `dims`, which exclude the batch axis, do not fit a tensor; None if they fit."""
    shape = tensor.shape[1:]
    if len(dims) == len(shape) + 1:
        return "the batch axis is listed, which turns batching off"
    if len(dims) != len(shape):
        return f"the engine has {len(shape)} dimensions after the batch"
    for dim, built in zip(dims, shape, strict=True):
        if isinstance(built, int):
            if dim != built:
                return f"the engine has {built} in place of {dim}"
        elif dim != -1 and not manifest.axes[built]["min"] <= dim <= manifest.axes[built]["max"]:
            axis = manifest.axes[built]
            return f"{dim} is outside the profile of {built}; allowed: {axis['min']} to {axis['max']}"
    return None


def _warmup(model: Path, config: ModelConfig) -> Iterator[tuple[str, str]]:
    """Warm-up files that are missing or have the wrong size: Triton would not load the model."""
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

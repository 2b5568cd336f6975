"""A typed graph compiled by TensorRT, and the proof that the engine runs in the precision asked.

Contract: one code path for TensorRT 10.12+ and 11 (target `tensorrt`: needs the GPU and the version that will
serve) and for TensorRT for RTX (target `tensorrt_rtx`: ahead of time, no GPU). Precision lives in the graph:
TensorRT 11 has no flag for it, 10.12 is given STRONGLY_TYPED, which 11 takes and ignores. Each TensorRT name used
here exists in all of them: `tests/test_tensorrt_api.py`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Manifest, Precision, TensorrtSpec
from export.artifact import human_bytes, staged

CompiledTarget = Literal["tensorrt", "tensorrt_rtx"]
OLDEST = (10, 12)  # the first whose strongly typed path has all that is used here
# Bytes of a plan beside its weights: kernels and tables. Past this a plan holds weights of a wider type.
PLAN_OVERHEAD_BYTES = 16 << 20
# A version-compatible plan also holds TensorRT's lean runtime.
LEAN_RUNTIME_BYTES = 128 << 20
_WIDER = {"fp16": 2.0, "int8": 4.0, "fp8": 4.0}  # how much larger an fp32 plan's weights would be


def tensorrt_module(target: CompiledTarget) -> Any:
    """The TensorRT package of a target; raises InputError where it is missing or too old."""
    try:
        trt = importlib.import_module(target)
    except ImportError as error:
        package = target.replace("_", "-")
        raise InputError(
            f"target {target}: cannot import {target} ({error}); install it with pip install {package}"
            + ("" if target == "tensorrt_rtx" else ", or build in the NVIDIA container of the server's tag")
        ) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if target == "tensorrt" and version < OLDEST:
        raise InputError(f"tensorrt {trt.__version__} is too old; {OLDEST[0]}.{OLDEST[1]} or newer is needed")
    return trt


def _logger(trt: Any) -> Any:
    """A TensorRT logger that keeps the errors, for the one line that the user is to see."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


def engine_from_onnx(
    trt: Any, path: Path, spec: DeploymentSpec, options: TensorrtSpec, *, timing_cache: Path | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Compiles a graph; returns the plan and what the network that was compiled holds.

    `timing_cache` is read if it is there and written after the build.
    Raises InputError where the parser or the builder refuses the graph, with its reason.
    """
    logger = _logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # what the bindings raise for a null pointer
        raise InputError(
            f"TensorRT {trt.__version__} cannot start ({_one_line(logger.errors)}); it builds on the GPU that will "
            "serve. Without one: make check-engine"
        ) from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = _parser_reasons(parser) or logger.errors
        raise InputError(f"{path}: TensorRT {trt.__version__} cannot parse it: {_one_line(reasons)}")
    config = _builder_config(trt, builder, options)
    config.add_optimization_profile(_profile(builder, network, spec))
    _read_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InputError(f"{path}: TensorRT {trt.__version__} cannot build it: {_one_line(logger.errors)}")
    if timing_cache is not None:
        with staged(timing_cache) as file:
            file.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan), found_layers(trt, network)


def applied(target: CompiledTarget, options: TensorrtSpec) -> dict[str, Any]:
    """The options that the builder of a target is given; RTX engines have their own compatibility and keep no cache."""
    names = {"optimization_level", "workspace_mib"}
    if target == "tensorrt":
        names |= {"hardware_compatibility", "version_compatible", "timing_cache"}
    return options.model_dump(include=names)


def _builder_config(trt: Any, builder: Any, options: TensorrtSpec) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if trt.__name__ == "tensorrt_rtx":
        return config
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatibility == "ampere_plus":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    elif options.hardware_compatibility == "same_compute_capability":
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    return config


def _profile(builder: Any, network: Any, spec: DeploymentSpec) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in spec.inputs:
            raise InputError(f"the graph's input {name!r} is not in deploy.toml, which has {', '.join(spec.inputs)}")
        profile.set_shape(name, *(spec.shape(name, corner) for corner in ("min", "opt", "max")))
    return profile


def _read_timing_cache(config: Any, path: Path | None) -> None:
    """Gives the builder what earlier builds measured; another device's or version's is not used."""
    if path is None:
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if not config.set_timing_cache(cache, ignore_mismatch=False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)


def _parser_reasons(parser: Any) -> list[str]:
    """The node and the reason of each error; for an operator that it lacks, TensorRT's own words are only "false"."""
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
        reasons.append(f"{node}{error.code().name}: {error.desc()}")
    return reasons


def _one_line(reasons: list[str]) -> str:
    """The first three; without what TensorRT adds where it finds no GPU to clear an error of."""
    lines = [line for reason in reasons[:3] for line in reason.splitlines() if "catchCudaError" not in line]
    return " ".join("; ".join(lines).split())[:400] or "it gave no reason"


@contextlib.contextmanager
def library_prints_to_stderr() -> Iterator[None]:
    """TensorRT's own code writes some warnings to file descriptor 1, where our result belongs."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def found_layers(trt: Any, network: Any) -> dict[str, Any]:
    """Counts the compute layers (matrix product, convolution) by the type they run in."""
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16", trt.int8: "int8", trt.fp8: "fp8"}
    compute = (trt.LayerType.MATRIX_MULTIPLY, trt.LayerType.CONVOLUTION, trt.LayerType.DECONVOLUTION)
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(index).name: layer for layer in layers for index in range(layer.num_outputs)}
    counts: Counter[str] = Counter()
    for layer in layers:
        if layer.type in compute:
            counts[_layer_type(trt, layer, producers, names)] += 1
    return {"compute_layers": dict(counts), "layers": len(layers)}


def _layer_type(trt: Any, layer: Any, producers: dict[str, Any], names: dict[Any, str]) -> str:
    """The type of what was dequantized on every operand, else the type of the first one.

    `int8_weights` where only the second operand, a constant, was.
    """
    carriers = (trt.LayerType.SHUFFLE, trt.LayerType.CAST, trt.LayerType.IDENTITY)
    quantized = []
    inputs = [layer.get_input(index) for index in range(layer.num_inputs)]
    for tensor in inputs[:2]:
        producer = producers.get(tensor.name) if tensor is not None else None
        while producer is not None and producer.type in carriers:
            producer = producers.get(producer.get_input(0).name)
        if producer is not None and producer.type == trt.LayerType.DEQUANTIZE:
            quantized.append(names.get(producer.get_input(0).dtype, "other"))
    if len(quantized) == 2:
        return quantized[0]
    if quantized and producer is not None and producer.type == trt.LayerType.DEQUANTIZE:
        stored = producers.get(producer.get_input(0).name)
        if stored is not None and stored.type == trt.LayerType.CONSTANT:
            return f"{quantized[0]}_weights"
    return names.get(inputs[0].dtype, "other")


def weight_bytes(graph: Manifest) -> int:
    """Bytes of a typed graph's weights, one that several nodes read once for each: a plan may hold it so."""
    return int(graph.found.get("bytes_by_reader", graph.size_bytes))


def prove(precision: Precision, found: dict[str, Any], plan: int, weights: int, options: TensorrtSpec) -> None:
    """Raises GateFailed where layers or plan size contradict the precision that was asked for.

    `plan` and `weights` are bytes, the latter of the typed graph. Layers: none runs in the precision. Size: the plan
    is nearer to what the weights would take in fp32, beyond what kernels take; it tells of large models only.
    """
    counts = found["compute_layers"]
    if counts and not (counts.get(precision) or counts.get(f"{precision}_weights")):
        raise GateFailed(f"{precision} was asked for, but no compute layer of the network runs in it (found: {counts})")
    wider = _WIDER.get(precision, float("inf"))
    overhead = PLAN_OVERHEAD_BYTES + (LEAN_RUNTIME_BYTES if options.version_compatible else 0)
    if plan > overhead + weights * (1 + wider) / 2:
        raise GateFailed(
            f"{precision} was asked for, but the plan has {human_bytes(plan)} where its typed weights "
            f"take {human_bytes(weights)}: the size of a wider precision"
        )

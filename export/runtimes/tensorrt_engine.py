"""Compiles a typed graph with TensorRT, and proves that the engine runs in the precision asked for.

Contract: one code path for TensorRT 10.12+ and 11 (target `tensorrt`: needs the GPU and the version that will
serve) and for TensorRT for RTX (target `tensorrt_rtx`: ahead of time, no GPU). Precision lives in the graph:
TensorRT 11 has no flag for it, 10.12 gets STRONGLY_TYPED, which 11 accepts and ignores. All of them have every
TensorRT name used here: `tests/test_tensorrt_api.py`.
"""

import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from deepseek.precisions import BITS, REDUCED
from deepseek.spec import DeploymentSpec, GateFailed, InputError, Manifest, Precision, TensorrtSpec, variables_for
from export.artifact import human_bytes, read_manifest, staged
from export.runtimes.engine_layers import found_layers

CompiledTarget = Literal["tensorrt", "tensorrt_rtx"]
OLDEST = (10, 12)  # the first whose strongly typed path has everything used here
# Share of the compute layers that the graph has in a precision which must run in it: TensorRT fuses layers, such as
# three projections into one.
LEAST_SHARE = 0.5
# Bytes of a plan besides its weights: kernels and tables. A larger plan holds weights of a wider type.
PLAN_OVERHEAD_BYTES = 16 << 20
# A version-compatible plan also holds TensorRT's lean runtime.
LEAN_RUNTIME_BYTES = 128 << 20


def tensorrt_module(target: CompiledTarget) -> Any:
    """The TensorRT package of a target, with its plugins: its parser runs some operators by them, such as
    ScatterElements with a reduction. Raises InputError if it is missing or too old."""
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
    trt.init_libnvinfer_plugins(None, "")  # None: plugins keep the logger, which would have to stay alive
    return trt


def _logger(trt: Any) -> Any:
    """A TensorRT logger that collects the errors for a one-line message."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)

    return Logger()


def check_layout(graph: Path, spec: DeploymentSpec, target: CompiledTarget) -> None:
    """Raises InputError if an int8 graph was made for ONNX Runtime on a CPU."""
    made = read_manifest(graph)
    if made.precision == "int8" and made.settings.get("high_precision") == "fp32":
        raise InputError(
            f"{graph}: made for ONNX Runtime on a CPU (unsigned activations, which TensorRT does not take); quantize "
            f"it with --target {target}, as make engine TARGET={target} {variables_for(spec.name)} does"
        )


def engine_from_onnx(
    trt: Any, path: Path, spec: DeploymentSpec, *, timing_cache: Path | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Compiles a graph; returns the plan, its compute layers (`export.runtimes.engine_layers`) and whether TF32 is on.

    `timing_cache` is read if it exists, and written after the build.
    Raises GateFailed with the reason if the parser or the builder refuses the graph, InputError if TensorRT does not
    start.
    """
    logger = _logger(trt)
    try:
        builder = trt.Builder(logger)
    except TypeError:  # the bindings raise this for a null pointer
        raise InputError(
            f"TensorRT {trt.__version__} cannot start ({_one_line(logger.errors)}); it builds on the GPU that will "
            "serve. Without one: make check-engine"
        ) from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = _parser_reasons(parser) or logger.errors
        raise GateFailed(f"{path}: TensorRT {trt.__version__} cannot parse it: {_one_line(reasons)}")
    config = _builder_config(trt, builder, spec.tensorrt)
    if config.add_optimization_profile(_profile(builder, network, spec)) < 0:
        reasons = _one_line(logger.errors)
        raise InputError(f"{path}: TensorRT {trt.__version__} refuses the axes as its profile: {reasons}")
    _read_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise GateFailed(f"{path}: TensorRT {trt.__version__} cannot build it: {_one_line(logger.errors)}")
    if timing_cache is not None:
        with staged(timing_cache) as file:
            file.write_bytes(bytes(config.get_timing_cache().serialize()))
    shapes = {name: spec.shape(name, "opt") for name in spec.inputs}
    found = found_layers(trt, network, bytes(plan), shapes)
    return bytes(plan), {**found, "tf32": bool(config.get_flag(trt.BuilderFlag.TF32))}


def applied(target: CompiledTarget, options: TensorrtSpec) -> dict[str, Any]:
    """The builder options of a target; RTX engines have their own compatibility and no timing cache."""
    names = {"optimization_level", "workspace_mib"}
    if target == "tensorrt":
        names |= {"hardware_compatibility", "version_compatible", "timing_cache"}
    return options.model_dump(include=names)


def _builder_config(trt: Any, builder: Any, options: TensorrtSpec) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the inspector tells types of layers
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
    """Gives the builder the timings of earlier builds; those of another device or version are ignored."""
    if path is None:
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):  # None: it cannot be read
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)


def _parser_reasons(parser: Any) -> list[str]:
    """The node and the reason of each error; for a missing operator, TensorRT's description is only "false"."""
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        node = f"node {error.node_name()!r} ({error.node_operator()}): " if error.node_operator() else ""
        reasons.append(f"{node}{error.code().name}: {error.desc()}")
    return reasons


def _one_line(reasons: list[str]) -> str:
    """The first three reasons, without the lines that TensorRT adds if it finds no GPU."""
    lines = [line for reason in reasons[:3] for line in reason.splitlines() if "catchCudaError" not in line]
    return " ".join("; ".join(lines).split())[:400] or "it gave no reason"


def weight_bytes(graph: Manifest) -> int:
    """Bytes of a typed graph's weights, counted once per reader: a plan may hold a copy for each."""
    return int(graph.found.get("bytes_by_reader", graph.size_bytes))


def prove(precision: Precision, found: dict[str, Any], plan_bytes: int, graph: Manifest, options: TensorrtSpec) -> None:
    """Raises GateFailed if layers or plan size contradict the precision that was asked for.

    Layers fail if fewer than LEAST_SHARE of those that the typed graph has in the precision run in it. Size fails if
    the plan, without kernels, is nearer to the size of fp32 weights; this detects only large models.
    """
    counts, weights = found["compute_layers"], weight_bytes(graph)
    expected = _in_precision(graph.found.get("compute_operators", {}), precision) or sum(counts.values())
    if _in_precision(counts, precision) < LEAST_SHARE * expected:
        raise GateFailed(
            f"{precision} was asked for, but {_in_precision(counts, precision)} compute layers of the "
            f"{found['read_from']} run in it (found: {counts}); the graph has {expected}, and at least "
            f"{LEAST_SHARE:.0%} of them have to"
        )
    wider = 32 / BITS[precision] if precision in REDUCED else math.inf  # size of fp32 weights over these
    overhead = PLAN_OVERHEAD_BYTES + (LEAN_RUNTIME_BYTES if options.version_compatible else 0)
    if plan_bytes > overhead + weights * (1 + wider) / 2:
        raise GateFailed(
            f"{precision} was asked for, but the plan has {human_bytes(plan_bytes)} where its typed weights "
            f"take {human_bytes(weights)}: the size of a wider precision"
        )


def _in_precision(counts: Mapping[str, int], precision: Precision) -> int:
    return counts.get(precision, 0) + counts.get(f"{precision}_weights", 0)

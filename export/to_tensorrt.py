"""ONNX to a TensorRT engine: a pure compile of a graph whose precision is already written in it.

Contract: reads `build/<name>/<precision>/model.onnx`; writes `build/<name>/<precision>/<target>/model.plan`
with the profile of `deploy.toml`. One code path for TensorRT 10.12+ and 11 (target `tensorrt`: build it
on the GPU and with the version that will serve it) and for TensorRT for RTX (target `tensorrt_rtx`: builds
ahead of time without a GPU; Triton cannot load it, it proves that the graph passes a real TensorRT).
After the build the precision is proved: from the layer types of the network that was compiled, and
from the plan's size. A mismatch fails, since TensorRT says nothing of an fp32 graph that stayed fp32.

Examples:
    python -m export.to_tensorrt --model recommender --precision fp16 --target tensorrt_rtx
    python -m export.to_tensorrt --model recommender --precision int8 --target tensorrt --workspace-mib 4096
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    Manifest,
    Parser,
    Precision,
    add_model_arguments,
    build_dir,
    run_command,
)
from export.artifact import (
    Clock,
    axes_of,
    engine_path,
    human_bytes,
    need,
    onnx_path,
    publish,
    read_manifest,
    scratch_in,
    sha256,
    staged,
    tool_versions,
    write_manifest,
)

CompiledTarget = Literal["tensorrt", "tensorrt_rtx"]
OLDEST = (10, 12)  # the first whose strongly typed path has all that is used here
# Bytes of a plan beside its weights: kernels and tables. Past this a plan holds weights of a wider type.
PLAN_OVERHEAD_BYTES = 16 << 20
_WIDER = {"fp16": 2.0, "int8": 4.0, "fp8": 4.0}  # how much larger an fp32 plan's weights would be

log = Console(file=sys.stderr)


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
    trt: Any, path: Path, spec: DeploymentSpec, *, workspace_mib: int | None = None, timing_cache: Path | None = None
) -> tuple[bytes, dict[str, Any]]:
    """Compiles a graph; returns the plan and what the network that was compiled holds.

    `timing_cache` is read if it is there and written after the build.
    Raises InputError where the parser or the builder refuses the graph, with its reason.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        reasons = [parser.get_error(index).desc() for index in range(parser.num_errors)] or logger.errors
        raise InputError(f"{path}: TensorRT {trt.__version__} cannot parse it: {_one_line(reasons)}")
    config = builder.create_builder_config()
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    config.add_optimization_profile(_profile(builder, network, spec))
    _read_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise InputError(f"{path}: TensorRT {trt.__version__} cannot build it: {_one_line(logger.errors)}")
    if timing_cache is not None:
        with staged(timing_cache) as file:
            file.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan), found_layers(trt, network)


@contextlib.contextmanager
def _library_prints_to_stderr() -> Iterator[None]:
    """TensorRT's own code writes some warnings to file descriptor 1, where our result belongs."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


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


def _one_line(reasons: list[str]) -> str:
    return " ".join("; ".join(reasons[:3]).split())[:400] or "it gave no reason"


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
    """The type of what was dequantized on every operand, else the type of the first one."""
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
    return names.get(inputs[0].dtype, "other")


def prove(precision: Precision, found: dict[str, Any], plan_bytes: int, weight_bytes: int) -> None:
    """Raises GateFailed where layers or plan size contradict the precision that was asked for.

    `weight_bytes` are those of the typed graph. Layers: none runs in the precision. Size: the plan is
    nearer to what the weights would take in fp32, beyond what kernels take; it tells of large models only.
    """
    counts = found["compute_layers"]
    if counts and not counts.get(precision):
        raise GateFailed(f"{precision} was asked for, but no compute layer of the network runs in it (found: {counts})")
    wider = _WIDER.get(precision, float("inf"))
    if plan_bytes > PLAN_OVERHEAD_BYTES + weight_bytes * (1 + wider) / 2:
        raise GateFailed(
            f"{precision} was asked for, but the plan has {human_bytes(plan_bytes)} where its typed weights "
            f"take {human_bytes(weight_bytes)}: the size of a wider precision"
        )


def build_engine(
    spec: DeploymentSpec, precision: Precision, target: CompiledTarget, workspace_mib: int | None
) -> dict[str, Any]:
    """Runs the stage; returns what it made."""
    clock = Clock()
    source = need(onnx_path(spec.name, precision), f"make engine PRECISION={precision}")
    path = engine_path(spec.name, precision, target)
    trt = tensorrt_module(target)
    graph = read_manifest(source)
    cache = build_dir(spec.name) / "tensorrt.timing" if target == "tensorrt" else None  # RTX keeps none
    with log.status(f"{target} {trt.__version__}: building {precision} of {spec.name}"), _library_prints_to_stderr():
        plan, found = engine_from_onnx(trt, source, spec, workspace_mib=workspace_mib, timing_cache=cache)
    weight_bytes = sum(graph.found.get("weight_bytes", {}).values()) or graph.size_bytes
    prove(precision, found, len(plan), weight_bytes)
    with scratch_in(path.parent) as scratch:
        (scratch / path.name).write_bytes(plan)
        manifest = Manifest(
            model=spec.name,
            precision=precision,
            target=target,
            found={**found, "plan_over_weight_bytes": round(len(plan) / max(weight_bytes, 1), 3)},
            sources={**graph.sources, "onnx": sha256(source)},
            axes=axes_of(spec),
            versions={**tool_versions(), target: trt.__version__},
            compute_capability=_compute_capability() if target == "tensorrt" else None,
            size_bytes=len(plan),
            build_s=clock.elapsed_s,
        )
        write_manifest(scratch / "manifest.json", manifest)
        publish(scratch, path)
    return {
        "path": str(path),
        **manifest.model_dump(include={"precision", "target", "found", "size_bytes", "build_s", "versions"}),
    }


def _compute_capability() -> str | None:
    """Of the first GPU, as TensorRT's engines depend on it."""
    import torch  # heavy, and only where there is a GPU to ask

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def main() -> None:
    """Builds one engine."""
    parser = Parser(__doc__, prog="python -m export.to_tensorrt")
    add_model_arguments(parser)
    parser.add_argument("--precision", required=True, choices=("fp32", "fp16", "int8", "fp8"))
    parser.add_argument(
        "--target", default="tensorrt", choices=("tensorrt", "tensorrt_rtx"), help="(default: %(default)s)"
    )
    parser.add_argument(
        "--workspace-mib", type=int, help="scratch memory that layers may use (default: all of the device's)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    spec = DeploymentSpec.of_model(args.model, args.models)
    result = build_engine(spec, args.precision, args.target, args.workspace_mib)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        counts = ", ".join(f"{count} in {name}" for name, count in result["found"]["compute_layers"].items())
        size, seconds = human_bytes(result["size_bytes"]), result["build_s"]
        print(f"{result['path']}: {size} in {seconds:.1f} s; compute layers: {counts}")


if __name__ == "__main__":
    run_command(main)

"""ONNX to a TensorRT engine: compiles a graph whose precision is already written in it.

Contract: reads `build/<name>/<precision>/model.onnx`; writes `build/<name>/<precision>/<target>/model.plan` with the
profile and the `[tensorrt]` options of `deploy.toml`. Target `tensorrt` builds on the GPU and with the version that
will serve it (`deepseek tensorrt-container`). Target `tensorrt_rtx` builds ahead of time without a GPU: Triton cannot
load it, but it shows that TensorRT accepts the graph. The stage then checks the precision by the plan's size and by the
layers of the built engine, or of the network if this machine cannot load the engine: TensorRT does not report an fp32
graph that stayed fp32.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from deepseek.spec import DeploymentSpec, Precision, build_dir, variables_for
from deepseek.spec.command import stdout_to_stderr
from deepseek.spec.machine.gpus import gpus
from export.artifact import (
    Stopwatch,
    engine_path,
    human_bytes,
    need,
    onnx_path,
    read_manifest,
    record_build,
    refusal,
    refuse,
    sha256,
)
from export.cache import put_in_place, stage_key
from export.runtimes.engine_layers import described
from export.runtimes.isolation import made_alone
from export.runtimes.tensorrt_engine import (
    CompiledTarget,
    applied,
    check_layout,
    engine_from_onnx,
    prove,
    tensorrt_module,
    weight_bytes,
)

log = Console(file=sys.stderr, markup=False)


def build_engine(spec: DeploymentSpec, precision: Precision, target: CompiledTarget) -> dict[str, Any]:
    source = need(onnx_path(spec.name, precision), f"make engine {variables_for(spec.name)} PRECISION={precision}")
    path = engine_path(spec.name, precision, target)
    if reason := refusal(source):  # one of several candidates: the build continues with the others
        refuse(path, reason)
        return {"path": str(path), "refused": reason}
    check_layout(source, spec, target)
    trt = tensorrt_module(target)
    put_in_place(stage_key(), path, lambda folder: _build(trt, spec, precision, target, folder / path.name))
    facts = {"precision", "target", "found", "settings", "size_bytes", "build_s", "versions"}
    return {"path": str(path), **read_manifest(path).model_dump(include=facts)}


def _build(trt: Any, spec: DeploymentSpec, precision: Precision, target: CompiledTarget, plan_path: Path) -> None:
    """Writes the plan and its manifest."""
    clock = Stopwatch()
    source = onnx_path(spec.name, precision)
    graph = read_manifest(source)
    timing = build_dir(spec.name) / "tensorrt.timing" if applied(target, spec.tensorrt).get("timing_cache") else None
    with log.status(f"{target} {trt.__version__}: building {precision} of {spec.name}"), stdout_to_stderr():
        plan, found = engine_from_onnx(trt, source, spec, timing_cache=timing)
    weights = weight_bytes(graph)
    prove(precision, found, len(plan), graph, spec.tensorrt)
    plan_path.write_bytes(plan)
    record_build(
        plan_path,
        spec,
        precision,
        clock,
        target=target,
        found={**found, "weight_bytes": weights, "plan_over_weight_bytes": round(len(plan) / max(weights, 1), 3)},
        sources={**graph.sources, "onnx": sha256(source)},
        settings=applied(target, spec.tensorrt),
        versions={target: trt.__version__},
        compute_capability=_compute_capability() if target == "tensorrt" else None,
    )


def _compute_capability() -> str | None:
    """Compute capability of the first GPU, which TensorRT's engines depend on; None without a GPU."""
    import torch  # heavy; needed only here

    if not torch.cuda.is_available():  # perhaps torch's build for CPUs
        return next((gpu.compute_capability for gpu in gpus()), None)
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def main(options: argparse.Namespace) -> None:
    spec = DeploymentSpec.to_build(options.model, options.models)
    result = made_alone(
        f"building the {options.precision} engine",
        engine_path(spec.name, options.precision, options.target),
        lambda: build_engine(spec, options.precision, options.target),
        candidate=options.candidate,
    )
    if options.json:
        print(json.dumps(result, indent=2))
    elif "refused" in result:
        print(f"{options.precision} cannot be made; the build continues without it: {result['refused']}")
    else:
        layers = described(result["found"], options.precision)
        size, seconds = human_bytes(result["size_bytes"]), result["build_s"]
        print(f"{result['path']}: {size} in {seconds:.1f} s; compute layers: {layers}")

"""ONNX to a TensorRT engine: a pure compile of a graph whose precision is already written in it.

Contract: reads `build/<name>/<precision>/model.onnx`; writes `build/<name>/<precision>/<target>/model.plan`
with the profile and the `[tensorrt]` options of `deploy.toml`. Target `tensorrt` builds on the GPU and with the
version that will serve it (`python -m export.container`); target `tensorrt_rtx` builds ahead of time without
a GPU: Triton cannot load it, it proves that the graph passes a real TensorRT.
After the build the precision is proved: from the layer types of the network that was compiled, and
from the plan's size. A mismatch fails, since TensorRT says nothing of an fp32 graph that stayed fp32.

Examples:
    python -m export.to_tensorrt --model recommender --precision fp16 --target tensorrt_rtx
    python -m export.to_tensorrt --model recommender --precision int8 --target tensorrt --optimization-level 5
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError
from rich.console import Console

from deepseek.spec import (
    DeploymentSpec,
    InputError,
    Manifest,
    Parser,
    Precision,
    TensorrtSpec,
    add_model_arguments,
    build_dir,
    run_command,
    variables_for,
)
from deepseek.spec.checks import first_error
from deepseek.spec.folders import scratch_in
from export.artifact import (
    Clock,
    axes_of,
    engine_path,
    human_bytes,
    need,
    onnx_path,
    pruned_settings,
    publish,
    read_manifest,
    refusal,
    refuse,
    sha256,
    tool_versions,
    write_manifest,
)
from export.cache import alone_with, fetch, key_of, store
from export.engine import (
    CompiledTarget,
    applied,
    engine_from_onnx,
    library_prints_to_stderr,
    prove,
    tensorrt_module,
    weight_bytes,
)
from export.runners import gpu_name

log = Console(file=sys.stderr, markup=False)


def build_engine(
    spec: DeploymentSpec, precision: Precision, target: CompiledTarget, options: TensorrtSpec
) -> dict[str, Any]:
    """Runs the stage; returns what it made."""
    source = need(onnx_path(spec.name, precision), f"make engine {variables_for(spec.name)} PRECISION={precision}")
    path = engine_path(spec.name, precision, target)
    if reason := refusal(source):  # one of several candidates: the others go on
        refuse(path, reason)
        return {"path": str(path), "precision": precision, "refused": reason}
    if precision == "int8" and read_manifest(source).settings.get("high_precision") == "fp32":
        raise InputError(
            f"{source}: made for ONNX Runtime on a CPU (unsigned activations, which TensorRT does not take); quantize "
            f"it with --high-precision fp16, as make engine TARGET={target} {variables_for(spec.name)} does"
        )
    trt = tensorrt_module(target)
    key = key_of(
        "to_tensorrt",
        model=[spec.name, read_manifest(source).sources],  # the manifest has them
        sources={file.name: sha256(file) for file in sorted(source.parent.glob(f"{source.name}*"))},
        settings=[precision, target, trt.__version__, options.model_dump(), axes_of(spec)],
        device=gpu_name() if target == "tensorrt" else None,
    )
    with scratch_in(path.parent) as scratch, alone_with(key):
        if not fetch(key, scratch):
            _build(trt, spec, precision, target, options, scratch / path.name)
            store(key, scratch)
        publish(scratch, path)
    facts = {"precision", "target", "found", "settings", "size_bytes", "build_s", "versions"}
    return {"path": str(path), **read_manifest(path).model_dump(include=facts)}


def _build(
    trt: Any, spec: DeploymentSpec, precision: Precision, target: CompiledTarget, options: TensorrtSpec, plan_path: Path
) -> None:
    """Writes the plan and its manifest."""
    clock = Clock()
    source = onnx_path(spec.name, precision)
    graph = read_manifest(source)
    timing = build_dir(spec.name) / "tensorrt.timing" if applied(target, options).get("timing_cache") else None
    with log.status(f"{target} {trt.__version__}: building {precision} of {spec.name}"), library_prints_to_stderr():
        plan, found = engine_from_onnx(trt, source, spec, options, timing_cache=timing)
    weights = weight_bytes(graph)
    prove(precision, found, len(plan), weights, options)
    plan_path.write_bytes(plan)
    manifest = Manifest(
        model=spec.name,
        precision=precision,
        target=target,
        found={**found, "weight_bytes": weights, "plan_over_weight_bytes": round(len(plan) / max(weights, 1), 3)},
        sources={**graph.sources, "onnx": sha256(source)},
        settings={**applied(target, options), **pruned_settings(spec.name)},
        axes=axes_of(spec),
        versions={**tool_versions(), target: trt.__version__},
        compute_capability=_compute_capability() if target == "tensorrt" else None,
        size_bytes=len(plan),
        build_s=clock.elapsed_s,
    )
    write_manifest(plan_path.parent / "manifest.json", manifest)


def _compute_capability() -> str | None:
    """Of the first GPU, as TensorRT's engines depend on it."""
    import torch  # heavy, and only where there is a GPU to ask

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def add_option_arguments(parser: argparse.ArgumentParser) -> None:
    """The builder's options as flags, each over what `[tensorrt]` of deploy.toml says."""
    levels = get_args(TensorrtSpec.model_fields["hardware_compatibility"].annotation)
    parser.add_argument("--optimization-level", type=int, help="0 builds fastest, 5 tries the most kernels")
    parser.add_argument("--workspace-mib", type=int, help="scratch memory that layers may use (default: all there is)")
    parser.add_argument("--hardware-compatibility", choices=levels, help="GPUs that are to run the engine")
    parser.add_argument(
        "--version-compatible",
        action=argparse.BooleanOptionalAction,
        help="let a later TensorRT of this major version load it (Triton needs a flag for it: docs/tensorrt.md)",
    )
    parser.add_argument(
        "--timing-cache", action=argparse.BooleanOptionalAction, help="reuse what earlier builds measured on this GPU"
    )


def options_of(spec: DeploymentSpec, args: argparse.Namespace) -> TensorrtSpec:
    """`[tensorrt]` of deploy.toml with the flags that were given in place; raises InputError."""
    given = {name: getattr(args, name, None) for name in TensorrtSpec.model_fields}
    asked = {name: value for name, value in given.items() if value is not None}
    try:
        return TensorrtSpec.model_validate({**spec.tensorrt.model_dump(), **asked})
    except ValidationError as error:
        key, message = first_error(error, TensorrtSpec)
        raise InputError(f"--{key.replace('_', '-')}: {message}") from None


def main() -> None:
    """Builds one engine."""
    parser = Parser(__doc__, prog="python -m export.to_tensorrt")
    add_model_arguments(parser)
    parser.add_argument("--precision", required=True, choices=get_args(Precision))
    parser.add_argument("--target", default="tensorrt", choices=get_args(CompiledTarget), help="(default: %(default)s)")
    add_option_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    spec = DeploymentSpec.of_model(args.model, args.models)
    result = build_engine(spec, args.precision, args.target, options_of(spec, args))
    if args.json:
        print(json.dumps(result, indent=2))
    elif "refused" in result:
        print(f"{args.precision} cannot be made, the other precisions go on: {result['refused']}")
    else:
        counts = ", ".join(f"{count} in {name}" for name, count in result["found"]["compute_layers"].items())
        size, seconds = human_bytes(result["size_bytes"]), result["build_s"]
        print(f"{result['path']}: {size} in {seconds:.1f} s; compute layers: {counts or 'none'}")


if __name__ == "__main__":
    run_command(main)

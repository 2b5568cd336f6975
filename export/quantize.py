"""The fp32 graph brought to fp16, int8 or fp8: precision is written into the graph itself.

Contract: reads `build/<name>/fp32/model.onnx` and real calibration inputs; writes
`build/<name>/<precision>/model.onnx`, inputs and outputs typed as before. fp16 is ModelOpt AutoCast;
int8 and fp8 are ModelOpt PTQ, which leaves Q/DQ nodes that ONNX Runtime and TensorRT both take. What
the graph then holds is counted and must be what was asked. No calibration data is an error.

At 8 bits a graph that breaks deploy.toml's budget goes through the sensitivity pass, which keeps the worst layers
high; beside the graph lie sensitivity.json (each layer's share of the error) and calibration.json (the curve that
shows whether more samples would help).

Examples:
    python -m export.quantize --model recommender --precision int8
    python -m export.quantize --model recommender --precision int8 --high-precision fp32 --method max
    python -m export.quantize --model recommender --precision int8 --calibration-data val_dataset.bin
    python -m export.quantize --model recommender --precision int8 --no-sensitivity --per-tensor --json
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.quantization import MethodChoice, QuantConfig
from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    Manifest,
    Parser,
    add_model_arguments,
    build_dir,
    flags_for,
    kept_for_json,
    run_command,
)
from deepseek.spec.folders import scratch_in
from export.artifact import (
    Clock,
    Row,
    axes_of,
    human_bytes,
    json_text,
    load_rows,
    need,
    onnx_path,
    pruned_settings,
    pruning_of,
    publish,
    read_manifest,
    refuse,
    save_graph,
    sha256,
    tool_versions,
    write_manifest,
)
from export.cache import alone_with, fetch, key_of, store
from export.calibration import Calibration, NotFinite, calibration_of
from export.curve import MOST_GROWTH
from export.eight_bits import copied, log, to_8_bits
from export.isolation import Killed, in_child
from export.ptq import check_source, fp16_from_onnx
from export.qdq import COMPUTE_OPS, found_precision, share_equal_weights
from export.runners import onnx_runner, outputs_of
from export.sensitivity import shares_table, verdict
from export.source import Source

REPORTS = ("calibration", "sensitivity")


def prove(config: QuantConfig, found: dict[str, Any]) -> None:
    """Raises GateFailed where the graph has no operator in the precision that was asked for."""
    counts = found["compute_operators"]
    if not counts.get(f"{config.precision}_weights" if config.weight_only else config.precision):
        raise GateFailed(
            f"{config.precision} was asked for, but no {'/'.join(COMPUTE_OPS)} of the graph runs in it "
            f"(found: {counts or 'none of them'}); the layers may be too small to gain (ModelOpt leaves sizes under 16 "
            "alone), not be of these operators, or all in keep_high"
        )


def _samples_of(spec: DeploymentSpec) -> Path:
    """The model's own calibration samples, which `export.to_onnx` wrote."""
    return build_dir(spec.name) / "calibration.npz"


def quantize_model(spec: DeploymentSpec, config: QuantConfig, model_folder: Source | None = None) -> dict[str, Any]:
    """Runs the stage; returns what it made. Without the model's folder there is no sensitivity pass."""
    source = need(onnx_path(spec.name, "fp32"), f"python -m export.to_onnx {flags_for(spec.name)}")
    path = onnx_path(spec.name, config.precision)
    if config.precision != "fp16" and config.calibration_data is None:
        raise InputError(f"{config.precision}: no calibration data; random data would make a graph that is wrong")
    evaluation = load_rows(build_dir(spec.name) / "evaluation.npz")
    calibration: Calibration | None = None
    sources = {"weights": read_manifest(source).sources["weights"], "onnx": sha256(source)}
    if config.calibration_data is not None:
        data = Path(config.calibration_data)
        try:
            calibration = calibration_of(spec, data, config.num_samples, evaluation)
            if calibration.note:
                log.print(calibration.note, soft_wrap=True)
        except NotFinite as error:
            if data != _samples_of(spec):
                raise
            raise GateFailed(f"samples('calibration'): {str(error).removeprefix(f'{data}: ')}") from error
        sources["calibration"] = sha256(data)
    check_source(source, config)
    key = key_of(
        "quantize",
        sources=sources,
        evaluation=sha256(build_dir(spec.name) / "evaluation.npz"),
        settings=dataclasses.asdict(dataclasses.replace(config, calibration_data=None)),
        spec=spec.model_facts(),
        # By evaluate() layers are kept high; what it says of the graph, `export.compare` asks anew.
        sensitivity=model_folder is not None and (spec.precision.metric is None or model_folder.reads()),
        pruning=pruning_of(spec.name),
    )
    with scratch_in(path.parent) as scratch, alone_with(key):
        if not fetch(key, scratch):
            _quantize(spec, config, sources, calibration, evaluation, scratch, model_folder)
            store(key, scratch)
        for name in REPORTS:  # of an earlier graph, which had another
            if not (scratch / f"{name}.json").is_file():
                (path.parent / f"{name}.json").unlink(missing_ok=True)
        publish(scratch, path)
    reports = {name: file for name in REPORTS if (file := path.parent / f"{name}.json").is_file()}
    return {
        "path": str(path),
        **read_manifest(path).model_dump(include={"precision", "found", "settings", "size_bytes", "build_s"}),
        **({name: json.loads(file.read_text()) for name, file in reports.items()}),
    }


def _quantize(
    spec: DeploymentSpec,
    config: QuantConfig,
    sources: dict[str, str],
    calibration: Calibration | None,
    evaluation: list[Row],
    scratch: Path,
    model_folder: Source | None,
) -> None:
    """Writes graph, reports and manifest into the folder `scratch`."""
    clock = Clock()
    graph = scratch / "model.onnx"
    reports: dict[str, Any] = {}
    with scratch_in(scratch) as work, log.status(f"{config.precision} of {spec.name}"):
        if calibration is None or config.precision == "fp16":
            model = fp16_from_onnx(copied(spec, work / "fp16"), config, calibration)
        else:
            model, reports = to_8_bits(spec, config, calibration, evaluation, work, model_folder)
        share_equal_weights(model)
        save_graph(model, graph)
    found = found_precision(graph)
    prove(config, found)
    _check_that_it_runs(spec, graph, evaluation)
    for name, report in reports.items():
        (scratch / f"{name}.json").write_text(json_text(report) + "\n")
    manifest = Manifest(
        model=spec.name,
        precision=config.precision,
        found=found,
        sources=sources,
        settings={**_settings(config, calibration, reports), **pruned_settings(spec.name)},
        axes=axes_of(spec),
        versions=tool_versions(),
        size_bytes=sum(file.stat().st_size for file in scratch.glob("model.onnx*")),
        build_s=clock.elapsed_s,
    )
    write_manifest(scratch / "manifest.json", manifest)


def _check_that_it_runs(spec: DeploymentSpec, path: Path, rows: list[Row]) -> None:
    """Raises GateFailed where ONNX Runtime refuses the graph that was made (control flow can break in a cast).

    The graph as it is written: what ONNX Runtime's optimizers make of it is for `export.compare` to see, on the target.
    """
    try:
        outputs_of(spec, onnx_runner(spec, path, "onnxruntime", optimized=False), rows[:1])
    except InputError:  # an execution provider that is not there
        raise
    except Exception as error:
        raise GateFailed(f"the graph that was made does not run: {' '.join(str(error).split())[:300]}") from error


def _settings(config: QuantConfig, calibration: Calibration | None, reports: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says: as asked, and what the graph then was made with."""
    layers = reports.get("sensitivity", {}).get("layers", [])
    return {
        "calibration_method": reports.get("calibration", {}).get("method", config.calibration_method),
        "samples": len(calibration.rows) if calibration is not None else 0,
        "per_channel": config.per_channel,
        "weight_only": config.weight_only,
        "op_types": config.op_types,
        "keep_high": [*config.keep_high, *(f"^{re.escape(each['name'])}$" for each in layers if each["high"])],
        "high_precision": config.high_precision,
    }


def show(result: dict[str, Any], high: str) -> None:
    """The result for people: what it holds, the calibration curve, the layers' shares."""
    counts = ", ".join(f"{count} in {name}" for name, count in result["found"]["compute_operators"].items())
    print(f"{result['path']}: {human_bytes(result['size_bytes'])}; {'/'.join(COMPUTE_OPS)}: {counts}")
    if calibration := result.get("calibration"):
        _show_calibration(calibration)
    report = result.get("sensitivity", {})
    if "drop" in report:
        print(f"budget: {verdict(report, result['precision'], high)}")
        if report["layers"]:
            Console(width=max(Console().width, 100), markup=False).print(
                shares_table(report, result["precision"], high)
            )


def _lengths(elements: Mapping[str, Sequence[int]]) -> str:
    """Inputs of which a row holds more or less, those that go together named together."""
    together: dict[tuple[int, ...], list[str]] = {}
    for name, ends in elements.items():
        together.setdefault(tuple(ends), []).append(name)
    varied = [f"{' and '.join(names)}: {least} to {most}" for (least, most), names in together.items() if least < most]
    return f"elements of {', '.join(varied)}" if varied else "all of one size"


def _show_calibration(report: dict[str, Any]) -> None:
    print(f"calibration: {report['rows']} rows ({_lengths(report['elements'])}), by {report['method']}")
    if report["errors"]:
        print(
            "calibration: output error "
            + ", ".join(f"{error:.3%} by {name}" for name, error in report["errors"].items())
        )
    elif report["growth"] > MOST_GROWTH:
        print(
            f"calibration: an activation grows {report['growth']:.3g}-fold past its first batch: no ranges by entropy"
        )
    table = Table("samples", *(str(point["samples"]) for point in report["curve"]), box=box.SIMPLE_HEAD)
    table.add_row("output error", *(f"{point['error']:.3%}" for point in report["curve"]))
    Console(width=max(Console().width, 100), markup=False).print(table)
    print(f"calibration: {report['conclusion']}")


def _parser() -> Parser:
    parser = Parser(__doc__, prog="python -m export.quantize")
    add_model_arguments(parser)
    parser.add_argument("--precision", required=True, choices=("fp16", "int8", "fp8"))
    parser.add_argument("--calibration-data", help="real inputs (default: build/<name>/calibration.npz)")
    parser.add_argument("--method", choices=get_args(MethodChoice), help="calibration method (default: deploy.toml's)")
    parser.add_argument("--samples", type=int, help="calibration samples at most (default: deploy.toml's)")
    parser.add_argument("--per-tensor", action="store_true", help="one scale for each weight (default: deploy.toml's)")
    parser.add_argument(
        "--weight-only", action="store_true", help="int8 weights, activations high (default: deploy.toml's)"
    )
    parser.add_argument(
        "--high-precision",
        default="fp16",
        choices=("fp16", "fp32"),
        help="of what is not quantized (default: %(default)s)",
    )
    parser.add_argument("--no-sensitivity", action="store_true", help="quantize all layers, whatever they cost")
    parser.add_argument(
        "--candidate",
        action="store_true",
        help="one of several: where it cannot be made, leave word for export.compare and exit 0",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def main() -> None:
    """Quantizes one model to one precision."""
    args = _parser().parse_args()
    if args.weight_only and args.precision != "int8":
        raise InputError(f"--weight-only: seen with --precision {args.precision}; it makes int8 weights: leave it out")
    spec = DeploymentSpec.of_model(args.model, args.models)
    precision = spec.precision
    data = args.calibration_data or need(_samples_of(spec), f"python -m export.to_onnx {flags_for(spec.name)}")
    weight_only = args.precision == "int8" and (args.weight_only or precision.weight_only)
    config = QuantConfig.of_precision(
        args.precision,
        **({"activation_bits": int(args.high_precision[2:])} if weight_only else {}),
        calibration_data=data,
        calibration_method=args.method or precision.calibration_method,
        num_samples=precision.calibration_samples if args.samples is None else args.samples,
        per_channel=precision.per_channel and not args.per_tensor,
        op_types=precision.op_types,
        keep_high=precision.keep_high,
        high_precision=args.high_precision,
    )
    wants_pass = args.precision != "fp16" and not args.no_sensitivity
    try:
        with kept_for_json(args.json):
            result = in_child(
                f"making or running the {args.precision} graph",
                lambda: quantize_model(spec, config, Source(args.model, args.models) if wants_pass else None),
            )
    except (GateFailed, Killed) as error:
        if not args.candidate:
            raise
        path = onnx_path(spec.name, args.precision)
        again = f"; to try again: rm {path}" if isinstance(error, Killed) else ""
        refuse(path, f"{error}{again}")
        result = {"precision": args.precision, "refused": f"{error}{again}"}
    if args.json:
        print(json_text(result))
    elif "refused" in result:
        print(f"{args.precision} cannot be made, the other precisions go on: {result['refused']}")
    else:
        show(result, args.high_precision)


if __name__ == "__main__":
    run_command(main)

"""Converts the fp32 graph to 16 or 8 bits; the precision is written into the graph itself.

Contract: reads `build/<name>/fp32/model.onnx` and real calibration inputs; writes `build/<name>/<precision>/model.onnx`
with unchanged input and output types. 16 bits are ModelOpt AutoCast; 8 bits are ModelOpt PTQ, whose Q/DQ nodes both
ONNX Runtime and TensorRT accept. The stage then checks the precision of the operators in the graph. An 8-bit graph
that breaks the budget goes through the sensitivity pass, which keeps the worst layers high. Beside the graph lie
sensitivity.json (each layer's share of the error) and calibration.json (would more samples help?).
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.precisions import BITS, EIGHT_BITS, PRECISIONS
from deepseek.quantization import QuantConfig
from deepseek.spec import DeploymentSpec, GateFailed, flags_for, kept_for_json
from deepseek.spec.files.folders import scratch_in
from deepseek.targets import TARGETS
from export.artifact import (
    Stopwatch,
    human_bytes,
    json_text,
    need,
    onnx_path,
    read_manifest,
    record_build,
    rows_path,
    sha256,
)
from export.cache import put_in_place, refined, stage_key
from export.graphs.graph_file import save_graph
from export.model_folder import ModelFolder
from export.precision.activation_ranges import ENDLESS, MOST_GROWTH
from export.precision.calibrated_graph import copied
from export.precision.calibration import Calibration, calibration_of
from export.precision.ptq import autocast_onnx, check_source
from export.precision.qdq import COMPUTE_OPS, found_precision, share_equal_weights
from export.precision.quantize_8bit import log, to_8_bits
from export.precision.sensitivity import shares_table, verdict
from export.rows import Row, load_rows
from export.runtimes.isolation import made_alone
from export.runtimes.onnxruntime_predictor import on_host

REPORTS = ("calibration", "sensitivity")


def prove(config: QuantConfig, found: dict[str, Any]) -> None:
    """Raises GateFailed if the graph has no operator in the precision that was asked for."""
    counts = found["compute_operators"]
    if not counts.get(f"{config.precision}_weights" if config.weight_only else config.precision):
        operators = f"{', '.join(COMPUTE_OPS[:-1])} or {COMPUTE_OPS[-1]}"
        if not counts:
            raise GateFailed(f"the graph has no {operators} to run in {config.precision}")
        why = "be too small to gain (ModelOpt skips sizes under 16), multiply two activations (wide on a CPU)"
        if config.precision not in EIGHT_BITS:
            why = "have values too large for it on calibration rows"
        raise GateFailed(
            f"no {operators} of the graph runs in {config.precision} (found: "
            f"{', '.join(f'{count} in {name}' for name, count in counts.items())}); the layers may {why}, or all be "
            "in keep_high"
        )


def quantize_model(
    spec: DeploymentSpec, config: QuantConfig, model_folder: ModelFolder | None = None
) -> dict[str, Any]:
    """Runs the stage; returns what it made. Without `model_folder` there is no sensitivity pass."""
    source = need(onnx_path(spec.name, "fp32"), f"deepseek to-onnx {flags_for(spec.name)}")
    path = onnx_path(spec.name, config.precision)
    own = need(rows_path(spec.name, "calibration"), f"deepseek to-onnx {flags_for(spec.name)}")
    data, evaluation = Path(config.calibration_data or own), load_rows(rows_path(spec.name, "evaluation"))
    calibration = calibration_of(spec, data, config.num_samples, evaluation)
    if calibration.note:
        log.print(calibration.note, soft_wrap=True)
    check_source(source, config)
    weights = read_manifest(source).sources["weights"]
    sources = {"weights": weights, "onnx": sha256(source), "calibration": sha256(data)}
    for name in REPORTS:  # reports of an earlier graph
        (path.parent / f"{name}.json").unlink(missing_ok=True)
    told = "" if model_folder is None else model_folder.data_digest()
    put_in_place(
        None if told is None else refined(stage_key(), fingerprint=told),
        path,
        lambda folder: _quantize(spec, config, sources, calibration, evaluation, folder, model_folder),
    )
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
    calibration: Calibration,
    evaluation: list[Row],
    scratch: Path,
    model_folder: ModelFolder | None,
) -> None:
    """Writes graph, reports and manifest into the folder `scratch`."""
    clock = Stopwatch()
    graph = scratch / "model.onnx"
    reports: dict[str, Any] = {}
    with scratch_in(scratch) as work, log.status(f"{config.precision} of {spec.name}"):
        if config.precision in EIGHT_BITS:
            model, reports = to_8_bits(spec, config, calibration, evaluation, work, model_folder)
        else:
            model = autocast_onnx(copied(spec, work / "autocast"), config, calibration)
        share_equal_weights(model)
        save_graph(model, graph)
    found = found_precision(graph)
    prove(config, found)
    for name, report in reports.items():
        (scratch / f"{name}.json").write_text(json_text(report) + "\n")
    settings = _settings(config, calibration, reports)
    record_build(graph, spec, config.precision, clock, found=found, sources=sources, settings=settings)


def _settings(config: QuantConfig, calibration: Calibration, reports: dict[str, Any]) -> dict[str, Any]:
    """Settings for the manifest: those asked for, and those the graph was made with."""
    layers = reports.get("sensitivity", {}).get("layers", [])
    return {
        "calibration_method": reports.get("calibration", {}).get("method", config.calibration_method),
        "samples": len(calibration.rows),
        "per_channel": config.per_channel,
        "weight_only": config.weight_only,
        "op_types": config.op_types,
        "keep_high": [*config.keep_high, *(f"^{re.escape(each['name'])}$" for each in layers if each["high"])],
        "high_precision": config.high_precision,
    }


def show(result: dict[str, Any], high: str) -> None:
    """Prints what the graph holds, the calibration curve and the layers' shares."""
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
    """The range of elements per row, for inputs whose rows differ; inputs with the same range share an entry."""
    together: dict[tuple[int, ...], list[str]] = {}
    for name, ends in elements.items():
        together.setdefault(tuple(ends), []).append(name)
    varied = [f"{' and '.join(names)}: {least} to {most}" for (least, most), names in together.items() if least < most]
    return f"elements of {', '.join(varied)}" if varied else "all of one size"


def _error_text(error: float) -> str:
    return "infinite" if error > ENDLESS else f"{error:.3%}"


def _show_calibration(report: dict[str, Any]) -> None:
    print(f"calibration: {report['rows']} rows ({_lengths(report['elements'])}), by {report['method']}")
    if report["errors"]:
        print(
            "calibration: output error "
            + ", ".join(f"{_error_text(error)} by {name}" for name, error in report["errors"].items())
        )
    elif report["growth"] > MOST_GROWTH:
        print(
            f"calibration: an activation grows {report['growth']:.3g}-fold past its first batch: no ranges by entropy"
        )
    table = Table("samples", *(str(point["samples"]) for point in report["curve"]), box=box.SIMPLE_HEAD)
    table.add_row("output error", *(_error_text(point["error"]) for point in report["curve"]))
    Console(width=max(Console().width, 100), markup=False).print(table)
    print(f"calibration: {report['conclusion']}")


def main(options: argparse.Namespace) -> None:
    spec = on_host(DeploymentSpec.to_build(options.model, options.models), options.target)
    precision = spec.precision
    high = TARGETS[options.target].high_precision
    weight_only = precision.weight_only and PRECISIONS[options.precision].may_quantize_weights_alone
    config = QuantConfig.of_precision(
        options.precision,
        **({"activation_bits": BITS[high]} if weight_only else {}),
        calibration_data=options.calibration_data,
        calibration_method=precision.calibration_method,
        num_samples=precision.calibration_samples,
        per_channel=precision.per_channel,
        op_types=precision.op_types,
        keep_high=precision.keep_high,
        high_precision=high,
    )
    eight_bits = options.precision in EIGHT_BITS
    with kept_for_json(options.json):
        result = made_alone(
            f"making or running the {options.precision} graph",
            onnx_path(spec.name, options.precision),
            lambda: quantize_model(spec, config, ModelFolder(options.model, options.models) if eight_bits else None),
            candidate=options.candidate,
        )
    if options.json:
        print(json_text(result))
    elif "refused" in result:
        print(f"{options.precision} cannot be made; the build continues without it: {result['refused']}")
    else:
        show(result, high)

"""The 8-bit graph of a model: calibrated by each method, the better one kept, the layers that cost most left high.

Contract: reads `build/<name>/fp32/model.onnx` and publishes nothing; beside the graph come the reports "calibration"
(method, output errors, the curve that says whether more samples would help) and "sensitivity" (each layer's share).

Example:
    model, reports = to_8_bits(spec, config, calibration, evaluation, work, source)
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

from deepseek.quantization import Method, QuantConfig
from deepseek.spec import BATCH, DeploymentSpec, GateFailed
from export.accuracy import too_small
from export.artifact import Row, onnx_path, save_graph
from export.budget import Baseline
from export.calibration import Calibration, lengths_of, stratified
from export.curve import Points, calibration_curve, ranges_by_samples, with_ranges, would_more_help
from export.ptq import qdq_from_onnx
from export.qdq import (
    keep_residuals_wide,
    load_graph,
    use_one_scale_a_tensor,
    use_wide_activations,
    with_8_bit_weights,
    with_unsigned_activations,
)
from export.runners import onnx_runner, outputs_of
from export.sensitivity import RANKING_ROWS, output_error, sensitivity_pass
from export.source import Predict, Source

CURVE_ROWS = 64  # evaluation rows that the curve's errors are measured on

log = Console(file=sys.stderr, markup=False)


class Trials:
    """Runs graphs that are not published yet, one after the other, in ONNX Runtime."""

    def __init__(self, spec: DeploymentSpec, folder: Path, config: QuantConfig) -> None:
        self._spec, self._path, self._config = spec, folder / "trial.onnx", config

    def predict(self, model: onnx.ModelProto) -> Predict:
        """What runs `model`; external weights are read while it is opened, so that the file may go."""
        save_graph(finished(model, self._config), self._path)  # as it will be served: its kernels count too
        run = onnx_runner(self._spec, self._path, "onnxruntime")

        def tried(inputs: Row) -> Row:
            try:
                return run(inputs)
            except Exception as error:  # ONNX Runtime's own, of many kinds
                raise GateFailed(f"a trial graph does not run: {' '.join(str(error).split())[:300]}") from error

        return tried

    def over(self, rows: list[Row]) -> Callable[[onnx.ModelProto], list[Row]]:
        """A function from a graph to its outputs on `rows`."""
        return lambda model: outputs_of(self._spec, self.predict(model), rows)


def to_8_bits(
    spec: DeploymentSpec,
    config: QuantConfig,
    calibration: Calibration,
    evaluation: list[Row],
    work: Path,
    model_folder: Source | None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The 8-bit graph and the reports "calibration" and "sensitivity"."""
    trials = Trials(spec, work, config)
    sample = stratified(evaluation, CURVE_ROWS)
    reference = trials.over(sample)(load_graph(onnx_path(spec.name, "fp32")))

    def error_of(graph: onnx.ModelProto) -> float:
        return output_error(trials.over(sample)(graph), reference)

    points, growth = ranges_by_samples(copied(spec, work / "ranges"), calibration.batches, spec.axes[BATCH].min)
    model, method, errors = _calibrated(spec, config, calibration, work, points, error_of)
    reports: dict[str, Any] = {"sensitivity": {"layers": [], "tried": []}}  # takes the place of an earlier one
    if model_folder is not None:
        baseline = Baseline.of(model_folder)
        if why := too_small(spec, baseline.metrics):
            log.print(f"warning: {why}", soft_wrap=True)
        model, reports["sensitivity"] = sensitivity_pass(
            model,
            trials.over(calibration.rows[:RANKING_ROWS]),
            lambda graph: baseline.measure(trials.predict(graph))["drop"],
            spec.precision.max_drop,
        )
    if config.weight_only:  # no ranges
        return finished(model, config), reports
    curve = calibration_curve(model, points[method], error_of)
    reports["calibration"] = {
        "method": method,
        "errors": errors,
        "growth": growth,
        "rows": len(calibration.rows),
        "elements": lengths_of(calibration.rows),
        "curve": curve,
        "conclusion": would_more_help(curve),
    }
    return finished(model, config), reports


def finished(model: onnx.ModelProto, config: QuantConfig) -> onnx.ModelProto:
    """The graph as it is published: weights stored at 8 bits, activations unsigned for ONNX Runtime on a CPU."""
    model = with_8_bit_weights(model)
    if config.precision == "int8" and config.high_precision == "fp32":
        model = with_unsigned_activations(model)
    return model


def copied(spec: DeploymentSpec, folder: Path) -> Path:
    """The fp32 graph and its external weights in a folder of their own, to be written to and beside."""
    source = onnx_path(spec.name, "fp32")
    folder.mkdir()
    for file in source.parent.glob(f"{source.name}*"):
        shutil.copyfile(file, folder / file.name)
    return folder / source.name


def _calibrated(
    spec: DeploymentSpec,
    config: QuantConfig,
    calibration: Calibration,
    work: Path,
    points: Mapping[Method, Points],
    error_of: Callable[[onnx.ModelProto], float],
) -> tuple[onnx.ModelProto, Method, dict[Method, float]]:
    """The Q/DQ graph, the method that its ranges are by, and the output error by method where both were tried.

    Where entropy cannot count an activation's range, max takes its place. ModelOpt calibrates once, by max; ranges by
    entropy are put into its graph, so that errors, curve and graph are all of the same ranges.
    """
    by_max = qdq_from_onnx(
        copied(spec, work / "max"), dataclasses.replace(config, calibration_method="max"), calibration
    )
    keep_residuals_wide(by_max)
    if not config.per_channel:
        use_one_scale_a_tensor(by_max)
    if config.weight_only:
        use_wide_activations(by_max)
    if config.calibration_method == "max" or config.weight_only or "entropy" not in points:
        return by_max, "max", {}
    final = {method: ranges[max(ranges)] for method, ranges in points.items()}
    by_entropy = with_ranges(by_max, final["entropy"], final["max"])
    if config.calibration_method == "entropy":
        return by_entropy, "entropy", {}
    errors: dict[Method, float] = {"max": error_of(by_max), "entropy": error_of(by_entropy)}
    return (by_max, "max", errors) if errors["max"] <= errors["entropy"] else (by_entropy, "entropy", errors)

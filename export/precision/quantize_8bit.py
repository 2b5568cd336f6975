"""Makes the 8-bit graph of a model: calibrates it and keeps the most sensitive layers in high precision.

Contract: reads `build/<name>/fp32/model.onnx` and publishes nothing; returns the graph with the reports "calibration"
(method, output errors, a curve over the number of samples) and "sensitivity" (each layer's share of the error).
"""

import sys
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console

from deepseek.quantization import QuantConfig
from deepseek.spec import DeploymentSpec
from export.artifact import onnx_path
from export.model_folder import ModelFolder
from export.precision.accuracy import too_small
from export.precision.accuracy_budget import Baseline, judged
from export.precision.activation_ranges import calibration_curve, would_more_help
from export.precision.calibrated_graph import UnpublishedGraphs, finished, kept_calibration
from export.precision.calibration import Calibration, lengths_of, stratified
from export.precision.sensitivity import RANKING_ROWS, output_error, sensitivity_pass
from export.rows import Row

CURVE_ROWS = 64  # evaluation rows on which the curve's errors are measured

log = Console(file=sys.stderr, markup=False)


def to_8_bits(
    spec: DeploymentSpec,
    config: QuantConfig,
    calibration: Calibration,
    evaluation: list[Row],
    work: Path,
    model_folder: ModelFolder | None,
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The 8-bit graph and the reports "calibration" and "sensitivity"."""
    graphs, sample = UnpublishedGraphs(spec, work, config), stratified(evaluation, CURVE_ROWS)
    calibrated = kept_calibration(spec, config, calibration, sample, work)
    model = calibrated.model
    reports: dict[str, Any] = {"sensitivity": {"layers": [], "tried": []}}  # replaces an earlier report
    if model_folder is not None:
        baseline = Baseline.of(model_folder)
        if why := too_small(spec, baseline.metrics):
            log.print(f"warning: {why}", soft_wrap=True)
        model, reports["sensitivity"] = sensitivity_pass(
            model,
            graphs.over(calibration.rows[:RANKING_ROWS]),
            lambda graph: baseline.judge(graphs.predict(graph)),
            lambda graph, choosing: judged(spec, *baseline.drop_on_half(graphs.predict(graph), choosing=choosing)),
        )
        if reports["sensitivity"]["layers"]:
            reports["sensitivity"]["rows"] = baseline.half_sizes()
    if config.weight_only:  # has no activation ranges
        return finished(model, config), reports
    reference = graphs.over(sample)(onnx.load(onnx_path(spec.name, "fp32")))
    curve = calibration_curve(
        model, calibrated.points, lambda graph: output_error(graphs.over(sample)(graph), reference)
    )
    reports["calibration"] = {
        "method": calibrated.method,
        "errors": calibrated.errors,
        "growth": calibrated.growth,
        "rows": len(calibration.rows),
        "elements": lengths_of(calibration.rows),
        "curve": curve,
        "conclusion": would_more_help(curve),
    }
    return finished(model, config), reports

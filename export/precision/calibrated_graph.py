"""Adds calibrated Q/DQ pairs to the fp32 graph: tries each calibration method and keeps the better one.

Contract: reads `build/<name>/fp32/model.onnx` and publishes nothing. A build caches the result, so that a changed
accuracy budget needs no new calibration.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from deepseek.precisions import Method
from deepseek.quantization import QuantConfig
from deepseek.spec import DeploymentSpec, GateFailed, one_line
from export.artifact import onnx_path
from export.cache import fill, stage_key
from export.graphs.graph_file import save_graph
from export.model_folder import Predict
from export.precision.activation_ranges import Points, ranges_by_samples, with_ranges
from export.precision.calibration import Calibration
from export.precision.cpu.biases import fit_scales_to_biases
from export.precision.cpu.pairs import pair_convolution_outputs, use_unsigned_activations
from export.precision.cpu.products import (
    batched_weights,
    merge_biases,
    separate_readers,
    with_wide_attention,
)
from export.precision.ptq import qdq_from_onnx
from export.precision.qdq import (
    keep_residuals_wide,
    quantize_weights,
    use_one_scale_a_tensor,
    use_wide_activations,
)
from export.precision.sensitivity import output_error
from export.rows import Row
from export.runtimes.batching import outputs_of
from export.runtimes.onnxruntime_predictor import onnx_predictor


@dataclass(frozen=True, kw_only=True)
class CalibratedGraph:
    """A graph with Q/DQ pairs around activations and (still wide) weights, and how their ranges were found."""

    model: onnx.ModelProto
    method: Method
    errors: dict[Method, float]
    """Output error by method, if both were tried."""
    points: Points
    """Ranges by number of samples, for the method that was kept."""
    growth: float
    """Largest ratio of an activation's range to its range in the first batch."""


class UnpublishedGraphs:
    """Runs graphs that are not published yet, one at a time, in ONNX Runtime."""

    def __init__(self, spec: DeploymentSpec, folder: Path, config: QuantConfig) -> None:
        self._spec, self._path, self._config = spec, folder / "trial.onnx", config

    def predict(self, model: onnx.ModelProto) -> Predict:
        """A predictor of `model`. External weights are read on opening, so the file may be removed afterwards."""
        save_graph(finished(model, self._config), self._path)  # as it will be served, with the same kernels
        run = onnx_predictor(self._spec, self._path, "onnxruntime")

        def tried(inputs: Row) -> Row:
            try:
                return run(inputs)
            except Exception as error:  # ONNX Runtime raises many types
                raise GateFailed(f"a trial graph does not run: {one_line(error)}") from error

        return tried

    def over(self, rows: list[Row]) -> Callable[[onnx.ModelProto], list[Row]]:
        """A function from a graph to its outputs on `rows`."""
        return lambda model: outputs_of(self._spec, self.predict(model), rows)


def finished(model: onnx.ModelProto, config: QuantConfig) -> onnx.ModelProto:
    """The graph to publish: weights stored at 8 bits, in the form that ONNX Runtime computes in integers on a CPU."""
    graph = deepcopy(model)
    if not _on_cpu(config):
        quantize_weights(graph)
        return graph
    fit_scales_to_biases(graph)
    quantize_weights(graph)
    use_unsigned_activations(graph)
    merge_biases(graph)
    separate_readers(graph)
    return graph


def _on_cpu(config: QuantConfig) -> bool:
    """Whether ONNX Runtime runs the graph on a CPU; beside int8, other targets have fp16."""
    return config.precision == "int8" and config.high_precision == "fp32"


def copied(spec: DeploymentSpec, folder: Path) -> Path:
    """Copies the fp32 graph and its external weights to a new folder, where they may be changed."""
    source = onnx_path(spec.name, "fp32")
    folder.mkdir()
    for file in source.parent.glob(f"{source.name}*"):
        shutil.copyfile(file, folder / file.name)
    return folder / source.name


def kept_calibration(
    spec: DeploymentSpec, config: QuantConfig, calibration: Calibration, sample: list[Row], work: Path
) -> CalibratedGraph:
    """The result of `calibrate`, from the cache if a build has run the same calibration before."""
    folder = work / "calibrated"
    folder.mkdir()
    key = stage_key(f"calibrate {config.precision}")
    fill(folder, key, lambda folder: _write(calibrate(spec, config, calibration, sample, work), folder))
    return _read(folder)


def _write(calibrated: CalibratedGraph, folder: Path) -> None:
    facts = {
        each.name: getattr(calibrated, each.name) for each in dataclasses.fields(calibrated) if each.name != "model"
    }
    (folder / "calibrated.json").write_text(json.dumps(facts))
    save_graph(calibrated.model, folder / "model.onnx")


def _read(folder: Path) -> CalibratedGraph:
    facts: dict[str, Any] = json.loads((folder / "calibrated.json").read_text())
    facts["points"] = {int(samples): ranges for samples, ranges in facts["points"].items()}
    return CalibratedGraph(model=onnx.load(folder / "model.onnx"), **facts)


def calibrate(
    spec: DeploymentSpec, config: QuantConfig, calibration: Calibration, sample: list[Row], work: Path
) -> CalibratedGraph:
    """The calibrated graph; methods are compared by their output error on the rows of `sample`.

    Falls back to max if entropy cannot count an activation's range. ModelOpt calibrates once, by max; entropy ranges
    are put into its graph, so that errors, curve and graph use the same ranges.
    """
    points, growth = ranges_by_samples(copied(spec, work / "ranges"), calibration.batches, convolutions=_on_cpu(config))
    by_max = qdq_from_onnx(
        copied(spec, work / "max"), dataclasses.replace(config, calibration_method="max"), calibration
    )
    keep_residuals_wide(by_max)
    if _on_cpu(config):
        pair_convolution_outputs(by_max, points["max"][max(points["max"])])
        by_max = with_wide_attention(by_max)
        use_one_scale_a_tensor(by_max, batched_weights(by_max))
    if not config.per_channel:
        use_one_scale_a_tensor(by_max)
    if config.weight_only:
        use_wide_activations(by_max)
    graphs: dict[Method, onnx.ModelProto] = {"max": by_max}
    if config.calibration_method != "max" and not config.weight_only and "entropy" in points:
        final = {method: ranges[max(ranges)] for method, ranges in points.items()}
        graphs["entropy"] = with_ranges(by_max, final["entropy"], final["max"])
    errors: dict[Method, float] = {}
    method = list(graphs)[-1]
    if config.calibration_method == "auto" and len(graphs) > 1:
        runs = UnpublishedGraphs(spec, work, config).over(sample)
        reference = runs(onnx.load(onnx_path(spec.name, "fp32")))
        errors = {tried: output_error(runs(graph), reference) for tried, graph in graphs.items()}
        method = min(errors, key=errors.__getitem__)
    return CalibratedGraph(model=graphs[method], method=method, errors=errors, points=points[method], growth=growth)

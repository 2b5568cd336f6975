"""The ranges of a graph's activations, by number of calibration samples, and whether more samples would help.

Contract: one run over all samples records the ranges after 8, 16, 32, ... samples. A build uses the ranges of all
samples. `calibration_curve` puts the earlier ranges into the finished Q/DQ graph and measures its output error, so a
point costs one short run, not a calibration. Its last point is the graph as built.
"""

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import HistogramCollector

from deepseek.precisions import Method
from deepseek.spec import GateFailed
from export.precision.qdq import COMPUTE_OPS, producers_of, quantized_names
from export.quiet import quiet
from export.rows import Row

FIRST = 8
FLAT = 0.05  # share of the final error; smaller differences are ignored
# Entropy keeps the first batch's bin width and tries each range, so its cost is (128 bins x growth) squared.
MOST_GROWTH = 64.0
ENDLESS = 1000.0  # output errors beyond this come from NaN or Inf at other places than in fp32
_BINS = 128  # the default of ONNX Runtime's calibrator
_LEAST_PEAK = 1e-30  # of a range that can be divided into bins: smaller numbers have too few digits


Points = dict[int, dict[str, float]]  # samples -> activation -> range


class ActivationRanges:
    """Largest magnitude or entropy threshold of each activation, over the batches seen so far."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.growth = 1.0
        """Largest ratio of an activation's range to that in its first batch with a range."""
        self._first: dict[str, float] = {}
        self._histograms = HistogramCollector("entropy", False, _BINS, _BINS, None, None)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Adds the activations of a batch; raises GateFailed if one is NaN or Inf."""
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise GateFailed(
                    f"activation {name!r} is NaN or Inf on a calibration sample, so it has no range: leave such "
                    "samples out, or replace NaN and Inf in forward"
                )
            peak = float(np.abs(value).max(initial=0))
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            if peak >= _LEAST_PEAK:
                self.growth = max(self.growth, self.peaks[name] / self._first.setdefault(name, peak))
        if self.growth <= MOST_GROWTH:
            with quiet():
                self._histograms.collect_value({name: [values[name]] for name in values.keys() & self._first.keys()})

    def of(self, method: Method) -> dict[str, float]:
        """The magnitude that 127 (fp8: 448) represents, by activation."""
        if method == "max":
            return dict(self.peaks)
        with quiet():
            found = self._histograms.compute_entropy()
        return {name: float(max(abs(low), abs(high))) for name, (low, high, *_) in found.items()}


def ranges_by_samples(
    path: Path, batches: Iterable[Row], *, convolutions: bool = False
) -> tuple[dict[Method, Points], float]:
    """Ranges after 8, 16, 32, ... and all samples, by method; and the growth.

    They are of the activations that compute operators read; with `convolutions`, also of what convolutions, and a Relu
    behind one, return.

    Past `MOST_GROWTH`, entropy is left out: it would take too long. `path` is the fp32 graph; a copy of it
    is written beside it, so that external weights are found.
    """
    activations, ranges, seen, due = _activations(path, convolutions), ActivationRanges(), 0, FIRST
    points: dict[Method, Points] = {"max": {}, "entropy": {}}
    batches = list(batches)
    for batch in batches:
        ranges.add(activations(batch))
        seen += len(next(iter(batch.values())))
        if seen >= due or batch is batches[-1]:
            for method in points:
                points[method][seen] = ranges.of(method)
            due = max(2 * due, seen + 1)
        if ranges.growth > MOST_GROWTH:
            points.pop("entropy", None)
    return points, ranges.growth


def _activations(path: Path, convolutions: bool) -> Callable[[Row], Row]:
    """A function from inputs to the activations of `ranges_by_samples`, including graph inputs."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    read = {name for node in graph.node if node.op_type in COMPUTE_OPS for name in node.input[:2]}
    if convolutions:
        returned = {node.output[0] for node in graph.node if node.op_type == "Conv"}
        functions = [node for node in graph.node if node.op_type in ("Relu", "Clip")]
        read |= returned | {node.output[0] for node in functions if node.input[0] in returned}
    made = producers_of(graph)
    graph.output.extend(
        onnx.ValueInfoProto(name=name) for name in sorted(read & made.keys() - {value.name for value in graph.output})
    )
    beside = path.with_name("watched.onnx")
    onnx.save(model, beside)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(beside, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs() if output.name in read and "float" in output.type]
    inputs = [value.name for value in session.get_inputs() if value.name in read and "float" in value.type]
    if not names and not inputs:
        raise GateFailed(f"no {'/'.join(COMPUTE_OPS)} of the graph reads an activation (those in subgraphs stay high)")

    def run(batch: Row) -> Row:
        found = dict(zip(names, session.run(names, batch), strict=True)) if names else {}
        return {name: batch[name] for name in inputs} | found

    return run


def with_ranges(model: onnx.ModelProto, ranges: Mapping[str, float], final: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of the Q/DQ graph with activation scales from `ranges` instead of `final`.

    Scales are linear in the range. Values that are not calibrated (Softmax has a fixed range) are in neither.
    """
    copy = deepcopy(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    for name, pair in quantized_names(copy).items():
        if ranges.get(name) and final.get(name):
            # A value and its maxima share a scale (`pair_convolution_outputs`): each is changed once.
            for tensor in [tensors.pop(scale) for scale in {node.input[1] for node in pair} if scale in tensors]:
                scale = onnx.numpy_helper.to_array(tensor)
                scale = (scale * (ranges[name] / final[name])).astype(scale.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    return copy


def calibration_curve(
    model: onnx.ModelProto, points: Points, error_of: Callable[[onnx.ModelProto], float]
) -> list[dict[str, Any]]:
    """The output error for each number of samples; `model` has the ranges of all samples."""
    final = points[max(points)]
    return [
        {"samples": samples, "error": error_of(with_ranges(model, points[samples], final))}
        for samples in sorted(points)
    ]


def would_more_help(curve: list[dict[str, Any]]) -> str:
    """The conclusion from the curve, in one sentence."""
    last = curve[-1]
    if len(curve) < 3:
        return f"{last['samples']} samples are too few to see a trend: add samples"
    if last["error"] > ENDLESS:
        return "NaN or Inf at other places than in fp32: more samples will not help"
    near = [abs(point["error"] - last["error"]) <= FLAT * last["error"] for point in curve]
    flat = next(index for index in range(len(curve)) if all(near[index:]))
    if flat < len(curve) - 1:
        return f"flat from {curve[flat]['samples']} samples on: more will not help"
    before = curve[-2]
    change = (last["error"] - before["error"]) / before["error"] if before["error"] else 1.0
    if change < 0:
        return f"still falling ({change:+.0%} from {before['samples']} to {last['samples']}): add samples"
    return (
        f"not settled ({change:+.0%} from {before['samples']} to {last['samples']}): ranges still grow with rare "
        "values; add samples, or try the other calibration method"
    )

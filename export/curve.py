"""Would more calibration samples help? The output error by the number of samples, from one pass over them.

Contract: the ranges that 8, 16, 32, ... samples give are found on the way to the last one and put into the
finished Q/DQ graph, so that the curve costs one run over the samples and one short run a point, not one
calibration a point. With all samples it is the graph as it was built.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import HistogramCollector

from deepseek.quantization import Method
from export.artifact import Row
from export.qdq import COMPUTE_OPS, producers_of

FIRST = 8
FLAT = 0.05  # of the final error: what is nearer than this makes no difference
# Entropy counts in bins of the first batch's width, and tries each range: 128 bins x growth, squared.
MOST_GROWTH = 64.0
_BINS = 128  # as ONNX Runtime's calibrator has them by default


class Ranges:
    """Largest magnitude or entropy threshold of each activation, over the batches seen so far."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.growth = 1.0
        """How far a range has outgrown the one of the first batch."""
        self._first: dict[str, float] = {}
        self._histograms = HistogramCollector("entropy", False, _BINS, _BINS, None, None)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Takes in the activations of a batch."""
        for name, value in values.items():
            peak = float(np.abs(value).max(initial=0))
            first = self._first.setdefault(name, peak)
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            if first > 0:
                self.growth = max(self.growth, self.peaks[name] / first)
        if self.growth <= MOST_GROWTH:
            with _silent():
                self._histograms.collect_value({name: [value] for name, value in values.items()})

    def of(self, method: Method) -> dict[str, float]:
        """The magnitude that 127 (fp8: 448) stands for, by activation."""
        if method == "max":
            return dict(self.peaks)
        with _silent():
            found = self._histograms.compute_entropy()
        return {name: float(max(abs(low), abs(high))) for name, (low, high, *_) in found.items()}


def ranges_by_samples(path: Path, batches: Iterable[Row], method: Method) -> tuple[dict[int, dict[str, float]], float]:
    """Ranges after 8, 16, 32, ... and all samples; and the growth, past `MOST_GROWTH` of which entropy is hopeless.

    `path` is the fp32 graph; a copy of it is written beside it, so that external weights are found.
    """
    ranges, points, seen, due = Ranges(), {}, 0, FIRST
    session, names = _watched(path)
    for batch in batches:
        ranges.add(dict(zip(names, session.run(names, batch), strict=True)))
        seen += len(next(iter(batch.values())))
        if ranges.growth > MOST_GROWTH and method == "entropy":
            return {}, ranges.growth
        if seen >= due:
            points[seen] = ranges.of(method)
            due = max(2 * due, seen + 1)
    points[seen] = ranges.of(method)
    return points, ranges.growth


def _watched(path: Path) -> tuple[onnxruntime.InferenceSession, list[str]]:
    """A session that also gives the float activations that compute operators read."""
    model = onnx.load(path, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    names = {
        name: None
        for node in model.graph.node
        if node.op_type in COMPUTE_OPS
        for name in node.input[:2]
        if name not in weights
    }
    made = producers_of(model.graph)
    outputs = {value.name for value in model.graph.output}
    inputs = {value.name for value in model.graph.input}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name in made and name not in outputs)
    beside = path.with_name("watched.onnx")
    onnx.save(model, beside)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(beside, options, providers=["CPUExecutionProvider"])
    given = {output.name: output.type for output in session.get_outputs()}
    return session, [name for name in names if "float" in given.get(name, "") and name not in inputs]


@contextlib.contextmanager
def _silent():  # type: ignore[no-untyped-def]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def with_ranges(model: onnx.ModelProto, ranges: Mapping[str, float], final: Mapping[str, float]) -> onnx.ModelProto:
    """The Q/DQ graph with its activations' scales as `ranges` would have made them instead of `final`.

    Scales are linear in the range. What is not calibrated (Softmax has a fixed range) has no entry in both.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        name = tensor.name.removesuffix("_scale")
        if name != tensor.name and ranges.get(name) and final.get(name):
            scale = onnx.numpy_helper.to_array(tensor)
            scale = (scale * (ranges[name] / final[name])).astype(scale.dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    return copy


def calibration_curve(
    model: onnx.ModelProto, points: Mapping[int, Mapping[str, float]], error_of: Callable[[onnx.ModelProto], float]
) -> list[dict[str, Any]]:
    """The output error that each number of samples would have given."""
    final = points[max(points)]
    return [
        {"samples": samples, "error": error_of(with_ranges(model, points[samples], final))}
        for samples in sorted(points)
    ]


def would_more_help(curve: list[dict[str, Any]]) -> str:
    """The plain sentence under the curve."""
    last = curve[-1]
    if len(curve) < 3:
        return f"{last['samples']} samples are too few to see a trend: add samples"
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

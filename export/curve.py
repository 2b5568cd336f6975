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
from deepseek.spec import GateFailed
from export.artifact import Row
from export.qdq import COMPUTE_OPS, producers_of, quantized_names

FIRST = 8
MOST_ACTIVATION_BYTES = 1 << 30  # of a batch, all held at once; past this rows go one by one
FLAT = 0.05  # of the final error: what is nearer than this makes no difference
# Entropy counts in bins of the first batch's width, and tries each range: 128 bins x growth, squared.
MOST_GROWTH = 64.0
_BINS = 128  # as ONNX Runtime's calibrator has them by default


Points = dict[int, dict[str, float]]  # samples -> activation -> range


class Ranges:
    """Largest magnitude or entropy threshold of each activation, over the batches seen so far."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.growth = 1.0
        """How far a range has outgrown the one of the first batch."""
        self._first: dict[str, float] = {}
        self._histograms = HistogramCollector("entropy", False, _BINS, _BINS, None, None)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Takes in the activations of a batch; GateFailed where one has no range."""
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise GateFailed(f"activation {name!r} is NaN or Inf on a calibration sample: it has no range")
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


def ranges_by_samples(path: Path, batches: Iterable[Row], least: int = 1) -> tuple[dict[Method, Points], float]:
    """Ranges after 8, 16, 32, ... and all samples, by method; and the growth. `least`: the smallest batch.

    Past `MOST_GROWTH` there are none of entropy, which could not be counted. `path` is the fp32 graph; a copy of it
    is written beside it, so that external weights are found.
    """
    activations, ranges, seen, due = _activations(path), Ranges(), 0, FIRST
    points: dict[Method, Points] = {"max": {}, "entropy": {}}
    batches = _that_fit(list(batches), activations, least)
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


def _that_fit(batches: list[Row], activations: Callable[[Row], Row], least: int) -> list[Row]:
    """The batches as they are; taken apart where the activations of the largest one would take too much memory."""
    largest = max(batches, key=lambda batch: sum(array.size for array in batch.values()))
    first, rows = _parts(largest, least)[0], len(next(iter(largest.values())))
    taken = sum(array.nbytes for array in activations(first).values())
    if taken / least * rows <= MOST_ACTIVATION_BYTES:
        return batches
    return [part for batch in batches for part in _parts(batch, least)]


def _parts(batch: Row, least: int) -> list[Row]:
    """Batches of the smallest size, the last one as large as what is left."""
    rows = len(next(iter(batch.values())))
    starts = range(0, rows - least + 1, least)
    ends = [*starts[1:], rows]
    return [{name: array[start:end] for name, array in batch.items()} for start, end in zip(starts, ends, strict=True)]


def _activations(path: Path) -> Callable[[Row], Row]:
    """A function from inputs to the float activations that compute operators read, those among the inputs included."""
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    read = {name for node in graph.node if node.op_type in COMPUTE_OPS for name in node.input[:2]}
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
        return found | {name: batch[name] for name in inputs}

    return run


@contextlib.contextmanager
def _silent():  # type: ignore[no-untyped-def]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def with_ranges(model: onnx.ModelProto, ranges: Mapping[str, float], final: Mapping[str, float]) -> onnx.ModelProto:
    """The Q/DQ graph with its activations' scales as `ranges` would have made them instead of `final`.

    Scales are linear in the range. What is not calibrated (Softmax has a fixed range) has no entry in both.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    for name, pair in quantized_names(copy).items():
        if ranges.get(name) and final.get(name):
            for tensor in {node.input[1]: tensors[node.input[1]] for node in pair}.values():
                scale = onnx.numpy_helper.to_array(tensor)
                scale = (scale * (ranges[name] / final[name])).astype(scale.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    return copy


def calibration_curve(
    model: onnx.ModelProto, points: Points, error_of: Callable[[onnx.ModelProto], float]
) -> list[dict[str, Any]]:
    """The output error that each number of samples would have given; `model` has the ranges of all."""
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

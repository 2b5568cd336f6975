"""The ranges of activations over calibration rows: by the largest magnitude, or by entropy.

Contract: one run over all rows records the ranges; `with_ranges` puts them into a finished Q/DQ graph, which costs no
second calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization.calibrate import HistogramCollector

from deepseek.quantization import Method
from deepseek.spec import GateFailed
from export.precision.qdq import COMPUTE_OPS, producers_of, quantized_names
from export.quiet import quiet
from export.rows import Row

# Entropy keeps the first batch's bin width and tries each range, so its cost is (128 bins x growth) squared.
MOST_GROWTH = 64.0
_BINS = 128  # the default of ONNX Runtime's calibrator

Ranges = dict[str, float]
"""The magnitude that 127 (fp8: 448) represents, by activation."""


class ActivationRanges:
    """Largest magnitude or entropy threshold of each activation, over the batches seen so far."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}
        self.growth = 1.0
        """Largest ratio of an activation's range to its range in the first batch."""
        self._first: dict[str, float] = {}
        self._histograms = HistogramCollector("entropy", False, _BINS, _BINS, None, None)

    def add(self, values: Mapping[str, np.ndarray]) -> None:
        """Adds the activations of a batch; raises GateFailed if one is NaN or Inf."""
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise GateFailed(f"activation {name!r} is NaN or Inf on a calibration sample: it has no range")
            peak = float(np.abs(value).max(initial=0))
            first = self._first.setdefault(name, peak)
            self.peaks[name] = max(self.peaks.get(name, 0.0), peak)
            if first > 0:
                self.growth = max(self.growth, self.peaks[name] / first)
        if self.growth <= MOST_GROWTH:
            with quiet():
                self._histograms.collect_value({name: [value] for name, value in values.items()})

    def of(self, method: Method) -> Ranges:
        if method == "max":
            return dict(self.peaks)
        with quiet():
            found = self._histograms.compute_entropy()
        return {name: float(max(abs(low), abs(high))) for name, (low, high, *_) in found.items()}


def ranges_of(path: Path, batches: Iterable[Row]) -> tuple[dict[Method, Ranges], float]:
    """The ranges over all batches, by method; and the growth.

    Past `MOST_GROWTH`, entropy is left out: it would take too long. `path` is the fp32 graph; a copy of it is written
    beside it, so that external weights are found.
    """
    activations, ranges = _activations(path), ActivationRanges()
    for batch in batches:
        ranges.add(activations(batch))
    methods: tuple[Method, ...] = ("max", "entropy") if ranges.growth <= MOST_GROWTH else ("max",)
    return {method: ranges.of(method) for method in methods}, ranges.growth


def _activations(path: Path) -> Callable[[Row], Row]:
    """A function from inputs to the float activations that compute operators read, including graph inputs."""
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


def with_ranges(model: onnx.ModelProto, ranges: Mapping[str, float], before: Mapping[str, float]) -> onnx.ModelProto:
    """A copy of the Q/DQ graph with activation scales from `ranges` instead of `before`.

    Scales are linear in the range. Values that are not calibrated (Softmax has a fixed range) are in neither.
    """
    copy = deepcopy(model)
    tensors = {tensor.name: tensor for tensor in copy.graph.initializer}
    for name, pair in quantized_names(copy).items():
        if ranges.get(name) and before.get(name):
            for tensor in {node.input[1]: tensors[node.input[1]] for node in pair}.values():
                scale = onnx.numpy_helper.to_array(tensor)
                scale = (scale * (ranges[name] / before[name])).astype(scale.dtype)
                tensor.CopyFrom(onnx.numpy_helper.from_array(scale, tensor.name))
    return copy

"""Fits the scales of weights to the biases, which ONNX Runtime adds as int32 on a CPU.

One step of a bias is the scale of the activation times that of the weights. Where the weights of a channel are next to
0, as of one that training left unused, its bias has more steps than an int32 holds. ONNX Runtime does not check this,
and adds a wrong bias in a convolution. Where all are 0, ModelOpt's scale is 1, and the bias has too few steps.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx

from export.precision.cpu.pairs import readers_of
from export.precision.qdq import COMPUTE_OPS, pair_before, producers_of

Values = np.ndarray[Any, Any]
_MOST_STEPS = 2**28  # twice as many behind a Relu, whose steps are half as large; the product needs room too
_SMALLEST = 1e-20  # a scale of weights that are 0


def fit_scales_to_biases(model: onnx.ModelProto) -> None:
    """Makes each channel's bias fit into an int32; channels without weights keep their biases.

    `model` has wide weights. Their larger steps add less than a thousandth of the bias as an error.
    """
    graph, producers, readers = model.graph, producers_of(model.graph), readers_of(model.graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type not in COMPUTE_OPS:
            continue
        activation, pair = (pair_before(name, producers)[1] for name in node.input[:2])
        if activation is None or pair is None or pair.input[0] not in producers:
            continue
        names = (
            bias_of(node, readers, outputs)[0],
            producers[pair.input[0]].input[0],
            activation.input[1],
            pair.input[1],
        )
        if not all(name in tensors for name in names):
            continue
        bias, weights, of_activation, scales = (onnx.numpy_helper.to_array(tensors[name]) for name in names)
        if bias.ndim == 1 and np.isfinite(bias).all():
            fitting = _fitting(bias, weights, of_activation, scales, pair)
            tensors[names[-1]].CopyFrom(onnx.numpy_helper.from_array(fitting, names[-1]))


def _fitting(bias: Values, weights: Values, of_activation: Values, scales: Values, pair: onnx.NodeProto) -> Values:
    """The scales of the weights, larger where the bias needs it: one for each channel, or one for all."""
    axis = next((attribute.i for attribute in pair.attribute if attribute.name == "axis"), 1) % weights.ndim
    used = weights.any(axis=tuple(each for each in range(weights.ndim) if each != axis))
    least = np.abs(bias) / (_MOST_STEPS * of_activation)
    if scales.ndim == 0:
        used, least = used.any(), least.max()
    if used.shape != scales.shape or least.shape != scales.shape:
        return scales
    return np.maximum(np.where(used, scales, _SMALLEST), least).astype(scales.dtype)


def bias_of(
    node: onnx.NodeProto, readers: Mapping[str, list[onnx.NodeProto]], outputs: Collection[str]
) -> tuple[str, str]:
    """The names of a layer's bias ("" if it has none) and of the sum with it. A MatMul has an Add behind it."""
    output = node.output[0]
    found = readers.get(output, [])
    if node.op_type == "MatMul" and output not in outputs and [each.op_type for each in found] == ["Add"]:
        return next((name for name in found[0].input if name != output), ""), found[0].output[0]
    return node.input[2] if node.op_type in ("Gemm", "Conv") and len(node.input) > 2 else "", output

"""Shapes the Q/DQ pairs of int8 so that ONNX Runtime computes in 8 bits on a CPU.

ONNX Runtime runs a convolution in 8 bits only between two pairs, and a product only on unsigned activations. Otherwise
it computes in fp32 and dequantizes the weights at every call, which is slower than the fp32 graph.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from export.precision.qdq import CARRIERS, Producers, drop_unread, pair_before, producers_of, replace_nodes, subgraphs

_LOWEST = {"Relu": 0.0, "Sigmoid": 0.0, "Softmax": 0.0, "Gelu": -0.17, "HardSwish": -0.375}
"""The least value of an activation function."""
_OF_SILU = -0.2785  # x times Sigmoid(x)


def pair_convolution_outputs(model: onnx.ModelProto, ranges: Mapping[str, float]) -> None:
    """Gives the output of each quantized convolution, or that of its Relu, a pair, if a node reads it wide.

    ModelOpt leaves it wide before an addition, a concatenation or a pooling, as TensorRT wants it. `ranges`: the
    magnitude that 127 represents, by output.
    """
    graph, producers, readers = model.graph, producers_of(model.graph), readers_of(model.graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}

    def behind_relu(output: str) -> str:
        """The output of a Relu that alone reads `output`; ONNX Runtime drops it before a QuantizeLinear."""
        (relu, *others) = readers.get(output) or [onnx.NodeProto()]
        return relu.output[0] if not others and is_relu(relu, tensors) and relu.output[0] not in outputs else output

    quantized = {
        node.output[0]
        for node in graph.node
        if node.op_type == "Conv" and all(pair_before(name, producers)[1] is not None for name in node.input[:2])
    }
    values = {behind_relu(output): output for output in sorted(quantized - outputs) if ranges.get(output)}
    pairs = {
        value: _existing_pair(value, readers)
        or _new_pair(graph, value, ranges.get(value) or ranges[output], _pair_behind_pooling(value, readers))
        for value, output in values.items()
        if [node.op_type for node in readers.get(value, [])] != ["QuantizeLinear"]
    }
    moved = {node.output[0] for pair in pairs.values() for node in pair}
    narrow, nodes = {value: pair[1].output[0] for value, pair in pairs.items()}, []
    for node in graph.node:
        if node.output[0] not in moved:
            node.input[:] = [narrow.get(name, name) for name in node.input]
            nodes += [node, *pairs.get(node.output[0], ())]
    replace_nodes(graph, nodes)


def readers_of(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that read each value, by the value's name; for a subgraph, the nodes inside."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
        for subgraph in subgraphs(node):
            for name, inside in readers_of(subgraph).items():
                readers.setdefault(name, []).extend(inside)
    return readers


def _existing_pair(
    output: str, readers: Mapping[str, list[onnx.NodeProto]]
) -> tuple[onnx.NodeProto, onnx.NodeProto] | None:
    for quantize in readers.get(output, []):
        if quantize.op_type == "QuantizeLinear":
            return quantize, readers[quantize.output[0]][0]
    return None


def _pair_behind_pooling(value: str, readers: Mapping[str, list[onnx.NodeProto]]) -> onnx.NodeProto | None:
    """The QuantizeLinear of the maxima of a value; with the same scale on both sides, pooling runs in 8 bits."""
    (pooling, *others) = readers.get(value) or [onnx.NodeProto()]
    behind = readers.get(pooling.output[0], []) if pooling.op_type == "MaxPool" and not others else []
    return behind[0] if [node.op_type for node in behind] == ["QuantizeLinear"] else None


def _new_pair(
    graph: onnx.GraphProto, value: str, magnitude: float, like: onnx.NodeProto | None
) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """A pair with ModelOpt's names, in which 127 represents the magnitude, or with the scale of `like`."""
    scale, zero = like.input[1:3] if like is not None else (f"{value}_scale", f"{value}_zero_point")
    if like is None:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(magnitude / 127, np.float32), scale))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(0, np.int8), zero))
    quantize, dequantize = (f"{value}_{operator}" for operator in ("QuantizeLinear", "DequantizeLinear"))
    return (
        onnx.helper.make_node("QuantizeLinear", [value, scale, zero], [f"{quantize}_Output"], name=quantize),
        onnx.helper.make_node(
            "DequantizeLinear", [f"{quantize}_Output", scale, zero], [f"{dequantize}_Output"], name=dequantize
        ),
    )


def use_unsigned_activations(model: onnx.ModelProto) -> None:
    """Makes int8 activations uint8 with a zero point of 128: the same steps, the same values.

    ONNX Runtime's x86 kernels take unsigned activations. It converts signed pairs itself, except one that several
    products read: it runs those in fp32 and dequantizes their weights at every call.

    Behind a function with few or no negative values (Relu, Gelu, SiLU, ...) the steps cover its values alone, and are
    about half as large. Behind a Relu the zero point is 0: QuantizeLinear then clips as the Relu does, so ONNX Runtime
    drops the Relu. It computes a convolution in 8 bits only if QuantizeLinear follows directly.
    """
    graph, producers = model.graph, producers_of(model.graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    signed = {
        node.output[0]: _steps(node, producers, tensors)
        for node in graph.node
        if node.op_type == "QuantizeLinear"
        and len(node.input) > 2
        and tensors[node.input[2]].data_type == onnx.TensorProto.INT8
        and not tensors[node.input[2]].dims  # per channel: a weight behind another node
    }
    for node in graph.node:
        between = {"QuantizeLinear": node.output[0], "DequantizeLinear": node.input[0]}.get(node.op_type)
        if between in signed:
            step, zero = signed[between]
            for place, value, name in ((1, step, f"{between}_step"), (2, zero, f"zero_point_{zero}_of_uint8")):
                if name not in tensors:
                    tensors[name] = onnx.numpy_helper.from_array(value, name)
                    graph.initializer.append(tensors[name])
                node.input[place] = name
    for value in [value for value in graph.value_info if value.name in signed]:
        graph.value_info.remove(value)
    drop_unread(graph)


def _steps(
    quantize: onnx.NodeProto, producers: Producers, tensors: Mapping[str, onnx.TensorProto]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Scale and zero point, uint8, for a value that has signed ones: up to the same largest value."""
    step = onnx.numpy_helper.to_array(tensors[quantize.input[1]])
    lowest, largest = _lowest(quantize.input[0], producers, tensors), 127 * float(step)
    if -lowest >= largest:
        return step, np.array(128, np.uint8)
    zero = math.ceil(-lowest * 255 / (largest - lowest))
    return np.asarray(largest / (255 - zero), step.dtype), np.array(zero, np.uint8)


def _lowest(name: str, producers: Producers, tensors: Mapping[str, onnx.TensorProto]) -> float:
    """The least value that a value may have, or minus infinity."""
    node = producers.get(name)
    while node is not None and node.op_type in ("MaxPool", "QuantizeLinear", "DequantizeLinear", *CARRIERS):
        node = producers.get(node.input[0])
    if node is None:
        return -math.inf
    if is_relu(node, tensors):
        return 0
    if node.op_type == "Mul" and any(
        (other := producers.get(node.input[1 - place])) is not None
        and other.op_type == "Sigmoid"
        and other.input[0] == node.input[place]
        for place in (0, 1)
    ):
        return _OF_SILU
    return _LOWEST.get(node.op_type, -math.inf)


def is_relu(node: onnx.NodeProto, tensors: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is a Relu, or a Clip at 0."""
    if node.op_type == "Clip" and len(node.input) > 1 and node.input[1] in tensors:
        return bool(onnx.numpy_helper.to_array(tensors[node.input[1]]) == 0)
    return node.op_type == "Relu"

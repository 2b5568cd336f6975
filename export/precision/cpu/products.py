"""Shapes the products of an int8 graph (MatMul, Gemm) so that ONNX Runtime computes them fast in 8 bits on a CPU.

ONNX Runtime runs a product with a bias in 8 bits only as a Gemm with a bias of int32. With a float bias it computes a
Gemm in fp32 and dequantizes the weights at every call, which is slower than the fp32 graph.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import onnx

from export.precision.cpu.biases import bias_of
from export.precision.cpu.pairs import is_relu, readers_of
from export.precision.qdq import CARRIERS, Producers, drop_unread, pair_before, producers_of, replace_nodes, with_high

_LARGEST_BIAS = 2**30  # steps; an int32 then has room for the product


def with_wide_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which products of two activations, as in attention, read wide values.

    In 8 bits they take 1.2 to 1.6 times as long on a CPU, since both operands would have to be quantized at each call.
    """
    producers, weights = producers_of(model.graph), {tensor.name for tensor in model.graph.initializer}

    def is_weight(name: str) -> bool:
        while name in producers and producers[name].op_type in ("QuantizeLinear", "DequantizeLinear", *CARRIERS):
            name = producers[name].input[0]
        return name in weights

    products = [
        node.name for node in model.graph.node if node.op_type == "MatMul" and not any(map(is_weight, node.input))
    ]
    return with_high(model, products)


def batched_weights(model: onnx.ModelProto) -> set[str]:
    """Names of the weights of a MatMul with more than two axes: ONNX Runtime takes one scale for each in 8 bits."""
    producers, tensors = producers_of(model.graph), {tensor.name: tensor for tensor in model.graph.initializer}
    pairs = [pair_before(node.input[1], producers)[1] for node in model.graph.node if node.op_type == "MatMul"]
    weights = {producers[pair.input[0]].input[0] for pair in pairs if pair is not None and pair.input[0] in producers}
    return {name for name in weights if name in tensors and len(tensors[name].dims) > 2}


class _Product(NamedTuple):
    """A product in 8 bits with a bias."""

    node: onnx.NodeProto
    output: str
    """The sum of the product and the bias."""
    activation: onnx.NodeProto
    """The DequantizeLinear before the first operand."""
    weight_shape: tuple[int, int]
    bias: np.ndarray[Any, Any]
    """In steps, int32."""
    step: np.ndarray[Any, Any]
    """By output: the step of the activation times the step of the weights."""


def merge_biases(model: onnx.ModelProto) -> None:
    """Makes each product in 8 bits and its bias one Gemm, with the bias as an int32.

    `model` has its weights in 8 bits.
    """
    graph, producers, readers = model.graph, producers_of(model.graph), readers_of(model.graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in graph.node:
        if node.output[0] in made:
            continue
        bias, output = bias_of(node, readers, outputs)
        product = _product(node, output, bias, producers, tensors)
        if product is None:
            nodes.append(node)
        else:
            nodes += _gemm(product, graph)
            made.add(output)
    replace_nodes(graph, nodes)
    drop_unread(graph)


def _product(
    node: onnx.NodeProto, output: str, bias: str, producers: Producers, tensors: Mapping[str, onnx.TensorProto]
) -> _Product | None:
    """The product of a node; None if it has no bias for each output, or is not computed in 8 bits."""
    if bias not in tensors:
        return None
    found = [producers.get(name) for name in node.input[:2]]
    activation, weight = (each if each is not None and each.op_type == "DequantizeLinear" else None for each in found)
    if activation is None or weight is None or weight.input[0] not in tensors:
        return None
    attributes = _attributes(node)
    if attributes.get("transA") or attributes.get("alpha", 1) != 1 or attributes.get("beta", 1) != 1:
        return None
    shape = tuple(tensors[weight.input[0]].dims)
    wide, of_activation, of_weight = (
        onnx.numpy_helper.to_array(tensors[name]) for name in (bias, activation.input[1], weight.input[1])
    )
    axis = 0 if attributes.get("transB") else 1  # of the outputs
    if len(shape) != 2 or wide.shape != (shape[axis],) or of_activation.size != 1:
        return None
    if of_weight.size > 1 and _attributes(weight).get("axis", 1) % 2 != axis:
        return None
    step = np.broadcast_to(of_activation * of_weight, wide.shape).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):  # a step of a channel without weights can be 0
        steps = np.rint(wide / step)
    if not (np.abs(steps) <= _LARGEST_BIAS).all():
        return None
    return _Product(node, output, activation, shape, steps.astype(np.int32), step)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


def _gemm(product: _Product, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that compute the product with its bias."""

    def constant(name: str, values: np.ndarray[Any, Any]) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(values, f"{product.output}_{name}"))
        return graph.initializer[-1].name

    make, output = onnx.helper.make_node, product.output
    bias = [constant("bias_steps", product.bias), constant("bias_step", product.step)]
    dequantize = make("DequantizeLinear", bias, [f"{output}_bias"], f"{output}_bias", axis=0)
    if product.node.op_type == "Gemm":
        gemm = deepcopy(product.node)
        gemm.input[2] = dequantize.output[0]
        return [dequantize, gemm]
    values, *pair = product.activation.input  # a Gemm has two axes, a MatMul may have more
    rows, outputs = (
        constant("rows", np.array([-1, product.weight_shape[0]])),
        constant("outputs", np.array([product.weight_shape[1]])),
    )
    return [
        dequantize,
        make("Shape", [values], [f"{output}_leading"], f"{output}_leading", end=-1),
        make("Concat", [f"{output}_leading", outputs], [f"{output}_shape"], f"{output}_shape", axis=0),
        make("Reshape", [values, rows], [f"{output}_8_bit_rows"], f"{output}_8_bit_rows"),
        make("DequantizeLinear", [f"{output}_8_bit_rows", *pair], [f"{output}_wide_rows"], f"{output}_wide_rows"),
        make(
            "Gemm",
            [f"{output}_wide_rows", product.node.input[1], dequantize.output[0]],
            [f"{output}_flat"],
            product.node.name,
        ),
        make("Reshape", [f"{output}_flat", f"{output}_shape"], [output], output),
    ]


def separate_readers(model: onnx.ModelProto) -> None:
    """Puts a Reshape to the same shape behind each product that ONNX Runtime would compute in fp32 otherwise.

    It does so for the readers of the output: a QuantizeLinear beside another reader, or a Relu or Clip that no
    QuantizeLinear makes redundant. A Reshape copies nothing.
    """
    graph, producers, readers = model.graph, producers_of(model.graph), readers_of(model.graph)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}

    def keeps_wide(output: str) -> bool:
        found = readers.get(output, [])
        if len(found) == 1 and found[0].op_type in ("Relu", "Clip"):
            behind = [node.op_type for node in readers.get(found[0].output[0], [])]
            redundant = behind == ["QuantizeLinear"] and is_relu(found[0], tensors)
            return len(behind) == 1 and (not redundant or output in outputs)
        return "QuantizeLinear" in [node.op_type for node in found] and (len(found) > 1 or output in outputs)

    def is_narrow(name: str) -> bool:
        return name in producers and producers[name].op_type == "DequantizeLinear"

    nodes = []
    for node in graph.node:
        nodes.append(node)
        output = node.output[0]
        if node.op_type in ("MatMul", "Gemm") and all(map(is_narrow, node.input[:2])) and keeps_wide(output):
            node.output[0], shape = f"{output}_apart", f"{output}_apart_shape"
            if node.op_type == "Gemm":  # has two axes
                graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, -1]), shape))
            else:
                nodes.append(onnx.helper.make_node("Shape", [node.output[0]], [shape], shape))
            nodes.append(onnx.helper.make_node("Reshape", [node.output[0], shape], [output], f"{output}_same"))
    replace_nodes(graph, nodes)

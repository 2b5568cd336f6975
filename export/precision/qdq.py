"""Inspects and edits Q/DQ pairs: finds the layers that compute at 8 bits, and returns some to high precision.

Contract: works on ModelOpt's graph, where weights are still in high precision before their pair
(initializer -> QuantizeLinear -> DequantizeLinear -> MatMul). Removing a layer's pairs gives the graph that
calibration without that layer would give, without calibrating again. `found_precision` takes any graph.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx

from deepseek.precisions import OpType
from export.graphs.graph_file import tensor_bytes

COMPUTE_OPS: tuple[str, ...] = get_args(OpType)
CARRIERS = ("Transpose", "Reshape", "Cast")  # may stand between a pair and its layer
_FP8_LARGEST = 448
_WORTH_SHARING_BYTES = 256
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_FLOAT_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}

Producers = Mapping[str, onnx.NodeProto]


def producers_of(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each value, by the value's name."""
    return {output: node for node in graph.node for output in node.output}


def quantized_layers(model: onnx.ModelProto) -> dict[str, str]:
    """Operator type by node name of the compute operators with a Q/DQ pair on an operand, in graph order."""
    producers = producers_of(model.graph)
    return {
        node.name: node.op_type
        for node in model.graph.node
        if node.op_type in COMPUTE_OPS and any(pair_before(name, producers)[1] for name in node.input[:2])
    }


def pair_before(name: str, producers: Producers) -> tuple[list[onnx.NodeProto], onnx.NodeProto | None]:
    """The carriers before an operand, last first, and the DequantizeLinear before them (None if there is none)."""
    carriers, node = [], producers.get(name)
    while node is not None and node.op_type in CARRIERS:
        carriers.append(node)
        node = producers.get(node.input[0])
    return carriers, node if node is not None and node.op_type == "DequantizeLinear" else None


def with_high(model: onnx.ModelProto, layers: Collection[str]) -> onnx.ModelProto:
    """A copy in which `layers` read the values before their Q/DQ pairs; pairs that nothing reads are removed."""
    copy = deepcopy(model)
    producers, nodes = producers_of(copy.graph), []
    for node in copy.graph.node:
        if node.name in layers:
            for place, name in enumerate(node.input[:2]):
                carriers, dequantize = pair_before(name, producers)
                if dequantize is not None:
                    source = producers[dequantize.input[0]].input[0]
                    nodes += _copied(carriers[::-1], source, f"{node.name}_high_{place}")
                    node.input[place] = nodes[-1].output[0] if carriers else source
        nodes.append(node)
    replace_nodes(copy.graph, nodes)
    _drop_idle_pairs(copy.graph, layers)
    drop_unread(copy.graph)
    return copy


def _drop_idle_pairs(graph: onnx.GraphProto, high: Collection[str]) -> None:
    """Lets nodes read the value before a pair that no layer at 8 bits needs; the layers in `high` are not.

    A layer needs the pairs that it reads, and a convolution also the pair behind it or its Relu.
    """
    producers = producers_of(graph)
    needed: set[str] = set()  # outputs of pairs, and of the carriers between them and a layer
    at_8_bits: dict[str, bool] = {}  # by output of a convolution or its Relu
    for node in graph.node:
        if node.op_type in COMPUTE_OPS:
            pairs = [pair_before(name, producers) for name in node.input[:2] if node.name not in high]
            needed.update(each.output[0] for carriers, pair in pairs if pair is not None for each in (*carriers, pair))
            if node.op_type == "Conv" and all(pair is not None for _, pair in pairs):
                at_8_bits[node.output[0]] = node.name not in high
        elif node.op_type in ("Relu", "Clip") and node.input[0] in at_8_bits:
            at_8_bits[node.output[0]] = at_8_bits[node.input[0]]

    def reads_wide(node: onnx.NodeProto, value: str, pair: str) -> bool:
        if node.output[0] in needed or (node.op_type in COMPUTE_OPS and node.name not in high):
            return False
        return not at_8_bits.get(value, pair in needed)

    _read_wide(graph, reads_wide)


def _copied(carriers: Iterable[onnx.NodeProto], source: str, prefix: str) -> list[onnx.NodeProto]:
    """Copies of the carriers, in data order, that read `source`; other layers may read the originals."""
    copies = []
    for index, carrier in enumerate(carriers):
        copy = deepcopy(carrier)
        copy.name = f"{prefix}_{index}"
        copy.input[0] = source
        copy.output[0] = source = copy.name
        copies.append(copy)
    return copies


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    kept = [deepcopy(node) for node in nodes]  # copied first: clearing the field frees its nodes
    del graph.node[:]
    graph.node.extend(kept)


def _read(graph: onnx.GraphProto) -> set[str]:
    """Names that the outputs and the nodes, including those of subgraphs, read."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for subgraph in subgraphs(node):
            names |= _read(subgraph)
    return names


def subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The branches or the body of a control-flow node."""
    return [
        graph
        for attribute in node.attribute
        for graph in [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    ]


def drop_unread(graph: onnx.GraphProto) -> None:
    """Removes the pairs, carriers and initializers that nothing reads."""
    while True:
        read = _read(graph)
        kept = [node for node in graph.node if node.op_type not in (*_PAIR, *CARRIERS) or read & set(node.output)]
        if len(kept) == len(graph.node):
            break
        replace_nodes(graph, kept)
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in read]:
        graph.initializer.remove(tensor)


def quantized_names(model: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """The pair of each quantized value, by the value's name in the fp32 graph, even behind casts."""
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type in _PAIR:
            between = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
            pairs.setdefault(between.removesuffix("_QuantizeLinear_Output"), []).append(node)
    return pairs


def use_wide_activations(model: onnx.ModelProto) -> None:
    """Removes the pairs of all activations; those of the weights stay."""
    weights = {tensor.name for tensor in model.graph.initializer}
    wide = {
        pair[-1].output[0]: pair[0].input[0]
        for pair in quantized_names(model).values()
        if pair[0].op_type == "QuantizeLinear" and pair[0].input[0] not in weights
    }
    for node in model.graph.node:
        node.input[:] = [wide.get(name, name) for name in node.input]
    drop_unread(model.graph)


def keep_residuals_wide(model: onnx.ModelProto) -> None:
    """Lets additions read values from before a pair that was inserted for a product beside them.

    A residual then loses no precision, and ONNX Runtime fuses the pair into the product, its only reader.
    """
    _read_wide(model.graph, lambda node, *_: node.op_type == "Add")
    drop_unread(model.graph)


def _read_wide(graph: onnx.GraphProto, reads: Callable[[onnx.NodeProto, str, str], bool]) -> None:
    """Where `reads(node, value, output of its pair)`, the node reads the value before the pair."""
    producers = producers_of(graph)
    for node in graph.node:
        for place, name in enumerate(node.input):
            dequantize = producers.get(name)
            if dequantize is not None and dequantize.op_type == "DequantizeLinear":
                quantize = producers.get(dequantize.input[0])
                if (
                    quantize is not None
                    and quantize.op_type == "QuantizeLinear"
                    and reads(node, quantize.input[0], name)
                ):
                    node.input[place] = quantize.input[0]


def share_equal_weights(model: onnx.ModelProto) -> None:
    """Deduplicates equal weights: AutoCast gives each reader its own copy (tied embeddings, LSTM gates)."""
    kept: dict[tuple[object, ...], str] = {}
    same: dict[str, str] = {}
    for tensor in model.graph.initializer:
        if tensor_bytes(tensor) >= _WORTH_SHARING_BYTES:
            facts = (tensor.data_type, tuple(tensor.dims), onnx.numpy_helper.to_array(tensor).tobytes())
            first = kept.setdefault((*facts[:2], hashlib.sha256(facts[2]).digest()), tensor.name)
            same |= {tensor.name: first} if first != tensor.name else {}
    _read_instead(model.graph, same)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name in same]:
        model.graph.initializer.remove(tensor)


def _read_instead(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        for subgraph in subgraphs(node):
            _read_instead(subgraph, names)


def use_one_scale_a_tensor(model: onnx.ModelProto, weights: Collection[str] | None = None) -> None:
    """Gives these weights, or all, one scale each, from the largest magnitude.

    It is not always the largest of the channels' scales, because ModelOpt's scale of a channel of zeros is 1.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = set(tensors if weights is None else weights)
    for pair in quantized_names(model).values():
        for node in pair if pair[0].input[0] in chosen else []:
            for axis in [attribute for attribute in node.attribute if attribute.name == "axis"]:
                node.attribute.remove(axis)
            scale, zero = tensors[node.input[1]], tensors[node.input[2]]
            scales, weight = (onnx.numpy_helper.to_array(tensors[name]) for name in (scale.name, pair[0].input[0]))
            steps = _FP8_LARGEST if zero.data_type == onnx.TensorProto.FLOAT8E4M3FN else 127
            one = np.asarray(np.abs(weight).max() / steps if weight.any() else scales.max(), scales.dtype)
            scale.CopyFrom(onnx.numpy_helper.from_array(one, scale.name))
            bits = bytes(onnx.helper.tensor_dtype_to_np_dtype(zero.data_type).itemsize)
            zero.CopyFrom(onnx.helper.make_tensor(zero.name, zero.data_type, [], bits, raw=True))


def quantize_weights(model: onnx.ModelProto) -> None:
    """Quantizes the weights now and not at each load: initializer -> DequantizeLinear."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    kept = []
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] in tensors:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            weight, scale, zero = (tensors[name] for name in node.input)
            values = _quantized(weight, scale, zero, axis)
            graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        else:
            kept.append(node)
    replace_nodes(graph, kept)
    drop_unread(graph)


def _quantized(
    weight: onnx.TensorProto, scale: onnx.TensorProto, zero: onnx.TensorProto, axis: int
) -> np.ndarray[Any, Any]:
    """QuantizeLinear of the ONNX standard with zero point 0: divide by the scale, round half to even, saturate."""
    wide = onnx.numpy_helper.to_array(weight).astype(np.float32)
    steps = onnx.numpy_helper.to_array(scale).astype(np.float32)
    if steps.ndim:
        steps = steps.reshape([-1 if place == axis % wide.ndim else 1 for place in range(wide.ndim)])
    dtype = onnx.helper.tensor_dtype_to_np_dtype(zero.data_type)
    if zero.data_type == onnx.TensorProto.FLOAT8E4M3FN:
        return np.clip(wide / steps, -_FP8_LARGEST, _FP8_LARGEST).astype(dtype)
    return np.clip(np.rint(wide / steps), -128, 127).astype(dtype)


def found_precision(path: Path) -> dict[str, Any]:
    """Counts a graph's compute operators by the type they run in, its bytes of weights, and their scales."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    producers = producers_of(model.graph)
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in COMPUTE_OPS:
            counts[_compute_type(node, producers, types)] += 1
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        weights[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += tensor_bytes(tensor)
    readers = Counter(name for node in model.graph.node for name in node.input)
    copies = sum(tensor_bytes(tensor) * max(readers[tensor.name], 1) for tensor in model.graph.initializer)
    found = {"compute_operators": dict(counts), "weight_bytes": dict(weights), "bytes_by_reader": copies}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scales = Counter(
        "per_channel" if tensors[node.input[1]].dims else "per_tensor"
        for node in model.graph.node
        if node.op_type == "DequantizeLinear"
        and (weight := tensors.get(node.input[0])) is not None
        and weight.data_type != onnx.TensorProto.INT32  # a bias
    )
    return found | ({"weight_scales": dict(scales)} if scales else {})


def _compute_type(node: onnx.NodeProto, producers: Producers, types: Mapping[str, int]) -> str:
    """The type a MatMul, Gemm or Conv runs in: that of its Q/DQ pairs if both operands have one.

    `int8_weights` if only a weight, stored at 8 bits, has one.
    """
    first, second = (pair_before(name, producers)[1] for name in node.input[:2])
    if second is not None and (first is not None or second.input[0] not in producers):
        narrow = "fp8" if types.get(second.input[2]) == onnx.TensorProto.FLOAT8E4M3FN else "int8"
        return narrow if first is not None else f"{narrow}_weights"
    return _FLOAT_TYPES.get(types.get(node.input[0], 0), "other")

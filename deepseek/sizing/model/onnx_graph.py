"""An ONNX file as a `Countable`: its parameters, and the operations of one forward pass at any size of its axes.

Contract: needs onnx, not torch. It reads only shapes, so weights in external files cost nothing. The first dimension of
every input is the batch, unless it is fixed and another input's is open; `length` is the size of all other open axes,
unless `axes` gives one by name. Quantized graphs (Q/DQ) count as the operations that they compute. Raises InputError
if the result of a product has no known shape; `uncounted` names products of which no shape is known.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from deepseek.sizing.model.counting import Op, stepped
from deepseek.sizing.training_step import SavedActivations, TrainingSetup
from deepseek.spec import InputError

PRODUCTS = {"MatMul", "Gemm", "Conv", "MatMulInteger", "ConvInteger", "QLinearMatMul", "QLinearConv"}
# Operators that read their input again; elementwise operators are fused with the operation before them.
MEMORY = {
    "LayerNormalization", "Softmax", "ReduceMean", "ReduceSum", "ReduceMax", "Gather", "TopK", "BatchNormalization",
    "InstanceNormalization", "GlobalAveragePool", "AveragePool", "MaxPool", "Resize", "SimplifiedLayerNormalization",
}  # fmt: skip
# DequantizeLinear is fused with the product after it. QuantizeLinear is fused in an engine, but not on a CPU.
FREE = {
    "Reshape", "Shape", "Constant", "Unsqueeze", "Squeeze", "Flatten", "Identity", "ConstantOfShape",
    "DequantizeLinear",
}  # fmt: skip
# Weights pass through them.
CARRIERS = {"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity"}
# Known elementwise operators of foreign domains; other foreign operators may compute anything.
ELEMENTWISE_ELSEWHERE = {
    "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
RECURRENT = {"LSTM", "GRU", "RNN"}
# Operators with an unknown amount of computation.
UNCOUNTED = {
    "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "ConvTranspose", "DeformConv", "If", "Loop",
    "Scan",
}  # fmt: skip
WEIGHT_TYPES = {1, 2, 3, 10, 11, 16, 17, 18, 19, 20, 21, 22}  # TensorProto: floats, and 4 and 8 bits
SMALL = 1024  # values that shapes may depend on, such as the scales of a Resize


class OnnxModel:
    """A `Countable` from an ONNX file."""

    default_length = 1  # the sizes of other axes must be given

    def __init__(self, path: str | Path, *, axes: Mapping[str, int] | None = None, name: str = "") -> None:
        try:
            import onnx
            import onnx.inliner
        except ImportError:
            raise InputError("an ONNX file needs the package onnx; install it with: pip install onnx") from None
        self.path, self.axes, self._onnx = Path(path), dict(axes or {}), onnx
        self.name = f"{name or self.path.stem} ({path})"
        try:
            self.proto = onnx.load(self.path, load_external_data=False)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except Exception as error:  # protobuf's own errors
            raise InputError(f"{path}: not an ONNX file ({type(error).__name__})") from None
        if not self.proto.graph.node:
            raise InputError(f"{path}: not an ONNX graph: it has no nodes")
        if self.proto.functions:
            self.proto = onnx.inliner.inline_local_functions(self.proto)
        self._check_axes()
        self._drop_values()
        self._unknown: set[str] = set()
        self.counted = lru_cache(maxsize=64)(self._counted)  # one cache per file

    def _check_axes(self) -> None:
        known = sorted({dim.dim_param for dim in self._dims() if dim.dim_param})
        for name in self.axes:
            if name not in known:
                allowed = f"{', '.join(known) or 'none'} (open axes of its inputs, besides the batch)"
                raise InputError(f"{self.path}: axis: seen {name!r}; allowed: {allowed}")

    def _drop_values(self) -> None:
        """Removes the values of large weights, which every shape inference would copy."""
        constants = (
            node.attribute[0].t for node in self.proto.graph.node if node.op_type == "Constant" and node.attribute
        )
        for tensor in (*self.proto.graph.initializer, *constants):
            if tensor.data_type in WEIGHT_TYPES and math.prod(tensor.dims) > SMALL:
                for values in ("raw_data", "float_data", "int32_data", "double_data"):
                    tensor.ClearField(values)

    @cached_property
    def _weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of weights by name, without small constants for shapes and axes."""
        found = {each.name: tuple(each.dims) for each in self.proto.graph.initializer if each.data_type in WEIGHT_TYPES}
        for node in self.proto.graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
                tensor = node.attribute[0].t
                if tensor.data_type in WEIGHT_TYPES and tensor.dims:
                    found[node.output[0]] = tuple(tensor.dims)
        scales = {
            name for node in self.proto.graph.node if "izeLinear" in node.op_type for name in node.input[1:]
        }  # scales and zero points
        return {name: shape for name, shape in found.items() if name not in scales}

    @cached_property
    def parameters(self) -> int:
        """Elements of all weights."""
        return sum(math.prod(shape) for shape in self._weights.values())

    @property
    def trained_parameters(self) -> int:
        return self.parameters

    @cached_property
    def product_parameters(self) -> int:
        products = (node for node in self.proto.graph.node if node.op_type in PRODUCTS)
        used = {weight for node in products for weight in self._matrices(node)}
        return sum(math.prod(self._weights[name]) for name in used)

    def _matrices(self, node: Any) -> list[str]:
        """The weights of two or more dimensions that a node reads."""
        weights = filter(None, map(self._weight_of, node.input))
        return [weight for weight in weights if len(self._weights[weight]) > 1]

    @cached_property
    def stepped_elements(self) -> int:
        return stepped(math.prod(shape) for shape in self._weights.values())

    @property
    def open_axes(self) -> list[str]:
        """Names of the axes besides the batch without a fixed size."""
        return sorted(
            {dim.dim_param or "?" for dim in self._dims() if not dim.dim_value and dim.dim_param not in self.axes}
        )

    @property
    def uncounted(self) -> list[str]:
        """Operators of the graph that may compute something, but are not counted."""
        known = PRODUCTS | MEMORY | FREE | CARRIERS | ELEMENTWISE_ELSEWHERE
        foreign = {node.op_type for node in self.proto.graph.node if node.domain not in ("", "ai.onnx")} - known
        return sorted({node.op_type for node in self.proto.graph.node} & UNCOUNTED | foreign | self._unknown)

    def ops(self, batch: int, length: int) -> list[Op]:
        return self.counted(batch, length)[0]

    def live_elements(self, batch: int, length: int) -> float:
        """The largest total of inputs and outputs of one operation."""
        return self.counted(batch, length)[1]

    def saved(self, setup: TrainingSetup) -> SavedActivations:
        """An upper bound: every intermediate value is kept for backward."""
        _, live, kept = self.counted(setup.batch, setup.length)
        return SavedActivations(kept=setup.value_bytes * kept, workspace=setup.value_bytes * live)

    def _counted(self, batch: int, length: int) -> tuple[list[Op], float, float]:
        shapes = self._shapes(batch, length)
        ops = list(self._ops(shapes))
        live, kept = 0.0, 0.0
        for node in self.proto.graph.node:
            sizes = [math.prod(shapes[name]) for name in (*node.input, *node.output) if name in shapes]
            live = max(live, sum(sizes))
            kept += sum(math.prod(shapes[name]) for name in node.output if name in shapes)
        return ops, live, kept

    def _inputs(self) -> list[Any]:
        weights = {each.name for each in self.proto.graph.initializer}
        return [value for value in self.proto.graph.input if value.name not in weights]

    def _dims(self) -> list[Any]:
        """Axes of the inputs besides the batch."""
        shapes = [value.type.tensor_type.shape.dim for value in self._inputs()]
        return [dim for shape in shapes for index, dim in enumerate(shape) if not self._is_batch(index, dim)]

    @cached_property
    def _batch(self) -> Any:
        """The batch: the first dimension of the first input where that is open, else of the first input."""
        firsts = [value.type.tensor_type.shape.dim[:1] for value in self._inputs()]
        return min((dim for dims in firsts for dim in dims), key=lambda dim: bool(dim.dim_value), default=None)

    def _is_batch(self, index: int, dim: Any) -> bool:
        if dim.dim_value:  # a graph of one batch size is planned at any
            return index == 0 and dim.dim_value == self._batch.dim_value
        return index == 0 or dim.dim_param == self._batch.dim_param != ""

    def _shapes(self, batch: int, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all activations, by ONNX's shape inference with every axis at one size."""
        proto = self._onnx.ModelProto()
        proto.CopyFrom(self.proto)
        del proto.graph.value_info[:]
        named = {value.name for value in self._inputs()}
        for value in proto.graph.input:
            if value.name in named:
                for index, dim in enumerate(value.type.tensor_type.shape.dim):
                    if self._is_batch(index, dim):
                        dim.dim_value = batch
                    elif not dim.dim_value:
                        dim.dim_value = self.axes.get(dim.dim_param, length)
        for value in proto.graph.output:
            value.type.tensor_type.ClearField("shape")
        try:
            proto = self._onnx.shape_inference.infer_shapes(proto, data_prop=True)
        except Exception as error:
            raise InputError(
                f"{self.path}: shapes at batch {batch}, length {length}: {' '.join(str(error).split())}"
            ) from None
        found = {}
        for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
            dims = value.type.tensor_type.shape.dim
            if value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
                found[value.name] = tuple(dim.dim_value for dim in dims)
        return {name: shape for name, shape in found.items() if name not in self._weights}

    def _ops(self, shapes: dict[str, tuple[int, ...]]) -> Iterator[Op]:
        count = {**dict.fromkeys(PRODUCTS, self._product), **dict.fromkeys(RECURRENT, self._steps)}
        for node in self.proto.graph.node:
            if node.op_type in count and (op := count[node.op_type](node, shapes)):
                yield op
            elif node.op_type not in FREE and node.output[0] not in self._constants:
                if node.op_type in MEMORY:
                    yield Op(kind="memory")
                outputs = sum(math.prod(shapes.get(name, (0,))) for name in node.output)
                yield Op(kind="elementwise", outputs=float(outputs))

    @cached_property
    def _constants(self) -> set[str]:
        """Weights, and what is computed from nothing else: once, when the graph is loaded."""
        found = {each.name for each in self.proto.graph.initializer}
        for node in self.proto.graph.node:  # each after those that it reads
            if node.op_type == "Constant" or (node.input and found.issuperset(filter(None, node.input))):
                found.update(node.output)
        return found

    def _product(self, node: Any, shapes: dict[str, tuple[int, ...]]) -> Op | None:
        inputs = [name for name in dict.fromkeys(node.input) if name and self._weight_of(name) is None]
        values = [name for name in inputs if name in shapes]
        weights = self._matrices(node)
        if not inputs:
            return None  # a product of weights: computed once, when the engine is built
        out = shapes.get(node.output[0])
        if out is None and not values:
            self._unknown.add(node.op_type)
            return None
        if out is None:
            raise InputError(
                f"{self.path}: the output of {node.op_type} {node.name or node.output[0]!r} has no known shape; give "
                f"the sizes of the axes {', '.join(self.open_axes) or 'that it depends on'}"
            )
        outputs = math.prod(out)
        return Op(
            kind="product" if weights or len(out) <= 2 else "attention",  # queries by keys, scores by values
            flops=2.0 * outputs * self._depth(node, shapes, weights),
            outputs=outputs,
            moved=float(sum(math.prod(shapes[name]) for name in values) + outputs),
            weights=float(sum(math.prod(self._weights[name]) for name in weights)),
        )

    def _steps(self, node: Any, shapes: dict[str, tuple[int, ...]]) -> Op | None:
        """A recurrent layer: each of its steps reads all weights, and waits for the step before."""
        given, out = shapes.get(node.input[0]), shapes.get(node.output[0])
        known = (self._weights.get(self._weight_of(name) or "", shapes.get(name)) for name in node.input[1:3])
        matrices = [shape for shape in known if shape is not None]  # of the inputs, and of the state
        if (given is None and out is None) or len(matrices) < 2:
            self._unknown.add(node.op_type)
            return None
        steps, batch = given[:2] if given else (out or ())[:3:2]  # (steps, batch, D) or (steps, directions, batch, D)
        weights = float(sum(map(math.prod, matrices)))
        outputs = float(batch * math.prod(matrices[1][::2]))  # (directions, gates x H, H)
        return Op(
            kind="product", flops=2.0 * batch * weights, outputs=outputs, moved=outputs, weights=weights, count=steps
        )

    def _depth(self, node: Any, shapes: dict[str, tuple[int, ...]], weights: list[str]) -> float:
        """Multiplications per output element."""
        first = shapes.get(node.input[0]) or self._weights.get(self._weight_of(node.input[0]) or "", ())
        if "Conv" in node.op_type:
            kernel = self._weights[weights[0]] if weights else (1, first[1])
            return math.prod(kernel[1:])  # channels of a group, times the kernel
        transposed = {each.name for each in node.attribute if each.i} if node.op_type == "Gemm" else set()
        if not first:  # of a reshape whose sizes are computed: the other side has the same depth
            return self._weights[weights[0]][-1 if "transB" in transposed else -2] if weights else 1
        return first[-2 if "transA" in transposed else -1]

    def _weight_of(self, name: str) -> str | None:
        """The weight that an input is, directly or through conversions; None if it is an activation."""
        for _ in range(8):
            if name in self._weights:
                return name
            node = self._producers.get(name)
            if node is None or node.op_type not in CARRIERS:
                return None
            name = node.input[0]
        return None

    @cached_property
    def _producers(self) -> dict[str, Any]:
        return {name: node for node in self.proto.graph.node for name in node.output}

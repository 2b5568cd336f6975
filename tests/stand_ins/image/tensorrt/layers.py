# mypy: ignore-errors
"""The layers of a network, as TensorRT's parser would make them from a graph."""

from enum import IntEnum, auto

import onnx
from onnx import TensorProto

TYPES = {TensorProto.FLOAT: "Float", TensorProto.FLOAT16: "Half", TensorProto.BFLOAT16: "BFloat16"}
TYPES |= {TensorProto.INT8: "Int8", TensorProto.FLOAT8E4M3FN: "FP8"}


class LayerType(IntEnum):
    MATRIX_MULTIPLY = auto()
    CONVOLUTION = auto()
    DECONVOLUTION = auto()
    SHUFFLE = auto()
    CAST = auto()
    IDENTITY = auto()
    QUANTIZE = auto()
    DEQUANTIZE = auto()
    CONSTANT = auto()
    ELEMENTWISE = auto()


OPERATORS = {
    **dict.fromkeys(("MatMul", "Gemm"), LayerType.MATRIX_MULTIPLY),
    **{"Conv": LayerType.CONVOLUTION, "ConvTranspose": LayerType.DECONVOLUTION, "Cast": LayerType.CAST},
    **dict.fromkeys(("Transpose", "Reshape", "Squeeze", "Unsqueeze"), LayerType.SHUFFLE),
    **{"QuantizeLinear": LayerType.QUANTIZE, "DequantizeLinear": LayerType.DEQUANTIZE},
    **{"Identity": LayerType.IDENTITY, "Constant": LayerType.CONSTANT},
}
COMPUTE = (LayerType.MATRIX_MULTIPLY, LayerType.CONVOLUTION, LayerType.DECONVOLUTION)


class Tensor:
    def __init__(self, name, dtype):
        self.name, self.dtype = name, dtype


class Layer:
    def __init__(self, kind, inputs, outputs):
        self.type, self.inputs, self.outputs = kind, inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    def get_input(self, index):
        return self.inputs[index]

    def get_output(self, index):
        return self.outputs[index]


class Network:
    """Empty until a parser fills it."""

    def __init__(self):
        self.layers, self.inputs = [], []

    def fill(self, model):
        """Takes the layers of a graph."""
        self.model = model
        graph = onnx.shape_inference.infer_shapes(model).graph
        dtypes = {each.name: each.data_type for each in graph.initializer}
        for value in (*graph.input, *graph.value_info, *graph.output):
            dtypes[value.name] = value.type.tensor_type.elem_type
        tensors = {name: Tensor(name, dtype) for name, dtype in dtypes.items()}
        self.inputs = [tensors[value.name] for value in graph.input]
        self.layers = [Layer(LayerType.CONSTANT, [], [tensors[each.name]]) for each in graph.initializer]
        for node in graph.node:
            kind = OPERATORS.get(node.op_type, LayerType.ELEMENTWISE)
            ends = [
                [tensors.setdefault(name, Tensor(name, 0)) for name in names if name]
                for names in (node.input, node.output)
            ]
            self.layers.append(Layer(kind, *ends))

    @property
    def num_layers(self):
        return len(self.layers)

    def get_layer(self, index):
        return self.layers[index]

    @property
    def num_inputs(self):
        return len(self.inputs)

    def get_input(self, index):
        return self.inputs[index]


def types(model):
    """The compute layers of a graph as the inspector tells them: types of the first input and of the weights."""
    network = Network()
    network.fill(model)
    made_by = {tensor.name: layer for layer in network.layers for tensor in layer.outputs}

    def kernel_type(tensor):
        layer = made_by.get(tensor.name)
        while layer is not None and layer.type in (LayerType.SHUFFLE, LayerType.CAST, LayerType.IDENTITY):
            layer = made_by.get(layer.inputs[0].name)
        found = layer.inputs[0] if layer is not None and layer.type == LayerType.DEQUANTIZE else tensor
        return TYPES.get(found.dtype, str(found.dtype))

    return [
        {
            "Name": layer.outputs[0].name,
            "LayerType": "conv" if layer.type != LayerType.MATRIX_MULTIPLY else "gemm",
            "Inputs": [{"Name": layer.inputs[0].name, "Format": "Linear", "Datatype": kernel_type(layer.inputs[0])}],
            "Constants": [{"Name": layer.inputs[1].name, "Datatype": kernel_type(layer.inputs[1])}],
        }
        for layer in network.layers
        if layer.type in COMPUTE
    ]

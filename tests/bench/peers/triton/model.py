"""ONNX Runtime in Triton's Python backend, as its documentation shows: the requests of a batch are joined, then split."""

import numpy as np
import triton_python_backend_utils as pb_utils
from graph import Graph


class TritonPythonModel:
    def initialize(self, args):
        self.graph = Graph()

    def execute(self, requests):
        names = [tensor.name() for tensor in requests[0].inputs()]
        columns = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in names
        }
        inputs = {name: np.concatenate(arrays) for name, arrays in columns.items()}
        if "text" in inputs:
            inputs = {"text": [text.decode() for text in inputs["text"][:, 0]]}
        outputs = self.graph.run(inputs)
        ends = np.cumsum([len(array) for array in columns[names[0]]])[:-1]
        parts = {name: np.split(array, ends) for name, array in outputs.items()}
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[place]) for name, arrays in parts.items()])
            for place in range(len(requests))
        ]

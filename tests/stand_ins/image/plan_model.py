# mypy: ignore-errors
"""Stand-in for Triton's TensorRT backend: runs the graph in a plan of the stand-in TensorRT with ONNX Runtime."""

import json

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One run for all requests of a batch, as the TensorRT backend does it."""

    def initialize(self, args):
        with open(f"{args['model_repository']}/{args['model_version']}/model.plan", "rb") as file:
            file.seek(28)  # the header
            file.readline()  # facts
            graph = file.read()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.names = [entry["name"] for entry in json.loads(args["model_config"])["input"]]

    def execute(self, requests):
        # By DLPack: as_numpy of 2.51 needs numpy 1.
        rows = [
            {name: np.from_dlpack(pb_utils.get_input_tensor_by_name(request, name)) for name in self.names}
            for request in requests
        ]
        sizes = [len(row[self.names[0]]) for row in rows]
        batch = {name: np.concatenate([row[name] for row in rows]) for name in self.names}
        outputs = self.session.run(None, batch)
        names = [output.name for output in self.session.get_outputs()]
        answers, begin = [], 0
        for size in sizes:
            parts = [np.ascontiguousarray(output[begin : begin + size]) for output in outputs]
            tensors = [pb_utils.Tensor.from_dlpack(name, part) for name, part in zip(names, parts, strict=True)]
            answers.append(pb_utils.InferenceResponse(tensors))
            begin += size
        return answers

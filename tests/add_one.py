"""`add_one`, a small model of Triton's Python backend: y = x + 1; and a change of any file of a model."""

from __future__ import annotations

from pathlib import Path

ADD_ONE = '''
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x + 1, after parameters["delay_s"] seconds per batch."""

    def initialize(self, args):
        import json
        parameters = json.loads(args["model_config"])["parameters"]
        self.delay_s = float(parameters.get("delay_s", {}).get("string_value", 0))

    def execute(self, requests):
        import time
        time.sleep(self.delay_s)
        inputs = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x")) for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", x + 1)]) for x in inputs]
'''
ADD_ONE_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 8
input {{ name: "x" data_type: TYPE_FP32 dims: [2, -1] }}
output {{ name: "y" data_type: TYPE_FP32 dims: [2, -1] }}
instance_group {{ kind: KIND_CPU count: {instances} }}
dynamic_batching {{
  default_queue_policy {{
    max_queue_size: {queue} timeout_action: REJECT default_timeout_microseconds: 5000000 allow_timeout_override: true
  }}
}}
parameters {{ key: "delay_s" value {{ string_value: "{delay_s}" }} }}
"""
TAKES_TEXTS = r"""
parameters { key: "text" value { string_value: "{\"max_texts\": 8, \"max_bytes\": 100}" } }
"""


def replace_in(path: Path, old: str, new: str) -> None:
    """Replaces a text in a file, which must have it."""
    text = path.read_text()
    assert old in text, f"{path}: no {old}"
    path.write_text(text.replace(old, new))


def write_add_one(
    repository: Path, name: str = "add_one", *, delay_s: float = 0.0, queue: int = 64, instances: int = 2
) -> None:
    """Writes the model y = x + 1 over (batch, 2, any) floats."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(ADD_ONE)
    settings = {"name": name, "delay_s": delay_s, "queue": queue, "instances": instances}
    (repository / name / "config.pbtxt").write_text(ADD_ONE_CONFIG.format(**settings))


def write_for_gpu(repository: Path) -> None:
    """Writes `add_one` as an engine of TensorRT that takes texts, for commands that only read its configuration."""
    write_add_one(repository)
    replace_in(repository / "add_one" / "config.pbtxt", 'backend: "python"', f'{TAKES_TEXTS}backend: "tensorrt"')

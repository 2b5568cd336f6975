"""The checks before any load, at a real Triton that is unloading something."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
from deepseek_client import InferenceClient

from deepseek.spec import DeploymentSpec
from loadtests.load.preflight import check
from loadtests.results.settings import LoadSettings
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE

MODEL = """
import os
import time

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(request, "x") for request in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x.as_numpy())]) for x in inputs]

    def finalize(self):
        ends_at = time.monotonic() + 120
        while {waits} and not os.path.exists("{go}") and time.monotonic() < ends_at:
            time.sleep(0.05)
"""
CONFIG = """
name: "{name}" backend: "python" max_batch_size: 8 instance_group {{ kind: KIND_CPU }}
input {{ name: "x" data_type: TYPE_FP32 dims: [1] }} output {{ name: "y" data_type: TYPE_FP32 dims: [1] }}
"""
SPEC = """
name = "stays"
inputs.x = { dtype = "float32", shape = ["batch", 1] }
outputs.y = { dtype = "float32", shape = ["batch", 1] }
axes.batch = { min = 1, opt = 4, max = 8 }
"""


def test_a_model_that_serves_is_measured_while_triton_unloads_another(tmp_path: Path) -> None:
    """Triton calls the whole server not ready until the other model is gone."""
    for name in ("stays", "goes"):
        version = tmp_path / "repository" / name / "1"
        version.mkdir(parents=True)
        (version / "model.py").write_text(MODEL.format(waits=name == "goes", go=tmp_path / "go"))
        (version.parent / "config.pbtxt").write_text(CONFIG.format(name=name))
    (tmp_path / "deploy.toml").write_text(SPEC)
    np.savez(tmp_path / "inputs.npz", **{"00000/x": np.ones((1, 1), np.float32)})  # type: ignore[arg-type]
    with (
        EmbeddedServer(tmp_path / "repository", **FREE, poll_s=1) as server,
        InferenceClient(server.grpc_url, "grpc") as client,
    ):
        shutil.rmtree(tmp_path / "repository" / "goes")
        ends_at = time.monotonic() + 60
        while client.ready():
            assert time.monotonic() < ends_at, "Triton never called itself not ready"
            time.sleep(0.05)
        about: dict[str, Any] = {"models": "", "target": "onnxruntime", "protocol": "grpc", "url": server.grpc_url}
        inputs = str(tmp_path / "inputs.npz")
        settings = LoadSettings(model="stays", **about, inputs=inputs, rate_rps=10.0, duration_s=1.0)
        assert check(settings, DeploymentSpec.load(tmp_path)).versions == ("1",)
        assert not client.ready()  # it still unloads: the checks met that state
        (tmp_path / "go").touch()

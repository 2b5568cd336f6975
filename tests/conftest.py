"""What the tests share: a real Triton over tiny models, and two models taken through the export stages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.embedded import EmbeddedServer
from tests.failing_servers import MakeRelays, Relay

os.environ["CACHE"] = "off"  # each test builds what it shows; those of the cache have one of their own

# Tensors cross by DLPack: see serving/onnxruntime_backend.py.
ADD_ONE = '''
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x + 1, after parameters["delay_s"] seconds a batch."""

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


def write_add_one(
    repository: Path, name: str = "add_one", *, delay_s: float = 0.0, queue: int = 64, instances: int = 2
) -> None:
    """A model y = x + 1 over (batch, 2, any) floats. With one instance a bounded queue can stall (docs/triton.md)."""
    version = repository / name / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(ADD_ONE)
    settings = {"name": name, "delay_s": delay_s, "queue": queue, "instances": instances}
    (repository / name / "config.pbtxt").write_text(ADD_ONE_CONFIG.format(**settings))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Triton that serves `add_one`, and `slow` (0.2 s a batch, one instance, a queue of 2)."""
    folder = tmp_path_factory.mktemp("server")
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "slow", delay_s=0.2, queue=2, instances=1)
    with EmbeddedServer(
        folder / "repository", http_port=0, grpc_port=0, metrics_port=0, log_path=folder / "triton.log"
    ) as running:
        yield running


@pytest.fixture
def relays(server: EmbeddedServer) -> Iterator[MakeRelays]:
    """Makes relays to that server: replicas of one service, each of which can be cut, closed or slowed down."""
    made: list[Relay] = []

    def make(protocol: str, count: int) -> list[Relay]:
        port = server.http_port if protocol == "http" else server.grpc_port
        made.extend(Relay((server.address, port)) for _ in range(count))
        return made

    yield make
    for relay in made:
        relay.close()


def run_module(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m …` as a user types it."""
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env={**os.environ, **environment}
    )


STAGES = (
    ("export.to_onnx",),
    ("export.quantize", "--precision", "fp16"),
    ("export.quantize", "--precision", "int8", "--high-precision", "fp32"),
    ("export.compare",),
    ("export.to_triton",),
)


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `build/` and `repository/` of the models `image` and `text`; not to be changed."""
    folder = tmp_path_factory.mktemp("built")
    for model in ("image", "text"):
        for stage, *flags in STAGES:
            if stage == "export.to_triton":
                flags = ["--repository", str(folder / "repository")]
            arguments = (stage, "--models", "tests/models", "--model", model, *flags)
            run = run_module(*arguments, BUILD=str(folder / "build"))
            assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="session")
def typed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same `build/` with int8 graphs as TensorRT takes them; not to be changed."""
    build = tmp_path_factory.mktemp("typed") / "build"
    shutil.copytree(built / "build", build)
    for model in ("image", "text"):
        arguments = ("--models", "tests/models", "--model", model, "--precision", "int8", "--high-precision", "fp16")
        run = run_module("export.quantize", *arguments, BUILD=str(build))
        assert run.returncode == 0, run.stderr
    return build


@pytest.fixture
def build(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shared `build/` folder as $BUILD."""
    monkeypatch.setenv("BUILD", str(built / "build"))
    return built / "build"

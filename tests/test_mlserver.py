"""MLServer, a KServe v2 server without Triton's binary tensors: installed into an environment of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient, InferenceError, InvalidInput, ModelNotFound

from tests.failing_servers import protocols

pytestmark = pytest.mark.slow
MODEL = """
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceResponse

class AddOne(MLModel):
    async def predict(self, payload):
        outputs = [NumpyCodec.encode_output("y", NumpyCodec.decode_input(each) + 1) for each in payload.inputs]
        return InferenceResponse(model_name=self.name, outputs=outputs)
"""
SETTINGS: dict[str, Any] = {
    "implementation": "add_one.AddOne",
    "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 3]}],
}


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Its address by protocol; it serves `described` and `bare`, which has no signature."""
    folder = tmp_path_factory.mktemp("mlserver")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    install = [str(folder / "venv/bin/python"), "-m", "pip", "install", "-q", "mlserver", "uvloop<0.22"]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"MLServer cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    (folder / "add_one.py").write_text(MODEL)
    for name, settings in (("described", SETTINGS), ("bare", {"implementation": "add_one.AddOne"})):
        (folder / name).mkdir()
        (folder / name / "model-settings.json").write_text(json.dumps({"name": name, **settings}))
    ports = _free_ports(3)
    names = dict(zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True))
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", "parallel_workers": 0, **names}))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    with (folder / "log").open("w") as log:
        command = [str(folder / "venv/bin/mlserver"), "start", "."]
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    urls = {"http": f"127.0.0.1:{ports[0]}", "grpc": f"127.0.0.1:{ports[1]}"}
    try:
        _wait_until_ready(urls, process, folder / "log")
        yield urls
    finally:
        process.terminate()
        process.wait(30)


def _free_ports(count: int) -> list[int]:
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in listeners]
    for each in listeners:
        each.close()
    return ports


def _wait_until_ready(urls: dict[str, str], process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 120
    for protocol, url in urls.items():
        with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    if client.ready("described") and client.ready("bare"):
                        break
                except InferenceError:
                    time.sleep(0.2)
            else:
                pytest.fail(log.read_text()[-2000:])


@protocols
@pytest.mark.parametrize("model", ["described", "bare"])
def test_mlserver_answers(mlserver: dict[str, str], protocol: Any, model: str) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with InferenceClient(mlserver[protocol], protocol) as client:
        np.testing.assert_array_equal(client.infer(model, {"x": x})["y"], x + 1)


@protocols
def test_mlservers_refusals_are_errors_of_the_tree(mlserver: dict[str, str], protocol: Any) -> None:
    with InferenceClient(mlserver[protocol], protocol) as client:
        with pytest.raises(ModelNotFound):
            client.infer("absent", {"x": np.ones((1, 3), np.float32)})
        with pytest.raises(InvalidInput, match="must be 3, not 4"):
            client.infer("described", {"x": np.ones((1, 4), np.float32)})

"""Bulk requests wait behind online ones, and are refused first, on a real Triton with a published configuration."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from deepseek_client import InferenceClient, ServerBusy
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import DeploymentSpec
from deepseek.spec.files.measured_batches import BatchingPlan
from export.triton_config import config_text, model_config
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE, write_add_one
from tests.gateway import wait_for
from tests.test_onnxruntime_backend import counter

PLACES = 8  # of the queue; bulk requests have half of them
HELD = '''
import os
import time
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x. Runs once the file GO exists; writes the x of each row to ORDER, in the order of the batches."""

    def execute(self, requests):
        inputs = [np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x")) for request in requests]
        with open("ORDER", "a") as file:
            file.writelines(f"{int(value)}\\n" for x in inputs for value in x[:, 0, 0])
        while not os.path.exists("GO"):
            time.sleep(0.01)
        return [pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", x + 0)]) for x in inputs]
'''


@dataclass
class Held:
    """A server whose model `held` runs, one request at a time, once `go` exists."""

    server: EmbeddedServer
    go: Path
    order: Path

    def waiting(self) -> float:
        return counter(self.server, 'nv_inference_pending_request_count{model="held",version="1"}')

    def ran(self) -> list[int]:
        return list(map(int, self.order.read_text().split())) if self.order.exists() else []


@pytest.fixture
def held(tmp_path: Path) -> Iterator[Held]:
    repository, go, order = tmp_path / "repository", tmp_path / "go", tmp_path / "order"
    write_add_one(repository, "held", instances=1)
    (repository / "held" / "1" / "model.py").write_text(HELD.replace("GO", str(go)).replace("ORDER", str(order)))
    path = repository / "held" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    plan = BatchingPlan(preferred_batch=1, queue_timeout_ms=600_000, max_queue_size=PLACES, reasons={})
    published = model_config(DeploymentSpec.load("tests/models/text"), "fp32", "onnxruntime", {}, plan=plan)
    config.dynamic_batching.CopyFrom(published.dynamic_batching)
    config.dynamic_batching.max_queue_delay_microseconds = 0
    path.write_text(config_text(config))
    with EmbeddedServer(repository, **FREE, log_path=tmp_path / "triton.log") as server:
        yield Held(server, go, order)
        go.touch()


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_bulk_requests_run_after_online_ones_and_are_refused_first(
    held: Held, protocol: Literal["grpc", "http"]
) -> None:
    url = getattr(held.server, f"{protocol}_url")
    with InferenceClient(url, protocol, timeout_s=300, retries=0) as client, ThreadPoolExecutor(16) as pool:

        def send(number: int, bulk: bool = False) -> None:
            x = np.full((1, 2, 1), number, np.float32)
            parameters = {"priority": 2} if bulk else None
            assert client.infer("held", {"x": x}, parameters=parameters)["y"][0, 0, 0] == number

        calls = [pool.submit(send, 0)]
        wait_for(lambda: held.ran() == [0])
        for number in range(1, 8):  # four bulk ones, then three online ones
            calls.append(pool.submit(send, number, number < 5))
            wait_for(lambda: held.waiting() == number)  # noqa: B023
        with pytest.raises(ServerBusy):
            send(8, bulk=True)
        held.go.touch()
        for call in calls:
            call.result()
    assert held.ran() == [0, 5, 6, 7, 1, 2, 3, 4]

"""More requests than the server can take: a full queue, and bulk requests behind online ones."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from deepseek_client import InferenceClient, ServerBusy
from google.protobuf import text_format
from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import DeploymentSpec
from deepseek.spec.files.measured_batches import BatchingPlan
from export.publishing.triton_config import config_text, model_config
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import write_add_one
from tests.conftest import FREE
from tests.test_onnxruntime_backend import counter
from tests.waiting import wait_for

QUEUE, AT_ONCE = 16, 200
X = {"x": np.zeros((1, 2, 3), np.float32)}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Takes 0.4 s for each batch of 8, in two instances; 16 requests may wait."""
    folder = tmp_path_factory.mktemp("overload")
    write_add_one(folder / "repository", delay_s=0.4, queue=QUEUE, instances=2)
    with EmbeddedServer(folder / "repository", log_path=folder / "log", **FREE) as server:
        yield server


def resident_mib(server: EmbeddedServer) -> float:
    """Memory of the server and the processes of its models."""
    triton = psutil.Process(server.pid)
    return sum(process.memory_info().rss for process in (triton, *triton.children(recursive=True))) / 2**20


@pytest.mark.slow
def test_requests_beyond_the_queue_are_refused_at_once(busy: EmbeddedServer) -> None:
    with InferenceClient(busy.grpc_url, retries=0, timeout_s=60) as client:

        def call(_: int) -> tuple[str, float]:
            try:
                client.infer("add_one", X)
            except ServerBusy:
                return "refused", time.monotonic()
            return "accepted", time.monotonic()

        call(0)
        before_mib = resident_mib(busy)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            ended = list(pool.map(call, range(AT_ONCE)))
        accepted = sorted(at_s for how, at_s in ended if how == "accepted")
        refused = sorted(at_s for how, at_s in ended if how == "refused")
        assert len(accepted) >= QUEUE
        assert refused
        assert refused[len(refused) // 2] < accepted[-1]  # no refusal waits for the queue
        assert resident_mib(busy) < before_mib + 100
        assert [call(0)[0] for _ in range(3)] == ["accepted"] * 3  # at once, as if nothing had been


def test_cut_and_half_open_connections_leave_room_for_callers(busy: EmbeddedServer) -> None:
    head = b"POST /v2/models/add_one/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{"
    for _ in range(200):
        with socket.create_connection((busy.address, busy.http_port)) as cut:
            cut.sendall(head)
            cut.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
    with ExitStack() as held, InferenceClient(busy.http_url, "http", retries=0) as client:
        for _ in range(500):
            held.enter_context(socket.create_connection((busy.address, busy.http_port))).sendall(head[:40])
        assert client.infer("add_one", X)["y"].shape == (1, 2, 3)


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


@pytest.fixture
def held(tmp_path: Path) -> Iterator[EmbeddedServer]:
    """A server whose model `held` runs, one request at a time, once the file `go` exists."""
    repository, go = tmp_path / "repository", tmp_path / "go"
    write_add_one(repository, "held", instances=1)
    code = HELD.replace("GO", str(go)).replace("ORDER", str(tmp_path / "order"))
    (repository / "held" / "1" / "model.py").write_text(code)
    path = repository / "held" / "config.pbtxt"
    config = text_format.Parse(path.read_text(), ModelConfig())
    plan = BatchingPlan(preferred_batch=1, queue_timeout_ms=600_000, max_queue_size=PLACES, reasons={})
    published = model_config(DeploymentSpec.load("tests/models/text"), "fp32", "onnxruntime", {}, plan=plan)
    config.dynamic_batching.CopyFrom(published.dynamic_batching)
    config.dynamic_batching.max_queue_delay_microseconds = 0
    path.write_text(config_text(config))
    with EmbeddedServer(repository, **FREE, log_path=tmp_path / "triton.log") as server:
        yield server
        go.touch()


def test_bulk_requests_run_after_online_ones_and_are_refused_first(held: EmbeddedServer, tmp_path: Path) -> None:
    order, waiting = tmp_path / "order", 'nv_inference_pending_request_count{model="held",version="1"}'
    with (
        InferenceClient(held.grpc_url, timeout_s=300, retries=0) as over_grpc,
        InferenceClient(held.http_url, "http", timeout_s=300, retries=0) as over_http,
        ThreadPoolExecutor(16) as pool,
    ):
        clients = (over_grpc, over_http)

        def send(number: int, bulk: bool = False) -> None:
            x = np.full((1, 2, 1), number, np.float32)
            parameters = {"priority": 2} if bulk else None
            assert clients[number % 2].infer("held", {"x": x}, parameters=parameters)["y"][0, 0, 0] == number

        calls = [pool.submit(send, 0)]
        wait_for(order.exists)
        for number in range(1, 8):  # four bulk ones, then three online ones
            calls.append(pool.submit(send, number, number < 5))
            wait_for(lambda: counter(held, waiting) == number)  # noqa: B023
        for number in (8, 9):
            with pytest.raises(ServerBusy):
                send(number, bulk=True)
        (tmp_path / "go").touch()
        for call in calls:
            call.result()
    assert order.read_text().split() == list("05671234")

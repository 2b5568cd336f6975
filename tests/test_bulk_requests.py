"""Bulk requests wait in the backend's process, so that they never keep an instance from an online request."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx.parser
import psutil
import pytest
from deepseek_client import BULK, InferenceClient, ServerBusy

from serving.backend import bulk_requests
from serving.backend.bulk_requests import BulkRequests, Copy
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE
from tests.test_onnxruntime_backend import counter, write_fragile
from tests.waiting import wait_for

PLACES = 4


class Request:
    """A request with one input; `name` tells it from others."""

    def __init__(self, name: str, shape: tuple[int, ...] = (1, 8), parameters: str = '{"bulk": true}') -> None:
        self.name, self._shape, self._parameters, self.timeout_us = name, shape, parameters, 0

    def parameters(self) -> str:
        return self._parameters

    def timeout(self) -> int:
        return self.timeout_us

    def inputs(self) -> list[Any]:
        return [SimpleNamespace(name=lambda: "x", as_numpy=lambda: np.zeros(self._shape))]

    def requested_output_names(self) -> list[str]:
        return []

    def get_response_sender(self) -> str:
        return self.name


class Held:
    """Bulk requests whose batches run once `go` is set, of up to 4 rows. A request's sender is its name."""

    def __init__(self, wait_us: int) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        self.batches: list[list[str]] = []
        self.refused: dict[str, str] = {}
        policy = {"max_queue_size": PLACES, "default_timeout_microseconds": str(wait_us)}
        self.requests = BulkRequests(
            policy, 4, {"x"}, self._answer, lambda each, why: self.refused.update({each.get_response_sender(): why})
        )

    def _answer(self, requests: Sequence[Copy]) -> None:
        self.begun.set()
        self.go.wait()
        self.batches.append([request.get_response_sender() for request in requests])

    def take(self, *requests: Request) -> list[bool]:
        return [self.requests.take(request) for request in requests]


@contextmanager
def held(wait_us: int = 0) -> Iterator[Held]:
    """The first request runs already."""
    running = Held(wait_us)
    running.take(Request("first"))
    running.begun.wait()
    yield running
    running.go.set()
    running.requests.close()


@pytest.mark.parametrize(
    ("parameters", "bulk"),
    [
        ('{"bulk": true}', True),
        ('{"bulk": "true", "prompt_name": "query"}', True),
        ('{"bulk": false}', False),
        ('{"prompt_name": "bulk"}', False),
        ("", False),
    ],
)
def test_a_request_is_bulk_if_its_parameter_says_so(parameters: str, bulk: bool) -> None:
    with held() as running:
        assert running.take(Request("a", parameters=parameters)) == [bulk]


def test_requests_of_one_shape_are_joined_up_to_the_rows_of_a_batch_in_order() -> None:
    with held() as running:
        running.take(Request("a", (2, 8)), Request("b", ()), Request("c", (3, 8)), Request("d", (2, 8)))
        running.go.set()
        wait_for(lambda: len(running.batches) == 4)
    assert running.batches == [["first"], ["a", "d"], ["b"], ["c"]]


def test_requests_beyond_the_places_are_refused_and_those_that_wait_are_at_the_end() -> None:
    with held() as running:
        assert running.take(*map(Request, "abcde")) == [True] * 5
        full = "Exceeds maximum queue size: 4 bulk requests wait already"
        assert running.refused == {"e": full}
        closing = threading.Thread(target=running.requests.close)
        closing.start()
        running.go.set()
        closing.join()
    assert running.batches == [["first"]]
    assert running.refused == {"e": full, **dict.fromkeys("abcd", "not at ready state: the server ends this model")}


@pytest.mark.parametrize(
    ("queue_s", "caller_s", "refused"), [(3, 0, False), (1, 0, True), (0, 1, True), (3, 1, True), (1, 3, True)]
)
def test_a_request_that_waits_longer_than_the_queue_or_its_caller_allows_is_refused(
    queue_s: int, caller_s: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [100.0]
    monkeypatch.setattr(bulk_requests, "monotonic", lambda: now_s[0])
    with held(queue_s * 1_000_000) as running:
        request = Request("second")
        request.timeout_us = caller_s * 1_000_000
        running.take(request)
        now_s[0] += 2
        running.go.set()
        wait_for(lambda: running.refused or len(running.batches) == 2)
    late = "Request timeout expired: a bulk request waited too long"
    assert running.refused == ({"second": late} if refused else {})


SLOW = """
<ir_version: 8, opset_import: ["" : 17]>
slow (float[batch, 2, columns] x) => (float[batch, 2, columns] y) {
  largest = ReduceMax <keepdims = 0> (x)
  rounds = Cast <to = 7> (largest)
  shape = Constant <value_ints = [128, 128]> ()
  zeros = ConstantOfShape (shape)
  worked = Loop <body = round (int64 number, bool go, float[128, 128] state) => (bool go_on, float[128, 128] next) {
    go_on = Identity (go)
    next = MatMul (state, state)
  }> (rounds, "", zeros)
  nothing = ReduceSum <keepdims = 0> (worked)
  y = Add (x, nothing)
}
"""


Slow = tuple[EmbeddedServer, tuple[InferenceClient, InferenceClient]]


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slow]:
    """A server of y = x, after as many rounds of work as the largest x says; and clients over gRPC and HTTP.

    Its model has one instance, and two bulk requests may wait.
    """
    folder = tmp_path_factory.mktemp("slow")
    write_fragile(folder, "slow")
    onnx.save(onnx.parser.parse_model(SLOW), folder / "slow" / "1" / "model.onnx")
    path = folder / "slow" / "config.pbtxt"
    config = path.read_text().replace("count: 2", "count: 1")
    path.write_text(config.replace("max_queue_size: 64", "max_queue_size: 2", 1))  # of bulk requests
    with (
        EmbeddedServer(folder, **FREE, log_path=folder / "log") as server,
        InferenceClient(server.grpc_url, timeout_s=300, retries=0) as over_grpc,
        InferenceClient(server.http_url, "http", timeout_s=300, retries=0) as over_http,
    ):
        yield server, (over_grpc, over_http)


def test_an_online_request_does_not_wait_for_a_bulk_one_that_runs(slow: Slow) -> None:
    server, clients = slow

    def send(client: InferenceClient, rounds: int, **options: Any) -> float:
        return float(client.infer("slow", {"x": np.full((1, 2, 3), rounds, np.float32)}, **options)["y"][0, 0, 0])

    def busy_s() -> float:
        return sum(sum(each.cpu_times()[:2]) for each in psutil.Process(server.pid).children(recursive=True))

    with ThreadPoolExecutor(8) as pool:
        send(clients[0], 1)
        before_s = busy_s()
        bulk = [pool.submit(send, client, 20_000, parameters=BULK) for client in clients]
        wait_for(lambda: busy_s() > before_s + 0.2)
        assert [send(client, number) for number in range(3) for client in clients] == [0, 0, 1, 1, 2, 2]
        assert not any(call.done() for call in bulk)
        assert [call.result() for call in bulk] == [20_000] * 2


def test_a_refused_bulk_request_did_not_run_and_is_counted(slow: Slow) -> None:
    server, clients = slow
    x = {"x": np.full((1, 2, 3), 5_000, np.float32)}
    bulk = {"bulk": True}  # without BULK's priority, Triton's own queue refuses none
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(client.infer, "slow", x, parameters=bulk) for client in clients * 4]
        errors = [call.exception() for call in calls]
    refused = [error for error in errors if error]
    assert all(isinstance(error, ServerBusy) and error.did_not_run for error in refused)
    assert all(any(errors[protocol::2]) for protocol in range(2))
    series = 'onnxruntime_inference_request_failure{model="slow",reason="REJECTED_BULK",version="1"}'
    assert counter(server, series) == len(refused)

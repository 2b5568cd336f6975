"""More than the server can do, and what breaks under it: on the real server, with a capacity that is known."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from deepseek_client import ConnectionLost, InferenceClient, ModelUnavailable, ServerError

from loadtests.steady import Figures, Load, Sent
from serving.embedded import EmbeddedServer
from tests.conftest import write_add_one
from tests.failing_servers import grpc_answering, refuse

BATCH, DELAY_S, INSTANCES, QUEUE = 8, 0.4, 2, 16
CAPACITY_RPS = BATCH * INSTANCES / DELAY_S  # 40
X = {"x": np.zeros((1, 2, 3), np.float32)}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Answers 40 requests a second, however fast the machine is; 16 may wait."""
    folder = tmp_path_factory.mktemp("overload")
    write_add_one(folder / "repository", delay_s=DELAY_S, queue=QUEUE, instances=INSTANCES)
    write_add_one(folder / "repository", "quick")
    write_add_one(folder / "repository", "doomed")
    free: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with EmbeddedServer(folder / "repository", log_path=folder / "log", **free) as server:
        yield server


def sent_at(server: EmbeddedServer, rate_rps: float, duration_s: float) -> list[Sent]:
    """An open loop, without retries."""
    with InferenceClient(server.grpc_url, retries=0, timeout_s=20) as client:
        load = Load(client, [client.prepare("add_one", X)], rate_rps)
        time.sleep(duration_s)
        load.stop()
    return load.sent


def processes(server: EmbeddedServer) -> list[psutil.Process]:
    """Triton and its stubs."""
    assert server._process is not None
    triton = psutil.Process(server._process.pid)
    return [triton, *triton.children(recursive=True)]


def resident_mib(server: EmbeddedServer) -> float:
    """Memory of all of them."""
    return sum(process.memory_info().rss for process in processes(server)) / 2**20


@pytest.mark.slow
def test_at_three_times_capacity_what_is_accepted_is_on_time_and_the_rest_refused_at_once(busy: EmbeddedServer) -> None:
    sent_at(busy, CAPACITY_RPS / 2, 2)
    before_mib = resident_mib(busy)
    sent = sent_at(busy, 3 * CAPACITY_RPS, 8)
    accepted = [each for each in sent if each.error is None]
    refused = [each for each in sent if each.error is not None]
    assert {each.error.partition(":")[0] for each in refused if each.error} == {"ServerBusy"}
    assert len(accepted) / 8 > 0.7 * CAPACITY_RPS  # it goes on doing what it can
    assert len(refused) > len(accepted)
    # A full queue is two batches, behind the two that run: without a bound the last would have waited for 16 s.
    assert (Figures.of(accepted).p99_ms or 0) < 8 * DELAY_S * 1000
    assert float(np.median([each.latency_ms for each in refused])) < DELAY_S * 1000  # no refusal waits for a batch
    assert resident_mib(busy) < before_mib + 100
    after = sent_at(busy, CAPACITY_RPS / 2, 2)  # at once, as if nothing had been
    assert [each.error for each in after if each.error] == []


def test_a_killed_backend_process_delays_its_own_model_and_no_other(busy: EmbeddedServer) -> None:
    """Triton 2.51 does not start it again; the launcher has its model loaded anew (tests/test_caretaker.py)."""
    stubs = [each for each in processes(busy)[1:] if "doomed" in " ".join(each.cmdline())]
    assert stubs
    for stub in stubs:
        stub.kill()
    again, killed_s = False, time.monotonic()
    with InferenceClient(busy.grpc_url, retries=0) as client:
        while not again:
            began_s = time.monotonic()
            assert began_s - killed_s < 60
            with contextlib.suppress(ServerError, ModelUnavailable):
                client.infer("doomed", X)
                again = True
            assert time.monotonic() - began_s < 5  # answered at once, whatever the answer is
            np.testing.assert_array_equal(client.infer("quick", X)["y"], X["x"] + 1)


def test_connections_cut_in_the_middle_of_a_request_harm_nobody_else(busy: EmbeddedServer) -> None:
    head = b"POST /v2/models/quick/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b"{" * 1000
    for _ in range(200):
        with socket.create_connection((busy.address, busy.http_port)) as cut:
            cut.sendall(head)
            cut.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # ends with a reset
    with InferenceClient(busy.http_url, "http", retries=0) as client:
        assert client.infer("quick", X)["y"].shape == (1, 2, 3)


def test_half_open_connections_leave_room_for_callers(busy: EmbeddedServer) -> None:
    held = [socket.create_connection((busy.address, busy.http_port)) for _ in range(500)]
    try:
        for each in held:
            each.sendall(b"POST /v2/models/quick/infer HTTP/1.1\r\n")
        with InferenceClient(busy.http_url, "http", retries=0) as client:
            assert client.infer("quick", X)["y"].shape == (1, 2, 3)
    finally:
        for each in held:
            each.close()


def test_a_call_that_a_server_cancels_as_it_ends_is_a_lost_connection() -> None:
    """Triton does so of what is in flight when its exit time-out is over."""
    with grpc_answering(refuse(grpc.StatusCode.CANCELLED, "CANCELLED")) as (url, seen):
        for idempotent, calls in ((False, 1), (True, 3)):
            seen.clear()
            with (
                InferenceClient(url, retries=2, idempotent=idempotent) as client,
                pytest.raises(ConnectionLost, match="CANCELLED"),
            ):
                client.metadata("any")
            assert len(seen) == calls

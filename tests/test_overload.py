"""More than the server can do, and what breaks under it: on the real server."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import psutil
import pytest
from deepseek_client import ConnectionLost, InferenceClient, PreparedRequest, ServerBusy

from serving.embedded.launcher import EmbeddedServer
from tests.conftest import FREE, write_add_one
from tests.failing_servers import grpc_answering, refuse

BATCH, DELAY_S, INSTANCES, QUEUE = 8, 0.4, 2, 16
AT_ONCE = 200
X = {"x": np.zeros((1, 2, 3), np.float32)}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Takes 0.4 s for each batch of 8, in two instances; 16 requests may wait."""
    folder = tmp_path_factory.mktemp("overload")
    write_add_one(folder / "repository", delay_s=DELAY_S, queue=QUEUE, instances=INSTANCES)
    write_add_one(folder / "repository", "quick")
    with EmbeddedServer(folder / "repository", log_path=folder / "log", **FREE) as server:
        yield server


def processes(server: EmbeddedServer) -> list[psutil.Process]:
    triton = psutil.Process(server.pid)
    return [triton, *triton.children(recursive=True)]


def resident_mib(server: EmbeddedServer) -> float:
    return sum(process.memory_info().rss for process in processes(server)) / 2**20


@pytest.mark.slow
def test_of_many_requests_at_once_a_queue_full_is_accepted_and_the_rest_refused_before_those_are_answered(
    busy: EmbeddedServer,
) -> None:
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
    """Triton cancels the calls in flight when its exit time-out is over."""
    request = PreparedRequest(model="m", version="", request_id="", outputs=(), parts=(b"",), tensors=())
    with grpc_answering(refuse(grpc.StatusCode.CANCELLED, "CANCELLED")) as (url, seen):
        for idempotent, calls in ((False, 1), (True, 3)):
            seen.clear()
            with (
                InferenceClient(url, retries=2, idempotent=idempotent) as client,
                pytest.raises(ConnectionLost, match="CANCELLED"),
            ):
                client.send(request)
            assert len(seen) == calls

"""Hedged calls: no attempt holds up the caller, the process or the ejection of a dead replica."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded, InferenceClient, InvalidInput, ModelNotFound, ServerBusy

from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import (
    Kind,
    MakeRelays,
    X,
    answering,
    client_of,
    dropping,
    grpc_answering,
    kinds,
    mute,
    prepared,
    protocols,
    refusing,
    url_of,
)
from tests.waiting import wait_for

HEDGED: dict[str, Any] = {"idempotent": True, "hedge_after_ms": 50, "retry_budget": None, "timeout_s": 120}
SOON_S = 60  # long before the deadline, on any machine


@contextlib.contextmanager
def within(seconds: float = SOON_S) -> Iterator[None]:
    start_s = time.monotonic()
    yield
    assert time.monotonic() - start_s < seconds


def wait_for_the_end(url: str) -> None:
    """Waits until no thread of a hedged call and no connection to the address is left."""
    port = int(url.rpartition(":")[2])

    def left() -> list[object]:
        found = [each for each in psutil.Process().net_connections("tcp") if each.raddr[1:] == (port,)]
        threads = [thread for thread in threading.enumerate() if thread.name.startswith("deepseek-hedge")]
        return [*threads, *found[2:]]  # `dropping` has two

    wait_for(left, [].__eq__)


@kinds
@protocols
@pytest.mark.parametrize("connects", [False, True])
def test_a_hedge_overtakes_a_silent_server_and_ends_the_attempt_there(
    relays: MakeRelays, protocol: str, kind: Kind, connects: bool
) -> None:
    (fast,) = relays(protocol, 1)
    silent: Any = answering(mute) if connects else dropping()
    with silent as found:
        url = found[0] if connects else found
        with within(), client_of([url, fast.url], protocol, kind, **HEDGED) as client:
            for _ in range(2):  # one of the two calls starts at the silent server
                np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
        if protocol == "http":
            wait_for_the_end(url)


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys
import numpy as np
from deepseek_client import InferenceClient

protocol, dropped, fast = sys.argv[1:]
client = InferenceClient([dropped, fast], protocol, idempotent=True, hedge_after_ms=50, timeout_s=120)
for _ in range(2):
    client.infer("add_one", {"x": np.ones((1, 2, 3), np.float32)})
"""
THREADS = GREENLETS.partition("import sys")[2]


@protocols
@pytest.mark.parametrize("program", [GREENLETS, "import sys" + THREADS], ids=["greenlets", "threads"])
def test_a_process_exits_while_the_loser_still_connects(relays: MakeRelays, protocol: str, program: str) -> None:
    (fast,) = relays(protocol, 1)
    with dropping() as dropped:
        command = [sys.executable, "-c", program, protocol, dropped, fast.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SOON_S)
    assert done.returncode == 0, done.stderr


@kinds
@pytest.mark.parametrize(
    ("line", "code", "expected"),
    [
        ("400 Bad Request", grpc.StatusCode.INVALID_ARGUMENT, InvalidInput),
        ("404 Not Found", grpc.StatusCode.NOT_FOUND, ModelNotFound),
    ],
)
@protocols
def test_a_refusal_by_the_hedge_ends_the_call(
    server: EmbeddedServer, protocol: str, line: str, code: grpc.StatusCode, expected: type, kind: Kind
) -> None:
    request = prepared(server, protocol)
    with (
        refusing(protocol, line, code, "no") as (refused, _),
        answering(mute) as (muted, _),
        client_of([muted, refused], protocol, kind, **HEDGED) as client,
    ):
        for _ in range(2):
            with within(), pytest.raises(expected):
                client.send(request)


@kinds
@protocols
def test_a_mute_replica_is_ejected_though_every_hedge_wins(
    server: EmbeddedServer, relays: MakeRelays, protocol: str, kind: Kind
) -> None:
    (fast,) = relays(protocol, 1)
    with answering(mute) as (muted, _), client_of([muted, fast.url], protocol, kind, **HEDGED) as client:
        request = prepared(server, protocol)
        for _ in range(8):
            client.send(request)
        assert client.statistics().replicas == {muted: False, fast.url: True}
        assert client.statistics().models["add_one"].errors == {}


def test_any_number_of_calls_are_hedged_at_once(server: EmbeddedServer, relays: MakeRelays) -> None:
    (fast,) = relays("http", 1)
    calls = 100
    with (
        answering(mute) as (muted, _),
        InferenceClient([muted, fast.url], "http", **HEDGED) as client,
        ThreadPoolExecutor(calls) as threads,
    ):
        request = prepared(server, "http")
        with within():
            done = [threads.submit(client.send, request) for _ in range(calls)]
            assert all(each.result()["y"].shape == (1, 2, 3) for each in done)


@protocols
def test_a_spent_deadline_of_a_hedged_call_is_deadline_exceeded(server: EmbeddedServer, protocol: Any) -> None:
    with InferenceClient(url_of(server, protocol), protocol, hedge_after_ms="p95", idempotent=True) as client:
        client.infer("add_one", {"x": X}, timeout_s=60)
        with pytest.raises((DeadlineExceeded, ServerBusy)):  # Triton may say first that the time is over
            client.infer("add_one", {"x": X}, timeout_s=1e-6)


@pytest.mark.parametrize("options", [{}, {"hedge_after_ms": 10_000, "idempotent": True}], ids=["plain", "hedged"])
def test_closing_a_client_during_a_call_over_grpc_is_a_lost_connection(options: dict[str, Any]) -> None:
    came, go = threading.Event(), threading.Event()

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        came.set()
        go.wait(SOON_S)
        return b""

    with grpc_answering(answer) as (url, _), ThreadPoolExecutor(1) as pool:
        client = InferenceClient(url, timeout_s=600, **options)
        call = pool.submit(client.metadata, "m")
        assert came.wait(SOON_S)
        client.close()
        with pytest.raises(ConnectionLost):
            call.result(SOON_S)
        go.set()

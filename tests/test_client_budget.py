"""The retry budget and hedging, against servers that fail everything or are slow."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    AsyncInferenceClient,
    InferenceClient,
    InvalidInput,
    ServerBusy,
    Statistics,
)
from deepseek_client.budget import RESERVE, RetryBudget

from serving.embedded import EmbeddedServer
from tests.failing_servers import (
    MakeRelays,
    answering,
    client_of,
    grpc_answering,
    prepared,
    refuse,
    status,
)

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
both = pytest.mark.parametrize("protocol", ["http", "grpc"])


def test_the_budget_is_a_share_of_the_calls_of_the_last_seconds() -> None:
    now_s = 100.0
    budget = RetryBudget(0.1, lambda: now_s)
    assert [budget.take() for _ in range(RESERVE + 1)] == [True] * RESERVE + [False]
    for _ in range(50):
        budget.count_call()
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]
    now_s += 9
    assert not budget.take()
    now_s += 1
    assert [budget.take() for _ in range(RESERVE + 1)] == [True] * RESERVE + [False]


CALLS = 500


@both
def test_a_server_that_fails_everything_sees_a_tenth_more_than_the_calls(server: EmbeddedServer, protocol: str) -> None:
    exhausted = refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    failing: Any = answering(status("503 Service Unavailable")) if protocol == "http" else grpc_answering(exhausted)
    request = prepared(server, protocol)

    def call(client: InferenceClient) -> None:
        with pytest.raises(ServerBusy):
            client.send(request)

    with failing as (url, seen), client_of([url], protocol, retries=5) as client:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(call, [client] * CALLS))
        told = client.statistics().models["add_one"]
    assert CALLS < len(seen) <= 1.1 * CALLS + RESERVE
    assert (told.calls, told.errors, told.retries) == (CALLS, {"ServerBusy": CALLS}, len(seen) - CALLS)
    assert told.denied >= CALLS - told.retries


def test_so_it_does_with_an_asynchronous_client(server: EmbeddedServer) -> None:
    async def main(url: str) -> None:
        async with AsyncInferenceClient(url, "http", retries=5) as client:
            for _ in range(10):
                calls = [client.send(request) for _ in range(CALLS // 10)]
                answers = await asyncio.gather(*calls, return_exceptions=True)
                assert {type(answer) for answer in answers} == {ServerBusy}

    request = prepared(server, "http")
    with answering(status("503 Service Unavailable")) as (url, seen):
        asyncio.run(main(url))
    assert CALLS < len(seen) <= 1.1 * CALLS + RESERVE


def test_without_a_budget_each_call_has_all_its_retries(server: EmbeddedServer) -> None:
    with (
        answering(status("503 Service Unavailable")) as (url, seen),
        client_of([url], "http", retries=2, retry_budget=None) as client,
    ):
        for _ in range(20):
            with pytest.raises(ServerBusy):
                client.send(prepared(server, "http"))
    assert len(seen) == 60


# Hedging


@both
def test_a_slow_replica_is_overtaken_by_another(relays: MakeRelays, protocol: str) -> None:
    slow, fast = relays(protocol, 2)
    with client_of([slow, fast], protocol, idempotent=True, hedge_after_ms=50, retry_budget=1.0) as client:
        request = client.prepare("add_one", {"x": X})
        for _ in range(4):
            client.send(request)
        slow.delay_s = 1.0
        start = time.monotonic()
        for _ in range(6):
            np.testing.assert_array_equal(client.send(request)["y"], X + 1)
        assert time.monotonic() - start < 2.5
        told = client.statistics().models["add_one"]
        assert told.hedges >= told.hedges_won >= 3
        slow.delay_s = 0.0
        for _ in range(4):  # what was stopped has left nothing behind
            np.testing.assert_array_equal(client.send(request)["y"], X + 1)


@both
def test_an_asynchronous_client_hedges_too(relays: MakeRelays, protocol: str) -> None:
    slow, fast = relays(protocol, 2)

    async def main() -> Statistics:
        urls = [slow.url, fast.url]
        async with AsyncInferenceClient(urls, protocol, idempotent=True, hedge_after_ms=50) as client:  # type: ignore[arg-type]
            request = await client.prepare("add_one", {"x": X})
            slow.delay_s = 1.0
            for _ in range(6):
                np.testing.assert_array_equal((await client.send(request))["y"], X + 1)
            return client.statistics()

    start = time.monotonic()
    told = asyncio.run(main()).models["add_one"]
    assert time.monotonic() - start < 3
    assert told.hedges_won >= 3


def test_the_loser_is_stopped_and_its_connection_closed(server: EmbeddedServer, relays: MakeRelays) -> None:
    (fast,) = relays("http", 1)
    ended: list[float] = []

    def wait_for_the_end(connection: Any) -> None:
        connection.settimeout(5)
        while connection.recv(65536):
            pass
        ended.append(time.monotonic())

    with (
        answering(wait_for_the_end) as (stalled, _),
        client_of([stalled, fast.url], "http", idempotent=True, hedge_after_ms=50) as client,
    ):
        request, start = prepared(server, "http"), time.monotonic()
        for _ in range(2):  # one of the two goes to the stalled one first
            client.send(request)
        time.sleep(0.2)
    assert ended
    assert ended[0] - start < 2


def test_hedges_are_inside_the_budget(server: EmbeddedServer) -> None:
    def slowly(request: bytes, context: grpc.ServicerContext) -> bytes:
        time.sleep(0.02)
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")
        return b""

    with (
        grpc_answering(slowly) as (url, seen),
        client_of([url], "grpc", idempotent=True, hedge_after_ms=1) as client,
    ):
        request = prepared(server, "grpc")
        for _ in range(100):
            with pytest.raises(InvalidInput):
                client.send(request)
        told = client.statistics().models["add_one"]
    assert 10 < told.hedges <= 10 + RESERVE
    assert len(seen) <= 100 + told.hedges


def test_a_percentile_hedges_once_enough_is_known(server: EmbeddedServer, relays: MakeRelays) -> None:
    slow, fast = relays("http", 2)
    settings: dict[str, Any] = {"idempotent": True, "hedge_after_ms": "p90", "retry_budget": None}
    with client_of([slow, fast], "http", **settings) as client:
        request = client.prepare("add_one", {"x": X})
        for _ in range(99):
            client.send(request)
        assert client.statistics().models["add_one"].hedges == 0
        client.send(request)
        slow.delay_s = 1.0
        start = time.monotonic()
        for _ in range(4):
            client.send(request)
        assert time.monotonic() - start < 1.5
        assert client.statistics().models["add_one"].hedges_won >= 2


def test_a_hedge_still_answers_where_the_first_attempt_breaks(server: EmbeddedServer, relays: MakeRelays) -> None:
    (other,) = relays("http", 1)
    other.delay_s = 0.3

    def break_late(connection: Any) -> None:
        time.sleep(0.2)

    with answering(break_late) as (breaks, _):
        settings: dict[str, Any] = {"idempotent": True, "hedge_after_ms": 50, "retries": 0}
        with client_of([breaks, other.url], "http", **settings) as client:
            request = prepared(server, "http")
            for _ in range(2):
                np.testing.assert_array_equal(client.send(request)["y"], X + 1)
            assert client.statistics().models["add_one"].hedges_won >= 1


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import grpc.experimental.gevent
grpc.experimental.gevent.init_gevent()
import sys
import gevent
import numpy as np
from deepseek_client import InferenceClient

protocol, *urls = sys.argv[1:]
with InferenceClient(urls, protocol, idempotent=True, hedge_after_ms=30, retry_budget=None) as client:
    request = client.prepare("add_one", {"x": np.ones((1, 2, 3), np.float32)})
    calls = [gevent.spawn(client.send, request) for _ in range(12)]
    gevent.joinall(calls, raise_error=True)
    print(client.statistics().models["add_one"].hedges_won >= 4, client.statistics().models["add_one"].p99_ms < 1500)
"""


@both
def test_greenlets_hedge_as_threads_do(relays: MakeRelays, protocol: str) -> None:
    slow, fast = relays(protocol, 2)
    slow.delay_s = 2.0
    # The fetch of the metadata may go to the slow one: it is not hedged, and takes its time.
    command = [sys.executable, "-c", GREENLETS, protocol, slow.url, fast.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "True"], done.stderr

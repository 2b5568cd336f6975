"""Several addresses, the retry budget and hedging: against real servers behind relays that stall, refuse and die."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    AsyncInferenceClient,
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    InvalidInput,
    PreparedRequest,
    ServerBusy,
    Statistics,
    Unreachable,
)
from deepseek_client.budget import RESERVE, RetryBudget

from serving.embedded import EmbeddedServer
from tests.failing_servers import Relay, answering, grpc_answering, mute, refuse, status

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
both = pytest.mark.parametrize("protocol", ["http", "grpc"])
MakeRelays = Callable[[str, int], list[Relay]]


@pytest.fixture
def relays(server: EmbeddedServer) -> Iterator[MakeRelays]:
    """Makes relays to the real server: replicas of one service."""
    made: list[Relay] = []

    def make(protocol: str, count: int) -> list[Relay]:
        port = server.http_port if protocol == "http" else server.grpc_port
        made.extend(Relay((server.address, port)) for _ in range(count))
        return made

    yield make
    for relay in made:
        relay.close()


def client_of(relays: list[Relay] | list[str], protocol: str, **settings: Any) -> InferenceClient:
    urls = [relay if isinstance(relay, str) else relay.url for relay in relays]
    return InferenceClient(urls, protocol, **settings)  # type: ignore[arg-type]


def prepared(server: EmbeddedServer, protocol: str, model: str = "add_one") -> PreparedRequest:
    url = server.http_url if protocol == "http" else server.grpc_url
    with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
        return client.prepare(model, {"x": X})


def wait_until(client: InferenceClient, holds: Callable[[Statistics], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds(client.statistics()):
        assert time.monotonic() < deadline, client.statistics()
        time.sleep(0.05)


@both
def test_calls_go_round_the_replicas(relays: MakeRelays, protocol: str) -> None:
    running = relays(protocol, 3)
    with client_of(running, protocol) as client:
        request = client.prepare("add_one", {"x": X})
        before = [relay.pieces for relay in running]
        for _ in range(30):
            client.send(request)
    seen = [relay.pieces - count for relay, count in zip(running, before, strict=True)]
    assert seen == [10, 10, 10] if protocol == "http" else min(seen) >= 10


@both
def test_a_dead_replica_costs_no_call_and_comes_back_when_it_does(relays: MakeRelays, protocol: str) -> None:
    dies, lives = relays(protocol, 2)
    with client_of([dies, lives], protocol) as client:
        request = client.prepare("add_one", {"x": X})
        dies.close()
        for _ in range(20):
            client.send(request)
        assert client.statistics().replicas == {dies.url: False, lives.url: True}
        assert client.statistics().models["add_one"].errors == {}
        dies.reopen()
        wait_until(client, lambda now: now.replicas[dies.url])
        accepted = dies.pieces
        for _ in range(10):
            client.send(request)
        assert dies.pieces > accepted
        assert (client.statistics().ejections, client.statistics().readmissions) == (1, 1)


def test_an_asynchronous_client_does_the_same(relays: MakeRelays) -> None:
    dies, lives = relays("grpc", 2)

    async def main() -> Statistics:
        async with AsyncInferenceClient([dies.url, lives.url]) as client:
            request = await client.prepare("add_one", {"x": X})
            dies.close()
            await asyncio.gather(*(client.send(request) for _ in range(20)))
            dies.reopen()
            while not client.statistics().replicas[dies.url]:
                await asyncio.sleep(0.05)
            await asyncio.gather(*(client.send(request) for _ in range(20)))
            return client.statistics()

    statistics = asyncio.run(asyncio.wait_for(main(), 20))
    assert statistics.models["add_one"].errors == {}
    assert statistics.ejections == statistics.readmissions >= 1


@both
def test_a_replica_that_stalls_is_ejected_after_three_deadlines_in_a_row(
    server: EmbeddedServer, relays: MakeRelays, protocol: str
) -> None:
    (lives,) = relays(protocol, 1)
    with answering(mute) as (stalled, _), client_of([stalled, lives.url], protocol) as client:
        request, failed = prepared(server, protocol), 0
        for _ in range(20):
            with contextlib.suppress(DeadlineExceeded):
                client.send(request, timeout_s=0.2)
                continue
            failed += 1
        assert failed == 3
        assert client.statistics().replicas == {stalled: False, lives.url: True}


def test_a_replica_whose_model_is_not_ready_is_ejected_until_it_is(server: EmbeddedServer, relays: MakeRelays) -> None:
    (lives,) = relays("http", 1)
    loading = status("400 Bad Request", '{"error": "Request for unknown model: \'add_one\' is not at ready state"}')
    with answering(loading) as (other, _), client_of([other, lives.url], "http") as client:
        request = prepared(server, "http")
        for _ in range(20):
            client.send(request)
        time.sleep(0.6)  # the first probe has been answered, in vain
        assert client.statistics().replicas[other] is False
        assert client.statistics().models["add_one"].retries == 3


def test_a_busy_replica_is_passed_over_and_not_ejected(server: EmbeddedServer, relays: MakeRelays) -> None:
    (lives,) = relays("http", 1)
    with answering(status("503 Service Unavailable")) as (busy, seen), client_of([busy, lives.url], "http") as client:
        request = prepared(server, "http")
        for _ in range(50):
            client.send(request)
        assert client.statistics().ejections == 0
        assert 1 <= len(seen) < 25  # it rests longer after each refusal


@both
def test_the_deadline_is_one_over_all_replicas(server: EmbeddedServer, protocol: str) -> None:
    with answering(mute) as (one, _), answering(mute) as (two, _), client_of([one, two], protocol, retries=9) as client:
        request, start = prepared(server, protocol), time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"timeout_s=0\.3"):
            client.send(request, timeout_s=0.3)
    assert time.monotonic() - start < 2


@both
def test_where_all_are_dead_each_is_tried_and_the_error_says_so(
    server: EmbeddedServer, relays: MakeRelays, protocol: str
) -> None:
    dead = relays(protocol, 2)
    for relay in dead:
        relay.close()
    with client_of(dead, protocol, retries=1) as client:
        with pytest.raises(Unreachable):
            client.send(prepared(server, protocol))
        assert set(client.statistics().replicas.values()) == {False}
        with pytest.raises(Unreachable):
            client.ready()


def test_one_replica_that_is_ready_makes_the_service_ready(relays: MakeRelays) -> None:
    dies, lives = relays("http", 2)
    dies.close()
    with client_of([dies, lives], "http") as client:
        assert client.ready("add_one")


# The budget


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


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param({"url": []}, "one address, or a list of different ones", id="no address"),
        pytest.param({"url": ["a:1", "a:1"]}, "list of different ones", id="twice the same"),
        pytest.param({"url": ["a:1", "http://b:1"]}, "without a scheme", id="scheme"),
        pytest.param({"hedge_after_ms": 5}, "say idempotent=True", id="hedge of what may not run twice"),
        pytest.param({"hedge_after_ms": "95", "idempotent": True}, "such as 'p95'", id="percentile"),
        pytest.param({"hedge_after_ms": 0, "idempotent": True}, "it must be milliseconds", id="no time"),
        pytest.param({"retry_budget": -1}, "a share of the calls", id="budget"),
        pytest.param({"shared_memory": "yes"}, "False, True or 'auto'", id="shared memory"),
    ],
)
@pytest.mark.parametrize("kind", [InferenceClient, AsyncInferenceClient])
def test_wrong_settings_are_refused_at_once(kind: type, settings: dict, says: str) -> None:
    with pytest.raises(InferenceError, match=says):
        kind(**settings)

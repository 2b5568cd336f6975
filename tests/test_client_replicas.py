"""Several addresses: real servers behind relays that stall, refuse and die."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable

import numpy as np
import pytest
from deepseek_client import (
    AsyncInferenceClient,
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    Statistics,
    Unreachable,
)

from serving.embedded import EmbeddedServer
from tests.failing_servers import (
    MakeRelays,
    answering,
    client_of,
    mute,
    prepared,
    status,
)

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
both = pytest.mark.parametrize("protocol", ["http", "grpc"])


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
        # Idempotent: the connection's end may not have been seen yet when the calls are made.
        async with AsyncInferenceClient([dies.url, lives.url], idempotent=True) as client:
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

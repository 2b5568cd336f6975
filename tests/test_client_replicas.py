"""Several addresses: real servers behind relays that stall, refuse and die."""

from __future__ import annotations

import contextlib
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deepseek_client import DeadlineExceeded, Unreachable, concurrency

from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import Kind, MakeRelays, X, answering, client_of, kinds, mute, prepared, protocols, status
from tests.waiting import wait_for


@kinds
@protocols
def test_calls_round_robin_over_the_replicas(relays: MakeRelays, protocol: str, kind: Kind) -> None:
    running = relays(protocol, 3)
    with client_of(running, protocol, kind) as client:
        request = client.prepare("add_one", {"x": X})
        before = [relay.pieces for relay in running]
        for _ in range(30):
            client.send(request)
    seen = [relay.pieces - count for relay, count in zip(running, before, strict=True)]
    assert seen == [10, 10, 10] if protocol == "http" else min(seen) >= 10


@kinds
@protocols
def test_a_dead_replica_loses_no_call_and_is_readmitted(relays: MakeRelays, protocol: str, kind: Kind) -> None:
    dies, lives = relays(protocol, 2)
    # Idempotent: the client may not have noticed the closed connection when it makes the calls.
    with client_of([dies, lives], protocol, kind, idempotent=True) as client:
        request = client.prepare("add_one", {"x": X})
        dies.close()
        for _ in range(20):
            np.testing.assert_array_equal(client.send(request)["y"], X + 1)
        assert client.statistics().replicas == {dies.url: False, lives.url: True}
        assert client.statistics().models["add_one"].errors == {}
        assert client.ready("add_one")  # one ready replica is enough
        dies.reopen()
        wait_for(client.statistics, lambda now: now.replicas[dies.url])
        pieces = dies.pieces
        for _ in range(10):
            client.send(request)
        assert dies.pieces > pieces
        assert client.statistics().ejections == client.statistics().readmissions >= 1


class NoThread(threading.Thread):
    def start(self) -> None:
        raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("options", [{}, {"hedge_after_ms": 5_000.0}], ids=["alone", "hedged"])
def test_without_room_for_a_thread_calls_are_answered_and_no_replica_stays_ejected(
    relays: MakeRelays, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    dies, lives = relays("http", 2)
    with client_of([dies, lives], "http", idempotent=True, **options) as client:
        request = client.prepare("add_one", {"x": X})
        dies.close()
        with monkeypatch.context() as full:
            full.setattr(concurrency, "threading", SimpleNamespace(Thread=NoThread, Lock=threading.Lock))
            for _ in range(4):
                np.testing.assert_array_equal(client.send(request)["y"], X + 1)
        assert client.statistics().replicas == {dies.url: True, lives.url: True}


@protocols
def test_a_replica_that_stalls_is_ejected_after_three_deadlines_in_a_row(
    server: EmbeddedServer, relays: MakeRelays, protocol: str
) -> None:
    (lives,) = relays(protocol, 1)
    with answering(mute) as (stalled, _), client_of([stalled, lives.url], protocol) as client:
        request, failed = prepared(server, protocol), 0
        while failed < 3:
            with contextlib.suppress(DeadlineExceeded):
                client.send(request, timeout_s=0.5)
                continue
            failed += 1
        assert client.statistics().replicas[stalled] is False


def test_a_replica_is_ejected_while_its_model_is_not_ready(server: EmbeddedServer, relays: MakeRelays) -> None:
    (lives,) = relays("http", 1)
    loading = status("400 Bad Request", '{"error": "Request for unknown model: \'add_one\' is not at ready state"}')
    with answering(loading) as (other, seen), client_of([other, lives.url], "http") as client:
        request = prepared(server, "http")
        for _ in range(20):
            client.send(request)
        assert client.statistics().models["add_one"].retries == 3
        while len(seen) < 4:  # until the first probe has been refused
            time.sleep(0.05)
        assert client.statistics().replicas[other] is False


@pytest.mark.parametrize("first", [True, False])
def test_one_replica_that_is_ready_makes_the_service_ready(relays: MakeRelays, first: bool) -> None:
    (lives,) = relays("http", 1)
    with answering(status("400 Bad Request", "")) as (other, _):
        with client_of([other, lives.url] if first else [lives.url, other], "http") as client:
            assert [client.ready("add_one") for _ in range(8)] == [True] * 8
        with client_of([other], "http") as client:
            assert not client.ready("add_one")
        with client_of([other, "127.0.0.1:1"] if first else ["127.0.0.1:1", other], "http") as client:
            assert not client.ready("add_one")


def test_a_busy_replica_is_avoided_but_not_ejected(server: EmbeddedServer, relays: MakeRelays) -> None:
    (lives,) = relays("http", 1)
    wait = "503 Service Unavailable\r\nRetry-After: 600"
    with answering(status(wait)) as (busy, seen), client_of([busy, lives.url], "http", idempotent=True) as client:
        request = prepared(server, "http")
        for _ in range(50):
            client.send(request)
        assert client.statistics().ejections == 0
        assert len(seen) == 1


@kinds
@protocols
def test_if_all_replicas_are_dead_each_is_tried(
    server: EmbeddedServer, relays: MakeRelays, protocol: str, kind: Kind
) -> None:
    dead = relays(protocol, 2)
    for relay in dead:
        relay.close()
    with client_of(dead, protocol, kind, retries=1) as client:
        with pytest.raises(Unreachable):
            client.send(prepared(server, protocol))
        assert set(client.statistics().replicas.values()) == {False}
        with pytest.raises(Unreachable):
            client.ready()


@protocols
def test_if_all_replicas_stall_ready_names_the_callers_time_out(protocol: str) -> None:
    with (
        answering(mute) as (first, _),
        answering(mute) as (second, _),
        client_of([first, second], protocol) as client,
        pytest.raises(DeadlineExceeded, match=r"did not answer within timeout_s=0\.4;"),
    ):
        client.ready(timeout_s=0.4)

"""Connections of the HTTP transport: how many are opened at once, who gets them, and what if one is closed as it is used.
A handshake is held up by a caller that connects to the relay first and says nothing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from deepseek_client import AsyncInferenceClient, ConnectionLost, DeadlineExceeded, InferenceClient
from deepseek_client.http_connections import AsyncConnection, BlockingConnection, connected
from deepseek_client.http_pool import MOST_OPENING, BlockingPool
from deepseek_client.runtimes import run
from deepseek_client.transports import Deadline

from serving.embedded import EmbeddedServer
from tests.failing_servers import Relay, answering, make_certificate, only_once, prepared

CALLS = 3 * MOST_OPENING


@pytest.fixture
def held(server: EmbeddedServer, tmp_path: Path) -> Iterator[tuple[Relay, Path, socket.socket]]:
    """A relay with TLS, its certificate, and what holds it up as long as it is open."""
    ca_cert, context = make_certificate(tmp_path)
    relay = Relay((server.address, server.http_port), context)
    with socket.create_connection(("127.0.0.1", relay.port)) as stalling:
        yield relay, ca_cert, stalling
    relay.close()


def connections(relay: Relay) -> int:
    """Of this process to the relay, the stalling one left out."""
    found = psutil.Process().net_connections("tcp")
    return sum(each.status == "ESTABLISHED" and each.raddr[1:] == (relay.port,) for each in found) - 1


def settled(relay: Relay) -> int:
    """How many there are once no more are added for a second."""
    seen, since_s = 0, time.monotonic()
    while time.monotonic() < since_s + 1:
        if (count := connections(relay)) != seen:
            seen, since_s = count, time.monotonic()
        time.sleep(0.05)
    return seen


def test_threads_open_no_more_than_so_many_at_a_time(held: tuple[Relay, Path, socket.socket]) -> None:
    relay, ca_cert, stalling = held
    with (
        InferenceClient(relay.url, "http", ca_cert=ca_cert, timeout_s=60, retries=0) as client,
        ThreadPoolExecutor(CALLS) as threads,
    ):
        answers = [threads.submit(client.metadata, "add_one") for _ in range(CALLS)]
        assert settled(relay) == MOST_OPENING
        stalling.close()
        assert {answer.result().name for answer in answers} == {"add_one"}


def test_tasks_open_no_more_than_so_many_at_a_time(held: tuple[Relay, Path, socket.socket]) -> None:
    relay, ca_cert, stalling = held

    async def main() -> None:
        async with AsyncInferenceClient(relay.url, "http", ca_cert=ca_cert, timeout_s=60, retries=0) as client:
            calls = [asyncio.ensure_future(client.metadata("add_one")) for _ in range(CALLS)]
            assert await asyncio.to_thread(settled, relay) == MOST_OPENING
            stalling.close()
            assert {found.name for found in await asyncio.gather(*calls)} == {"add_one"}

    asyncio.run(main())


def test_a_handshake_outlives_the_task_that_it_was_begun_for(held: tuple[Relay, Path, socket.socket]) -> None:
    relay, ca_cert, stalling = held

    async def main() -> None:
        async with AsyncInferenceClient(relay.url, "http", ca_cert=ca_cert, timeout_s=60, retries=0) as client:
            with pytest.raises(DeadlineExceeded):
                await client.metadata("add_one", timeout_s=0.5)
            assert await asyncio.to_thread(settled, relay) == 1
            stalling.close()
            assert (await client.metadata("add_one")).name == "add_one"

    asyncio.run(main())


def test_threads_that_wait_for_one_keep_their_deadline(held: tuple[Relay, Path, socket.socket]) -> None:
    relay, ca_cert, _ = held
    with (
        InferenceClient(relay.url, "http", ca_cert=ca_cert, timeout_s=0.5, retries=0) as client,
        ThreadPoolExecutor(CALLS) as threads,
    ):
        answers = [threads.submit(client.metadata, "add_one") for _ in range(CALLS)]
        assert all(isinstance(answer.exception(20), DeadlineExceeded) for answer in answers)


@pytest.mark.parametrize("idempotent", [False, True], ids=["once", "idempotent"])
def test_where_a_reused_connection_is_closed_a_call_that_may_run_twice_goes_over_a_new_one(
    server: EmbeddedServer, idempotent: bool
) -> None:
    request = prepared(server, "http")
    lost = contextlib.nullcontext() if idempotent else pytest.raises(ConnectionLost)

    async def main(url: str) -> None:
        async with AsyncInferenceClient(url, "http", retries=0, idempotent=idempotent) as client:
            assert [await client.ready() for _ in range(3)] == [True] * 3
            with lost:
                assert await client.send(request) == {}

    with answering(only_once) as (url, seen):
        with InferenceClient(url, "http", retries=0, idempotent=idempotent) as client:
            assert [client.ready() for _ in range(3)] == [True] * 3
            with lost:
                assert client.send(request) == {}
        asyncio.run(main(url))
    assert len(seen) == 2 * (3 + idempotent)  # one on each connection


def test_who_reads_over_a_tls_connection_that_is_stopped_reads_no_ciphertext(tmp_path: Path) -> None:
    ca_cert, context = make_certificate(tmp_path)
    ours, theirs = socket.socketpair()
    sent = bytes(100_000)

    def serve() -> None:
        with context.wrap_socket(theirs, server_side=True) as served:
            served.sendall(sent)

    with ThreadPoolExecutor(1) as pool:
        serving = pool.submit(serve)
        trusting = ssl.create_default_context(cafile=ca_cert)
        connection = BlockingConnection(trusting.wrap_socket(ours, server_hostname="localhost"))
        received = bytearray(run(connection.receive(len(sent), Deadline(20))))
        serving.result(20)
    connection.stop()
    with contextlib.suppress(OSError):
        while piece := run(connection.receive(len(sent), Deadline(20))):
            received += piece
    connection.close()
    assert not any(received)


def test_a_mute_address_of_a_host_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as mute, socket.create_server(("127.0.0.1", 0)) as good, contextlib.ExitStack() as full:
        mute.bind(("127.0.0.1", 0))
        mute.listen(0)
        for _ in range(2):  # what more come are not answered
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(mute.getsockname())
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each.getsockname()) for each in (mute, good)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
        with connected("host", 1, Deadline(2)) as connection:
            assert connection.getpeername() == good.getsockname()


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_task_that_is_cancelled_as_it_connects_leaves_no_socket(
    monkeypatch: pytest.MonkeyPatch, addresses: int
) -> None:
    ends = []

    async def main(port: int) -> None:
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        found = places[-addresses:]  # of two the first refuses
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lambda *_, **__: asyncio.sleep(0, found))
        for turns in range(40):
            task = asyncio.ensure_future(AsyncConnection.open("host", port, None, Deadline(5)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await task).close()
            ends.append(task.cancelled())
            await asyncio.sleep(0)  # an aborted transport is closed in the loop's next turn

    with socket.create_server(("127.0.0.1", 0), backlog=50) as there:
        asyncio.run(main(there.getsockname()[1]))
    assert ends[0]
    assert not ends[-1]
    gc.collect()  # a socket that is still open warns, and warnings are errors


def test_an_address_needs_none_of_the_loops_threads() -> None:
    async def main(port: int, done: threading.Event) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = loop.run_in_executor(None, done.wait)
        try:
            (await AsyncConnection.open("127.0.0.1", port, None, Deadline(5))).close()
        finally:
            done.set()
            await busy

    with socket.create_server(("127.0.0.1", 0)) as there:
        asyncio.run(main(there.getsockname()[1], threading.Event()))


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ((socket.AF_INET, errno.ECONNREFUSED), (socket.AF_INET6, errno.EADDRNOTAVAIL), errno.ECONNREFUSED),
        ((socket.AF_INET6, errno.EADDRNOTAVAIL), (socket.AF_INET, errno.ECONNREFUSED), errno.ECONNREFUSED),
        ((socket.AF_INET6, errno.ECONNREFUSED), (socket.AF_INET, errno.EADDRNOTAVAIL), errno.EADDRNOTAVAIL),
    ],
    ids=["no IPv6, asked last", "no IPv6, asked first", "no port left"],
)
def test_that_a_machine_has_no_ipv6_hides_no_other_failure(
    monkeypatch: pytest.MonkeyPatch, first: tuple[int, int], then: tuple[int, int], told: int
) -> None:
    numbers = iter((first[1], then[1]))

    def connect(*_: Any) -> None:
        raise OSError(next(numbers), "no")

    places = [(family, socket.SOCK_STREAM, 6, "", ("x", 1)) for family, _ in (first, then)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    monkeypatch.setattr("socket.socket.connect", connect)
    with pytest.raises(OSError, match="no") as caught:
        connected("host", 1, Deadline(2))
    assert caught.value.errno == told


class Lies:
    """A connection that lies in the pool, as good as new."""

    def is_alive(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing is open."""


def test_who_waits_for_a_new_connection_keeps_none_that_came_back_from_the_next() -> None:
    async def never(*_: Any) -> Any:
        raise AssertionError

    pool = BlockingPool(never, "h", 1, None)
    pool._opening = MOST_OPENING
    with ThreadPoolExecutor(2) as threads:
        picky = threads.submit(lambda: run(pool.take(Deadline(2), idle=False)))
        while pool._waiting < 1:
            time.sleep(0.01)
        other = threads.submit(lambda: run(pool.take(Deadline(20))))
        while pool._waiting < 2:
            time.sleep(0.01)
        given: Any = Lies()
        pool.give_back(given)
        assert other.result(1.5) is given
        with pytest.raises(TimeoutError):
            picky.result(10)

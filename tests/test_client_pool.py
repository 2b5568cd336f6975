"""The HTTP connection pool: how many connections it opens at once, who gets them, and closed connections.

A connection to the relay that sends nothing delays the handshakes of later ones.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded, InferenceClient
from deepseek_client.concurrency import run
from deepseek_client.http.connection import AsyncConnection, BlockingConnection, connected
from deepseek_client.http.pool import MOST_OPENING, BlockingPool
from deepseek_client.transport import Deadline

from serving.embedded.serve import EmbeddedServer
from tests.failing_servers import Awaited, Client, Relay, answering, kinds, make_certificate, only_once, prepared

CALLS = 3 * MOST_OPENING
Kind = Callable[..., Client]


@pytest.fixture
def held(server: EmbeddedServer, tmp_path: Path) -> Iterator[tuple[Relay, Path, socket.socket]]:
    """A relay with TLS, its certificate, and the connection that delays it."""
    ca_cert, context = make_certificate(tmp_path)
    relay = Relay((server.address, server.http_port), context)
    with socket.create_connection(("127.0.0.1", relay.port)) as stalling:
        yield relay, ca_cert, stalling
    relay.close()


def connections(relay: Relay) -> int:
    """The number of this process's connections to the relay, without the stalling one."""
    found = psutil.Process().net_connections("tcp")
    return sum(each.status == "ESTABLISHED" and each.raddr[1:] == (relay.port,) for each in found) - 1


def wait_for(relay: Relay, count: int) -> None:
    """Waits until there are exactly `count` connections."""
    give_up_at = time.monotonic() + 60
    while connections(relay) < count and time.monotonic() < give_up_at:
        time.sleep(0.05)
    time.sleep(0.5)
    assert connections(relay) == count


@kinds
def test_the_number_of_connections_being_opened_is_limited(held: tuple[Relay, Path, socket.socket], kind: Kind) -> None:
    relay, ca_cert, stalling = held
    with (
        kind(relay.url, "http", ca_cert=ca_cert, timeout_s=60, retries=0) as client,
        ThreadPoolExecutor(CALLS) as threads,
    ):
        answers = [threads.submit(client.metadata, "add_one") for _ in range(CALLS)]
        wait_for(relay, MOST_OPENING)
        stalling.close()
        assert {answer.result().name for answer in answers} == {"add_one"}


def test_a_handshake_continues_after_its_task_ends(held: tuple[Relay, Path, socket.socket]) -> None:
    relay, ca_cert, stalling = held
    with Awaited(relay.url, "http", ca_cert=ca_cert, timeout_s=60, retries=0) as client:
        with pytest.raises(DeadlineExceeded):
            client.metadata("add_one", timeout_s=0.5)
        wait_for(relay, 1)
        stalling.close()
        assert client.metadata("add_one").name == "add_one"


def test_threads_that_wait_for_a_connection_keep_their_deadline(held: tuple[Relay, Path, socket.socket]) -> None:
    relay, ca_cert, _ = held
    with (
        InferenceClient(relay.url, "http", ca_cert=ca_cert, timeout_s=0.5, retries=0) as client,
        ThreadPoolExecutor(CALLS) as threads,
    ):
        answers = [threads.submit(client.metadata, "add_one") for _ in range(CALLS)]
        assert all(isinstance(answer.exception(20), DeadlineExceeded) for answer in answers)


@kinds
@pytest.mark.parametrize("idempotent", [False, True], ids=["once", "idempotent"])
def test_an_idempotent_call_on_a_closed_idle_connection_uses_a_new_one(
    server: EmbeddedServer, idempotent: bool, kind: Kind
) -> None:
    lost = contextlib.nullcontext() if idempotent else pytest.raises(ConnectionLost)
    with answering(only_once) as (url, seen), kind(url, "http", retries=0, idempotent=idempotent) as client:
        assert [client.ready() for _ in range(3)] == [True] * 3
        with lost:
            assert client.send(prepared(server, "http"))["y"].shape == (1, 2, 3)
    assert len(seen) == 3 + idempotent  # one on each connection


def test_a_reader_of_a_stopped_tls_connection_gets_no_ciphertext(tmp_path: Path) -> None:
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


def test_an_address_that_never_answers_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as mute, socket.create_server(("127.0.0.1", 0)) as good, contextlib.ExitStack() as full:
        mute.bind(("127.0.0.1", 0))
        mute.listen(0)
        for _ in range(2):  # fills the backlog: further connections get no answer
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(mute.getsockname())
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each.getsockname()) for each in (mute, good)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
        with connected("host", 1, Deadline(2)) as connection:
            assert connection.getpeername() == good.getsockname()


@pytest.mark.parametrize("addresses", [1, 2])
def test_a_task_cancelled_while_connecting_leaves_no_socket(monkeypatch: pytest.MonkeyPatch, addresses: int) -> None:
    ends = []

    async def main(port: int) -> None:
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)) for host in ("127.0.0.2", "127.0.0.1")]
        found = places[-addresses:]  # with two, the first refuses
        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lambda *_, **__: asyncio.sleep(0, found))
        for turns in range(40):
            task = asyncio.ensure_future(AsyncConnection.open("host", port, None, Deadline(5)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                (await task).close()
            ends.append(task.cancelled())
            await asyncio.sleep(0)  # the loop closes an aborted transport in its next iteration

    with socket.create_server(("127.0.0.1", 0), backlog=50) as there:
        asyncio.run(main(there.getsockname()[1]))
    assert ends[0]
    assert not ends[-1]
    gc.collect()  # an open socket raises a warning, and warnings are errors


@pytest.mark.parametrize(
    ("first", "then", "told"),
    [
        ((socket.AF_INET, errno.ECONNREFUSED), (socket.AF_INET6, errno.EADDRNOTAVAIL), errno.ECONNREFUSED),
        ((socket.AF_INET6, errno.EADDRNOTAVAIL), (socket.AF_INET, errno.ECONNREFUSED), errno.ECONNREFUSED),
        ((socket.AF_INET6, errno.ECONNREFUSED), (socket.AF_INET, errno.EADDRNOTAVAIL), errno.EADDRNOTAVAIL),
    ],
    ids=["no IPv6, asked last", "no IPv6, asked first", "no port left"],
)
def test_missing_ipv6_does_not_hide_the_real_failure(
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


class Idle:
    def is_alive(self) -> bool:
        return True

    def close(self) -> None:
        """Does nothing."""


def test_a_call_that_needs_a_new_connection_leaves_returned_ones_to_others() -> None:
    async def never(*_: Any) -> Any:
        raise AssertionError("a new one")

    pool = BlockingPool(never)
    pool._opening = MOST_OPENING
    with ThreadPoolExecutor(2) as threads:
        picky = threads.submit(lambda: run(pool.take(Deadline(60), idle=False)))
        while pool._waiting < 1:
            time.sleep(0.01)
        other = threads.submit(lambda: run(pool.take(Deadline(60))))
        while pool._waiting < 2:
            time.sleep(0.01)
        given: Any = Idle()
        pool.give_back(given)
        assert other.result(60) is given
        assert not picky.done()
        with pool._changed:
            pool._opening = 0
            pool._changed.notify_all()
        with pytest.raises(AssertionError, match="a new one"):
            picky.result(60)

"""The HTTP connection pool: how many connections it opens at once, and closed connections."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded
from deepseek_client.http.connection import AsyncConnection, connected, connected_on_loop
from deepseek_client.http.pool import MOST_OPENING
from deepseek_client.transport import Deadline

from serving.embedded.launcher import EmbeddedServer
from tests import waiting
from tests.failing_servers import Kind, Relay, answering, dropping, kinds, make_certificate, only_once, prepared
from tests.fake_kserve import http_answer, http_serving

CALLS = 3 * MOST_OPENING


def connections(relay: Relay) -> int:
    """The number of this process's connections to the relay, without the stalling one."""
    found = psutil.Process().net_connections("tcp")
    return sum(each.status == "ESTABLISHED" and each.raddr[1:] == (relay.port,) for each in found) - 1


def wait_for(relay: Relay, count: int) -> None:
    """Waits until there are exactly `count` connections."""
    waiting.wait_for(lambda: connections(relay) >= count)
    time.sleep(0.5)
    assert connections(relay) == count


@kinds
def test_the_number_of_connections_being_opened_is_limited(server: EmbeddedServer, tmp_path: Path, kind: Kind) -> None:
    ca_cert, context = make_certificate(tmp_path)
    relay = Relay.to(server, "http", context)
    with (
        socket.create_connection(("127.0.0.1", relay.port)) as stalling,  # sends nothing: delays the other handshakes
        kind(relay.url, "http", ca_cert=ca_cert, timeout_s=60, retries=0) as client,
        ThreadPoolExecutor(CALLS) as threads,
    ):
        answers = [threads.submit(client.metadata, "add_one") for _ in range(CALLS)]
        wait_for(relay, MOST_OPENING)
        with pytest.raises(DeadlineExceeded):  # though it only waits for its turn
            client.metadata("add_one", timeout_s=0.1)
        stalling.close()
        assert {answer.result().name for answer in answers} == {"add_one"}
    relay.close()


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


@kinds
def test_a_call_on_a_closed_idle_connection_is_sent_again_once(kind: Kind) -> None:
    together, lost = threading.Barrier(4), list[bytes]()

    def answer(connection: socket.socket) -> None:
        """Answers, and closes at the next request; the first four at once, so that each has its connection."""
        if len(seen) <= 4:
            together.wait(60)
        connection.sendall(http_answer(b""))
        lost.extend([connection.recv(65536)] if len(seen) <= 4 else [])

    with (
        answering(answer) as (url, seen),
        kind(url, "http", retries=0) as client,
        ThreadPoolExecutor(4) as threads,
    ):
        assert list(threads.map(lambda _: client.ready(), range(4))) == [True] * 4
        assert client.ready()
        assert (len(seen), len([each for each in lost if each])) == (5, 1)


FORKED = """
import os, sys
from deepseek_client import InferenceClient
client = InferenceClient(sys.argv[1], "http", timeout_s=60)
assert client.ready()
if child := os.fork():
    sys.exit(os.waitpid(child, 0)[1])
assert client.ready()
"""


def test_a_forked_process_opens_its_own_connection() -> None:
    connections = set[int]()  # by their threads

    def answer(path: str, body: bytes) -> bytes:
        connections.add(threading.get_ident())
        return http_answer(b"")

    with http_serving(answer) as url:
        subprocess.run([sys.executable, "-c", FORKED, url], check=True, timeout=100)
    assert len(connections) == 2


def test_an_address_that_never_answers_does_not_hide_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with dropping() as dropped, socket.create_server(("127.0.0.1", 0)) as good:
        ports = (int(dropped.rpartition(":")[2]), good.getsockname()[1])
        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
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
            task = asyncio.ensure_future(AsyncConnection.open("host", port, None, Deadline(60)))
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


def test_a_cancel_is_kept_that_comes_while_the_slower_address_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(*ports: int) -> None:
        loop = asyncio.get_running_loop()
        connect = loop.sock_connect

        async def sock_connect(connection: socket.socket, address: Any) -> None:
            try:
                await connect(connection, address)
            except asyncio.CancelledError:
                call.cancel()
                raise

        places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]
        monkeypatch.setattr(loop, "getaddrinfo", lambda *_, **__: asyncio.sleep(0, places))
        monkeypatch.setattr(loop, "sock_connect", sock_connect)
        call = asyncio.ensure_future(connected_on_loop("host", 1))
        with pytest.raises(asyncio.CancelledError):
            (await call).close()

    with dropping() as dropped, socket.create_server(("127.0.0.1", 0)) as good:
        asyncio.run(main(int(dropped.rpartition(":")[2]), good.getsockname()[1]))


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
        connected("host", 1, Deadline(60))
    assert caught.value.errno == told

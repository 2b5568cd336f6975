"""The load generator's connections over real sockets, to the real server and to mute, slow or dead servers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded

from loadtests.load.wire.client import WireClient
from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import Relay, X, answering, mute, protocols, status, url_of

Connect = Callable[..., WireClient]


@pytest.fixture
def connect(server: EmbeddedServer) -> Iterator[Connect]:
    """Makes clients for the real server, or for `url`, and closes them."""
    with ExitStack() as stack:

        def make(protocol: str, url: str = "", **settings: Any) -> WireClient:
            return stack.enter_context(WireClient(url or url_of(server, protocol), protocol, retries=0, **settings))  # type: ignore[arg-type]

        yield make


@protocols
def test_a_connection_is_reused_and_replaced_after_a_close(connect: Connect, protocol: str, relay: Relay) -> None:
    client = connect(protocol, relay.url)
    request = client.prepare("add_one", {"x": X})
    for _ in range(5):
        np.testing.assert_array_equal(client.send(request)["y"], X + 1)
    assert relay.accepted == 1
    relay.cut()
    while relay.accepted == 1:  # a call fails if the cut was not noticed yet
        try:
            client.send(request)
        except ConnectionLost:
            time.sleep(0.01)
    np.testing.assert_array_equal(client.send(request)["y"], X + 1)
    assert relay.accepted == 2


def test_a_deadline_keeps_the_connection_for_other_calls(connect: Connect, server: EmbeddedServer) -> None:
    relay = Relay.to(server, "grpc")
    client = connect("grpc", relay.url)
    request = client.prepare("add_one", {"x": X})
    relay.delay_s = 1.0
    with pytest.raises(DeadlineExceeded):
        client.send(request, timeout_s=0.2)
    relay.delay_s = 0.0
    np.testing.assert_array_equal(client.send(request)["y"], X + 1)
    assert relay.accepted == 1
    relay.close()


@protocols
def test_a_connection_that_breaks_during_a_call_raises_connection_lost(
    connect: Connect, protocol: str, relay: Relay
) -> None:
    client = connect(protocol, relay.url)
    request = client.prepare("slow", {"x": X})
    threading.Timer(0.1, relay.cut).start()
    with pytest.raises(ConnectionLost, match="broke before the answer was complete"):
        client.send(request)


@protocols
def test_a_mute_server_ends_at_the_deadline(connect: Connect, protocol: str) -> None:
    with answering(mute) as (url, _), pytest.raises(DeadlineExceeded):
        connect(protocol, url, timeout_s=0.4).metadata("m")


def test_a_body_that_the_server_does_not_read_ends_at_the_deadline(connect: Connect) -> None:
    request = connect("http").prepare("add_one", {"x": np.zeros((8, 2, 400_000), np.float32)})
    with answering(lambda _: time.sleep(1)) as (url, _), pytest.raises(DeadlineExceeded):
        connect("http", url, timeout_s=0.3).send(request)


def test_an_http_1_server_asked_over_grpc_is_a_lost_connection(connect: Connect) -> None:
    with answering(status("400 Bad Request")) as (url, _), pytest.raises(ConnectionLost, match="does not speak HTTP/2"):
        connect("grpc", url).metadata("m")


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gc, sys
import gevent.pool
import numpy as np
from loadtests.load.wire.client import WireClient

with WireClient(sys.argv[1], sys.argv[2]) as client:
    request = client.prepare("add_one", {"x": np.ones((1, 2, 3), np.float32)})
    pool = gevent.pool.Pool(16)
    calls = [pool.spawn(client.send, request) for _ in range(200)]
    gevent.joinall(calls, raise_error=True)
    killed = gevent.spawn(client.send, request)
    gevent.sleep(0)
    killed.kill()
    print(sum(call.value["y"][0, 0, 0] for call in calls), client.send(request)["y"][0, 0, 0])
    gevent.joinall([gevent.spawn(client.send, request) for _ in range(16)], raise_error=True)
"""


@protocols
def test_greenlets_share_a_client(server: EmbeddedServer, protocol: str) -> None:
    command = [sys.executable, "-W", "error", "-c", GREENLETS, url_of(server, protocol), protocol]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["400.0", "2.0"], done.stderr
    assert not done.stderr

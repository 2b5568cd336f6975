"""HTTP over the connection that clients have under gevent: the real server, and servers that are mute, slow or gone."""

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
from deepseek_client import ConnectionLost, DeadlineExceeded, InferenceClient, InferenceError, Unreachable
from deepseek_client.green_connection import GreenConnection

from serving.embedded import EmbeddedServer
from tests.failing_servers import Relay, answering, half_an_answer, mute, status, trickle

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
Connect = Callable[..., InferenceClient]


@pytest.fixture
def opened() -> list[GreenConnection]:
    """Every connection of the test's clients."""
    return []


@pytest.fixture
def connect(
    server: EmbeddedServer, opened: list[GreenConnection], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Connect]:
    """Makes clients with such connections, of the real server or of `url`, and closes them."""

    async def open_noted(*arguments: Any) -> GreenConnection:
        opened.append(await GreenConnection.open(*arguments))
        return opened[-1]

    monkeypatch.setattr("deepseek_client.inference._blocking_connection", lambda tls: open_noted)
    with ExitStack() as stack:
        yield lambda url=server.http_url, **more: stack.enter_context(InferenceClient(url, "http", **more))


def test_a_connection_is_used_again_and_again(connect: Connect, server: EmbeddedServer) -> None:
    relay = Relay((server.address, server.http_port))
    client = connect(relay.url)
    for _ in range(5):
        np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
    assert relay.accepted == 1
    relay.close()


def test_a_large_request_and_a_large_answer_arrive_whole(connect: Connect) -> None:
    large = np.random.default_rng(0).random((8, 2, 200_000), np.float32)  # 12.8 MB
    np.testing.assert_array_equal(connect(timeout_s=60).infer("add_one", {"x": large})["y"], large + 1)


def test_an_idle_connection_that_was_closed_is_replaced(connect: Connect, server: EmbeddedServer) -> None:
    relay = Relay((server.address, server.http_port))
    client = connect(relay.url, retries=0)
    client.infer("add_one", {"x": X})
    relay.cut()
    time.sleep(0.2)
    np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
    relay.close()


@pytest.mark.parametrize("answer", [mute, trickle], ids=["mute", "trickle"])
def test_no_server_costs_more_than_the_deadline(connect: Connect, answer: Callable) -> None:
    with answering(answer) as (url, _):
        client = connect(url, timeout_s=0.4)
        start_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.metadata("m")
    assert 0.3 < time.monotonic() - start_s < 5


def test_a_body_that_nobody_reads_costs_no_more_than_the_deadline(connect: Connect) -> None:
    request = connect().prepare("add_one", {"x": np.zeros((8, 2, 400_000), np.float32)})
    with answering(lambda _: time.sleep(1)) as (url, _), pytest.raises(DeadlineExceeded):
        connect(url, timeout_s=0.3).send(request)


def test_what_breaks_is_said_as_over_other_connections(connect: Connect) -> None:
    with answering(half_an_answer) as (url, _), pytest.raises(ConnectionLost, match="IncompleteRead"):
        connect(url).metadata("m")
    with pytest.raises(Unreachable):
        connect(url, timeout_s=0.3).metadata("m")
    with answering(status("500 Internal Server Error")) as (url, _), pytest.raises(InferenceError, match="500"):
        connect(url).metadata("m")


def test_stop_makes_whoever_waits_fail(connect: Connect, opened: list[GreenConnection]) -> None:
    with answering(mute) as (url, _):
        client = connect(url, timeout_s=10)
        threading.Timer(0.3, lambda: opened[0].stop()).start()
        start_s = time.monotonic()
        with pytest.raises(ConnectionLost):
            client.metadata("m")
    assert time.monotonic() - start_s < 5


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import gc, sys
import gevent.pool
import numpy as np
from deepseek_client import InferenceClient

with InferenceClient(sys.argv[1], "http") as client:
    request = client.prepare("add_one", {"x": np.ones((1, 2, 3), np.float32)})
    pool = gevent.pool.Pool(16)
    calls = [pool.spawn(client.send, request) for _ in range(200)]
    gevent.joinall(calls, raise_error=True)
    killed = gevent.spawn(client.send, request)
    gevent.sleep(0)
    killed.kill()
    print(sum(call.value["y"][0, 0, 0] for call in calls), client.send(request)["y"][0, 0, 0])
    print("GreenConnection" in {type(each).__name__ for each in gc.get_objects()})
"""


def test_greenlets_call_over_it(server: EmbeddedServer) -> None:
    command = [sys.executable, "-W", "error", "-c", GREENLETS, server.http_url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["400.0", "2.0", "True"], done.stderr

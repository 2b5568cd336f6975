"""The wire that clients have under gevent, over real sockets: the real server, and peers that fail."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded, InferenceClient, ModelNotFound, Unreachable
from deepseek_client.plain_wires import GreenWire

from serving.embedded import EmbeddedServer
from tests.failing_servers import Relay, answering

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def client(server: EmbeddedServer, green: None) -> Iterator[InferenceClient]:
    with InferenceClient(server.grpc_url, retries=0) as found:
        yield found


@pytest.fixture
def relay(server: EmbeddedServer) -> Iterator[Relay]:
    found = Relay((server.address, server.grpc_port))
    yield found
    found.close()


@pytest.fixture
def green(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients use the plain wire, as they do under gevent."""
    monkeypatch.setattr("deepseek_client.inference.blocking_wire", lambda url, credentials: GreenWire(url))


def test_triton_answers_on_it(client: InferenceClient) -> None:
    assert client.ready("add_one")
    assert client.metadata("add_one").max_batch_size == 8
    outputs = client.infer("add_one", {"x": X}, outputs=["y"], request_id="7", headers={"traceparent": TRACE})
    np.testing.assert_array_equal(outputs["y"], X + 1)
    with pytest.raises(ModelNotFound, match="absent"):
        client.metadata("absent")


def test_large_tensors_go_both_ways_through_the_windows(client: InferenceClient) -> None:
    large = np.random.default_rng(0).random((1, 2, 700_000), np.float32)  # 5.6 MB
    np.testing.assert_array_equal(client.infer("add_one", {"x": large})["y"], large + 1)


def test_many_threads_share_its_connection(relay: Relay, green: None) -> None:
    with InferenceClient(relay.url) as client:
        client.infer("add_one", {"x": X})
        answers: list[float] = []

        def call(number: int) -> None:
            answers.extend(client.infer("add_one", {"x": X + number})["y"][0, 0, 0] - number for _ in range(5))

        threads = [threading.Thread(target=call, args=(number,)) for number in range(20)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert answers == [1.0] * 100
        assert relay.accepted == 1


def test_a_deadline_ends_the_call_and_leaves_the_connection(relay: Relay, green: None) -> None:
    with InferenceClient(relay.url, retries=0) as client:
        request = client.prepare("add_one", {"x": X})
        relay.delay_s = 1.0
        start_s = time.perf_counter()
        with pytest.raises(DeadlineExceeded):
            client.send(request, timeout_s=0.2)
        assert time.perf_counter() - start_s < 0.9
        relay.delay_s = 0.0
        np.testing.assert_array_equal(client.send(request)["y"], X + 1)
        assert relay.accepted == 1


def test_a_connection_that_broke_is_opened_again(relay: Relay, green: None) -> None:
    with InferenceClient(relay.url, retries=0) as client:
        client.infer("add_one", {"x": X})
        relay.delay_s = 0.3
        threading.Timer(0.1, relay.cut).start()
        with pytest.raises(ConnectionLost, match="the connection broke"):
            client.infer("add_one", {"x": X})
        relay.delay_s = 0.0
        client.infer("add_one", {"x": X})
        assert relay.accepted == 2


def test_nobody_there_is_unreachable_and_another_protocol_is_no_answer(green: None) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with InferenceClient(f"127.0.0.1:{unused.getsockname()[1]}", retries=0) as client, pytest.raises(Unreachable):
            client.ready()

    def speak_http(connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    said = pytest.raises(ConnectionLost, match=r"does not speak HTTP/2|closed the connection")
    with answering(speak_http) as (url, _), InferenceClient(url, retries=0) as client, said:
        client.ready()


def test_all_addresses_of_a_host_together_cost_no_more_than_the_deadline(
    green: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        full = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)) for _ in range(4)]
        for each in full:  # so that it answers nobody else
            stack.enter_context(socket.create_connection(each.getsockname()))
        addresses = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", each.getsockname()) for each in full]
        monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: addresses)
        client = stack.enter_context(InferenceClient("four.test:1", timeout_s=0.8, retries=0))
        start_s = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            client.ready()
        assert 0.7 < time.monotonic() - start_s < 2.4  # four times 0.8 s where each had them all


def test_a_client_that_is_closed_while_it_connects_leaves_no_connection(
    green: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = InferenceClient("one.test:1", timeout_s=60)
    ours, theirs = socket.socketpair()

    def connected(*_: Any) -> socket.socket:
        client.close()
        return ours

    monkeypatch.setattr("deepseek_client.plain_wires.connected", connected)
    monkeypatch.setattr("deepseek_client.plain_wires._tune", lambda _: None)
    with theirs:
        theirs.settimeout(20)
        with pytest.raises(ConnectionLost, match="the client was closed"):
            client.ready()
        while theirs.recv(1000):  # up to its end
            pass


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import sys
import gevent.pool
import numpy as np
from deepseek_client import InferenceClient

with InferenceClient(sys.argv[1]) as client:
    request = client.prepare("add_one", {"x": np.ones((1, 2, 3), np.float32)})
    pool = gevent.pool.Pool(16)
    calls = [pool.spawn(client.send, request) for _ in range(200)]
    gevent.joinall(calls, raise_error=True)
    killed = gevent.spawn(client.send, request)
    gevent.sleep(0)
    killed.kill()
    print(sum(call.value["y"][0, 0, 0] for call in calls), client.send(request)["y"][0, 0, 0])
    print(type(client._calls._replicas.all[0].transport._wire).__name__)
"""


def test_greenlets_call_over_it(server: EmbeddedServer) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GREENLETS, server.grpc_url], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.split() == ["400.0", "2.0", "GreenWire"], done.stderr

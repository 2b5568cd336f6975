"""Both clients against a real Triton, and against servers that are gone, never answer or lose the connection."""

from __future__ import annotations

import contextlib
import json
import math
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import (
    AccessDenied,
    AsyncInferenceClient,
    ConnectionLost,
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ServerBusy,
    ServerError,
    TensorMetadata,
    Unreachable,
)

from serving.embedded.launcher import EmbeddedServer
from tests.add_one import write_add_one
from tests.conftest import FREE
from tests.failing_servers import Awaited, Client, Relay, X, answering, kinds, protocols, status, url_of
from tests.waiting import wait_for

Connect = Callable[..., Client]


@pytest.fixture
def kind() -> Callable[..., Client]:
    return InferenceClient


@pytest.fixture
def connect(server: EmbeddedServer, kind: Callable[..., Client]) -> Iterator[Connect]:
    """Makes clients of the real server, or of `url`, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(protocol: str, url: str = "", **settings: Any) -> Client:
            client = kind(url or url_of(server, protocol), protocol, **settings)
            stack.callback(client.__exit__, None, None, None)
            return client

        yield make


@kinds
@protocols
def test_metadata_readiness_and_inference_match_the_server(connect: Connect, protocol: str) -> None:
    client = connect(protocol)
    metadata = client.metadata("add_one")
    assert metadata.inputs == (TensorMetadata(name="x", datatype="FP32", shape=(-1, 2, -1)),)
    assert (metadata.name, metadata.versions, metadata.max_batch_size) == ("add_one", ("1",), 8)
    assert metadata.parameters == {"delay_s": "0.0"}
    assert (client.ready(), client.ready("add_one"), client.ready("absent")) == (True, True, False)
    outputs = client.infer("add_one", {"x": X}, request_id="7", version="1", outputs=["y"])
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], X + 1)


@kinds
@protocols
def test_large_and_non_contiguous_tensors_arrive_intact(connect: Connect, protocol: str) -> None:
    client = connect(protocol, timeout_s=60)
    large = np.random.default_rng(0).random((2, 2, 1_000_000), np.float32)  # 16 MB
    strided = np.arange(24, dtype=np.float32).reshape(2, 4, 3).transpose(0, 2, 1)[:, ::2]  # (2, 2, 4)
    for x in (large, strided):
        np.testing.assert_array_equal(client.infer("add_one", {"x": x})["y"], x + 1)


@kinds
@protocols
def test_a_request_prepared_for_the_other_protocol_is_refused(connect: Connect, protocol: str) -> None:
    other = "http" if protocol == "grpc" else "grpc"
    request = connect(other).prepare("add_one", {"x": X})
    with pytest.raises(InvalidInput, match=f"protocol='{other}'.*'{protocol}': prepare it with this client"):
        connect(protocol).send(request)


@kinds
@protocols
def test_many_callers_share_a_client_and_its_prepared_requests(connect: Connect, protocol: str, relay: Relay) -> None:
    client = connect(protocol, relay.url)
    requests = [client.prepare("add_one", {"x": X + k}) for k in range(8)]
    accepted = relay.accepted
    for request in requests:
        client.send(request)
    assert relay.accepted == accepted  # sequential calls share one connection
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.send, requests * 20))
    for k, answer in enumerate(answers):
        np.testing.assert_array_equal(answer["y"], X + k % 8 + 1)


@protocols
@pytest.mark.parametrize(
    ("call", "expected", "says"),
    [
        pytest.param({"model": "absent"}, ModelNotFound, "'absent' is not found", id="unknown model"),
        pytest.param({"version": "9"}, ModelNotFound, "version 9 is not found", id="unknown version"),
        pytest.param({"version": "../x"}, InvalidInput, "version='../x'; it must be a number", id="invalid version"),
        pytest.param({"request_id": 7}, InvalidInput, "request_id=7 is of type int", id="request_id"),
        pytest.param({"inputs": [X]}, InvalidInput, "inputs is a list; pass a dict", id="no names"),
        pytest.param({"outputs": "y"}, InvalidInput, r"pass a list of names: \['y'\]", id="one name"),
        pytest.param({"outputs": ["z"]}, InvalidInput, r"no output 'z'; its outputs are y \(FP32", id="output"),
        pytest.param({"parameters": 5}, InvalidInput, "parameters is of type int; pass a dict", id="parameters"),
        pytest.param(
            {"parameters": {"timeout": 5}}, InvalidInput, "'timeout' cannot be a name; it", id="own parameter"
        ),
        pytest.param(
            {"parameters": {"x": [5]}}, InvalidInput, r"x=\[5\]; it must be a text, a b", id="parameter's type"
        ),
        pytest.param({"parameters": {"x": math.nan}}, InvalidInput, "x=nan; it must be a text, a b", id="not a number"),
        pytest.param({"parameters": {"x": 2**63}}, InvalidInput, "a whole number of 64 bits", id="large parameter"),
        pytest.param({"headers": 5}, InvalidInput, "headers is of type int; pass a dict", id="headers"),
        pytest.param({"timeout_s": 0}, InvalidInput, "timeout_s=0; it must be a positive number", id="no time"),
        pytest.param({"timeout_s": 1e10}, InvalidInput, "at most 1e.09", id="too long a time"),
    ],
)
def test_a_wrong_call_is_refused(connect: Connect, protocol: str, call: dict, expected: type, says: str) -> None:
    with pytest.raises(expected, match=says):
        connect(protocol).infer(**{"model": "add_one", "inputs": {"x": X}} | call)


@kinds
@protocols
def test_triton_takes_a_number_with_a_fraction_as_a_parameter(connect: Connect, protocol: str) -> None:
    answer = connect(protocol).infer("add_one", {"x": X}, parameters={"temperature": 0.5, "top_k": 5, "echo": True})
    assert (answer["y"] == X + 1).all()


@kinds
@protocols
def test_a_refused_connection_is_retried_until_the_deadline(connect: Connect, protocol: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        refused_url = f"127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(Unreachable, match="Connection refused"):
        connect(protocol, refused_url, retries=0).ready()
    client = connect(protocol, refused_url, retries=1000, timeout_s=0.5)
    with pytest.raises((Unreachable, DeadlineExceeded)):  # the second if the deadline passes during an attempt
        client.infer("add_one", {"x": X})
    assert 1 <= client.statistics().models["add_one"].retries < 1000


@kinds
@protocols
def test_a_passed_deadline_does_not_affect_the_next_call(connect: Connect, protocol: str) -> None:
    client = connect(protocol)
    with pytest.raises(DeadlineExceeded):
        client.infer("slow", {"x": X}, timeout_s=0.05)
    np.testing.assert_array_equal(client.infer("slow", {"x": X}, timeout_s=20)["y"], X + 1)


def executed(server: EmbeddedServer, model: str) -> int:
    """The number of requests that the model has run, by Triton's own count."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/stats") as answer:
        return json.load(answer)["model_stats"][0]["inference_count"]


@protocols
def test_the_server_drops_a_queued_request_whose_deadline_is_over(
    connect: Connect, protocol: str, server: EmbeddedServer
) -> None:
    client = connect(protocol, retries=0)
    request, before, late = client.prepare("slow", {"x": X}), executed(server, "slow"), 0
    with ThreadPoolExecutor(1) as pool:
        while executed(server, "slow") - before == 3 * late and late < 20:  # until one has been queued behind the other
            running = pool.submit(client.send, request)  # its batch takes 0.2 s
            time.sleep(0.1)
            with contextlib.suppress(InferenceError):
                client.send(request, timeout_s=0.03)
            running.result()
            client.send(request)  # the queue is empty after this one
            late += 1
    assert executed(server, "slow") - before < 3 * late


@pytest.mark.parametrize(("protocol", "kind"), [("http", Awaited), ("grpc", InferenceClient)])
def test_a_full_queue_is_busy_and_retries_get_through(connect: Connect, protocol: str) -> None:
    hasty, patient = connect(protocol, retries=0), connect(protocol, retries=100, retry_budget=None, timeout_s=60)
    request = hasty.prepare("slow", {"x": np.repeat(X, 8, axis=0)})  # fills a batch: 0.2 s each

    def outcome(client: Client) -> str:
        try:
            return str(client.send(request)["y"].shape)
        except ServerBusy as error:
            return str(error)

    with ThreadPoolExecutor(12) as pool:
        said = list(pool.map(outcome, [hasty] * 12))
        assert any("Exceeds maximum queue size" in each for each in said)
        assert list(pool.map(outcome, [patient] * 6)) == ["(8, 2, 3)"] * 6


@kinds
@protocols
@pytest.mark.parametrize("idempotent", [False, True], ids=["once", "idempotent"])
def test_a_lost_connection_is_retried_only_if_idempotent(
    connect: Connect, protocol: str, relay: Relay, idempotent: bool
) -> None:
    client = connect(protocol, relay.url, idempotent=idempotent, retries=10, timeout_s=60)
    request = client.prepare("slow", {"x": X})
    threading.Timer(0.1, relay.cut).start()
    lost = pytest.raises(ConnectionLost, match="broke before the answer was complete")
    with contextlib.nullcontext() if idempotent else lost:
        np.testing.assert_array_equal(client.send(request)["y"], X + 1)


@kinds
@protocols
def test_the_client_reconnects_to_a_restarted_server(connect: Connect, protocol: str, relay: Relay) -> None:
    # Idempotent: the client may not have noticed the closed connection when it makes the call.
    client = connect(protocol, relay.url, retries=50, idempotent=True, timeout_s=60)
    client.infer("add_one", {"x": X})
    relay.cut()  # an idle connection
    np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
    relay.close()
    threading.Timer(0.2, relay.reopen).start()
    np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)


@pytest.mark.parametrize(
    ("line", "body", "expected", "attempts"),
    [
        pytest.param("400 Bad Request", '{"error": "batch-size\\nmust be <= 8"}', InvalidInput, 1, id="400"),
        pytest.param("401 Unauthorized", "<html>", AccessDenied, 1, id="401"),
        pytest.param("404 Not Found", "<html>", ModelNotFound, 1, id="404"),
        pytest.param("413 Content Too Large", "<html>", InvalidInput, 1, id="413"),
        pytest.param("429 Too Many Requests", "", ServerBusy, 3, id="429"),
        pytest.param("500 Internal Server Error", '{"error": "boom"}', ServerError, 1, id="500"),
        pytest.param("502 Bad Gateway", "<html>", ConnectionLost, 3, id="502"),
        pytest.param("503 Service Unavailable", "<html>", ServerBusy, 3, id="503"),
        pytest.param("200 OK", "<html>", ServerError, 1, id="not Triton"),
        pytest.param("200 OK", '{"status": "ok"}', ServerError, 2, id="not Triton, JSON"),
        pytest.param("200 OK", "[]", ServerError, 1, id="not Triton, a list"),
    ],
)
def test_each_status_maps_to_one_error_and_only_refusals_are_retried(
    connect: Connect, line: str, body: str, expected: type, attempts: int
) -> None:
    with answering(status(line, body)) as (url, seen), pytest.raises(expected) as caught:
        connect("http", url, retries=2).metadata("m")
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)
    assert len(seen) == attempts


def test_the_reason_of_an_error_in_openais_shape_is_its_message(connect: Connect) -> None:
    body = '{"error": {"message": "model m: not here", "type": "invalid_request_error"}}'
    with (
        answering(status("404 Not Found", body)) as (url, _),
        pytest.raises(ModelNotFound, match=r": model m: not here$"),
    ):
        connect("http", url, retries=0).metadata("m")


def test_the_grpc_port_used_for_http_is_named_in_the_error(connect: Connect, server: EmbeddedServer) -> None:
    with pytest.raises(ServerError, match="does not speak HTTP; is it Triton's gRPC port"):
        connect("http", server.grpc_url, timeout_s=10).ready()
    with pytest.raises(Unreachable, match="correct the url"):
        connect("grpc", server.http_url, timeout_s=10).ready()


def test_a_model_with_a_new_signature_needs_no_new_client(tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    config = tmp_path / "repository" / "add_one" / "config.pbtxt"
    with (
        EmbeddedServer(tmp_path / "repository", **FREE, poll_s=0.2, log_path=tmp_path / "log") as running,
        InferenceClient(running.http_url, "http") as over_http,
        InferenceClient(running.grpc_url) as over_grpc,
        InferenceClient(running.grpc_url) as watcher,
    ):
        clients = (over_http, over_grpc)
        for client in clients:
            client.infer("add_one", {"x": X})
        config.write_text(config.read_text().replace("[2, -1]", "[3, -1]"))
        wait_for(lambda: watcher.metadata("add_one").inputs[0].shape == (-1, 3, -1))
        for client in clients:
            with pytest.raises(InvalidInput):
                client.infer("add_one", {"x": X})
            assert client.infer("add_one", {"x": np.ones((1, 3, 1), np.float32)})["y"].tolist() == [[[2], [2], [2]]]


@pytest.mark.parametrize("model", [["add_one"], 5, None])
def test_a_model_whose_name_is_not_a_text_is_refused_and_not_counted(model: Any) -> None:
    with InferenceClient("127.0.0.1:9") as client:
        with pytest.raises(InvalidInput, match="pass a text"):
            client.infer(model, {"x": X})
        assert not client.statistics().models


def test_a_closed_client_refuses_calls(connect: Connect, server: EmbeddedServer) -> None:
    client = connect("grpc")
    client.close()
    with pytest.raises(RuntimeError, match="is closed"):
        client.ready()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param({"url": "http://h:8000"}, "must be host:port without a scheme", id="scheme"),
        pytest.param({"url": "h:99999"}, "must be host:port", id="no such port"),
        pytest.param({"url": "foo..bar:8000"}, "must be host:port", id="empty label"),
        pytest.param({"url": "[1]:8000"}, "must be host:port", id="no IPv6 address"),
        pytest.param({"url": None}, "must be host:port", id="no url"),
        pytest.param({"url": []}, "one address, or a list of different ones", id="no address"),
        pytest.param({"url": ["a:1", "a:1"]}, "list of different ones", id="duplicate address"),
        pytest.param({"protocol": "rest"}, "'grpc' or 'http'", id="protocol"),
        pytest.param({"retries": -1}, "0 or more", id="retries"),
        pytest.param({"retries": "3"}, "retries='3'; it must be a whole number", id="retries as text"),
        pytest.param({"idempotent": "no"}, "idempotent='no'; it must be True or False", id="idempotent as text"),
        pytest.param({"retry_budget": -1}, "a share of the calls", id="budget"),
        pytest.param({"hedge_after_ms": 5}, "set idempotent=True", id="hedge of a request that may not run twice"),
        pytest.param({"hedge_after_ms": "95", "idempotent": True}, "such as 'p95'", id="percentile"),
        pytest.param({"hedge_after_ms": 0, "idempotent": True}, "it must be milliseconds", id="hedge after 0 ms"),
        pytest.param({"shared_memory": "yes"}, "False, True or 'auto'", id="shared memory"),
        pytest.param({"shared_memory": np.ones(2)}, "False, True or 'auto'", id="shared memory as an array"),
        pytest.param({"timeout_s": float("inf")}, "positive number of seconds", id="time-out"),
        pytest.param({"tls": "no"}, "tls='no'; it must be True or False", id="tls as text"),
        pytest.param({"ca_cert": 5}, "a file's path", id="certificate as a number"),
        pytest.param({"ca_cert": "/absent.pem"}, "No such file", id="no certificate"),
        pytest.param({"ca_cert": __file__}, "must be a PEM file", id="bad certificate"),
        pytest.param({"ca_cert": "/dev/null"}, "must be a PEM file", id="empty certificate"),
        pytest.param({"api_key": "k"}, "only sent over TLS", id="key in the clear"),
        pytest.param({"api_key": "k\r\nX: y", "tls": True}, "pass the bare key", id="key with a newline"),
    ],
)
@pytest.mark.parametrize("of", [InferenceClient, AsyncInferenceClient])
def test_wrong_options_are_refused_at_once(of: type, settings: dict, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        of(**settings)


@pytest.mark.parametrize("host", ["localhost", "a.b-c.", "triton_1", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_names_and_addresses_are_hosts(host: str) -> None:
    InferenceClient(f"{host}:8001").close()

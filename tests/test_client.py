"""The client against a real Triton, and against servers that are gone, mute, slow or cut off."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ServerBusy,
    ServerError,
    TensorSpec,
    Unreachable,
)

from serving.embedded import EmbeddedServer
from tests.conftest import write_add_one
from tests.failing_servers import Relay, answering, half_an_answer, make_certificate, mute, status, trickle

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
both = pytest.mark.parametrize("protocol", ["http", "grpc"])
Connect = Callable[..., InferenceClient]


@pytest.fixture
def connect(server: EmbeddedServer) -> Iterator[Connect]:
    """Makes clients of the real server, or of `url`, and closes them."""
    with contextlib.ExitStack() as stack:

        def make(protocol: str, url: str = "", **settings: Any) -> InferenceClient:
            default = server.http_url if protocol == "http" else server.grpc_url
            return stack.enter_context(InferenceClient(url or default, protocol, **settings))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def relay(server: EmbeddedServer, request: pytest.FixtureRequest) -> Iterator[Relay]:
    port = server.http_port if request.getfixturevalue("protocol") == "http" else server.grpc_port
    running = Relay((server.address, port))
    yield running
    running.close()


@pytest.fixture
def refused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@both
def test_infer_gives_the_outputs_by_name(connect: Connect, protocol: str) -> None:
    outputs = connect(protocol).infer("add_one", {"x": X}, request_id="7", version="1")
    assert list(outputs) == ["y"]
    np.testing.assert_array_equal(outputs["y"], X + 1)


@both
def test_arrays_that_are_not_contiguous_arrive_in_order(connect: Connect, protocol: str) -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 4, 3).transpose(0, 2, 1)[:, ::2]  # (2, 2, 4)
    np.testing.assert_array_equal(connect(protocol).infer("add_one", {"x": x}, outputs=["y"])["y"], x + 1)


@both
def test_metadata_and_readiness_say_what_the_server_has(connect: Connect, protocol: str) -> None:
    client = connect(protocol)
    metadata = client.metadata("add_one")
    assert metadata.inputs == (TensorSpec(name="x", datatype="FP32", shape=(-1, 2, -1)),)
    assert (metadata.name, metadata.versions, metadata.max_batch_size) == ("add_one", ("1",), 8)
    assert metadata.parameters == {"delay_s": "0.0"}
    assert client.ready()
    assert client.ready("add_one")
    assert not client.ready("absent")


@both
def test_a_prepared_request_can_be_sent_many_times_from_many_threads(connect: Connect, protocol: str) -> None:
    client = connect(protocol)
    requests = [client.prepare("add_one", {"x": X + k}) for k in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(client.send, requests * 20))
    for k, answer in enumerate(answers):
        np.testing.assert_array_equal(answer["y"], X + k % 8 + 1)


@both
@pytest.mark.parametrize(
    ("call", "expected", "says"),
    [
        pytest.param({"model": "absent"}, ModelNotFound, "'absent' is not found", id="unknown model"),
        pytest.param({"version": "9"}, ModelNotFound, "version 9 is not found", id="unknown version"),
        pytest.param({"version": "../x"}, InvalidInput, "version='../x'; it must be a number", id="no version"),
        pytest.param({"inputs": [X]}, InvalidInput, "inputs is a list; pass a dict", id="no names"),
        pytest.param({"outputs": "y"}, InvalidInput, r"pass a list of names: \['y'\]", id="one name"),
        pytest.param({"outputs": ["z"]}, InvalidInput, r"no output 'z'; its outputs are y \(FP32", id="output"),
        pytest.param({"timeout_s": 0}, InvalidInput, "timeout_s=0; it must be a positive number", id="no time"),
    ],
)
def test_a_wrong_call_is_refused(connect: Connect, protocol: str, call: dict, expected: type, says: str) -> None:
    with pytest.raises(expected, match=says):
        connect(protocol).infer(**{"model": "add_one", "inputs": {"x": X}} | call)


def check_ends_within(limit_s: float, call: Callable[[], object]) -> float:
    """Seconds that a call took; it has three, since other work on the machine may hold one up."""
    took_s: list[float] = []
    while not took_s or took_s[-1] >= limit_s:
        assert len(took_s) < 3, f"{took_s}, allowed: {limit_s}"
        start = time.monotonic()
        call()
        took_s.append(time.monotonic() - start)
    return took_s[-1]


@both
def test_a_refused_connection_is_unreachable_and_retried_within_the_deadline(
    connect: Connect, protocol: str, refused_url: str
) -> None:
    def call() -> None:
        with pytest.raises(Unreachable, match="Connection refused"):
            connect(protocol, refused_url, retries=1000, timeout_s=0.5).infer("add_one", {"x": X})

    check_ends_within(0.7, call)


@both
def test_a_server_that_never_answers_costs_no_more_than_the_deadline(connect: Connect, protocol: str) -> None:
    with answering(mute) as (url, _):
        client = connect(protocol, url, retries=5)

        def call() -> None:
            with pytest.raises(DeadlineExceeded, match=r"did not answer within timeout_s=0\.3"):
                client.infer("add_one", {"x": X}, timeout_s=0.3)

        assert check_ends_within(0.6, call) > 0.29


def test_a_server_that_trickles_bytes_costs_no_more_than_the_deadline(connect: Connect) -> None:
    with answering(trickle) as (url, _):

        def call() -> None:
            with pytest.raises(DeadlineExceeded):
                connect("http", url, timeout_s=0.3).ready()

        check_ends_within(1, call)


@both
def test_the_deadline_of_one_call_is_not_that_of_the_next(connect: Connect, protocol: str) -> None:
    client = connect(protocol)
    with pytest.raises(DeadlineExceeded):
        client.infer("slow", {"x": X}, timeout_s=0.05)
    np.testing.assert_array_equal(client.infer("slow", {"x": X}, timeout_s=5)["y"], X + 1)


def executed(server: EmbeddedServer, model: str) -> int:
    """How many requests the model has run, by Triton's own count."""
    with urllib.request.urlopen(f"http://{server.http_url}/v2/models/{model}/stats") as answer:
        return json.load(answer)["model_stats"][0]["inference_count"]


@both
def test_the_server_drops_a_queued_request_whose_deadline_is_over(
    connect: Connect, protocol: str, server: EmbeddedServer
) -> None:
    client = connect(protocol, retries=0)
    before = executed(server, "slow")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.infer, "slow", {"x": X})
        time.sleep(0.1)
        with pytest.raises(InferenceError):
            client.infer("slow", {"x": X}, timeout_s=0.03)
        running.result()
    client.infer("slow", {"x": X})  # the queue is empty after this one
    assert executed(server, "slow") - before == 2


@both
def test_a_full_queue_is_busy_and_retries_get_through(connect: Connect, protocol: str) -> None:
    hasty, patient = connect(protocol, retries=0), connect(protocol, retries=30, retry_budget=None)
    x = np.repeat(X, 8, axis=0)  # a batch to itself: 0.2 s each
    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(patient.infer, "slow", {"x": x}) for _ in range(6)]
        time.sleep(0.1)
        with pytest.raises(ServerBusy, match="Exceeds maximum queue size"):
            hasty.infer("slow", {"x": x})
        assert [future.result()["y"].shape for future in running] == 6 * [(8, 2, 3)]


@both
def test_a_connection_lost_in_the_middle_is_not_retried(connect: Connect, protocol: str, relay: Relay) -> None:
    client = connect(protocol, relay.url)
    request = client.prepare("slow", {"x": X})
    threading.Timer(0.1, relay.cut).start()
    with pytest.raises(ConnectionLost, match="broke before the answer was complete"):
        client.send(request)


@both
def test_an_idempotent_client_retries_a_connection_lost_in_the_middle(
    connect: Connect, protocol: str, relay: Relay
) -> None:
    client = connect(protocol, relay.url, idempotent=True, retries=10)
    request = client.prepare("slow", {"x": X})
    threading.Timer(0.1, relay.cut).start()
    np.testing.assert_array_equal(client.send(request)["y"], X + 1)


@both
def test_an_idle_connection_that_was_closed_is_replaced(connect: Connect, protocol: str, relay: Relay) -> None:
    client = connect(protocol, relay.url, retries=0)
    client.infer("add_one", {"x": X})
    relay.cut()
    time.sleep(0.1)
    np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)


@both
def test_a_server_that_comes_back_is_found_within_seconds(connect: Connect, protocol: str, relay: Relay) -> None:
    # Idempotent: the connection's end may not have been seen yet when the call is made.
    client = connect(protocol, relay.url, retries=50, idempotent=True)
    client.infer("add_one", {"x": X})
    relay.close()
    threading.Timer(1.0, relay.reopen).start()
    start = time.monotonic()
    np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("line", "body", "expected", "attempts"),
    [
        pytest.param("400 Bad Request", '{"error": "batch-size\\nmust be <= 8"}', InvalidInput, 1, id="400"),
        pytest.param("401 Unauthorized", "<html>", AccessDenied, 1, id="401"),
        pytest.param("413 Content Too Large", "<html>", InvalidInput, 1, id="413"),
        pytest.param("429 Too Many Requests", "", ServerBusy, 3, id="429"),
        pytest.param("500 Internal Server Error", '{"error": "boom"}', ServerError, 1, id="500"),
        pytest.param("502 Bad Gateway", "<html>", ConnectionLost, 1, id="502"),
        pytest.param("503 Service Unavailable", "<html>", ServerBusy, 3, id="503"),
        pytest.param("200 OK", "<html>", ServerError, 1, id="not Triton"),
        pytest.param("200 OK", '{"status": "ok"}', ServerError, 2, id="not Triton, JSON"),
        pytest.param("200 OK", "[]", ServerError, 2, id="not Triton, a list"),
    ],
)
def test_a_status_is_one_error_and_only_refusals_are_retried(
    connect: Connect, line: str, body: str, expected: type, attempts: int
) -> None:
    with answering(status(line, body)) as (url, seen), pytest.raises(expected) as caught:
        connect("http", url, retries=2).metadata("m")
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)
    assert len(seen) == attempts


def test_half_an_answer_is_a_lost_connection(connect: Connect) -> None:
    with answering(half_an_answer) as (url, _), pytest.raises(ConnectionLost, match="IncompleteRead"):
        connect("http", url).metadata("m")


def test_an_early_refusal_of_a_large_body_is_read(connect: Connect, server: EmbeddedServer) -> None:
    client = connect("http")
    request = client.prepare("add_one", {"x": np.zeros((8, 2, 200_000), np.float32)})  # 12.8 MB
    with answering(status("413 Content Too Large")) as (url, _):
        other = connect("http", url)
        with pytest.raises((InvalidInput, ConnectionLost)):  # the second where the reset overtakes the answer
            other.send(request)


def test_the_wrong_port_is_named(connect: Connect, server: EmbeddedServer) -> None:
    with pytest.raises(ServerError, match="does not speak HTTP; is it Triton's gRPC port"):
        connect("http", server.grpc_url, timeout_s=3).ready()
    with pytest.raises(Unreachable, match="correct the url"):
        connect("grpc", server.http_url, timeout_s=3).ready()


@both
def test_a_new_signature_needs_no_new_client(tmp_path: Path, protocol: str) -> None:
    write_add_one(tmp_path / "repository")
    config = tmp_path / "repository" / "add_one" / "config.pbtxt"
    with EmbeddedServer(
        tmp_path / "repository", http_port=0, grpc_port=0, metrics_port=0, poll_s=1, log_path=tmp_path / "log"
    ) as running:
        url = running.http_url if protocol == "http" else running.grpc_url
        with InferenceClient(url, protocol) as client, InferenceClient(url, protocol) as watcher:  # type: ignore[arg-type]
            client.infer("add_one", {"x": X})
            config.write_text(config.read_text().replace("[2, -1]", "[3, -1]"))
            wait_until(lambda: watcher.metadata("add_one").inputs[0].shape == (-1, 3, -1))
            with pytest.raises(InvalidInput):
                client.infer("add_one", {"x": X})
            assert client.infer("add_one", {"x": np.ones((1, 3, 1), np.float32)})["y"].tolist() == [[[2], [2], [2]]]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(InferenceError):
            if condition():
                return
        time.sleep(0.1)
    pytest.fail("waited 20 s in vain")


@both
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"version": 1}, "version=1 is of type int; pass a text: '1'"),
        ({"request_id": 7}, "request_id=7 is of type int"),
        ({"timeout_s": "1"}, "timeout_s='1'; it must be a positive number"),
        ({"timeout_s": 1e10}, "at most 1e.09"),
        ({"headers": 5}, "headers is of type int; pass a dict"),
        ({"outputs": 5}, "outputs=5; pass a list of names"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_option_of_the_wrong_type_is_refused(connect: Connect, protocol: str, options: dict, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        connect(protocol).infer("add_one", {"x": X}, **options)


def test_a_closed_client_says_so(server: EmbeddedServer) -> None:
    client = InferenceClient(server.grpc_url)
    client.close()
    with pytest.raises(RuntimeError, match="is closed"):
        client.ready()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate of localhost, and a server's TLS with it."""
    return make_certificate(tmp_path_factory.mktemp("tls"))


@both
def test_tls_trusts_the_given_authority_and_no_other(
    connect: Connect, protocol: str, server: EmbeddedServer, certificate: tuple[Path, ssl.SSLContext]
) -> None:
    ca_cert, context = certificate
    port = server.http_port if protocol == "http" else server.grpc_port
    relay = Relay((server.address, port), tls=context)
    client = connect(protocol, relay.url, ca_cert=ca_cert, api_key="secret")
    for _ in range(3):  # over a connection that is kept
        np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
    with pytest.raises(Unreachable):
        connect(protocol, relay.url, tls=True, timeout_s=3, retries=0).ready()
    relay.close()


def test_the_api_key_travels_as_a_bearer_token(
    connect: Connect, server: EmbeddedServer, certificate: tuple[Path, ssl.SSLContext]
) -> None:
    ca_cert, context = certificate
    with answering(status("200 OK")) as (url, seen):
        relay = Relay(("127.0.0.1", int(url.split(":")[1])), tls=context)
        assert connect("http", relay.url, ca_cert=ca_cert, api_key="secret").ready()
        relay.close()
    assert b"\r\nAuthorization: Bearer secret\r\n" in seen[0]


def test_the_api_key_travels_as_grpc_metadata(connect: Connect, certificate: tuple[Path, ssl.SSLContext]) -> None:
    ca_cert, _ = certificate
    headers: dict[str, str | bytes] = {}

    def refuse(request: bytes, context: grpc.ServicerContext) -> bytes:
        headers.update(context.invocation_metadata())
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "key expired")
        return b""

    with ThreadPoolExecutor(1) as pool:
        gateway = grpc.server(pool)
        call = {"ServerReady": grpc.unary_unary_rpc_method_handler(refuse)}
        gateway.add_generic_rpc_handlers(
            (grpc.method_handlers_generic_handler("inference.GRPCInferenceService", call),)
        )
        key = grpc.ssl_server_credentials([((ca_cert.parent / "key").read_bytes(), ca_cert.read_bytes())])
        port = gateway.add_secure_port("localhost:0", key)
        gateway.start()
        with pytest.raises(AccessDenied, match="key expired"):
            connect("grpc", f"localhost:{port}", ca_cert=ca_cert, api_key="secret").ready()
        gateway.stop(None).wait()
    assert headers["authorization"] == "Bearer secret"

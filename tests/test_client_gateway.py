"""What a client says to a gateway and hears from one: headers, keys, refusals with a time to wait, HTTP of any kind."""

from __future__ import annotations

import asyncio
import email.utils
import http.client
import io
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    AccessDenied,
    AsyncInferenceClient,
    InferenceClient,
    InferenceError,
    InvalidInput,
    PreparedRequest,
    ServerBusy,
    Unreachable,
)
from deepseek_client.__main__ import main
from deepseek_client.counters import Histogram
from deepseek_client.http_answer import Answer, read_answer
from deepseek_client.runtimes import run

from serving.embedded import EmbeddedServer
from tests.failing_servers import Relay, answering, grpc_answering, make_certificate, refuse, status

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
both = pytest.mark.parametrize("protocol", ["http", "grpc"])
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def request_of(server: EmbeddedServer) -> Callable[..., PreparedRequest]:
    """Prepares requests by what the real server says of the model."""

    def prepare(protocol: str, **settings: Any) -> PreparedRequest:
        url = server.http_url if protocol == "http" else server.grpc_url
        with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
            return client.prepare("add_one", {"x": X}, **settings)

    return prepare


def test_headers_and_the_request_id_travel_over_http(request_of: Callable) -> None:
    request, headers = request_of("http", request_id="order-7"), {"traceparent": TRACE, "X-Shop": "a b"}
    refusing = answering(status("400 Bad Request"))
    with refusing as (url, seen), InferenceClient(url, "http") as client, pytest.raises(InvalidInput):
        client.send(request, headers=headers)
    assert f"\r\ntraceparent: {TRACE}\r\nX-Shop: a b\r\nx-request-id: order-7\r\n".encode() in seen[0]
    assert b'{"id": "order-7"' in seen[0]


def test_headers_and_the_request_id_travel_over_grpc(request_of: Callable) -> None:
    nothing = refuse(grpc.StatusCode.INVALID_ARGUMENT, "no")

    async def call(url: str) -> None:
        async with AsyncInferenceClient(url) as client:
            await client.send(request_of("grpc", request_id="order-7"), headers={"Traceparent": TRACE})

    with grpc_answering(nothing) as (url, seen), pytest.raises(InvalidInput):
        asyncio.run(call(url))
    assert (seen[0]["traceparent"], seen[0]["x-request-id"]) == (TRACE, "order-7")


@both
def test_a_real_server_takes_them(server: EmbeddedServer, protocol: str) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
        answer = client.infer("add_one", {"x": X}, request_id="7", headers={"traceparent": TRACE})
    np.testing.assert_array_equal(answer["y"], X + 1)


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        pytest.param(
            {"traceparent": "0af7651916cd43dd8448eb211c80319c"}, "it must be version-trace-parent", id="trace"
        ),
        pytest.param({"traceparent": TRACE.replace("b7ad6b7169203331", 16 * "0")}, "lower-case hex", id="no parent"),
        pytest.param({"a": "b\r\nHost: c"}, "printable ASCII text in one line", id="injection"),
        pytest.param({"a: b\r\nc": "d"}, "is no name", id="injection by name"),
        pytest.param({"Content-Length": "0"}, "written by the client itself", id="own"),
        pytest.param({"Authorization": "Basic x"}, "written by the client itself", id="key"),
        pytest.param({"grpc-timeout": "1S"}, "is no name", id="gRPC's"),
        pytest.param({"a": ""}, "printable ASCII", id="empty"),
    ],
)
def test_headers_that_cannot_be_sent_are_refused(server: EmbeddedServer, headers: dict, says: str) -> None:
    with InferenceClient(server.http_url, "http") as client, pytest.raises(InvalidInput, match=says):
        client.infer("add_one", {"x": X}, headers=headers)


def test_a_request_id_cannot_smuggle_a_header(request_of: Callable) -> None:
    request, refusing = request_of("http", request_id="é 7\r\nHost: a"), answering(status("400 Bad Request"))
    with refusing as (url, seen), InferenceClient(url, "http") as client, pytest.raises(InvalidInput):
        client.send(request)
    assert b"\r\nx-request-id: %C3%A9%207%0D%0AHost:%20a\r\n" in seen[0]


def refusal(url: str, protocol: str, request: PreparedRequest, timeout_s: float) -> ServerBusy:
    """What a call ends with that may be retried once."""
    with InferenceClient(url, protocol, retries=1) as client, pytest.raises(ServerBusy) as caught:  # type: ignore[arg-type]
        client.send(request, timeout_s=timeout_s)
    return caught.value


def test_retry_after_is_waited_for(request_of: Callable) -> None:
    line = "429 Too Many Requests\r\nRetry-After: 1"
    with answering(status(line)) as (url, seen):
        start = time.monotonic()
        error = refusal(url, "http", request_of("http"), 10)
    assert time.monotonic() - start >= 1
    assert len(seen) == 2
    assert error.retry_after_s == 1
    assert "asks to wait 1 s" in str(error)


def test_retry_after_beyond_the_deadline_is_an_error_at_once(request_of: Callable) -> None:
    when = email.utils.formatdate(time.time() + 60, usegmt=True)
    with answering(status(f"503 Service Unavailable\r\nRetry-After: {when}")) as (url, seen):
        start = time.monotonic()
        error = refusal(url, "http", request_of("http"), 5)
    assert time.monotonic() - start < 4
    assert len(seen) == 1
    assert error.retry_after_s is not None
    assert 50 < error.retry_after_s <= 60


@pytest.mark.parametrize("said", [{"retry_after": "1"}, {"grpc_retry_pushback_ms": "1000"}], ids=["header", "pushback"])
def test_grpc_servers_say_it_in_their_metadata(request_of: Callable, said: dict) -> None:
    with grpc_answering(refuse(grpc.StatusCode.UNAVAILABLE, "shedding load", **said)) as (url, seen):
        start = time.monotonic()
        assert refusal(url, "grpc", request_of("grpc"), 10).retry_after_s == 1
    assert time.monotonic() - start >= 1
    assert len(seen) == 2


NGINX = """
pid nginx.pid; error_log stderr crit; daemon off; worker_processes 1;
events {}
http {
    access_log off;
    server {
        listen 127.0.0.1:%d; http2 on;
        location ~ /(v2/health/ready|inference.GRPCInferenceService/ServerReady)$ { return 401; }
        location ~ /(v2/models/forbidden|inference.GRPCInferenceService/ModelMetadata)$ { return 403; }
        location / { add_header Retry-After 7 always; return 429; }
    }
}
"""


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[str]:
    """A gateway that refuses everything."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if not program:
        pytest.skip("nginx is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    (tmp_path / "nginx.conf").write_text(NGINX % port)
    process = subprocess.Popen([program, "-p", str(tmp_path), "-c", "nginx.conf", "-e", "stderr"])
    try:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(5)


@both
def test_a_gateway_s_refusals_are_the_same_errors_over_both_protocols(
    nginx: str, protocol: str, request_of: Callable
) -> None:
    with InferenceClient(nginx, protocol, retries=0) as client:  # type: ignore[arg-type]
        with pytest.raises(AccessDenied, match="401"):
            client.ready()
        with pytest.raises(AccessDenied, match="403"):
            client.metadata("forbidden")
        with pytest.raises(ServerBusy, match="429") as caught:
            client.send(request_of(protocol))
        # gRPC drops the headers of what is no gRPC answer.
        assert caught.value.retry_after_s == (7 if protocol == "http" else None)


def test_a_protocol_that_triton_restricts_is_access_denied() -> None:
    said = "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"
    refusing = grpc_answering(refuse(grpc.StatusCode.UNAVAILABLE, said))
    with refusing as (url, _), InferenceClient(url) as client, pytest.raises(AccessDenied, match="restricted"):
        client.ready()


@both
def test_a_certificate_of_another_host_is_refused(server: EmbeddedServer, protocol: str, tmp_path: Path) -> None:
    ca_cert, context = make_certificate(tmp_path)
    relay = Relay((server.address, server.http_port if protocol == "http" else server.grpc_port), context)
    url = f"127.0.0.1:{relay.port}"  # the certificate is of localhost
    client = InferenceClient(url, protocol, ca_cert=ca_cert, retries=0, timeout_s=5)  # type: ignore[arg-type]
    with client, pytest.raises(Unreachable, match=r"IP address mismatch|Hostname Verification") as refused:
        client.ready()
    assert str(refused.value).startswith(f"the certificate of {url} is not trusted (")
    relay.close()


@both
def test_a_certificate_that_nothing_vouches_for_is_named_as_the_reason(protocol: str, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "known").mkdir()
    _, context = make_certificate(tmp_path / "served")
    ca_cert, _ = make_certificate(tmp_path / "known")
    relay = Relay(("127.0.0.1", 9), context)
    client = InferenceClient(f"localhost:{relay.port}", protocol, ca_cert=ca_cert, retries=0)  # type: ignore[arg-type]
    with client, pytest.raises(Unreachable, match=r"is not trusted \(self.signed certificate\)"):
        client.ready()
    relay.close()


def test_the_command_line_takes_the_key_from_the_environment(
    server: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca_cert, context = make_certificate(tmp_path)
    monkeypatch.setenv("DEEPSEEK_API_KEY", "from-the-environment")
    with answering(status("200 OK")) as (url, seen):
        relay = Relay(("127.0.0.1", int(url.split(":")[1])), tls=context)
        arguments = ["ready", "--protocol", "http", "--url", relay.url, "--ca-cert", str(ca_cert)]
        assert main(arguments) == 0
        (tmp_path / "key").write_text("from-a-file\n")
        assert main([*arguments, "--api-key-file", str(tmp_path / "key")]) == 0
        relay.close()
        assert main(["ready", "--protocol", "http", "--url", url]) == 0  # no TLS: not sent
    keys = [line for piece in seen for line in piece.split(b"\r\n") if line.startswith(b"Authorization")]
    assert keys == [b"Authorization: Bearer from-the-environment", b"Authorization: Bearer from-a-file"]


# HTTP answers

BODY = json.dumps({"outputs": []})
ANSWERS = [
    pytest.param(f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}", True, id="length"),
    pytest.param(f"HTTP/1.1 200 OK\r\ncontent-LENGTH:{len(BODY)}\r\nConnection: close\r\n\r\n{BODY}", False, id="close"),
    pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\nA\r\n0123456789\r\n0\r\nX: y\r\n\r\n", True, id="chunks"),
    pytest.param("HTTP/1.1 204 No Content\r\n\r\n", True, id="no content"),
    pytest.param(f"HTTP/1.0 200 OK\r\n\r\n{BODY}", False, id="to the end"),
    pytest.param("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n", True, id="continue"),
    pytest.param("HTTP/1.1 429\r\nContent-Length: 0\r\n\r\n", True, id="no reason"),
]  # fmt: skip


def read(data: bytes, piece: int) -> Answer:
    pieces = iter([data[start : start + piece] for start in range(0, len(data), piece)])

    async def receive(wanted: int) -> bytes:
        return next(pieces, b"")

    return run(read_answer(receive))


@pytest.mark.parametrize("piece", [1, 7, 10_000])
@pytest.mark.parametrize(("text", "keep"), ANSWERS)
def test_an_answer_is_read_as_the_standard_library_reads_it(text: str, keep: bool, piece: int) -> None:
    class Stream:
        def makefile(self, mode: str) -> io.BytesIO:
            return io.BytesIO(text.encode())

    theirs = http.client.HTTPResponse(Stream(), method="POST")  # type: ignore[arg-type]
    theirs.begin()
    ours = read(text.encode(), piece)
    assert (ours.status, bytes(ours.body), ours.keep) == (theirs.status, theirs.read(), keep)
    assert ours.headers.get("retry-after") == theirs.getheader("Retry-After")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        pytest.param("", http.client.RemoteDisconnected, id="nothing"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Le", http.client.IncompleteRead, id="half a head"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nabc", http.client.IncompleteRead, id="half a body"),
        pytest.param("HTTP/2 200\r\n\r\n", http.client.BadStatusLine, id="another version"),
        pytest.param("SSH-2.0-OpenSSH\r\n", http.client.BadStatusLine, id="no HTTP"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", http.client.HTTPException, id="two lengths"),
        pytest.param("HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\nabc", http.client.HTTPException, id="negative length"),
        pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nabc", http.client.HTTPException, id="encoding"),
        pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", http.client.HTTPException, id="chunk size"),
        pytest.param("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc", http.client.HTTPException, id="long chunk"),
        pytest.param("HTTP/1.1 200 OK\r\nno colon\r\n\r\n", http.client.HTTPException, id="no header"),
        pytest.param("HTTP/1.1 200 OK\r\nA: " + 70_000 * "b", http.client.HTTPException, id="endless head"),
    ],
)  # fmt: skip
def test_an_answer_that_is_none_is_an_error(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        read(text.encode(), 100)


def test_bytes_beyond_an_answer_end_the_connection() -> None:
    answer = read(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcHTTP/1.1 200 OK", 10_000)
    assert bytes(answer.body) == b"abc"
    assert not answer.keep


# Statistics


def test_percentiles_are_within_a_hundredth() -> None:
    latencies_s = np.random.default_rng(0).lognormal(-5, 1, 20_000)
    histogram = Histogram()
    for latency_s in latencies_s.tolist():
        histogram.record(latency_s)
    for percent in (1, 50, 90, 99, 99.9):
        expected_ms = np.percentile(latencies_s, percent) * 1000
        assert histogram.percentile_ms(percent) == pytest.approx(expected_ms, rel=0.012)
    assert Histogram().percentile_ms(50) is None


@both
def test_a_client_counts_its_calls_and_errors_by_model(server: EmbeddedServer, protocol: str) -> None:
    url = server.http_url if protocol == "http" else server.grpc_url
    with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
        for _ in range(3):
            client.infer("add_one", {"x": X})
        client.infer("slow", {"x": X})
        with pytest.raises(InferenceError):
            client.infer("slow", {"x": X}, timeout_s=0.05)
        told = client.statistics()
    assert (told.models["add_one"].calls, told.models["add_one"].errors) == (3, {})
    assert (told.models["slow"].calls, told.models["slow"].errors) == (2, {"DeadlineExceeded": 1})
    p50_ms, p99_ms = told.models["slow"].p50_ms, told.models["slow"].p99_ms
    assert p50_ms is not None
    assert p99_ms is not None
    assert 195 < p50_ms <= p99_ms
    assert told.replicas == {url: True}

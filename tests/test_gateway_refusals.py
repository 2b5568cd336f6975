"""What the gateway refuses: the list of attacks, and what is larger or slower than any caller needs."""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import time
import urllib.request

import pytest
from tritonclient.utils import InferenceServerException

from serving.embedded import EmbeddedServer
from serving.flags import ADMIN_HEADER
from tests.gateway import INFER, SERVICE, Gateway, authorized, grpc_input, json_body

# ---- only inference, metadata and readiness ----------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/add_one",
        "/v2/models/add_one/versions/1",
        "/v2/models/add_one/ready",
        "/v2/models/add_one/config",
    ],
)
def test_metadata_and_readiness_are_let_through(gateway: Gateway, target: str) -> None:
    assert gateway.http("GET", target)[0] == 200


CLOSED = [
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/add_one/load"),
    ("POST", "/v2/repository/models/add_one/unload"),
    ("GET", "/v2/systemsharedmemory/status"),
    ("POST", "/v2/systemsharedmemory/region/x/register"),
    ("POST", "/v2/cudasharedmemory/region/x/register"),
    ("GET", "/v2/trace/setting"),
    ("POST", "/v2/models/add_one/trace/setting"),
    ("GET", "/v2/logging"),
    ("POST", "/v2/logging"),
    ("GET", "/v2/models/stats"),
    ("GET", "/v2/models/add_one/stats"),
    ("GET", "/metrics"),
    ("POST", "/v2/models/add_one/generate"),
    ("POST", "/v2/models/add_one/generate_stream"),
    ("DELETE", "/v2/models/add_one/infer"),
    ("GET", "/v2/models/add_one/infer"),
    ("POST", "/v2/models/add_one"),
    ("OPTIONS", "*"),
    ("GET", "/"),
    ("GET", "/healthz"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "target"), CLOSED, ids=lambda value: value)
def test_all_else_is_forbidden(gateway: Gateway, method: str, target: str) -> None:
    status, answer = gateway.http(method, target, body=b"{}" if method == "POST" else b"")
    assert status == (400 if target == "*" else 403)
    assert b"triton" not in answer.lower()


@pytest.mark.parametrize(
    "path",
    [
        *(f"{SERVICE}/{name}" for name in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "ModelStatistics", "TraceSetting", "LogSettings", "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "ModelStreamInfer", "Nonsense", "ModelInfer/")),
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Watch",
    ],
)  # fmt: skip
def test_other_grpc_methods_are_denied(gateway: Gateway, path: str) -> None:
    assert gateway.grpc_status(path) == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "target",
    [
        "/v2/../v2/repository/index",
        "/v2/models/add_one/../../repository/index",
        "/v2/models/../repository/index",
        "/v2/models/add_one/infer/../stats",
        "/v2/models/add_one/./stats",
        "/v2/models/%2e%2e/repository/index",
        "/v2/models/..%2frepository/index",
        "/v2/models/add_one%2fstats",
        "/v2/models/add_one/%69nfer",
        "/%76%32/repository/index",
        "//v2/repository/index",
        "/v2//repository/index",
        "/v2/models/add_one/stats/",
        "/v2/models/add_one/stats?",
        "/v2/models/add_one/stats#/infer",
        "/v2/models/add_one/infer?x=/../stats",
        "/v2/models/add_one;/../stats",
        "/v2/models/add_one\\..\\stats",
        "/v2/models/add_one/infer%00",
        "/V2/models/add_one/stats",
        "http://localhost/v2/models/add_one/stats",
        "http://127.0.0.1:8000/v2/repository/index",
        "https://localhost/v2/../v2/models/add_one/stats",
        "/v2/models/versions/1/stats",
        "/v2/models/stats",
        "/v2/models/add_one/versions/1/stats",
    ],
)
def test_no_trick_with_the_path_reaches_what_is_closed(gateway: Gateway, target: str) -> None:
    for method in ("GET", "POST"):
        status, answer = gateway.http(method, target, body=b"{}" if method == "POST" else b"")
        assert status in (400, 403), answer
        assert b"model_stats" not in answer
        assert b'"state"' not in answer


def test_the_admin_key_opens_triton_but_does_not_pass_the_gateway(gateway: Gateway, closed: EmbeddedServer) -> None:
    url = f"http://{closed.http_url}/v2/models/add_one/stats"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(url)
    assert urllib.request.urlopen(urllib.request.Request(url, headers={ADMIN_HEADER: "sesame"})).status == 200
    assert gateway.http("GET", "/v2/models/add_one/stats", f"{ADMIN_HEADER}: sesame")[0] == 403
    sent = ((f"triton-grpc-protocol-{ADMIN_HEADER}", "sesame"),)
    assert gateway.grpc_status(f"{SERVICE}/ModelStatistics", metadata=sent) == "PERMISSION_DENIED"


# ---- smuggling ---------------------------------------------------------------------------------

INNER = b"GET /v2/repository/index HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4",
        b"Content-Length: 4\r\nContent-Length: 60",
        b"Content-Length: 4, 60",
        b"Content-Length: +4",
        b"Content-Length: 0x4",
        b"Content-Length: -1",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding : chunked\r\nContent-Length: 4",
        b"Transfer-Encoding: gzip, chunked",
        b"Authorization: Bearer dsk_AAAA",
        b"Host: elsewhere",
        b"X-Bad: a\x00b",
    ],
)
def test_requests_that_two_servers_could_read_differently_are_refused(gateway: Gateway, headers: bytes) -> None:
    request = b"POST " + INFER.encode() + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    request += f"Authorization: Bearer {gateway.key}\r\n".encode() + headers + b"\r\n\r\n0\r\n\r\n" + INNER
    status, answer = gateway.send(request)
    assert status in (400, 501), answer
    assert answer.count(b"HTTP/1.1 ") <= 1


def test_an_upgrade_to_h2c_is_not_taken(gateway: Gateway) -> None:
    upgrade = ("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", "Connection: Upgrade, HTTP2-Settings")
    status, answer = gateway.http("GET", "/v2/health/ready", *upgrade)
    assert status == 200
    assert b"HTTP/1.1 101" not in answer


def test_plain_http_and_old_tls_are_refused(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as plain:
        plain.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain.recv(64).startswith(b"HTTP/1.1 400")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises((ssl.SSLError, ConnectionError)):
        gateway.connect(version=ssl.TLSVersion.TLSv1_1)


# ---- sizes and speed ---------------------------------------------------------------------------


def test_the_largest_request_of_a_model_passes_and_a_larger_one_does_not(gateway: Gateway) -> None:
    assert gateway.http("POST", INFER, body=json_body(8, 1024))[0] == 200
    assert gateway.http("POST", INFER, body=json_body(64, 1024))[0] == 413
    with gateway.grpc_client() as client:
        client.infer("add_one", grpc_input(8, 1024), headers=authorized(gateway.key))
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("add_one", grpc_input(64, 4096), headers=authorized(gateway.key))


def test_a_body_without_a_length_is_measured_as_it_comes(gateway: Gateway) -> None:
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    request = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n"
    request += f"Authorization: Bearer {gateway.key}\r\n\r\n"
    assert gateway.send(request.encode() + chunk * 20 + b"0\r\n\r\n")[0] == 413


def test_compressed_requests_are_refused_before_anything_unpacks_them(gateway: Gateway) -> None:
    body = gzip.compress(json_body())
    assert gateway.http("POST", INFER, "Content-Encoding: gzip", body=body)[0] == 415
    assert gateway.http("POST", INFER, "Content-Encoding: deflate", body=body)[0] == 415
    with gateway.grpc_client() as client, pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
        client.infer("add_one", grpc_input(), headers=authorized(gateway.key), compression_algorithm="gzip")


def test_headers_larger_than_any_caller_needs_are_refused(gateway: Gateway) -> None:
    assert gateway.http("GET", "/v2/health/ready", "X-Large: " + "a" * 9000)[0] == 400
    assert gateway.http("GET", "/v2/models/" + "a" * 9000)[0] == 414


@pytest.mark.slow
def test_slow_and_half_open_callers_are_cut_off_and_cost_the_others_nothing(gateway: Gateway) -> None:
    half_open = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(200)]
    slow = [gateway.connect() for _ in range(20)]
    started = time.monotonic()
    ended = 0.0
    for connection in slow:
        connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: ")
    while not ended and time.monotonic() - started < 15:
        assert gateway.http("GET", "/v2/health/ready")[0] == 200
        try:
            slow[0].sendall(b"x")
            slow[0].settimeout(0.2)
            ended = 0.0 if slow[0].recv(1) else time.monotonic() - started
        except TimeoutError:
            continue
        except OSError:
            ended = time.monotonic() - started
    assert 4 < ended < 9
    for each in [*slow, *half_open]:
        each.settimeout(3)
        with each, contextlib.suppress(ConnectionError, ssl.SSLError):
            assert each.recv(1) == b""  # closed by the gateway, not timed out here

"""The gateway refuses a list of attacks, and requests larger or slower than any caller needs."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from serving.embedded.flags import ADMIN_HEADER
from serving.embedded.launcher import EmbeddedServer
from tests.add_one import write_add_one
from tests.conftest import FREE
from tests.gateway import INFER, SERVICE, Gateway, authorized, grpc_input, json_body, limits_of
from tests.waiting import wait_for

# ---- only inference, metadata and readiness ----------------------------------------------------


OPEN = ["GET /v2", "GET /v2/health/live", "GET /v2/models/add_one/versions/1", "GET /v2/models/add_one/config"]
CLOSED = [
    "POST /v2/repository/index",
    "POST /v2/repository/models/add_one/load",
    "POST /v2/repository/models/add_one/unload",
    "GET /v2/systemsharedmemory/status",
    "GET /v2/trace/setting",
    "GET /v2/logging",
    "POST /v2/models/add_one/generate_stream",
    "GET /v2/models/add_one/infer",
    "POST /v2/systemsharedmemory/region/x/register",
    "POST /v2/cudasharedmemory/region/x/register",
    "POST /v2/models/add_one/trace/setting",
    "POST /v2/logging",
    "GET /v2/models/stats",
    "GET /v2/models/add_one/stats",
    "GET /v2/models/add_one/versions/1/stats",
    "GET /metrics",
    "POST /v2/models/add_one/generate",
    "DELETE /v2/models/add_one/infer",
    "POST /v2/models/add_one",
    "OPTIONS *",
    "GET /",
    # tricks with the path
    "POST /v2/../v2/repository/index",
    "POST /v2/models/../repository/index",
    "GET /v2/models/add_one/infer/../stats",
    "POST /v2/models/%2e%2e/repository/index",
    "GET /v2/models/add_one%2fstats",
    "POST /v2/models/add_one/%69nfer",
    "POST /%76%32/repository/index",
    "POST /v2//repository/index",
    "GET /v2/models/add_one/stats?",
    "GET /v2/models/add_one/stats#/infer",
    "GET /v2/models/add_one/infer?x=/../stats",
    "GET /v2/models/add_one\\..\\stats",
    "POST /v2/models/add_one/infer%00",
    "GET /V2/models/add_one/stats",
    "GET http://localhost/v2/models/add_one/stats",
]


@pytest.mark.parametrize("request_line", [*OPEN, *CLOSED])
def test_only_inference_metadata_and_readiness_are_let_through(gateway: Gateway, request_line: str) -> None:
    method, _, target = request_line.partition(" ")
    status, answer = gateway.http(method, target, body=b"{}" if method == "POST" else b"")
    assert status in ((200,) if request_line in OPEN else (400, 403)), answer
    assert not re.search(rb'(?i)model_stats|"state"', answer)
    assert request_line in OPEN or b"triton" not in answer.lower()


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


@pytest.mark.parametrize("header", ["X: y", "Content-Type: application/json", "Content-Type: application/grpc-web"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_grpc_path_without_grpc_is_refused_before_it_reaches_triton(
    gateway: Gateway, method: str, header: str
) -> None:
    """Triton closes the connection: a caller's mistake would count as a failure of the server."""
    status, answer = gateway.http(method, f"{SERVICE}/ServerLive", header, "X-Request-Id: no-grpc")
    assert status == 415
    assert b'{"error":"this path is for gRPC: Content-Type must be application/grpc; over HTTP use /v2"}' in answer
    assert {line["triton"] for line in gateway.lines(id="no-grpc")} == {""}


def test_grpc_without_the_header_te_is_answered(gateway: Gateway) -> None:
    """Some proxies remove it, and Triton resets such a call."""
    empty = b"\0" * 5
    status, answer = gateway.http("POST", f"{SERVICE}/ServerLive", "Content-Type: application/grpc", body=empty)
    assert (status, b"\0\0\0\0\x02\x08\x01" in answer) == (200, True)  # live


def test_the_admin_key_opens_triton_but_does_not_pass_the_gateway(gateway: Gateway, closed: EmbeddedServer) -> None:
    index = f"http://{closed.http_url}/v2/repository/index"
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(index, data=b"{}")
    asked = urllib.request.Request(index, data=b"{}", headers={ADMIN_HEADER: "sesame"})
    assert urllib.request.urlopen(asked).status == 200
    assert gateway.http("POST", "/v2/repository/index", f"{ADMIN_HEADER}: sesame", body=b"{}")[0] == 403
    sent = ((f"triton-grpc-protocol-{ADMIN_HEADER}", "sesame"),)
    assert gateway.grpc_status(f"{SERVICE}/RepositoryIndex", metadata=sent) == "PERMISSION_DENIED"


# ---- smuggling ---------------------------------------------------------------------------------

INNER = b"GET /v2/repository/index HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 4\r\nTransfer-Encoding: chunked",
        b"Content-Length: 4\r\nContent-Length: 60",
        b"Content-Length: 4, 60",
        b"Content-Length: +4",
        b"Transfer-Encoding: xchunked",
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


def test_plain_http_old_tls_and_upgrades_to_h2c_are_refused(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as plain:
        plain.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = plain.recv(4096)
    assert answer.startswith(b"HTTP/1.1 400")
    assert answer.endswith(b'{"error":"this port needs https://"}\n')
    with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises((ssl.SSLError, ConnectionError)):
        gateway.connect(version=ssl.TLSVersion.TLSv1_1)
    upgrade = ("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__", "Connection: Upgrade, HTTP2-Settings")
    status, answer = gateway.http("GET", "/v2/health/ready", *upgrade)
    assert status == 200
    assert b"HTTP/1.1 101" not in answer


# ---- sizes and speed ---------------------------------------------------------------------------


def test_the_largest_request_of_a_model_passes_and_a_larger_one_does_not(gateway: Gateway) -> None:
    assert gateway.http("POST", INFER, body=json_body(8, 1024))[0] == 200
    assert gateway.http("POST", INFER, body=json_body(64, 1024))[0] == 413
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {gateway.key}\r\n"
    chunks = (b"10000\r\n" + b" " * 0x10000 + b"\r\n") * 20 + b"0\r\n\r\n"
    assert gateway.send(f"{head}Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + chunks)[0] == 413
    with gateway.grpc_client() as client:
        client.infer("add_one", grpc_input(8, 1024), headers=authorized(gateway.key))
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
            client.infer("add_one", grpc_input(64, 4096), headers=authorized(gateway.key))


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """A gateway with room for six bodies of 4 MB, or two of them as JSON."""
    folder = tmp_path_factory.mktemp("narrow")
    write_add_one(folder / "repository", delay_s=0.5)
    with EmbeddedServer(folder / "repository", log_path=folder / "triton.log", exit_timeout_s=1, **FREE) as server:
        text = re.sub(r"(limit_conn large_json) \d+", r"\1 2", limits_of(server, folder, input_numbers=200_000))
        with Gateway(folder, text, server.http_url, server.grpc_url, room_mib=26) as running:
            yield running


LARGE = (8, 62_500)  # rows, and columns of the two lines that a row has: 4 MB
LARGE_JSON = json_body(8, 16_000)


def over_http(gateway: Gateway, body: bytes, *headers: str) -> tuple[str, str]:
    """Status and message of a large request."""
    status, answer = gateway.http("POST", INFER, *headers, body=body)
    return str(status), answer.decode(errors="replace").partition("\r\n\r\n")[2] if status != 200 else ""


def as_json(gateway: Gateway) -> tuple[str, str]:
    return over_http(gateway, LARGE_JSON)


def as_chunks(gateway: Gateway) -> tuple[str, str]:
    """A small body, but the gateway cannot know that in advance."""
    head = f"POST {INFER} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {gateway.key}\r\n"
    body = json_body()
    chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    status, answer = gateway.send(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks)
    return str(status), answer.decode(errors="replace").partition("\r\n\r\n")[2] if status != 200 else ""


def as_binary(gateway: Gateway) -> tuple[str, str]:
    tensor = triton_http.InferInput("x", [LARGE[0], 2, LARGE[1]], "FP32")
    tensor.set_data_from_numpy(np.zeros(tensor.shape(), np.float32))
    body, length = triton_http.InferenceServerClient.generate_request_body([tensor])
    return over_http(gateway, body, f"Inference-Header-Content-Length: {length}")


def as_grpc(gateway: Gateway) -> tuple[str, str]:
    with gateway.grpc_client() as client:
        try:
            client.infer("add_one", grpc_input(*LARGE), headers=authorized(gateway.key))
        except InferenceServerException as error:
            return error.status(), error.message()
    return "200", ""


NO_ROOM = "no memory for another large request; try again"
NO_ROOM_FOR_JSON = "no memory for another large JSON request; send binary tensors, or try again"
NO_ROOM_FOR_CHUNKS = NO_ROOM_FOR_JSON.replace(";", " (without a Content-Length each counts as large);")


@pytest.mark.parametrize(
    ("send", "status", "said"),
    [
        (as_json, "429", f'{{"error":"{NO_ROOM_FOR_JSON}"}}\n'),
        (as_chunks, "429", f'{{"error":"{NO_ROOM_FOR_CHUNKS}"}}\n'),
        (as_binary, "429", f'{{"error":"{NO_ROOM}"}}\n'),
        (as_grpc, "StatusCode.RESOURCE_EXHAUSTED", NO_ROOM),
    ],
)
def test_large_requests_without_room_are_refused_in_one_line(
    narrow: Gateway, send: Callable[[Gateway], tuple[str, str]], status: str, said: str
) -> None:
    found: set[tuple[str, str]] = set()

    def seen_both() -> bool:
        found.update(pool.map(send, [narrow] * 8))
        found.discard(("0", ""))  # closed before the caller had read why
        return len(found) > 1

    with ThreadPoolExecutor(8) as pool:
        wait_for(seen_both)  # a busy machine may send one after the other
    assert found == {("200", ""), (status, said)}
    assert narrow.http("POST", INFER, body=json_body())[0] == 200
    assert send(narrow)[0] == "200"  # there is room again


def test_compressed_requests_are_refused_before_anything_unpacks_them(gateway: Gateway) -> None:
    body = gzip.compress(json_body())
    assert gateway.http("POST", INFER, "Content-Encoding: gzip", body=body)[0] == 415
    assert gateway.http("POST", INFER, "Content-Encoding: deflate", body=body)[0] == 415
    assert gateway.http("POST", INFER, "Content-Encoding: Identity", body=json_body())[0] == 200
    for beside in ({}, {"content-encoding": "Identity"}):
        sent = {**authorized(gateway.key), **beside}
        with gateway.grpc_client() as client, pytest.raises(InferenceServerException, match="UNIMPLEMENTED"):
            client.infer("add_one", grpc_input(), headers=sent, compression_algorithm="gzip")


PATH = "/v2/health/ready"


@pytest.mark.parametrize(
    ("request_line", "header", "status", "reason"),
    [
        (f"GET {PATH} HTTP/1.1", "X-Large: " + "a" * 9000, 400, "the request headers are too large: 32 KiB"),
        (f"GET /v2/models/{'a' * 9000} HTTP/1.1", "X: y", 414, "the request line is longer than 8 KiB"),
        (f"GET {PATH} HTTP/1.1", "Host: another", 400, "malformed request"),
        (f"GET {PATH} HTTP/1.1", "Transfer-Encoding: gzip", 501, "malformed request"),
        (f"TRACE {PATH} HTTP/1.1", "X: y", 405, "not a method for inference"),
        (f"GET {PATH} HTTP/3.0", "X: y", 505, "malformed request"),
        ("GET\x00 / HTTP/1.1", "X: y", 400, "malformed request"),
        ("POST /v1/embeddings HTTP/1.1", "X-Large: " + "a" * 9000, 400, "the request headers are too large"),
        ("POST /v1/embeddings HTTP/1.1", "Transfer-Encoding: chunked", 400, "malformed request"),
    ],
)
def test_requests_that_nginx_itself_refuses_get_the_gateways_json(
    gateway: Gateway, request_line: str, header: str, status: int, reason: str
) -> None:
    head = f"{request_line}\r\nHost: localhost\r\nConnection: close\r\nAuthorization: Bearer {gateway.key}\r\n{header}"
    found, answer = gateway.send(head.encode() + b"\r\n\r\nno chunk\r\n")
    assert found == status, answer
    assert b"Content-Type: application/json" in answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert (error["message"] if "/v1/" in request_line else error).startswith(reason)


@pytest.mark.slow
def test_slow_and_half_open_callers_are_cut_off_and_cost_the_others_nothing(gateway: Gateway) -> None:
    half_open = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(200)]
    started = time.monotonic()
    slow = [gateway.connect() for _ in range(20)]
    ended = 0.0
    for connection in slow:
        connection.sendall(b"GET /v2/health/ready HTTP/1.1\r\nHost: ")
    while not ended and time.monotonic() - started < 120:
        assert gateway.http("GET", "/v2/health/ready")[0] == 200
        try:
            slow[0].sendall(b"x")
            slow[0].settimeout(0.2)
            ended = 0.0 if slow[0].recv(1) else time.monotonic() - started
        except TimeoutError:
            continue
        except OSError:
            ended = time.monotonic() - started
    assert ended > 4, "cut off too early, or not at all"  # 5 s are allowed
    for each in [*slow, *half_open]:
        each.settimeout(60)
        with each, contextlib.suppress(ConnectionError, ssl.SSLError):
            assert each.recv(1) == b""  # closed by the gateway, not timed out here

"""The gateway before a real Triton: what it lets through, and the list of attacks that it refuses."""

from __future__ import annotations

import contextlib
import gzip
import os
import re
import socket
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from serving.certificate import ensure_certificate
from serving.embedded import EmbeddedServer
from serving.flags import ADMIN_HEADER
from serving.stack import limits, served_models
from tests.conftest import write_add_one
from tests.gateway import Gateway, authorized, grpc_input, json_body, skip_without_nginx

INFER = "/v2/models/add_one/infer"
SERVICE = "/inference.GRPCInferenceService"


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """A Triton with the flags of the stack, whose admin key is known here; `stuck` takes 3 s a batch."""
    skip_without_nginx()
    folder = tmp_path_factory.mktemp("closed")
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "stuck", delay_s=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_ADMIN_KEY", "sesame")
        ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
        with EmbeddedServer(
            folder / "repository", **ports, log_path=folder / "triton.log", behind_gateway=True, exit_timeout_s=1
        ) as running:
            yield running


@pytest.fixture(scope="module")
def gateway(closed: EmbeddedServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The gateway before it; an answer may take 1 s."""
    folder = tmp_path_factory.mktemp("gateway")
    models = [replace(model, queue_timeout_ms=500, p99_ms=50) for model in served_models(closed.repository, folder)]
    running = Gateway(folder, limits(models), closed.http_url, closed.grpc_url)
    yield running
    assert running.stop() == 0


def http_client(gateway: Gateway) -> triton_http.InferenceServerClient:
    """Bare tritonclient over HTTP."""
    context = ssl.create_default_context(cafile=str(gateway.folder / "ca.crt"))
    return triton_http.InferenceServerClient(f"localhost:{gateway.port}", ssl=True, ssl_context_factory=lambda: context)


def test_http_and_grpc_infer_through_one_port(gateway: Gateway) -> None:
    status, answer = gateway.http("POST", INFER, body=json_body())
    assert status == 200
    assert b'"data":[1.5,1.5,1.5,1.5,1.5,1.5]' in answer
    with gateway.grpc_client() as client:
        assert client.infer("add_one", grpc_input(), headers=authorized(gateway.key)).as_numpy("y").sum() == 6
        assert client.is_model_ready("add_one", headers=authorized(gateway.key))
    with gateway.connect("h2", "http/1.1") as connection:
        assert connection.selected_alpn_protocol() == "h2"


def test_bare_tritonclient_sends_binary_tensors_through_it(gateway: Gateway) -> None:
    tensor = triton_http.InferInput("x", [1, 2, 3], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 2, 3), np.float32))
    with http_client(gateway) as client:
        answer = client.infer("add_one", [tensor], headers=authorized(gateway.key))
        assert answer.as_numpy("y").sum() == 6
        assert client.get_model_metadata("add_one", headers=authorized(gateway.key))["name"] == "add_one"


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "X-Nothing: 1",
        "Authorization: Bearer dsk_" + "A" * 43,
        "Authorization: Bearer ",
        "Authorization: Basic c2hvcDpzaG9w",
        "Authorization: Bearer ../keys/x",
        "Authorization: Bearer dsk_" + "A" * 5000,
        "Authorization_: Bearer {key}",
        "Proxy-Authorization: Bearer {key}",
        "Cookie: Authorization=Bearer {key}",
        "authorization: bearer{key}",
        "Authorization: Bearer {key}x",
        "Authorization: Bearer {key}, Bearer {key}",
    ],
)
def test_without_a_key_that_counts_nothing_is_answered(gateway: Gateway, header: str) -> None:
    status, answer = gateway.http("GET", "/v2/health/ready", header.format(key=gateway.key), key="")
    assert status == 401
    assert gateway.http("POST", INFER, header.format(key=gateway.key), body=json_body(), key="")[0] == 401
    assert b"Bearer <key>" in answer


@pytest.mark.parametrize("key", ["", "dsk_" + "A" * 43, "x"])
def test_grpc_without_a_key_that_counts_is_unauthenticated(gateway: Gateway, key: str) -> None:
    assert gateway.grpc_status(f"{SERVICE}/ServerLive", key=key) == "UNAUTHENTICATED"


def test_an_expired_key_does_not_count(gateway: Gateway) -> None:
    key = gateway.add_key("short", expires_s=0.5)
    assert gateway.http("GET", "/v2/health/ready", key=key)[0] == 200
    time.sleep(0.6)
    assert gateway.http("GET", "/v2/health/ready", key=key)[0] == 401


def test_a_key_counts_at_once_and_a_revoked_one_ends_at_once_on_open_connections(gateway: Gateway) -> None:
    key = gateway.add_key("guest")
    with gateway.grpc_client() as over_grpc, http_client(gateway) as over_http:
        assert over_grpc.is_server_ready(headers=authorized(key))
        assert over_http.is_server_ready(headers=authorized(key))
        gateway.end_key("guest")
        with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
            over_grpc.is_server_ready(headers=authorized(key))
        assert not over_http.is_server_ready(headers=authorized(key))


def test_a_key_is_rotated_with_both_valid_in_between(gateway: Gateway) -> None:
    old, new = gateway.add_key("rotated"), gateway.add_key("rotated")
    assert [gateway.http("GET", "/v2/health/ready", key=key)[0] for key in (old, new)] == [200, 200]


def test_the_rate_of_a_key_is_its_own(gateway: Gateway) -> None:
    slow = gateway.add_key("slow", rate_rps=5)
    with http_client(gateway) as client:
        seen = [client.is_server_ready(headers=authorized(slow)) for _ in range(100)]
        assert client.is_server_ready(headers=authorized(gateway.key))
    seconds = 1 + len({line["time"] for line in gateway.lines(caller="slow")})
    assert 5 <= seen.count(True) <= 5 * seconds
    assert gateway.lines(caller="slow", status=429)
    while gateway.grpc_status(f"{SERVICE}/ServerLive", key=slow) == "OK":  # until the second's five are used up
        pass
    assert gateway.lines(caller="slow", grpc_status="8")


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


# ---- what callers and operators see --------------------------------------------------------------


def test_an_answer_that_does_not_come_in_time_is_given_up(gateway: Gateway) -> None:
    status, answer = gateway.http("POST", "/v2/models/stuck/infer", body=json_body())
    assert status == 504
    assert b"in time" in answer
    with gateway.grpc_client() as client, pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer("stuck", grpc_input(), headers=authorized(gateway.key))


def test_without_a_server_the_answer_is_unavailable(gateway: Gateway, tmp_path: Path) -> None:
    alone = Gateway(tmp_path, (gateway.folder / "limits.conf").read_text(), "127.0.0.1:9", "127.0.0.1:9")
    try:
        assert alone.http("GET", "/v2/health/ready")[0] == 503
        assert alone.grpc_status(f"{SERVICE}/ServerReady") == "UNAVAILABLE"
    finally:
        alone.stop()


def test_of_two_servers_one_that_is_killed_costs_no_request(gateway: Gateway, tmp_path: Path) -> None:
    write_add_one(tmp_path / "repository")
    ports: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}
    with contextlib.ExitStack() as stack:
        two = [
            stack.enter_context(EmbeddedServer(tmp_path / "repository", log_path=tmp_path / name, **ports))
            for name in ("a.log", "b.log")
        ]
        addresses = [",".join(urls) for urls in ([each.http_url for each in two], [each.grpc_url for each in two])]
        both = Gateway(tmp_path, (gateway.folder / "limits.conf").read_text(), *addresses)
        stack.callback(both.stop)
        client = stack.enter_context(both.grpc_client())

        def call() -> None:
            assert both.http("POST", INFER, body=json_body())[0] == 200
            client.infer("add_one", grpc_input(), headers=authorized(both.key))

        for _ in range(8):
            call()
        assert {line["triton"] for line in both.lines(api="infer")} == {
            url for each in two for url in (each.http_url, each.grpc_url)
        }
        assert two[0]._process is not None
        two[0]._process.kill()
        for _ in range(20):
            call()


def test_each_request_is_a_line_of_json_with_its_id_and_without_its_key(gateway: Gateway) -> None:
    _, answer = gateway.http("POST", INFER, "X-Request-Id: order-17", 'User-Agent: a"b\\', body=json_body())
    assert b"X-Request-Id: order-17" in answer
    (line,) = gateway.lines(id="order-17")
    assert (line["caller"], line["api"], line["status"], line["agent"]) == ("shop", "infer", 200, 'a"b\\')
    _, answer = gateway.http("GET", "/v2", "X-Request-Id: <script>")
    assert re.search(rb"X-Request-Id: [0-9a-f]{32}\r", answer)
    assert gateway.key not in gateway.log_path.read_text()


def test_requests_are_counted_by_outcome_and_inferences_timed(gateway: Gateway) -> None:
    gateway.http("POST", INFER, body=json_body())
    gateway.http("GET", "/v2", key="")
    text = urllib.request.urlopen(f"http://127.0.0.1:{gateway.internal_port}/metrics").read().decode()
    assert re.search(
        r'^gateway_requests_total\{protocol="http",api="infer",model="add_one",status="200"\} \d+$', text, re.M
    )
    assert re.search(
        r'^gateway_requests_total\{protocol="http",api="metadata",model="",status="401"\} \d+$', text, re.M
    )
    labels = r'\{protocol="http",api="infer",model="add_one"'
    buckets = [int(count) for count in re.findall(rf"_bucket{labels},le=[^}}]+\}} (\d+)", text)]
    assert buckets == sorted(buckets)
    assert re.search(rf"_count{labels}\}} {buckets[-1]}$", text, re.M)


def test_a_new_certificate_is_served_without_a_restart(gateway: Gateway) -> None:
    before = served_certificate(gateway)
    (gateway.folder / "tls.crt").unlink()
    assert ensure_certificate(gateway.folder, ["api.example.com"])
    deadline = time.monotonic() + 10
    while served_certificate(gateway) == before:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with gateway.connect() as connection:
        names = dict(connection.getpeercert() or {})["subjectAltName"]
    assert ("DNS", "api.example.com") in names
    assert gateway.http("GET", "/v2")[0] == 200


def served_certificate(gateway: Gateway) -> bytes | None:
    """The one that a new connection is shown."""
    with gateway.connect() as connection:
        return connection.getpeercert(binary_form=True)


def test_requests_in_flight_are_answered_when_it_is_told_to_stop(closed: EmbeddedServer, tmp_path: Path) -> None:
    models = served_models(closed.repository, tmp_path)
    running = Gateway(tmp_path, limits(models), closed.http_url, closed.grpc_url)
    seen: list[int] = []
    caller = threading.Thread(
        target=lambda: seen.append(running.http("POST", "/v2/models/stuck/infer", body=json_body())[0])
    )
    caller.start()
    time.sleep(0.5)
    assert running.stop() == 0
    caller.join()
    assert seen == [200]


def test_a_folder_without_a_certificate_is_one_line(tmp_path: Path) -> None:
    skip_without_nginx()
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    run = subprocess.run(["docker/gateway/gateway.sh"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {tmp_path}/tls.crt cannot be read by user ")

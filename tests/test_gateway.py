"""The gateway in front of a real Triton: what it lets through, and what callers and operators see."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import ssl
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tritonclient.http as triton_http
from deepseek_client import BULK, AccessDenied, ServerBusy
from tritonclient.utils import InferenceServerException

from loadtests.load.traffic_file import read_traffic
from serving.embedded.launcher import EmbeddedServer
from serving.stack.api_keys import digest
from serving.stack.gateway_folder import ensure_folder
from tests.add_one import write_add_one
from tests.conftest import FREE
from tests.failing_servers import Relay
from tests.gateway import INFER, SERVICE, Gateway, authorized, grpc_input, json_body, limits_of, skip_without_nginx
from tests.waiting import wait_for


def http_client(gateway: Gateway) -> triton_http.InferenceServerClient:
    """A bare tritonclient over HTTP."""
    context = ssl.create_default_context(cafile=str(gateway.folder / "ca.crt"))
    return triton_http.InferenceServerClient(f"localhost:{gateway.port}", ssl=True, ssl_context_factory=lambda: context)


def test_a_caller_that_offers_both_protocols_gets_http_2(gateway: Gateway) -> None:
    with gateway.connect("h2", "http/1.1") as connection:
        assert connection.selected_alpn_protocol() == "h2"


# ---- keys --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        "X-Nothing: 1",
        "Authorization: Bearer dsk_" + "A" * 43,
        "Authorization: Bearer ../keys/x",
        "Authorization: Bearer dsk_" + "A" * 5000,
        "Authorization_: Bearer {key}",
        "Cookie: Authorization=Bearer {key}",
        "Authorization: Bearer {key}x",
        "Authorization: Bearer {key}, Bearer {key}",
    ],
)
def test_without_a_valid_key_nothing_is_answered(gateway: Gateway, header: str) -> None:
    status, answer = gateway.http("GET", "/v2/health/ready", header.format(key=gateway.key), key="")
    assert status == 401
    assert gateway.http("POST", INFER, header.format(key=gateway.key), body=json_body(), key="")[0] == 401
    assert b"Bearer <key>" in answer


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer "])
def test_the_scheme_of_a_key_counts_in_any_case(gateway: Gateway, scheme: str) -> None:
    header = f"Authorization: {scheme} {gateway.key}"
    assert gateway.http("GET", "/v2/health/ready", header, key="")[0] == 200


@pytest.mark.parametrize("key", ["", "dsk_" + "A" * 43, "x"])
def test_grpc_without_a_valid_key_is_unauthenticated(gateway: Gateway, key: str) -> None:
    assert gateway.grpc_status(f"{SERVICE}/ServerLive", key=key) == "UNAUTHENTICATED"


def test_a_key_counts_at_once_and_an_expired_or_revoked_one_ends_at_once_on_open_connections(gateway: Gateway) -> None:
    key = gateway.add_key("guest", expires_s=3600)
    entry = gateway.folder / "keys" / f"{digest(key)}.json"
    valid = json.loads(entry.read_text())
    with gateway.grpc_client() as over_grpc, http_client(gateway) as over_http:
        for end in (lambda: entry.write_text(json.dumps(valid | {"expires": time.time() - 1})), entry.unlink):
            entry.write_text(json.dumps(valid))
            assert over_grpc.is_server_ready(headers=authorized(key))
            assert over_http.is_server_ready(headers=authorized(key))
            end()
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                over_grpc.is_server_ready(headers=authorized(key))
            assert not over_http.is_server_ready(headers=authorized(key))


def test_each_key_has_a_rate_of_its_own_also_two_of_one_name(gateway: Gateway) -> None:
    fast, slow = gateway.add_key("busy", rate_rps=100_000), gateway.add_key("busy", rate_rps=5)
    seen: list[bool] = []
    with http_client(gateway) as client:
        for _ in range(100):
            assert client.is_server_ready(headers=authorized(fast))
            seen.append(client.is_server_ready(headers=authorized(slow)))
    seconds = 1 + len({line["time"] for line in gateway.lines(caller="busy")})
    assert seen[:5] == [True] * 5
    assert seen.count(True) <= 5 * seconds
    assert gateway.lines(caller="busy", status=429)


def test_a_key_for_bulk_requests_sends_only_those(gateway: Gateway) -> None:
    """Over HTTP, where the gateway reads the priority; over gRPC it does not, so the key cannot infer there."""
    key = gateway.add_key("nightly", bulk=True)
    labels = '{protocol="http",api="infer",model="add_one"'
    total, timed = f'gateway_requests_total{labels},status="200"}}', f"gateway_request_duration_seconds_count{labels}}}"
    before = gateway.metrics()
    for parameters, expected in (
        ("", 400),
        ('"parameters": {"priority": 1, "bulk": true}, ', 400),
        ('"parameters": {"priority": 2}, ', 400),
        ('"parameters": {"priority": 2, "bulk": true}, ', 200),
    ):
        body = json_body().replace(b"{", b"{" + parameters.encode(), 1)
        status, answer = gateway.http("POST", INFER, body=body, key=key)
        assert status == expected
        assert (b"this key is for bulk requests" in answer) is (status == 400)
    raw = np.zeros((1, 2, 3), np.float32).tobytes()
    assert gateway.http("POST", INFER, "Inference-Header-Content-Length: 0", body=raw, key=key)[0] == 400
    x = np.zeros((1, 2, 3), np.float32)
    with gateway.client("http", api_key=key) as client:
        assert client.infer("add_one", {"x": x}, parameters=BULK)["y"].all()
    after = wait_for(gateway.metrics, lambda found: found[total] >= before.get(total, 0) + 2)
    assert after.get(timed, 0) == before.get(timed, 0)
    with gateway.client("grpc", api_key=key) as client:
        assert client.ready("add_one")
        with pytest.raises(AccessDenied, match="a key for bulk requests cannot infer over gRPC"):
            client.infer("add_one", {"x": x}, parameters=BULK)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_callers_above_their_rate_are_told_when_to_retry(gateway: Gateway, protocol: Literal["http", "grpc"]) -> None:
    with gateway.client(protocol, retries=0, api_key=gateway.add_key("hasty", rate_rps=1)) as client:

        def until_refused() -> None:
            for _ in range(100):
                client.metadata("add_one")

        with pytest.raises(ServerBusy) as refused:
            until_refused()
    assert refused.value.retry_after_s == 1


# ---- what callers and operators see --------------------------------------------------------------


def test_killing_one_of_two_servers_costs_no_request(tmp_path: Path) -> None:
    """Not even requests in flight fail, from bare clients that do not retry."""
    write_add_one(tmp_path / "repository")
    write_add_one(tmp_path / "repository", "slow", delay_s=1)
    with contextlib.ExitStack() as stack:
        two = [
            stack.enter_context(EmbeddedServer(tmp_path / "repository", log_path=tmp_path / name, **FREE))
            for name in ("a.log", "b.log")
        ]
        relays = [Relay.to(two[0], protocol) for protocol in ("http", "grpc")]
        for relay in relays:
            stack.callback(relay.close)
        urls = (relays[0].url, two[1].http_url), (relays[1].url, two[1].grpc_url)
        both = stack.enter_context(Gateway(tmp_path, limits_of(two[0], tmp_path), *map(",".join, urls)))
        client = stack.enter_context(both.grpc_client())
        pool = stack.enter_context(ThreadPoolExecutor(8))

        def over_http(model: str) -> None:
            assert both.http("POST", f"/v2/models/{model}/infer", body=json_body())[0] == 200

        def over_grpc(model: str) -> None:
            client.infer(model, grpc_input(), headers=authorized(both.key))

        for _ in range(8):
            over_http("add_one")
            over_grpc("add_one")
        assert {line["triton"] for line in both.lines(api="infer")} == {*urls[0], *urls[1]}
        before = sum(relay.pieces for relay in relays)
        under_way = [pool.submit(call, "slow") for call in (over_grpc, over_http) * 4]
        wait_for(lambda: sum(relay.pieces for relay in relays) > before)
        os.kill(two[0].pid, signal.SIGKILL)
        for relay in relays:
            relay.close()
        for each in under_way:
            each.result()
        for _ in range(20):
            over_http("add_one")
            over_grpc("add_one")
        assert [line for line in both.lines(api="infer") if " : " in line["triton"]]  # sent a second time


def test_servers_that_were_all_too_late_once_are_asked_again_at_once(closed: EmbeddedServer, tmp_path: Path) -> None:
    """nginx ejects a late server for a second, but never all servers."""
    twice = [f"{url},{url}" for url in (closed.http_url, closed.grpc_url)]
    text = limits_of(closed, tmp_path, queue_timeout_ms=500, p99_ms=150)  # an answer may take 2 s
    with contextlib.ExitStack() as stack:
        both = stack.enter_context(Gateway(tmp_path, text, *twice))
        client = stack.enter_context(both.grpc_client())  # one connection: one of nginx's processes
        pool = stack.enter_context(ThreadPoolExecutor(2))
        late = [pool.submit(client.infer, "stuck", grpc_input(), headers=authorized(both.key)) for _ in range(2)]
        for each in late:
            with pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
                each.result()
        for _ in range(4):
            assert client.infer("add_one", grpc_input(), headers=authorized(both.key)).as_numpy("y").sum() == 6
        # From the request: no model answered.
        assert {line["model"] for line in both.lines(grpc_status="4")} == {"stuck"}


def test_each_request_is_a_line_of_json_with_its_id_and_without_its_key(gateway: Gateway) -> None:
    _, answer = gateway.http("POST", INFER, "X-Request-Id: order-17", 'User-Agent: a"b\\', body=json_body())
    assert b"X-Request-Id: order-17" in answer
    (line,) = gateway.lines(id="order-17")
    assert (line["caller"], line["api"], line["status"], line["agent"]) == ("shop", "infer", 200, 'a"b\\')
    _, answer = gateway.http("GET", "/v2", "X-Request-Id: <script>")
    assert re.search(rb"X-Request-Id: [0-9a-f]{32}\r", answer)


def test_a_key_in_a_wrong_place_is_not_logged(gateway: Gateway) -> None:
    gateway.http("GET", f"/v2?api_key={gateway.key}", "X-Request-Id: query")
    (line,) = gateway.lines(id="query")
    assert (line["path"], line["status"]) == ("/v2?api_key=an API key", 403)
    gateway.http("GET", f"/v2/models/{gateway.key}", f"X-Request-Id: {gateway.key}", f"User-Agent: {gateway.key}")
    (line,) = gateway.lines(id="an API key")
    assert (line["model"], line["agent"]) == ("an API key", "an API key")
    gateway.http("POST", f"/v2?key={gateway.key}", body=b" " * 1_200_000)  # nginx writes an error, too
    said = re.compile(r"too large body: .*POST /v2\?key=an API key HTTP")
    wait_for(lambda: said.search(gateway.log_path.read_text()), bool)
    assert gateway.key not in gateway.log_path.read_text()


def test_the_log_makes_a_file_to_replay(gateway: Gateway, tmp_path: Path) -> None:
    """With the lines of docs/loadtests.md."""
    page = Path("docs/loadtests.md").read_text()
    (script,) = re.findall(r"gateway \| python3 -c '\n(.*?)' > traffic.csv", page, re.DOTALL)
    sizes, logged = [], []
    for protocol in ("http", "grpc"):
        with gateway.client(protocol) as client:
            request = client.prepare("add_one", {"x": np.zeros((8, 2, 3), np.float32)}, request_id=f"replay-{protocol}")
            sizes.append(sum(map(len, request.parts[1:] or request.parts)))
            client.send(request)
        logged += gateway.lines(id=f"replay-{protocol}")
    gateway.http("POST", INFER, key="wrong", body=json_body())
    logged += gateway.lines(refusal="401")[-1:]
    lines = [json.dumps(line, separators=(",", ":")) for line in logged]  # as nginx writes them
    log = "\n".join(
        ["nginx: not JSON", lines[0], *(f"\x1b[2K{line}" for line in lines[1:])]
    )  # as Compose 2.26 shows them
    made = subprocess.run([sys.executable, "-c", script], input=log, check=True, capture_output=True, text=True)
    (tmp_path / "traffic.csv").write_text(made.stdout)
    more = read_traffic(tmp_path / "traffic.csv", {"add_one": 1}).of("add_one").values - sizes
    assert (more > 0).all()
    assert (more < np.array([20, 100])).all()  # the time-out; the frames of gRPC and HTTP/2


def test_an_unreadable_key_file_is_logged(gateway: Gateway) -> None:
    key = gateway.add_key("unreadable")
    path = gateway.folder / "keys" / f"{digest(key)}.json"
    path.unlink()
    assert gateway.http("GET", "/v2", key=key)[0] == 401
    assert path.name not in gateway.log_path.read_text()
    path.mkdir()  # where no mode keeps root from a file
    assert gateway.http("GET", "/v2", key=key)[0] == 401
    said = re.compile(rf"\[error\] .*{path.name} gives no key \(.+\), so its caller gets 401")
    wait_for(lambda: said.search(gateway.log_path.read_text()), bool)
    path.rmdir()


def test_requests_in_flight_are_answered_at_a_stop(closed: EmbeddedServer, tmp_path: Path) -> None:
    """Signals come while it looks for changes: bash 5.2 fails if one with a trap comes while it reads a "$(...)"."""
    relay = Relay.to(closed, "http")
    running = Gateway(tmp_path, limits_of(closed, tmp_path), relay.url, closed.grpc_url, watch_s=0)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(running.http, "POST", "/v2/models/stuck/infer", body=json_body())
        wait_for(lambda: relay.pieces > 0)  # of the request have reached the server
        for _ in range(500):
            running.process.terminate()
            time.sleep(0.001)
        assert running.stop() == 0
    assert call.result()[0] == 200
    relay.close()


def test_a_folder_without_a_certificate_is_one_line(tmp_path: Path) -> None:
    skip_without_nginx()
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    run = subprocess.run(["docker/gateway/gateway.sh"], env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: {tmp_path}/tls.crt cannot be read by user ")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_run_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    ensure_folder(tmp_path, [])
    (tmp_path / "limits.conf").touch()
    (run_folder := tmp_path / "run").mkdir()
    os.chown(run_folder, 10001, 10001)
    settings = {**os.environ, "FOLDER": str(tmp_path), "RUN_FOLDER": str(run_folder)}
    run = subprocess.run(["docker/gateway/gateway.sh"], env=settings, capture_output=True, text=True, timeout=10)
    assert (run.returncode, list(run_folder.iterdir())) == (2, [])
    assert run.stderr.startswith(f"error: {run_folder} belongs to another user")

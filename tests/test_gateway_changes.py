"""Changes under a running gateway lose no request: the SLO, its certificate, the addresses of its servers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from tritonclient.utils import InferenceServerException

from deepseek.spec.files.folders import write_whole
from serving.embedded.launcher import EmbeddedServer
from serving.stack.certificate import ensure_certificate
from tests.gateway import INFER, SERVICE, Gateway, authorized, grpc_input, json_body, limits_of
from tests.waiting import wait_for

DURATION = "gateway_request_duration_seconds"


@pytest.fixture
def running(closed: EmbeddedServer, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway for one test in front of the real Triton."""
    with Gateway.in_front_of(closed, tmp_path) as gateway:
        yield gateway


# ---- its metrics -----------------------------------------------------------------------------------


def up_to(gateway: Gateway) -> dict[str, float]:
    """Number of HTTP inferences up to each histogram bound; `count` is the total."""
    labels = '{protocol="http",api="infer",model="add_one"'
    series = re.compile(rf'{DURATION}_bucket{labels},le="(.*)"\}}')
    found = gateway.metrics()
    by_bound = {match[1]: value for name, value in found.items() if (match := series.fullmatch(name))}
    return by_bound | {"count": found.get(f"{DURATION}_count{labels}}}", 0)}


def test_counts_survive_a_changed_slo(running: Gateway, closed: EmbeddedServer, tmp_path: Path) -> None:
    assert running.http("POST", INFER, body=json_body())[0] == 200
    before = wait_for(lambda: up_to(running), lambda found: found["count"] == 1)
    fell = min(float(bound) for bound, count in before.items() if bound != "count" and count)
    (running.folder / "limits.conf").write_text(limits_of(closed, tmp_path, p99_ms=5000))
    after = wait_for(lambda: up_to(running), lambda found: "50.0" in found)
    assert before.keys() & after.keys() == {"+Inf", "count"}
    assert after.pop("count") == 1
    assert after == {bound: float(bound) >= fell for bound in after}
    (running.folder / "limits.conf").write_text(limits_of(closed, tmp_path))
    assert wait_for(lambda: up_to(running), lambda found: "50.0" not in found) == before


def timed_without_a_model(gateway: Gateway) -> float:
    """Number of inferences in the histogram that no model answered."""
    return sum(value for name, value in gateway.metrics().items() if re.match(rf'{DURATION}_count{{.*,model=""', name))


def test_only_timed_out_requests_are_timed_without_an_answer(gateway: Gateway) -> None:
    before = timed_without_a_model(gateway)
    assert gateway.http("POST", INFER, body=b"{")[0] == 400
    assert gateway.grpc_status(f"{SERVICE}/ModelInfer") != "OK"
    assert gateway.http("POST", "/v2/models/stuck/infer", body=json_body())[0] == 504
    with gateway.grpc_client() as client, pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer("stuck", grpc_input(), headers=authorized(gateway.key))
    wait_for(lambda: timed_without_a_model(gateway), lambda found: found >= before + 2)
    assert timed_without_a_model(gateway) == before + 2


def test_what_triton_cannot_read_counts_as_the_callers_mistake(gateway: Gateway) -> None:
    series = 'gateway_requests_total{protocol="http",api="infer",model="",status="400"}'
    before = gateway.metrics().get(series, 0)
    answer = gateway.http("POST", INFER, body=json_body().replace(b"[1, ", b"[1.0, "))
    assert (answer[0], b"Unable to parse 'shape'" in answer[1]) == (400, True)
    wait_for(lambda: gateway.metrics().get(series, 0) == before + 1)


def test_requests_without_a_server_are_counted_by_status_only(closed: EmbeddedServer, tmp_path: Path) -> None:
    with Gateway(tmp_path, limits_of(closed, tmp_path), "127.0.0.1:9", "127.0.0.1:9") as alone:
        assert alone.http("POST", INFER, body=json_body())[0] == 503
        assert alone.grpc_status(f"{SERVICE}/ModelInfer") == "UNAVAILABLE"
        wait_for(lambda: sum(name.startswith("gateway_requests_total") for name in alone.metrics()) == 2)
        assert timed_without_a_model(alone) == 0


# ---- its certificate and its servers -----------------------------------------------------------------


@contextlib.contextmanager
def load(gateway: Gateway) -> Iterator[list[int]]:
    """Calls over new connections during the change; their statuses, 0 for a broken connection."""
    done = threading.Event()
    seen: list[int] = []

    def call() -> None:
        while not done.is_set():
            try:
                seen.append(gateway.http("POST", INFER, body=json_body())[0])
            except OSError:
                seen.append(0)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    try:
        yield seen
    finally:
        done.set()
        for caller in callers:
            caller.join()


def served_certificate(gateway: Gateway) -> bytes | None:
    with gateway.connect() as connection:
        return connection.getpeercert(binary_form=True)


EXPIRY, PENDING = "gateway_certificate_expiry_timestamp_seconds", "gateway_reload_pending"


def told(gateway: Gateway) -> tuple[float, float]:
    """The gateway's metrics: when its certificate expires, and whether a change waits to be loaded."""
    found = gateway.metrics()
    return found[EXPIRY], found[PENDING]


def end_of(gateway: Gateway) -> float:
    """Expiry of the certificate that a new connection gets."""
    shown = served_certificate(gateway)
    assert shown is not None
    return x509.load_der_x509_certificate(shown).not_valid_after_utc.timestamp()


def test_a_removed_certificate_stays_in_effect_until_a_new_pair_is_complete(
    running: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(running.folder, tmp_path / "new" / "gateway")
    shutil.copytree(tmp_path / "gateway-authority", tmp_path / "new" / "gateway-authority")
    monkeypatch.setattr("serving.stack.certificate.VALID_DAYS", 100)
    assert ensure_certificate(tmp_path / "new" / "gateway", ["api.example.com"])
    before, end = served_certificate(running), end_of(running)
    assert told(running) == (end, 0)
    with load(running) as seen:
        (running.folder / "tls.crt").unlink()
        wait_for(lambda: told(running), lambda found: found == (end, 1))
        shutil.copy(tmp_path / "new" / "gateway" / "tls.crt", running.folder)  # whose key is not there yet
        time.sleep(1)  # five looks at it
        assert served_certificate(running) == before
        assert told(running) == (end, 1)
        shutil.copy(tmp_path / "new" / "gateway" / "tls.key", running.folder)
        wait_for(lambda: served_certificate(running) != before)
        wait_for(lambda: told(running), lambda found: found[0] < end and found[1] == 0)
    assert set(seen) == {200}


def test_a_change_that_cannot_be_loaded_is_reported_until_it_is_undone(running: Gateway) -> None:
    """nginx itself loads an RSA key beside an EC certificate, and then no caller can connect."""
    rsa = subprocess.run(["openssl", "genrsa", "2048"], capture_output=True, check=True).stdout
    before = served_certificate(running)
    for name, bad in (("tls.key", b"nothing"), ("tls.key", rsa), ("limits.conf", b"nothing")):
        good = (running.folder / name).read_bytes()
        (running.folder / name).write_bytes(bad)
        wait_for(lambda: told(running)[1] == 1)
        assert running.http("POST", INFER, body=json_body())[0] == 200
        assert served_certificate(running) == before
        (running.folder / name).write_bytes(good)
        wait_for(lambda: told(running)[1] == 0)
    assert "key values mismatch" in running.log_path.read_text()


# ---- the addresses of its servers ------------------------------------------------------------------

Resolve = Callable[..., None]


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Sets the addresses of the name `triton`, at first 127.0.0.1; without any, a look-up fails.

    A `getent` on the gateway's PATH answers in place of the DNS; the file `asked` has a line for each look-up.
    """
    addresses, program = tmp_path / "addresses", tmp_path / "bin" / "getent"
    program.parent.mkdir()
    answer = f'while read -r each; do echo "$each STREAM triton"; done <{addresses}'
    program.write_text(f"#!/bin/bash\necho >>{tmp_path}/asked\n[ -s {addresses} ] || exit 2\n{answer}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")

    def to(*found: str) -> None:
        write_whole(addresses, "".join(f"{address}\n" for address in found))

    to("127.0.0.1")
    return to


def by_name(server: EmbeddedServer, folder: Path) -> Gateway:
    return Gateway(folder, limits_of(server, folder), f"triton:{server.http_port}", f"triton:{server.grpc_port}")


def test_a_failed_look_up_keeps_the_servers(closed: EmbeddedServer, tmp_path: Path, resolve: Resolve) -> None:
    def asked() -> int:
        return (tmp_path / "asked").read_text().count("\n")

    with by_name(closed, tmp_path) as running:
        endpoints = (tmp_path / "run" / "endpoints.conf").read_text()
        resolve()
        failed = 1 + asked()
        with load(running) as seen:
            wait_for(lambda: asked() > failed + 6)  # three for each look
        assert set(seen) == {200}
        assert (tmp_path / "run" / "endpoints.conf").read_text() == endpoints


def test_a_new_server_takes_its_share_and_one_that_goes_costs_no_request(
    closed: EmbeddedServer, tmp_path: Path, resolve: Resolve
) -> None:
    second = EmbeddedServer(
        closed.repository,
        address="127.0.0.2",
        http_port=closed.http_port,
        grpc_port=closed.grpc_port,
        metrics_port=0,
        log_path=tmp_path / "triton.log",
    )
    with second, by_name(closed, tmp_path) as running, running.grpc_client() as client, load(running) as seen:

        def shares() -> list[float]:
            """The second server's share of the last 20 requests over HTTP and over gRPC."""
            client.infer("add_one", grpc_input(), headers=authorized(running.key))
            lines = running.lines(api="infer")
            tried = [
                [re.split(", | : ", line["triton"])[-1] for line in lines if line["protocol"] == protocol][-20:]
                for protocol in ("HTTP/1.1", "HTTP/2.0")
            ]
            return [sum(each.startswith("127.0.0.2:") for each in answered) / 20 for answered in tried]

        resolve("127.0.0.1", "127.0.0.2")
        wait_for(shares, lambda found: all(0.3 <= share <= 0.7 for share in found))
        resolve("127.0.0.2")
        wait_for(shares, lambda found: found == [1, 1])
    assert set(seen) == {200}

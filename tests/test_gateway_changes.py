"""Changes under a running gateway lose no request: the SLO, its certificate, the addresses of its servers."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from tritonclient.utils import InferenceServerException

from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import served_models
from serving.stack.certificate import ensure_certificate
from serving.stack.gateway_limits import limits
from tests.gateway import INFER, SERVICE, Gateway, authorized, grpc_input, json_body, skip_without_nginx, wait_for

DURATION = "gateway_request_duration_seconds"


@pytest.fixture
def running(closed: EmbeddedServer, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway for one test in front of the real Triton."""
    skip_without_nginx()
    gateway = before_by_name(closed, tmp_path)
    yield gateway
    assert gateway.stop() == 0


def before_by_name(server: EmbeddedServer, folder: Path) -> Gateway:
    urls = (url.replace("127.0.0.1", "localhost") for url in (server.http_url, server.grpc_url))
    return Gateway(folder, limits(served_models(server.repository, folder)), *urls)


# ---- its metrics -----------------------------------------------------------------------------------


def up_to(gateway: Gateway) -> dict[str, float]:
    """Number of HTTP inferences up to each histogram bound; `count` is the total."""
    labels = '{protocol="http",api="infer",model="add_one"'
    series = re.compile(rf'{DURATION}_bucket{labels},le="(.*)"\}}')
    found = gateway.metrics()
    by_bound = {match[1]: value for name, value in found.items() if (match := series.fullmatch(name))}
    return by_bound | {"count": found.get(f"{DURATION}_count{labels}}}", 0)}


def test_a_changed_slo_takes_nothing_from_what_was_counted(
    running: Gateway, closed: EmbeddedServer, tmp_path: Path
) -> None:
    models = served_models(closed.repository, tmp_path)
    assert running.http("POST", INFER, body=json_body())[0] == 200
    before = wait_for(lambda: up_to(running), lambda found: found["count"] == 1)
    fell = min(float(bound) for bound, count in before.items() if bound != "count" and count)
    (running.folder / "limits.conf").write_text(limits([replace(model, p99_ms=5000) for model in models]))
    after = wait_for(lambda: up_to(running), lambda found: "50.0" in found)
    assert before.keys() & after.keys() == {"+Inf", "count"}
    assert after.pop("count") == 1
    assert after == {bound: float(bound) >= fell for bound in after}
    (running.folder / "limits.conf").write_text(limits(models))
    assert wait_for(lambda: up_to(running), lambda found: "50.0" not in found) == before


def timed_without_a_model(gateway: Gateway) -> float:
    """Number of inferences in the histogram that no model answered."""
    return sum(value for name, value in gateway.metrics().items() if re.match(rf'{DURATION}_count{{.*,model=""', name))


def test_of_those_without_an_answer_only_who_waited_in_vain_is_timed(gateway: Gateway) -> None:
    before = timed_without_a_model(gateway)
    assert gateway.http("POST", INFER, body=b"{")[0] == 400
    assert gateway.grpc_status(f"{SERVICE}/ModelInfer") != "OK"
    assert gateway.http("POST", "/v2/models/stuck/infer", body=json_body())[0] == 504
    with gateway.grpc_client() as client, pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer("stuck", grpc_input(), headers=authorized(gateway.key))
    wait_for(lambda: timed_without_a_model(gateway), lambda found: found >= before + 2)
    assert timed_without_a_model(gateway) == before + 2


def test_who_found_no_server_is_counted_by_the_status_alone(
    gateway: Gateway, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    alone = Gateway(tmp_path, (gateway.folder / "limits.conf").read_text(), "127.0.0.1:9", "127.0.0.1:9")
    request.addfinalizer(alone.stop)
    assert alone.http("POST", INFER, body=json_body())[0] == 503
    assert alone.grpc_status(f"{SERVICE}/ModelInfer") == "UNAVAILABLE"
    wait_for(
        lambda: sum(name.startswith("gateway_requests_total") for name in alone.metrics()), lambda found: found == 2
    )
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


def test_a_certificate_that_is_taken_away_serves_on_until_a_new_pair_is_there(
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


def test_a_change_that_cannot_be_loaded_waits_and_is_told_until_it_is_taken_back(running: Gateway) -> None:
    for name in ("tls.key", "limits.conf"):
        good = (running.folder / name).read_bytes()
        (running.folder / name).write_text("nothing")
        wait_for(lambda: running.metrics()[PENDING], lambda found: found == 1)
        assert running.http("POST", INFER, body=json_body())[0] == 200
        (running.folder / name).write_bytes(good)
        wait_for(lambda: running.metrics()[PENDING], lambda found: found == 0)


GETENT = """#!/bin/bash
echo asked >>"{folder}/asked"
[ ! -e "{folder}/fails" ] || exit 2
exec {getent} "$@"
"""


def test_servers_whose_names_cannot_be_looked_up_stay(
    closed: EmbeddedServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    skip_without_nginx()
    (tmp_path / "getent").write_text(GETENT.format(folder=tmp_path, getent=shutil.which("getent")))
    (tmp_path / "getent").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    request.addfinalizer((running := before_by_name(closed, tmp_path)).stop)
    endpoints = (tmp_path / "run" / "endpoints.conf").read_text()
    (tmp_path / "fails").touch()
    failed = 1 + (tmp_path / "asked").read_text().count("\n")
    with load(running) as seen:
        wait_for(lambda: (tmp_path / "asked").read_text().count("\n") > failed + 6)  # three for each look
    assert set(seen) == {200}
    assert (tmp_path / "run" / "endpoints.conf").read_text() == endpoints

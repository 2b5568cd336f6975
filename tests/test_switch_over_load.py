"""The load while a server switches versions: its figures before, around and after the change."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest

from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement
from loadtests.load.background_load import BackgroundLoad
from loadtests.load.request_log import RequestLog, SentRequest
from loadtests.release.switch_over_load import check_before, main, rate_of, result_of
from serving.release.gate_commands import SteadyLoad
from tests.fake_endpoint import FakeEndpoint
from tests.test_locustfile import SPEC


def sent_at(planned_s: float, latency_ms: float, error: str | None = None) -> SentRequest:
    return SentRequest(planned_s, planned_s, planned_s + latency_ms / 1000, error)


def test_a_request_lost_at_the_change_does_not_count_as_failed_before_it() -> None:
    in_flight = result_of(RequestLog([sent_at(0.5, 1), sent_at(0.9, 200, "ConnectionLost: y")]), 1, 2)
    assert (in_flight["failed_before"], in_flight["failed"], in_flight["since_seen"]["failed"]) == (0, 1, 0)
    assert result_of(RequestLog([sent_at(0.5, 1, "ServerError: x")]), 1, 2)["failed_before"] == 1


def test_a_switch_is_not_begun_while_requests_fail() -> None:
    log = RequestLog([sent_at(0, 1), sent_at(1, 2, "ServerBusy: full")])
    with pytest.raises(
        InvalidMeasurement, match=r"1 of 2 requests failed before the change \(1 times: ServerBusy: full"
    ):
        check_before(log, may_fail=False)
    late = RequestLog([SentRequest(0, 0.2, 0.21, None)])
    with pytest.raises(InvalidMeasurement, match="sent late: p99 200 ms"):
        check_before(late, may_fail=False)
    for roll_back_now in (log, late):  # a rollback waits for neither
        check_before(roll_back_now, may_fail=True)


def test_a_load_that_died_is_reported_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with SteadyLoad("--model", "absent", "--until", "2") as load:
        load._process.wait()
        load.change()
        with pytest.raises(InputError, match="absent"):
            load.result()
    monkeypatch.setattr("loadtests.load.background_load.PROCESS", "print(0.0)")
    with BackgroundLoad([]) as own:
        own._process.wait()
        with pytest.raises(InvalidMeasurement, match="the load ended early"):
            own.so_far()


def test_a_load_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtests.load.background_load.STOP_S", 0.01)
    monkeypatch.setattr(
        "loadtests.load.background_load.PROCESS", "import time; print(0.0, flush=True); time.sleep(600)"
    )
    with BackgroundLoad([]) as own, pytest.raises(InvalidMeasurement, match=r"did not end within 0\.01 s"):
        own.stop()


def test_the_figures_cover_the_load_before_around_and_after_the_change() -> None:
    log = RequestLog([sent_at(0, 1), sent_at(1, 2), sent_at(2, 50), sent_at(2.5, 3, "ServerBusy: full"), sent_at(4, 4)])
    found = result_of(log, changed_s=2, seen_s=2.7)
    assert (found["requests"], found["failed"], found["switched_s"]) == (5, 1, 0.7)
    assert found["before"] == {"requests": 2, "failed": 0, "p50_ms": 1, "p99_ms": 2, "max_ms": 2, "send_lag_ms": 0}
    assert (found["around"]["p99_ms"], found["around"]["failed"], found["after"]["requests"]) == (50, 1, 1)
    never = result_of(log, changed_s=2, seen_s=None)
    assert (never["switched_s"], never["around"]["requests"], never["after"]["p50_ms"]) == (None, 3, None)
    spec = DeploymentSpec.load("tests/models/text")
    assert (rate_of(None, spec), rate_of(30, spec)) == (20, 30)


def test_the_load_has_the_rate_of_the_targets_slo(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float | None] = []
    monkeypatch.setattr("loadtests.release.switch_over_load.check", lambda *_: None)
    monkeypatch.setattr(
        "loadtests.release.switch_over_load.drive", lambda client, settings, *_: rates.append(settings.rate_rps)
    )
    for target in ("tensorrt", "onnxruntime"):  # minilm: 200 on a GPU, 40 on two cores
        main(values_of("switch-over-load", "--model", "minilm", "--target", target, "--until", "2"))
    assert rates == [200, 40]


def test_the_command_loads_the_server_until_it_reports_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loadtests.release.switch_over_load.LATEST_MS", 1e9)  # a busy machine must not fail this
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "deploy.toml").write_text(SPEC.format(name="tiny"))
    np.savez(tmp_path / "in.npz", **{"00000/x": np.ones((1, 4), np.float32)})  # type: ignore[arg-type]
    flags = ["--model", "tiny", "--models", str(tmp_path / "models"), "--inputs", str(tmp_path / "in.npz")]
    flags += ["--until", "1", "--rate", "40", "--before-s", "1", "--after-s", "0.5"]
    with FakeEndpoint(delay_ms=5) as endpoint:
        main(values_of("switch-over-load", *flags, "--url", endpoint.grpc_url))
    steady, found = map(json.loads, capsys.readouterr().out.splitlines())
    assert steady == {"steady": True, "version": 1}
    assert (found["version"], found["failed"], found["failed_before"]) == (1, 0, 0)
    assert found["before"]["requests"] > 0
    assert found["requests"] == sum(found[name]["requests"] for name in ("before", "around", "after"))

"""What an SLO demands of a load test: rates, time-outs, requests in flight and a length that can prove it."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.commands import BY_NAME
from cli.main import values_of
from deepseek.spec import InputError, SloSpec
from deepseek.spec.objectives import latency_limits
from loadtests.results.settings import Replay
from loadtests.slo.slo_demands import in_flight_for, rates, timeout_for, too_short
from tests.saved_runs import load_settings
from tests.sleeper import write_sleeper

SLO = SloSpec(p99_ms=50, rate_rps=100, max_error_rate=0.01)


@pytest.mark.parametrize(
    ("slo", "timeout_s", "in_flight"),
    [
        ({"p99_ms": 50}, 5, 512),
        ({"p99_ms": 2000}, 5, 1600),
        ({"p50_ms": 50, "objectives": ("max_ms < 15000 @ 10 rps",)}, 30, 8192),
        ({"rate_rps": 100}, 5, 512),
    ],
)
def test_defaults_neither_time_out_nor_drop_answers_in_time(
    slo: dict[str, Any], timeout_s: float, in_flight: int
) -> None:
    asked = SloSpec(**slo)
    assert timeout_for(None, asked) == timeout_for(None, SloSpec(), asked) == timeout_s
    assert timeout_for(timeout_s + 1, asked) == timeout_s + 1
    settings = load_settings(shape="10x5, 10-800x5", workers=2)
    assert in_flight_for(settings, asked) == in_flight


@pytest.mark.parametrize(("rate_rps", "workers"), [(4100.0, 1), (8200.0, 2)])
def test_a_rate_at_which_answers_in_time_would_be_dropped_is_an_error(rate_rps: float, workers: int) -> None:
    asked, settings = SloSpec(p99_ms=2000), load_settings(rate_rps=rate_rps, workers=workers)
    message = rf"at {rate_rps:g}/s: .* a worker can have 8192, .* use {workers + 1} workers"
    with pytest.raises(InputError, match=message):
        in_flight_for(settings, asked)
    assert in_flight_for(replace(settings, workers=workers + 1), asked) == 8192
    assert in_flight_for(replace(settings, rate_rps=4096.0 * workers), asked) == 8192
    bound = SloSpec(p99_ms=50, objectives=("max_ms < 2000 @ 100 rps",))  # applies only at 100/s
    assert in_flight_for(settings, bound) > 512


@pytest.mark.parametrize("command", ["loadtest", "capacity", "regression", "tune"])
def test_a_time_out_within_the_slos_latency_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    write_sleeper(tmp_path, 0.01)  # its p50 is 100 ms
    sides = ("--base", str(tmp_path / "repository"), "--new", str(tmp_path / "repository"))
    which = ("--model", "tiny", "--models", str(tmp_path / "models"), *(sides if "regression" in command else ()))
    module = importlib.import_module(BY_NAME[command].module)
    message = r"--timeout-s 0\.1: the SLO allows answers up to 0\.1 s.*leave it out \(default 5\)"
    with pytest.raises(InputError, match=message):
        module.main(values_of(command, *which, "--timeout-s", "0.1"))


def test_a_short_run_is_announced_before_it_starts() -> None:
    settings = load_settings(rate_rps=20, duration_s=10)
    assert list(too_short(settings, SLO)) == [
        "200 requests cannot prove p99_ms, 1196 can: run for 60 s or more",
        "200 requests cannot prove max_error_rate, 1196 can: run for 60 s or more",
    ]
    one = replace(settings, rate_rps=1, duration_s=1)
    assert list(too_short(one, SLO)) == [
        "1 requests cannot prove p99_ms, 299 can: run for 299 s or more",
        "1 requests cannot prove max_error_rate, 299 can: run for 299 s or more",
    ]
    slow = SloSpec(p95_ms=50, rate_rps=5, max_error_rate=0.05)
    assert list(too_short(load_settings(rate_rps=5, duration_s=30), slow)) == [
        "150 requests cannot prove rate_rps, 285 can: run for 57 s or more"
    ]
    assert list(too_short(load_settings(rate_rps=100, duration_s=9), SloSpec(rate_rps=100, max_error_rate=1))) == [
        "900 requests cannot prove rate_rps, 1000 can: run for 10 s or more"  # its bounds are over seconds
    ]
    replay = Replay(file="traffic.csv", sha256="", speed=1, requests=4, peak_rps=2)
    notes = too_short(load_settings(replay=replay, duration_s=2), SLO)
    assert next(notes) == "4 requests cannot prove p99_ms, 299 can: replay a longer file"


def test_only_requests_at_the_rate_of_an_objective_count_towards_its_samples() -> None:
    slo = SloSpec(rate_rps=10, p99_ms=50, max_error_rate=1, objectives=("p50_ms < 10 @ 200 rps",))
    steps = load_settings(shape="10x30, 200x30", duration_s=60)
    assert list(too_short(steps, slo)) == ["300 requests cannot prove p99_ms, 598 can: run for 60 s or more"]
    bound = SloSpec(rate_rps=10, max_error_rate=1, objectives=("p99_ms < 50 @ 200 rps",))
    ramp = load_settings(shape="200-300x60, 200x1, 10x60", duration_s=121)
    assert list(too_short(ramp, bound)) == ["200 requests cannot prove p99_ms, 11960 can: run for 60 s or more"]


@pytest.mark.parametrize(
    ("slo", "found"),
    [
        ({"rate_rps": 100, "objectives": ("throughput >= 150", "p50_ms < 10 @ 200 rps")}, [100, 150, 200]),
        ({"rate_rps": 100, "objectives": ("throughput >= 95", "throughput >= 120 @ 130 rps")}, [100, 130]),
        ({"objectives": ("throughput >= 150",)}, [150]),
        ({"objectives": ("throughput >= 0",)}, []),
    ],
)
def test_a_throughput_above_the_slos_rate_adds_a_rate_to_send(slo: dict[str, Any], found: list[float]) -> None:
    assert rates(SloSpec(**slo)) == found


def test_the_limits_of_percentiles_are_the_tightest_at_the_slos_own_rate() -> None:
    others = ("max_ms < 500", "error_rate < 1%", "p50_ms < 5 @ 10 rps", "p99_ms < 20 @ 10 rps")
    lines = ("p99.9_ms < 90", "p99_ms < 60", *others)
    assert latency_limits(SloSpec(p99_ms=50, rate_rps=100, objectives=lines).all_objectives()) == {99: 50, 99.9: 90}

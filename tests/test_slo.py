"""The verdict on a saved run: what holds, what is violated, and what cannot be said."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import InputError, SloSpec, run_command
from loadtests import slo
from loadtests.limits import in_flight_for, samples_needed, timeout_for, too_short
from loadtests.results import Settings
from loadtests.slo import judge
from tests.test_capacity import write_sleeper
from tests.test_results import saved_run, steady

SLO = SloSpec(p99_ms=50, rate_rps=100, max_error_rate=0.001)
FIXED: dict[str, Any] = {
    "model": "m",
    "models": "",
    "target": "onnxruntime",
    "protocol": "grpc",
    "url": "",
    "inputs": "",
}


def test_a_run_within_every_limit_holds_with_its_margins(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady(0.01)), SLO)
    margins = {each.name: round(each.margin, 2) for each in judgement.objectives}
    assert judgement.verdict == "holds"
    assert margins == {"p99_ms": 0.80, "rate_rps": 0.00, "max_error_rate": 1.00}


@pytest.mark.parametrize(
    ("limits", "violated"),
    [
        ({"p99_ms": 5.0}, "p99_ms"),
        ({"p95_ms": 9.0}, "p95_ms"),
        ({"p50_ms": 9.99, "p99_ms": 50.0}, "p50_ms"),
        ({"rate_rps": 99.0}, None),
        ({"rate_rps": 100.5}, None),
        ({}, None),
    ],
    ids=["p99", "p95", "p50", "rate below", "rate within 1 %", "error rate alone"],
)
def test_each_objective_is_judged_by_itself(tmp_path: Path, limits: dict[str, Any], violated: str | None) -> None:
    judgement = judge(saved_run(tmp_path, steady(0.01, lag_s=0)), SloSpec(**limits))
    assert [each.name for each in judgement.objectives if each.status == "violated"] == ([violated] if violated else [])
    assert judgement.verdict == ("violated" if violated else "holds")


def test_the_judged_latency_counts_from_the_planned_send(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(0.01, lag_s=0.002))
    seen = {each.name: each.seen for each in judge(run, SLO).objectives}
    assert seen["p99_ms"] == pytest.approx(12, rel=2e-3)


def test_errors_and_drops_count_against_the_slo(tmp_path: Path) -> None:
    requests = [(p, s, f, {0: "ServerBusy", 50: "dropped"}.get(i % 100)) for i, (p, s, f, _) in enumerate(steady())]
    judgement = judge(saved_run(tmp_path, requests), SLO)
    statuses = {each.name: each.status for each in judgement.objectives}
    assert statuses["max_error_rate"] == statuses["p99_ms"] == statuses["rate_rps"] == "violated"
    assert "10 ServerBusy" in judgement.objectives[-1].note


@pytest.mark.parametrize(("percent", "needed"), [(99, 459), (95, 90), (50, 7)])
def test_the_samples_that_a_percentile_needs(percent: float, needed: int) -> None:
    assert samples_needed(percent) == needed


def test_too_few_samples_are_inconclusive_and_the_number_needed_is_said(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady(count=458)), SloSpec(p99_ms=50))
    assert judgement.verdict == "inconclusive"
    assert judgement.objectives[0].note == "458 requests, 459 needed"


@pytest.mark.parametrize(
    ("slo", "timeout_s", "in_flight"),
    [
        ({"p99_ms": 50}, 5, 512),
        ({"p99_ms": 2000}, 5, 1600),
        ({"p50_ms": 50, "objectives": ("max_ms < 15000 @ 10 rps",)}, 30, 8192),
        ({"rate_rps": 100}, 5, 512),
    ],
    ids=["fast", "rate", "slow", "no latency"],
)
def test_no_answer_that_is_in_time_is_given_up_or_dropped(
    slo: dict[str, Any], timeout_s: float, in_flight: int
) -> None:
    asked = SloSpec(**slo)
    assert timeout_for(None, asked) == timeout_for(None, SloSpec(), asked) == timeout_s
    assert timeout_for(timeout_s + 1, asked) == timeout_s + 1
    settings = Settings(**FIXED, shape="10x5, 10-800x5", workers=2)
    assert in_flight_for(settings, asked) == in_flight


@pytest.mark.parametrize("command", ["run", "capacity", "compare_runs", "tune"])
def test_a_deadline_within_the_slos_latency_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    write_sleeper(tmp_path, 0.01)  # its p50 is 100 ms
    sides = ("--base", str(tmp_path / "repository"), "--new", str(tmp_path / "repository"))
    which = ("--model", "tiny", "--models", str(tmp_path / "models"), *(sides if command == "compare_runs" else ()))
    monkeypatch.setattr("sys.argv", [command, *which, "--timeout-s", "0.1"])
    with pytest.raises(
        InputError, match=r"--timeout-s 0\.1: the SLO allows an answer 0\.1 s.*\(5 where it is left out"
    ):
        importlib.import_module(f"loadtests.{command}").main()


def test_a_short_run_is_announced_before_it_starts() -> None:
    settings = Settings(**FIXED, rate_rps=20, duration_s=10)
    assert list(too_short(settings, SLO)) == ["200 requests cannot prove p99_ms, 459 can: run for 23 s or more"]


def test_of_several_rates_only_what_a_line_is_judged_at_counts_towards_it() -> None:
    slo = SloSpec(rate_rps=10, p99_ms=50, objectives=("p50_ms < 10 @ 200 rps",))
    steps = Settings(**FIXED, shape="10x30, 200x30", duration_s=60)
    assert list(too_short(steps, slo)) == ["300 requests cannot prove p99_ms, 459 can: run for 46 s or more"]
    bound = SloSpec(rate_rps=10, objectives=("p99_ms < 50 @ 200 rps",))
    ramp = Settings(**FIXED, shape="200-300x60, 200x1, 10x60", duration_s=121)
    assert list(too_short(ramp, bound)) == ["200 requests cannot prove p99_ms, 459 can: run for 3 s or more"]


@pytest.mark.parametrize(
    ("changes", "lag_s", "problem"),
    [
        ({}, 0.003, "sent late"),
        ({"thread_cpu": 0.95}, 0.0, "95% busy"),
        ({"duration_s": 9.0}, 1.5, "in time"),
    ],
    ids=["late", "busy", "behind"],
)
def test_an_unhealthy_generator_makes_the_run_invalid(
    tmp_path: Path, changes: dict[str, Any], lag_s: float, problem: str
) -> None:
    judgement = judge(saved_run(tmp_path, steady(lag_s=lag_s), **changes), SLO)
    assert judgement.verdict == "invalid"
    assert any(problem in line for line in judgement.problems)
    assert {each.status for each in judgement.objectives} == {"inconclusive"}


def test_no_samples_are_no_pass(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, []), SLO)
    assert (judgement.verdict, judgement.objectives) == ("invalid", ())


def test_a_rate_that_was_never_offered_is_not_judged(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady(count=500), rate_rps=50.0), SLO)
    assert judgement.verdict == "inconclusive"
    assert "only 50/s was offered" in [each.note for each in judgement.objectives]


def test_a_part_of_a_mix_tells_of_the_whole_where_it_is_judged_alone(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(), mix="tiny:3,text:1")
    assert judge(run, SLO).notes == (
        "one of the mix tiny:3,text:1; all of it is judged by: make verdict MIX=tiny:3,text:1",
    )
    assert judge(run, SLO, alone=False).notes == ()


def test_a_closed_loop_is_judged_by_service_latency_and_says_so(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(0.01), rate_rps=None, users=4)
    judgement = judge(run, SLO)
    assert judgement.verdict == "holds"
    assert "coordinated omission" in judgement.notes[0]


@pytest.mark.parametrize(
    ("line", "status", "margin"),
    [
        ("p99.9_ms < 50", "inconclusive", 0.8),
        ("mean_ms < 12", "holds", 1 / 6),
        ("max_ms < 5", "violated", -1.0),
        ("p50_ms < 10 @ 100 rps", "violated", 0.0),
        ("p50_ms <= 10 @ 300 rps", "inconclusive", None),
        ("error_rate < 0.1%", "holds", 1.0),
        ("throughput >= 150", "inconclusive", -1 / 3),
        ("throughput >= 80", "holds", 0.25),
        ("ndcg@10 >= 0.99 * baseline", "holds", 0.0101),
        ("ndcg@10 > 0.1", "violated", -0.01),
    ],
)
def test_a_line_is_judged_by_what_it_names(tmp_path: Path, line: str, status: str, margin: float | None) -> None:
    quality = {"ndcg@10": {"seen": 0.099, "baseline": 0.099, "source": "make compare"}}
    run = saved_run(tmp_path, steady(0.01, lag_s=0), quality=quality)
    found = judge(run, SloSpec(objectives=(line,))).objectives[-1]
    assert found.status == status
    assert margin is None or found.margin == pytest.approx(margin, abs=2e-3)


def test_of_several_rates_each_line_is_judged_at_its_own(tmp_path: Path) -> None:
    slow = [(planned, sent, sent + (0.03 if planned >= 5 else 0.01), None) for planned, sent, *_ in steady(lag_s=0)]
    slo = SloSpec(p50_ms=20, rate_rps=100, objectives=("p50_ms < 20 @ 200 rps", "throughput > 100 @ 50 rps"))
    run = saved_run(tmp_path, slow, rate_rps=None, shape="100x5, 200x5")
    found = {each.name: (each.status, each.note) for each in judge(run, slo).objectives}
    assert found["p50_ms @ 100 rps"][0] == "holds"
    assert found["p50_ms @ 200 rps"][0] == "violated"
    assert found["throughput @ 50 rps"] == ("inconclusive", "measured at 100, 200/s; make loadtest RATE=50")


def test_of_several_rates_without_the_slos_own_nothing_is_said(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(count=1500), rate_rps=None, shape="100x5, 200x5")
    judgement = judge(run, SloSpec(p99_ms=50, rate_rps=150))
    assert judgement.verdict == "inconclusive"
    assert {each.note for each in judgement.objectives} == {"measured at 100, 200/s; make loadtest RATE=150"}
    assert judge(run, SloSpec(p99_ms=50)).verdict == "holds"  # of no rate: all of it


@pytest.mark.parametrize("shape", ["100x5, 100-500x5", "10-100x5, 100x5"])
def test_beside_a_ramp_a_line_is_judged_at_the_slos_rate(tmp_path: Path, shape: str) -> None:
    first = shape.startswith("100x")
    sent = [(at, at, at + (0.01 if (at < 5) == first else 0.5), None) for at, *_ in steady(lag_s=0)]
    run = saved_run(tmp_path, sent, rate_rps=None, shape=shape)
    found = judge(run, SloSpec(p50_ms=20, rate_rps=100)).objectives[0]
    assert (found.name, found.status) == ("p50_ms @ 100 rps", "holds")


def test_a_quality_that_was_not_measured_is_no_pass(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady()), SloSpec(objectives=("ndcg@10 > 0.1",)))
    assert (judgement.verdict, judgement.objectives[-1].status) == ("inconclusive", "inconclusive")
    assert "make compare" in judgement.objectives[-1].note


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with `tiny`, whose runs lie under tmp_path."""
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    tiny = tmp_path / "models" / "tiny"
    tiny.mkdir(parents=True)
    (tiny / "deploy.toml").write_text(
        'name = "tiny"\n[inputs.x]\ndtype = "float32"\nshape = ["batch", 2]\n[outputs.y]\ndtype = "float32"\n'
        'shape = ["batch", 2]\n[axes.batch]\nmin = 1\nopt = 2\nmax = 4\n[slo]\np99_ms = 5\n'
        "[targets.tensorrt.slo]\np99_ms = 50\n"
    )
    return tmp_path / "models"


def judged(monkeypatch: pytest.MonkeyPatch, models: Path, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["slo", "--model", "tiny", "--models", str(models), *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(slo.main)
    return ended.value.code


def test_the_exit_code_is_the_verdict(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = saved_run(tmp_path / "run", steady(0.01, lag_s=0), timeout_s=5.0)
    few = saved_run(tmp_path / "[/few]", steady(0.01, count=20, lag_s=0))
    assert judged(monkeypatch, model, "--run", str(run.folder), "--json") == 1
    assert json.loads(capsys.readouterr().out)["objectives"][0]["status"] == "violated"
    assert judged(monkeypatch, model, "--run", str(run.folder), "--target", "tensorrt") == 0
    assert judged(monkeypatch, model, "--run", str(few.folder)) == 3
    assert f"inconclusive  {few.folder}" in capsys.readouterr().out  # no markup
    assert judged(monkeypatch, model) == 2
    assert "no load test of tiny" in capsys.readouterr().err


def test_of_what_was_given_up_in_the_time_of_a_looser_slo_nothing_is_said(tmp_path: Path) -> None:
    requests = [(p, s, f, "DeadlineExceeded" if i % 20 == 0 else None) for i, (p, s, f, _) in enumerate(steady())]
    run = saved_run(tmp_path, requests, timeout_s=5.0)
    loose, tight = (judge(run, SloSpec(p99_ms=limit_ms, max_error_rate=0.1)) for limit_ms in (8000, 4000))
    assert (loose.verdict, tight.verdict) == ("inconclusive", "violated")
    assert "given up after 5 s, which the SLO allows: measure again" in loose.objectives[0].note

"""The verdict on a saved run: what holds, what is violated, and what cannot be said."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import InputError, SloSpec, run_command
from loadtests import slo
from loadtests.limits import in_flight_for, rates, samples_needed, timeout_for, too_short
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


@pytest.mark.parametrize(("rate_rps", "workers"), [(4100.0, 1), (8200.0, 2)])
def test_a_rate_at_which_answers_in_time_would_be_dropped_is_refused(rate_rps: float, workers: int) -> None:
    asked, settings = SloSpec(p99_ms=2000), Settings(**FIXED, rate_rps=rate_rps, workers=workers)
    with pytest.raises(
        InputError, match=rf"at {rate_rps:g}/s: .* a worker can have 8192, .* from {workers + 1} workers"
    ):
        in_flight_for(settings, asked)
    assert in_flight_for(replace(settings, workers=workers + 1), asked) == 8192
    bound = SloSpec(p99_ms=50, objectives=("max_ms < 2000 @ 100 rps",))  # asked of 100/s alone
    assert in_flight_for(settings, bound) > 512


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


@pytest.mark.parametrize(
    ("lag_s", "problem"),
    [
        (0.02, "the generator sent late at 10/s: p99 of the lag is 20.0"),
        (0.6, "the generator took up 88.0% of the planned requests at 10/s in time"),
    ],
    ids=["late", "behind"],
)
def test_a_generator_that_fails_in_a_stretch_is_not_hidden_by_the_whole(
    tmp_path: Path, lag_s: float, problem: str
) -> None:
    few = [(at / 10, at / 10 + lag_s, at / 10 + lag_s + 0.001, None) for at in range(50)]
    many = [(5 + at / 1000, 5 + at / 1000, 5.001 + at / 1000, None) for at in range(5000)]
    run = saved_run(tmp_path, [*few, *many], rate_rps=None, shape="10x5, 1000x5")
    slo = SloSpec(p50_ms=50, rate_rps=10, objectives=("p50_ms < 10 @ 1000 rps",))
    judgement = judge(run, slo)
    assert judgement.verdict == "invalid"
    assert judgement.problems[0].startswith(problem)
    assert judge(run, SloSpec(p50_ms=50, rate_rps=1000)).verdict == "holds"  # nothing is judged at 10/s


@pytest.mark.parametrize(
    ("line", "late", "problem"),
    [("max_ms < 9", 1, "max of the lag is 3.0"), ("mean_ms < 9", 1000, "mean of the lag is 3.0")],
    ids=["max", "mean"],
)
def test_the_generators_lag_is_held_against_a_maximum_and_a_mean_that_do_not_hold_with_it(
    tmp_path: Path, line: str, late: int, problem: str
) -> None:
    requests = [(p, p + 0.003 * (i < late), p + 0.01, None) for i, (p, *_) in enumerate(steady())]
    judgement = judge(saved_run(tmp_path, requests), SloSpec(p50_ms=100, objectives=(line,)))
    assert judgement.verdict == "invalid"
    assert problem in judgement.problems[0]
    wider = SloSpec(p50_ms=100, objectives=(line.replace("< 9", "< 50"),))
    assert judge(saved_run(tmp_path, requests), wider).verdict == "holds"


@pytest.mark.parametrize(("kind", "advice"), [("NoFile", "ulimit -n"), ("NoPort", "ip_local_port_range")])
def test_connections_that_the_generators_machine_could_not_make_make_the_run_invalid(
    tmp_path: Path, kind: str, advice: str
) -> None:
    requests = [(p, s, f, kind if i % 100 == 0 else None) for i, (p, s, f, _) in enumerate(steady())]
    judgement = judge(saved_run(tmp_path, requests), SLO)
    assert judgement.verdict == "invalid"
    assert len(judgement.problems) == 1
    assert judgement.problems[0].startswith("10 requests found no ")
    assert advice in judgement.problems[0]


def test_no_samples_are_no_pass(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, []), SLO)
    assert (judgement.verdict, judgement.objectives) == ("invalid", ())


def test_a_rate_that_was_never_offered_is_not_judged(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady(count=500), rate_rps=50.0), SLO)
    assert judgement.verdict == "inconclusive"
    assert "only 50/s was offered" in [each.note for each in judgement.objectives]


@pytest.mark.parametrize(
    ("slo", "found"),
    [
        ({"rate_rps": 100, "objectives": ("throughput >= 150", "p50_ms < 10 @ 200 rps")}, [100, 150, 200]),
        ({"rate_rps": 100, "objectives": ("throughput >= 95", "throughput >= 120 @ 130 rps")}, [100, 130]),
        ({"objectives": ("throughput >= 150",)}, [150]),
        ({"objectives": ("throughput >= 0",)}, []),
    ],
    ids=["above", "within", "alone", "none"],
)
def test_a_throughput_above_the_slos_rate_is_a_rate_to_send_at(slo: dict[str, Any], found: list[float]) -> None:
    assert rates(SloSpec(**slo)) == found


def test_a_throughput_is_judged_where_as_much_was_asked_for(tmp_path: Path) -> None:
    times = [*(i / 100 for i in range(500)), *(5 + i / 150 for i in range(750))]
    run = saved_run(tmp_path, [(at, at, at + 0.001, None) for at in times], rate_rps=None, shape="100x5, 150x5")
    judgement = judge(run, SloSpec(rate_rps=100, objectives=("throughput >= 150", "throughput >= 160")))
    found = {each.name: (each.status, round(each.seen)) for each in judgement.objectives if each.kind == "throughput"}
    assert found["rate_rps @ 100 rps"] == ("holds", 100)
    assert found["throughput @ 150 rps"] == ("holds", 150)
    assert found["throughput @ 100 rps"] == ("inconclusive", 100)  # 160/s were never asked for


@pytest.mark.parametrize(
    ("count", "failed", "note"),
    [
        (100, 0, "0 of 100: tells no more than under 4.5%, 4603 are needed for 0.1%"),
        (4000, 1, "1 ServerBusy, 1 of 4000: tells no more than under 0.17%, 4603 are needed for 0.1%"),
        (4603, 0, ""),
    ],
)
def test_how_little_few_requests_tell_of_errors_is_said(tmp_path: Path, count: int, failed: int, note: str) -> None:
    requests = [(p, s, f, "ServerBusy" if i < failed else None) for i, (p, s, f, _) in enumerate(steady(count=count))]
    found = judge(saved_run(tmp_path, requests, rate_rps=count / 10), SloSpec()).objectives[0]
    assert (found.status, found.note) == ("holds", note)
    unbounded = judge(saved_run(tmp_path, requests, rate_rps=count / 10), SloSpec(max_error_rate=1)).objectives[0]
    assert unbounded.note == ("1 ServerBusy" if failed else "")


@pytest.mark.parametrize(("every", "status", "seen"), [(1000, "holds", 10), (1, "violated", math.inf)])
def test_a_mean_is_of_what_was_answered(tmp_path: Path, every: int, status: str, seen: float) -> None:
    requests = [(p, s, f, None if i % every else "ServerBusy") for i, (p, s, f, _) in enumerate(steady(lag_s=0))]
    found = judge(saved_run(tmp_path, requests), SloSpec(objectives=("mean_ms < 12",))).objectives[-1]
    assert (found.status, found.seen) == (status, pytest.approx(seen, rel=2e-3))


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
    slo = SloSpec(p50_ms=20, rate_rps=100, objectives=("p50_ms < 20 @ 200 rps", "throughput > 40 @ 50 rps"))
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
    fixed: dict[str, Any] = {"rate_rps": 100, "max_error_rate": 0.01, "objectives": ("mean_ms < 12",)}
    loose, tight = (judge(run, SloSpec(p99_ms=limit_ms, **fixed)) for limit_ms in (8000, 4000))
    assert [each.status for each in loose.objectives] == ["inconclusive"] * 4
    assert {each.note for each in loose.objectives} == {
        "50 requests were given up after 5 s, which the SLO allows: measure again"
    }
    assert [each.status for each in tight.objectives] == ["violated"] * 3 + ["holds"]


def test_what_fails_for_other_reasons_is_violated_by_a_looser_slo_too(tmp_path: Path) -> None:
    errors = {0: "DeadlineExceeded", 1: "ServerBusy"}
    requests = [(p, s, f, errors.get(i % 20)) for i, (p, s, f, _) in enumerate(steady())]
    judgement = judge(saved_run(tmp_path, requests), SloSpec(p50_ms=8000, rate_rps=100, max_error_rate=0.01))
    assert [each.status for each in judgement.objectives] == ["holds", "violated", "violated"]

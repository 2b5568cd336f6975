"""The verdict on a saved run: objectives that hold, are violated, or are inconclusive."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cli.main import main as command_line
from deepseek.spec import SloSpec, variables_for
from deepseek.spec.objectives import KINDS, formatted
from loadtests.slo.judge import JUDGES, judge, overall
from loadtests.slo.judged_objectives import SloStatus
from tests.saved_runs import Request, saved_run, steady

SLO = SloSpec(p99_ms=50, rate_rps=100, max_error_rate=0.01)


def refused(requests: list[Request], every: int, kind: str = "ServerBusy") -> list[Request]:
    """The same requests, of which each `every`-th from the first fails."""
    return [(p, s, f, kind if i % every == 0 else None) for i, (p, s, f, _) in enumerate(requests)]


def decided(latency_s: float = 0.01, lag_s: float = 0.0001) -> list[Request]:
    """Requests of 70 s at 100/s, which decide a p99."""
    return steady(latency_s, 7000, lag_s, seconds=70)


def test_a_run_within_every_limit_holds_with_its_margins(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, decided(), duration_s=70.0), SLO)
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
        ({"rate_rps": 100.5}, None),  # within 1 %
        ({}, None),
    ],
)
def test_each_objective_is_judged_independently(tmp_path: Path, limits: dict[str, Any], violated: str | None) -> None:
    judgement = judge(saved_run(tmp_path, decided(lag_s=0), duration_s=70.0), SloSpec(**limits))
    assert [each.name for each in judgement.objectives if each.status == "violated"] == ([violated] if violated else [])
    assert judgement.verdict == ("violated" if violated else "holds")


def test_errors_and_drops_count_against_the_slo(tmp_path: Path) -> None:
    requests = [(p, s, f, {0: "ServerBusy", 5: "dropped"}.get(i % 10)) for i, (p, s, f, _) in enumerate(steady())]
    judgement = judge(saved_run(tmp_path, requests), SLO)
    statuses = {each.name: each.status for each in judgement.objectives}
    assert statuses["max_error_rate"] == statuses["p99_ms"] == statuses["rate_rps"] == "violated"
    assert "100 ServerBusy" in judgement.objectives[-1].note


@pytest.mark.parametrize(("percent", "independent"), [(99, 299), (95, 59), (50, 5)])
def test_a_percentile_is_decided_by_as_many_independent_requests_as_its_confidence_needs(
    tmp_path: Path, percent: int, independent: int
) -> None:
    slo, slow = SloSpec(objectives=(f"p{percent}_ms < 50",)), {"rate_rps": 1.0, "duration_s": float(independent)}
    few, enough = steady(count=independent - 1, seconds=independent), steady(count=independent, seconds=independent)
    assert judge(saved_run(tmp_path / "few", few, **slow), slo).objectives[-1].status == "inconclusive"
    assert judge(saved_run(tmp_path / "enough", enough, **slow), slo).objectives[-1].status == "holds"


def test_the_confidence_of_the_slo_decides_what_a_run_proves(tmp_path: Path) -> None:
    run = saved_run(tmp_path, decided(), duration_s=70.0)
    statuses = [judge(run, SloSpec(p99_ms=50, confidence=level)).objectives[0].status for level in (0.9, 0.95, 0.99)]
    assert statuses == ["holds", "holds", "inconclusive"]
    watched = replace(run, settings=replace(run.settings, looks=4))  # each look spends a quarter of the error
    assert judge(watched, SloSpec(p99_ms=50)).objectives[0].status == "inconclusive"
    assert "4 looks" in judge(watched, SloSpec(p99_ms=50)).notes[0]


def test_a_sample_inside_the_limit_is_inconclusive_and_says_how_many_more_requests_decide(tmp_path: Path) -> None:
    requests = [(p, s, f + 0.1 * (i % 200 == 0), None) for i, (p, s, f, _) in enumerate(steady(count=2000, seconds=20))]
    found = judge(saved_run(tmp_path, requests, duration_s=20.0), SloSpec(p99_ms=50)).objectives[0]
    assert (found.status, found.within, found.low < 0.005 < found.high) == ("inconclusive", True, True)
    assert found.more_requests is not None
    assert f"1% allowed; about {found.more_requests} more requests would decide" in found.note


def test_slow_answers_in_bursts_prove_less_than_scattered_ones(tmp_path: Path) -> None:
    slow = [{place * 25 for place in range(80)}, set(range(500, 540)) | set(range(1500, 1540))]
    bounds = []
    for name, places in enumerate(slow):  # 4 % of the requests each
        requests = [(p, s, f + 0.1 * (i in places), None) for i, (p, s, f, _) in enumerate(steady(count=2000))]
        run = saved_run(tmp_path / str(name), requests, rate_rps=200.0)
        bounds.append(judge(run, SloSpec(p99_ms=50)).objectives[0])
    assert [each.status for each in bounds] == ["violated", "inconclusive"]
    assert bounds[1].low < bounds[0].low < 0.04 < bounds[0].high < bounds[1].high


def test_no_samples_are_no_pass(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, []), SLO)
    assert (judgement.verdict, judgement.objectives) == ("invalid", ())


def test_a_rate_that_was_never_offered_is_not_judged(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady(count=500), rate_rps=50.0), SLO)
    assert judgement.verdict == "inconclusive"
    assert "only 50/s was offered" in [each.note for each in judgement.objectives]


@pytest.mark.parametrize(("shape", "noted"), [("200x10", True), ("0-200x5, 200x5", False)])
def test_a_run_at_more_than_the_slos_rate_says_so(tmp_path: Path, shape: str, noted: bool) -> None:
    run = saved_run(tmp_path, steady(count=1500), rate_rps=None, shape=shape)
    assert ("measured at 200/s, more than the 100/s that the SLO asks for" in judge(run, SLO).notes) == noted


def test_a_throughput_is_judged_at_the_rate_of_its_limit(tmp_path: Path) -> None:
    times = [*(i / 100 for i in range(500)), *(5 + i / 150 for i in range(750))]
    run = saved_run(tmp_path, [(at, at, at + 0.001, None) for at in times], rate_rps=None, shape="100x5, 150x5")
    judgement = judge(run, SloSpec(rate_rps=100, objectives=("throughput >= 150", "throughput >= 160")))
    found = {each.name: (each.status, round(each.seen)) for each in judgement.objectives if each.kind == "throughput"}
    assert found["rate_rps @ 100 rps"] == ("holds", 100)
    assert found["throughput @ 150 rps"] == ("holds", 150)
    assert found["throughput @ 100 rps"] == ("inconclusive", 100)  # 160/s were never offered


@pytest.mark.parametrize(
    ("seconds", "failed", "status", "note"),
    [
        (30, 0, "inconclusive", "0% to 2% failed, 1% allowed; about 3000 more requests would decide"),
        (30, 1, "inconclusive", "1 ServerBusy, "),
        (60, 0, "holds", "at most 0.99% failed"),
        (60, 600, "violated", "600 ServerBusy, at least "),
        (200, 20000, "violated", "20000 ServerBusy, at least 99.7% failed"),
    ],
)
def test_an_error_rate_is_judged_by_its_bounds(
    tmp_path: Path, seconds: int, failed: int, status: str, note: str
) -> None:
    every = steady(count=100 * seconds, seconds=seconds)
    requests = refused(every, len(every) // failed) if failed else every
    run = saved_run(tmp_path, requests, duration_s=float(seconds))
    found = judge(run, SloSpec(max_error_rate=0.01)).objectives[0]
    assert (found.status, found.note[: len(note)]) == (status, note)
    assert judge(run, SloSpec(max_error_rate=1)).objectives[0].status == "holds"


@pytest.mark.parametrize(("every", "status", "seen"), [(1000, "holds", 10), (1, "violated", math.inf)])
def test_a_mean_is_over_the_answered_requests(tmp_path: Path, every: int, status: str, seen: float) -> None:
    run = saved_run(tmp_path, refused(steady(lag_s=0), every))
    found = judge(run, SloSpec(objectives=("mean_ms < 12",))).objectives[-1]
    assert (found.status, found.seen) == (status, pytest.approx(seen, rel=2e-3))


def test_a_part_of_a_mix_judged_alone_refers_to_the_whole_mix(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(), mix="tiny:3,text:1")
    note = "part of the mix tiny:3,text:1; to judge the whole mix: make verdict MIX=tiny:3,text:1"
    assert judge(run, SLO).notes == (note,)
    assert judge(run, SLO, alone=False).notes == ()


def test_an_open_loop_is_judged_from_the_planned_send_a_closed_loop_by_service_latency(tmp_path: Path) -> None:
    opened = judge(saved_run(tmp_path / "open", steady(0.01, lag_s=0.002)), SLO)
    assert opened.objectives[0].seen == pytest.approx(12, rel=2e-3)
    closed = judge(saved_run(tmp_path / "closed", decided(), rate_rps=None, users=4, duration_s=70.0), SLO)
    assert closed.verdict == "holds"
    assert "coordinated omission" in closed.notes[0]


@pytest.mark.parametrize(
    ("line", "status", "margin"),
    [
        ("p99.9_ms < 50", "inconclusive", 0.8),
        ("mean_ms < 12", "holds", 1 / 6),
        ("max_ms < 5", "violated", -1.0),
        ("p50_ms < 10 @ 100 rps", "violated", 0.0),
        ("p50_ms <= 10 @ 300 rps", "inconclusive", None),
        ("error_rate < 0.1%", "inconclusive", 1.0),
        ("error_rate < 10%", "holds", 1.0),
        ("p90_ms < 12", "holds", 1 / 6),
        ("throughput >= 150", "inconclusive", -1 / 3),
        ("throughput >= 80", "holds", 0.25),
        ("throughput >= 0", "holds", math.inf),
        ("error_rate <= 0%", "holds", 0.0),
        ("ndcg@10 >= 0.99 * baseline", "holds", 0.0101),
        ("ndcg@10 > 0.1", "violated", -0.01),
    ],
)
def test_an_objective_is_judged_by_the_figure_that_it_names(
    tmp_path: Path, line: str, status: str, margin: float | None
) -> None:
    quality = {"ndcg@10": {"seen": 0.099, "baseline": 0.099, "source": "make parity"}}
    run = saved_run(tmp_path, steady(0.01, lag_s=0), quality=quality)
    found = judge(run, SloSpec(objectives=(line,))).objectives[-1]
    assert found.status == status
    assert margin is None or found.margin == pytest.approx(margin, abs=2e-3)
    assert repr(found.margin) != "-0.0"


def test_a_figure_is_written_with_its_unit() -> None:
    assert [formatted("ms", ms) for ms in (9.994, 10.04, math.inf, math.nan)] == ["9.99 ms", "10.0 ms", "never", "-"]
    assert [formatted("throughput", rate) for rate in (99.96, 0.0167, 0)] == ["100.0/s", "0.017/s", "0.0/s"]
    assert (formatted("quality", 0.12346), formatted("error_rate", 0.00123)) == ("0.1235", "0.123%")


def test_each_objective_is_judged_at_its_own_rate(tmp_path: Path) -> None:
    slow = [(planned, sent, sent + (0.03 if planned >= 5 else 0.01), None) for planned, sent, *_ in steady(lag_s=0)]
    slo = SloSpec(p50_ms=20, rate_rps=100, objectives=("p50_ms < 20 @ 200 rps", "throughput > 40 @ 50 rps"))
    run = saved_run(tmp_path, slow, rate_rps=None, shape="100x5, 200x5")
    found = {each.name: (each.status, each.note) for each in judge(run, slo).objectives}
    assert found["p50_ms @ 100 rps"][0] == "holds"
    assert found["p50_ms @ 200 rps"][0] == "violated"
    note = f"measured at 100, 200/s; make loadtest {variables_for('tiny')} RATE=50"
    assert found["throughput @ 50 rps"] == ("inconclusive", note)
    part = judge(saved_run(tmp_path, slow, mix="tiny:3,text:1", rate_rps=None, shape="100x5, 200x5"), slo)
    assert part.objectives[-1].note == "measured at 100, 200/s; make loadtest MIX=tiny:3,text:1, with 50/s for tiny"


def test_several_rates_without_the_slos_own_are_inconclusive(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(count=1500), rate_rps=None, shape="100x5, 200x5")
    judgement = judge(run, SloSpec(p99_ms=50, rate_rps=150))
    assert judgement.verdict == "inconclusive"
    note = f"measured at 100, 200/s; make loadtest {variables_for('tiny')} RATE=150"
    assert {each.note for each in judgement.objectives} == {note}
    third = judge(run, SloSpec(rate_rps=33.3333333)).objectives[0].note  # a rounded rate would not be the SLO's own
    assert third.endswith("RATE=33.3333333")
    whole = judge(run, SloSpec(p95_ms=50, max_error_rate=1, confidence=0.9))  # an SLO without a rate: the whole run
    assert whole.verdict == "holds"


@pytest.mark.parametrize("line", ["error_rate < 1%", "p50_ms < 20", "max_ms < 20", "throughput >= 0.1"])
def test_at_a_rate_too_low_for_a_request_nothing_is_judged(tmp_path: Path, line: str) -> None:
    sent = [request for request in steady() if request[0] >= 4]
    run = saved_run(tmp_path, sent, rate_rps=None, shape="0.1x4, 100x6")
    found = judge(run, SloSpec(objectives=(f"{line} @ 0.1 rps",))).objectives[-1]
    assert (found.name, found.status) == (f"{line.split()[0]} @ 0.1 rps", "inconclusive")


def test_a_stall_makes_the_throughput_of_users_uncertain(tmp_path: Path) -> None:
    answered = [request for request in steady(count=6000, seconds=60) if not 20 <= request[0] < 40]
    run = saved_run(tmp_path, answered, rate_rps=None, users=4, duration_s=60.0)
    found = judge(run, SloSpec(objectives=("throughput >= 65",))).objectives[-1]
    assert (found.status, round(found.seen, 1)) == ("inconclusive", 66.7)
    assert found.low < 50


@pytest.mark.parametrize("shape", ["100x5, 100-500x5", "10-100x5, 100x5"])
def test_in_a_run_with_a_ramp_an_objective_is_judged_at_the_slos_rate(tmp_path: Path, shape: str) -> None:
    first = shape.startswith("100x")
    sent = [(at, at, at + (0.01 if (at < 5) == first else 0.5), None) for at, *_ in steady(lag_s=0)]
    run = saved_run(tmp_path, sent, rate_rps=None, shape=shape)
    found = judge(run, SloSpec(p50_ms=20, rate_rps=100)).objectives[0]
    assert (found.name, found.status) == ("p50_ms @ 100 rps", "holds")


def test_a_quality_that_was_not_measured_is_no_pass(tmp_path: Path) -> None:
    judgement = judge(saved_run(tmp_path, steady()), SloSpec(objectives=("ndcg@10 > 0.1",)))
    assert (judgement.verdict, judgement.objectives[-1].status) == ("inconclusive", "inconclusive")
    assert "make parity MODEL=tiny" in judgement.objectives[-1].note


@pytest.fixture
def model(tmp_path: Path, own_build: Path) -> Path:
    """A models folder with `tiny`; its runs are under tmp_path."""
    tiny = tmp_path / "models" / "tiny"
    tiny.mkdir(parents=True)
    (tiny / "deploy.toml").write_text(
        'name = "tiny"\n[inputs.x]\ndtype = "float32"\nshape = ["batch", 2]\n[outputs.y]\ndtype = "float32"\n'
        'shape = ["batch", 2]\n[axes.batch]\nmin = 1\nopt = 2\nmax = 4\n[slo]\np99_ms = 5\n'
        "[targets.tensorrt.slo]\np99_ms = 50\n"
    )
    return tmp_path / "models"


def judged(models: Path, *arguments: str) -> int:
    return command_line(["verdict", "--model", "tiny", "--models", str(models), *arguments])


def test_the_exit_code_is_the_verdict(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = saved_run(tmp_path / "run", decided(lag_s=0), timeout_s=5.0, duration_s=70.0)
    few = saved_run(tmp_path / "[/few]", steady(0.001, count=20, lag_s=0))
    assert judged(model, "--run", str(run.folder), "--json") == 1
    assert json.loads(capsys.readouterr().out)["objectives"][0]["status"] == "violated"
    assert judged(model, "--run", str(run.folder), "--target", "tensorrt") == 0
    assert judged(model, "--run", str(few.folder)) == 3
    assert f"inconclusive  {few.folder}" in capsys.readouterr().out  # no markup
    assert judged(model) == 2
    assert "no load test of tiny" in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "closed"), [("", ""), ("--json", " >&-")])
def test_an_output_that_nobody_reads_does_not_change_the_exit_code(
    tmp_path: Path, model: Path, flag: str, closed: str
) -> None:
    """As in `... | grep -q holds`, whose reader leaves early, and in `... >&-`."""
    few = saved_run(tmp_path / "few", steady(0.001, count=20, lag_s=0))
    reader, writer = os.pipe()
    os.close(reader)
    words = ["verdict", "--model", "tiny", "--models", str(model), "--run", str(few.folder)]
    command = f"exec {shlex.join([sys.executable, '-m', 'cli', *words])} {flag}{closed}"
    ended = subprocess.run(command, shell=True, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (3, b"")


def test_a_terminal_without_utf_8_shows_the_verdict(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few, shown = saved_run(tmp_path / "few", steady(0.001, count=20, lag_s=0)), io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    assert judged(model, "--run", str(few.folder)) == 3
    assert b"| ? 5.00 ms |" in shown.getvalue()


def test_a_margin_that_rounds_to_zero_has_no_minus(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = model / "tiny" / "deploy.toml"
    toml.write_text(toml.read_text().replace("p99_ms = 5\n", "p99_ms = 5\nrate_rps = 100\n", 1))
    run = saved_run(tmp_path / "run", steady(0.001, 6990, seconds=70), timeout_s=5.0, duration_s=70.0)
    judged(model, "--run", str(run.folder))
    shown = capsys.readouterr().out
    assert "+0%" in shown
    assert "-0%" not in shown


def test_a_mix_is_judged_model_by_model_and_as_a_whole(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(model / "tiny", model / "other")
    toml = model / "other" / "deploy.toml"
    toml.write_text(toml.read_text().replace('"tiny"', '"other"').replace("p99_ms = 5\n", "p99_ms = 50\n", 1))
    for name in ("tiny", "other"):
        runs = tmp_path / "build" / name / "loadtests" / "2026-11-25T12-00-00.000Z"
        saved_run(runs, decided(lag_s=0), timeout_s=5.0, duration_s=70.0, model=name, mix="tiny:1,other:1")
    arguments = ("--mix", "tiny:1,other:1", "--json")
    assert judged(model, *arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "violated"
    assert {name: each["verdict"] for name, each in found["models"].items()} == {"tiny": "violated", "other": "holds"}
    assert found["models"]["tiny"]["notes"] == []
    assert judged(model, *arguments, "--target", "tensorrt") == 0
    assert judged(model, "--mix", "tiny:1,other:1") == 1
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line in ("tiny", "other")] == ["tiny", "other"]
    assert "the mix tiny:1,other:1 as a whole" in shown
    assert judged(model) == 1
    assert "tiny" not in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("verdicts", "whole"),
    [
        (("holds", "violated", "invalid"), "violated"),
        (("inconclusive", "invalid", "holds"), "invalid"),
        (("holds", "inconclusive"), "inconclusive"),
        (("holds", "holds"), "holds"),
    ],
)
def test_the_worst_verdict_is_that_of_the_mix(verdicts: tuple[SloStatus, ...], whole: str) -> None:
    assert overall(verdicts) == whole


def test_a_run_that_gave_up_what_a_looser_slo_allows_is_invalid_by_it(tmp_path: Path) -> None:
    run = saved_run(tmp_path, refused(steady(), 20, "DeadlineExceeded"), timeout_s=5.0)
    loose, tight = (judge(run, SloSpec(p99_ms=limit_ms, max_error_rate=0.1)) for limit_ms in (5001, 5000))
    assert (loose.verdict, tight.verdict) == ("invalid", "violated")
    assert loose.problems == ("50 requests timed out after 5 s, but the SLO allows longer answers: measure again",)


def test_every_kind_of_objective_that_depends_on_load_has_a_judge() -> None:
    of_load = {kind for kind, facts in KINDS.items() if facts.of_load}
    assert JUDGES.keys() == of_load, "loadtests/slo/judge.py: JUDGES"

"""A load generator that was the limit: late requests, a busy thread, connections that it cannot open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import SloSpec
from loadtests.slo.generator_health import generator_problems
from loadtests.slo.judge import judge
from tests.saved_runs import saved_run, steady
from tests.test_verdict import SLO, decided, refused


@pytest.mark.parametrize(
    ("changes", "lag_s", "problem"),
    [
        ({}, 0.013, "sent late"),
        ({"thread_cpu": 0.95}, 0.0, "95% busy"),
        ({"workers_lost": 1, "workers": 3}, 0.0, "1 of 3 workers were lost with their results"),
        ({"duration_s": 9.0}, 1.5, "in time"),
    ],
)
def test_an_unhealthy_generator_makes_the_run_invalid(
    tmp_path: Path, changes: dict[str, Any], lag_s: float, problem: str
) -> None:
    judgement = judge(saved_run(tmp_path, steady(lag_s=lag_s), **changes), SLO)
    assert judgement.verdict == "invalid"
    assert any(problem in line for line in judgement.problems)
    assert {each.status for each in judgement.objectives} == {"inconclusive"}


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"thread_cpu": 0.95},
            "lower the rate, use more workers (WORKERS=), or give the generator a machine with free "
            "cores, or give it real-time priority (--priority, PRIORITY=1)",
        ),
        (
            {"thread_cpu": 0.95, "rate_rps": None, "users": 4},
            "use more workers (WORKERS=), or give the generator a machine with free cores",
        ),
        ({"workers_lost": 1, "workers": 3}, "1 of 3 workers were lost with their results: measure again"),
    ],
)
def test_the_advice_for_an_unhealthy_generator_fits_the_load(
    tmp_path: Path, changes: dict[str, Any], advice: str
) -> None:
    assert generator_problems(saved_run(tmp_path, steady(), **changes), SLO)[-1] == advice


@pytest.mark.parametrize(
    ("lag_s", "problem"),
    [
        (0.02, "the generator sent late at 10/s: p99 of the lag is 20.0"),
        (0.6, "the generator started 88.0% of the planned requests at 10/s in time"),
    ],
)
def test_a_generator_that_fails_in_one_stretch_makes_the_run_invalid(
    tmp_path: Path, lag_s: float, problem: str
) -> None:
    few = [(at / 10, at / 10 + lag_s, at / 10 + lag_s + 0.001, None) for at in range(50)]
    many = [(5 + at / 1000, 5 + at / 1000, 5.001 + at / 1000, None) for at in range(5000)]
    run = saved_run(tmp_path, [*few, *many], rate_rps=None, shape="10x5, 1000x5")
    slo = SloSpec(p50_ms=50, rate_rps=10, max_error_rate=1, objectives=("p50_ms < 10 @ 1000 rps",))
    judgement = judge(run, slo)
    assert (judgement.verdict, judgement.problems[0][: len(problem)]) == ("invalid", problem)
    elsewhere = SloSpec(p50_ms=50, rate_rps=1000, max_error_rate=1)  # nothing is judged at 10/s
    assert judge(run, elsewhere).verdict == "holds"


@pytest.mark.parametrize(
    ("line", "late", "problem"),
    [("max_ms < 9", 1, "max of the lag is 3.0"), ("mean_ms < 9", 1000, "mean of the lag is 3.0")],
)
def test_the_generators_lag_invalidates_a_maximum_or_mean_that_it_breaks(
    tmp_path: Path, line: str, late: int, problem: str
) -> None:
    requests = [(p, p + 0.003 * (i < late), p + 0.01, None) for i, (p, *_) in enumerate(steady())]
    judgement = judge(saved_run(tmp_path, requests), SloSpec(p50_ms=100, max_error_rate=1, objectives=(line,)))
    assert judgement.verdict == "invalid"
    assert problem in judgement.problems[0]
    wider = SloSpec(p50_ms=100, max_error_rate=1, objectives=(line.replace("< 9", "< 50"),))
    assert judge(saved_run(tmp_path, requests), wider).verdict == "holds"


@pytest.mark.parametrize(
    ("lag_s", "every", "limits", "problem"),
    [
        (0.0124, None, {"p99_ms": 50}, ""),
        (0.0126, None, {"p99_ms": 50}, "at most 25% of the SLO's 50 ms"),
        (0.0124, 1000, {"p99_ms": 50}, "at most 5% of the SLO's 50 ms"),  # 0.1 % refused: it may be the lag
        (0.0124, None, {"p50_ms": 20, "p99_ms": 50}, "at most 5% of the SLO's 50 ms"),
    ],
)
def test_limits_that_hold_with_the_lag_hold(
    tmp_path: Path, lag_s: float, every: int | None, limits: dict[str, Any], problem: str
) -> None:
    """Answers after 10 ms; intended latency includes the lag."""
    requests = decided(lag_s=lag_s)
    run = saved_run(tmp_path, refused(requests, every) if every else requests, duration_s=70.0)
    judgement = judge(run, SloSpec(max_error_rate=0.01, **limits))
    assert judgement.verdict == ("invalid" if problem else "holds")
    assert problem in "".join(judgement.problems)
    for slo in (SLO, SloSpec(objectives=("mean_ms < 50",))):  # the lag would be compared too
        assert generator_problems(run, slo, compared=True)


def test_a_limit_that_the_service_alone_breaks_is_violated_in_spite_of_the_lag(tmp_path: Path) -> None:
    for latency_s, verdict in ((0.01, "violated"), (0.001, "invalid")):  # 0.1 ms of lag, and a limit of 0.5 ms
        run = saved_run(tmp_path / verdict, decided(latency_s), duration_s=70.0)
        judgement = judge(run, SloSpec(p99_ms=0.5))
        assert judgement.verdict == verdict
    assert "at most 5% of the service's 1 ms" in judgement.problems[0]
    for kind, verdict in (("DeadlineExceeded", "violated"), ("Unreachable", "violated"), ("ServerBusy", "invalid")):
        failing = saved_run(tmp_path / kind, refused(decided(lag_s=0.003), 10, kind), duration_s=70.0)
        assert judge(failing, SLO).verdict == verdict
    very_late = saved_run(tmp_path / "late", refused(decided(lag_s=0.3), 10, "Unreachable"), duration_s=70.0)
    assert "5% of the service's 5000 ms" in judge(very_late, SLO).problems[0]


@pytest.mark.parametrize(("kind", "advice"), [("NoFile", "ulimit -n"), ("NoPort", "ip_local_port_range")])
def test_connections_that_the_generators_machine_cannot_open_make_the_run_invalid(
    tmp_path: Path, kind: str, advice: str
) -> None:
    judgement = judge(saved_run(tmp_path, refused(steady(), 100, kind)), SLO)
    (problem,) = judgement.problems
    assert judgement.verdict == "invalid"
    assert problem.startswith("10 requests failed because the generator ran out of ")
    assert advice in problem

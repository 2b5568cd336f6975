"""The objectives of an SLO applied at any rate, and the trials that they judge."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.spec import SloSpec
from loadtests.search.rate_trial import RateTrial
from loadtests.search.slo_at_rate import (
    bound_rates,
    error_limit_at,
    objective_lines,
    required_rps,
    seconds_needed,
    seconds_to_prove,
    slo_at,
)
from loadtests.slo.judge import judge
from tests.saved_runs import saved_run, steady

SLO = SloSpec(
    p99_ms=50,
    rate_rps=100,
    max_error_rate=0.001,
    objectives=("p50_ms < 10 @ 200 rps", "throughput >= 150", "ndcg@10 >= 0.99 * baseline"),
)


def test_a_slow_service_without_errors_is_measured_long_enough_to_prove_its_rate() -> None:
    slo = SloSpec(p95_ms=50, max_error_rate=0)
    assert seconds_to_prove(slo, 2) == pytest.approx(1.5 * 375 / 2, rel=0.01)  # its p95 takes 90 requests
    assert seconds_to_prove(slo, 200) == pytest.approx(1.5 * 90 * 0.2, rel=0.01)


@pytest.mark.parametrize(("rate", "bound_applies"), [(120, True), (200, True), (200.1, False), (240, False)])
def test_an_objective_that_is_bound_to_a_rate_applies_up_to_that_rate(rate: float, bound_applies: bool) -> None:
    lines = slo_at(SLO, rate, 10).all_objectives()
    names = ["p99_ms", "rate_rps", "max_error_rate"] + ["p50_ms"] * bound_applies
    assert [line.name for line in lines] == names
    assert all(line.rate_rps is None for line in lines)
    # The trial's own rate, less the errors allowed and one limit's worth of requests in flight at the end.
    assert lines[1].limit == pytest.approx(rate * (1 - 0.001 - 0.05 / 10))


@pytest.mark.parametrize(("rate", "limit"), [(150, 0.01), (200, 0.01), (201, None)])
def test_a_limit_on_errors_that_is_bound_to_a_rate_applies_up_to_that_rate(rate: float, limit: float | None) -> None:
    slo = SloSpec(p99_ms=50, objectives=("error_rate < 1% @ 200 rps",))
    assert error_limit_at(slo, rate) == limit
    limits = {line.name: line.limit for line in slo_at(slo, rate, 10).all_objectives()}
    assert (limits.get("error_rate"), limits.get("max_error_rate")) == ((limit, None) if limit else (None, 1))
    assert limits["rate_rps"] == pytest.approx(rate * (1 - 0.01 - 0.05 / 10))


def test_the_tightest_of_several_error_limits_applies() -> None:
    slo = SloSpec(max_error_rate=0.01, objectives=("error_rate < 0.2% @ 200 rps",))
    assert [error_limit_at(slo, rate) for rate in (200, 300)] == [0.002, 0.01]


def test_rates_samples_and_lines_of_an_slo() -> None:
    assert (bound_rates(SLO), required_rps(SLO), required_rps(SloSpec(p99_ms=5))) == ([200], 200, None)
    assert [seconds_needed(SLO, rate) for rate in (100, 10, 5)] == pytest.approx([2 * 299 / 100, 2 * 299 / 10, 60])
    simple = ("p99_ms ≤ 50.0 ms", "rate_rps ≥ 100.0/s", "max_error_rate ≤ 0.100%")
    assert objective_lines(SLO) == (*simple, *SLO.objectives)


def test_a_trial_is_judged_at_its_own_rate(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(0.009, count=600, lag_s=0), rate_rps=60.0)
    assert judge(run, SLO).verdict == "inconclusive"  # 100/s were not offered
    assert RateTrial.of_run(run, slo_at(SLO, 60, 10), "bracket").outcome == "holds"
    assert RateTrial.of_run(run, slo_at(SLO, 60, 10), "prove").outcome == "inconclusive"  # 10 s prove no p99
    assert seconds_to_prove(SLO, 60) == pytest.approx(1.5 * 4603 * 0.2, rel=1e-3)  # 0.1 % of errors
    few = [*steady(0.009, count=592, lag_s=0), *[(p, s, s + 0.1, None) for p, s, *_ in steady(count=600)[592:]]]
    trial = RateTrial.of_run(saved_run(tmp_path, few, rate_rps=60.0), slo_at(SLO, 60, 10), "bracket")
    assert (trial.outcome, trial.violated) == ("fails", False)  # eight slow requests of 600 do not violate a p99
    run = saved_run(tmp_path, steady(0.03, count=600, lag_s=0), rate_rps=60.0)
    assert RateTrial.of_run(run, slo_at(SLO, 60, 10), "prove").outcome == "fails"
    slow = RateTrial.of_run(run, slo_at(SLO, 60, 10), "bracket")
    assert (slow.outcome, slow.failed, slow.p50_ms) == ("fails", ("p50_ms",), pytest.approx(30, rel=2e-3))
    assert slow.violated
    lost = [(p, s, f, "ServerBusy" if i % 2 else None) for i, (p, s, f, _) in enumerate(steady(0.01, count=600))]
    busy = RateTrial.of_run(saved_run(tmp_path, lost, rate_rps=60.0), slo_at(SLO, 60, 10), "bracket")
    assert (busy.overloaded, busy.error_rate, busy.p99_ms) == (True, 0.5, None)
    assert "throughput" in busy.failed

"""The search for the highest rate that holds, on computed queues."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from loadtests.results.schedule import Schedule, Segment
from loadtests.search.highest_rate import SAMPLES, TIME, RateSearch, SearchPlan, TryRate
from loadtests.search.rate_trial import Phase, RateTrial, TrialOutcome
from tests.computed_server import server_of, trial

PLAN = SearchPlan(start_rps=20, duration_s=10)


def queue(service_s: float, p99_ms: float, luck: int) -> TryRate:
    """One server with a queue: the schedule gives the arrivals, `luck` the service time of each request."""

    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        schedule = Schedule((Segment(duration_s=duration_s + 2, rate_rps=rate_rps),), seed=seed)
        arrives = schedule.times_s()
        takes = service_s * np.random.default_rng([seed, luck]).lognormal(0, 0.2, len(arrives))
        before = np.cumsum(takes) - takes
        answered = np.maximum.accumulate(arrives - before) + before + takes
        seen_ms = float(np.percentile((answered - arrives)[arrives > 2], 99)) * 1000
        achieved = np.count_nonzero((answered > 2) & (answered < duration_s + 2)) / duration_s
        outcome: TrialOutcome = "holds" if seen_ms < p99_ms else "fails"
        return trial(rate_rps, outcome, phase, p99_ms=seen_ms, achieved_rps=achieved, duration_s=duration_s)

    return attempt


@pytest.mark.parametrize("start_rps", [3.0, 20.0, 700.0])
def test_the_highest_rate_that_holds_is_found_from_anywhere_and_confirmed(start_rps: float) -> None:
    search = RateSearch(
        SearchPlan(start_rps=start_rps, duration_s=10), server_of(lambda rate, _: "holds" if rate < 95 else "fails")
    )
    found = search.run()
    assert found.capacity_rps is not None
    assert found.first_failing_rps is not None
    assert 95 / 1.05 <= found.capacity_rps < 95 <= found.first_failing_rps <= found.capacity_rps * 1.051
    assert (found.confirmed, found.limited_by) == (True, "p99_ms")
    assert (search.trials[-1].phase, search.trials[-1].duration_s) == ("confirm", 30)


def test_the_result_is_a_rate_that_holds_with_confidence() -> None:
    def search(proved_rps: float) -> RateSearch:
        def judged(rate_rps: float, phase: Phase) -> TrialOutcome:
            return "holds" if rate_rps < (proved_rps if phase == "prove" else 95) else "fails"

        plan = SearchPlan(start_rps=20, duration_s=10, proof_s=lambda rate_rps: 9000 / rate_rps)
        return RateSearch(plan, server_of(judged))

    lower, none = search(88), search(0)
    found, unproved = lower.run(), none.run()
    assert found.capacity_rps is not None
    assert 80 < found.capacity_rps < 88
    assert (found.confirmed, found.limited_by, lower.trials[-1].phase) == (True, "p99_ms", "prove")
    assert lower.trials[-1].duration_s == math.ceil(9000 / found.capacity_rps)
    assert (unproved.capacity_rps, unproved.confirmed, unproved.limited_by) == (None, False, "p99_ms")
    assert [trial.phase for trial in none.trials].count("prove") == 5


@pytest.mark.parametrize(
    ("outcome", "max_s", "proved", "limited_by"),
    [
        ("holds", 1000, 88, ""),
        ("fails", 1000, None, "p99_ms"),
        ("inconclusive", 1000, None, SAMPLES),
        ("holds", 100, None, TIME),
    ],
)
def test_the_rate_of_another_search_can_be_proved(
    outcome: TrialOutcome, max_s: float, proved: float | None, limited_by: str
) -> None:
    plan = SearchPlan(start_rps=88, duration_s=10, max_s=max_s, proof_s=lambda rate_rps: 9000 / rate_rps)
    search = RateSearch(plan, server_of(lambda rate_rps, phase: outcome))
    found = search.prove(88)
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (proved, proved is not None, limited_by)
    assert {trial.phase for trial in search.trials} <= {"prove"}


def test_repeated_on_the_same_queue_three_searches_agree_within_ten_percent() -> None:
    for first in range(0, 30, 3):
        plan = SearchPlan(start_rps=20, duration_s=10, needed_s=lambda rate_rps: 918 / rate_rps)
        searches = [RateSearch(plan, queue(0.02, 500, luck)).run() for luck in range(first, first + 3)]
        found = [each.capacity_rps for each in searches if each.capacity_rps is not None]
        assert len(found) == 3
        assert max(found) <= 1.1 * min(found)
        assert max(found) < 50  # 20 ms a request allow no more


def test_one_stall_does_not_end_the_search_far_too_low() -> None:
    tried: list[float] = []

    def stalls_once(rate_rps: float, phase: Phase) -> TrialOutcome:
        tried.append(rate_rps)
        return "fails" if rate_rps > 95 or tried.count(rate_rps) == 1 else "holds"

    found = RateSearch(PLAN, server_of(stalls_once)).run()
    assert found.capacity_rps is not None
    assert found.capacity_rps > 95 / 1.1


def test_an_overloaded_trial_counts_at_once() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        outcome: TrialOutcome = "holds" if rate_rps < 50 else "fails"
        return trial(rate_rps, outcome, phase, achieved_rps=min(rate_rps, 50), duration_s=duration_s)

    search = RateSearch(PLAN, attempt)
    search.run()
    assert [each.rate_rps for each in search.trials].count(80) == 1
    assert [each.rate_rps for each in search.trials].count(56.6) == 2  # the server nearly keeps up: repeated


def test_from_an_overloaded_server_the_search_steps_down_to_what_it_answered() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        outcome: TrialOutcome = "holds" if rate_rps < 9 else "fails"
        return trial(rate_rps, outcome, phase, achieved_rps=min(rate_rps, 8.0), duration_s=duration_s)

    search = RateSearch(SearchPlan(start_rps=100, duration_s=10), attempt)
    assert search.run().confirmed
    assert [each.rate_rps for each in search.trials][:2] == [100, 8]


def test_the_search_steps_down_from_a_rate_that_a_longer_run_refutes() -> None:
    found = RateSearch(
        PLAN, server_of(lambda rate, phase: "holds" if rate < (95 if phase != "confirm" else 88) else "fails")
    ).run()
    assert found.capacity_rps is not None
    assert 80 < found.capacity_rps < 88
    assert found.confirmed


def test_a_failure_that_the_repetition_refutes_sets_no_limit() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        outcome: TrialOutcome = (
            "invalid" if seed == 0 else "holds" if rate_rps < (115 if phase == "bisect" else 103) else "fails"
        )
        return trial(rate_rps, outcome, phase, duration_s=duration_s)

    found = RateSearch(SearchPlan(start_rps=100, duration_s=10), attempt).run()
    assert (found.confirmed, found.limited_by) == (True, "p99_ms")
    assert found.first_failing_rps is not None
    assert found.first_failing_rps > 103


@pytest.mark.parametrize(("knee_rps", "held_rps"), [(1e9, 198), (195, 189)], ids=["never", "with its last step"])
def test_a_walk_with_too_few_turns_confirms_nothing(knee_rps: float, held_rps: float) -> None:
    def outcome(rate_rps: float, phase: Phase) -> TrialOutcome:  # another process has the machine during the bisection
        return "holds" if rate_rps < (knee_rps if phase == "confirm" else 108) else "fails"

    found = RateSearch(SearchPlan(start_rps=100, duration_s=10), server_of(outcome)).run()
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (held_rps, False, "trials")


def test_at_the_generators_limit_the_capacity_is_a_lower_bound() -> None:
    found = RateSearch(PLAN, server_of(lambda rate, _: "holds" if rate < 95 else "invalid")).run()
    assert found.capacity_rps is not None
    assert 90 < found.capacity_rps < 95
    assert (found.confirmed, found.limited_by, found.first_failing_rps) == (True, "generator", None)


def test_a_failing_rate_below_the_generators_limit_is_found() -> None:
    outcome = server_of(lambda rate, _: "holds" if rate < 95 else "fails" if rate < 120 else "invalid")
    assert RateSearch(PLAN, outcome).run().limited_by == "p99_ms"


@pytest.mark.parametrize(
    ("plan", "limited_by"),
    [({"max_trials": 4}, "trials"), ({"max_s": 45}, "time")],
    ids=["trials", "seconds"],
)
def test_a_search_that_reaches_a_bound_returns_its_best_rate(plan: dict[str, Any], limited_by: str) -> None:
    passed = iter(range(0, 10_000, 10))
    outcome = server_of(lambda rate, _: "holds" if rate < 95 else "fails")
    search = RateSearch(SearchPlan(start_rps=20, duration_s=10, **plan), outcome, clock=lambda: next(passed))
    assert (found := search.run()).limited_by == limited_by
    assert (found.capacity_rps, found.confirmed) == (
        max(each.rate_rps for each in search.trials if each.outcome == "holds"),
        False,
    )


def test_if_no_rate_holds_there_is_no_capacity() -> None:
    search = RateSearch(PLAN, server_of(lambda rate, phase: "fails"))
    found = search.run()
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (None, False, "p99_ms")
    assert 0.1 <= search.trials[-1].rate_rps < 0.2


@pytest.mark.parametrize("start_rps", [30, 50, 100])
@pytest.mark.parametrize("knee_rps", [105, 142, 165, 184, 191, 193, 196, 199, 200])
def test_the_rate_of_a_bound_objective_must_hold_before_a_higher_one_is_tried(
    knee_rps: float, start_rps: float
) -> None:
    # From the knee to 200/s an objective fails that does not apply above 200/s, where the next knee is at 500/s.
    outcome = server_of(lambda rate, _: "fails" if knee_rps <= rate <= 200 or rate >= 500 else "holds")
    search = RateSearch(SearchPlan(start_rps=start_rps, duration_s=10, stops_rps=(200.0,)), outcome)
    found = search.run()
    assert found.capacity_rps is not None
    assert 0.95 * knee_rps / 1.05 < found.capacity_rps < knee_rps
    assert found.confirmed
    assert max(each.rate_rps for each in search.trials) <= 200


def test_two_bound_rates_within_one_step_must_both_hold() -> None:
    outcome = server_of(lambda rate, _: "fails" if 200 < rate <= 201 else "holds")
    found = RateSearch(SearchPlan(start_rps=100, duration_s=10, stops_rps=(200.0, 201.0)), outcome).run()
    assert (found.capacity_rps, found.first_failing_rps, found.confirmed) == (200, 201, True)


def test_a_bound_rate_of_four_digits_is_not_rounded() -> None:
    tried: list[float] = []

    def outcome(rate_rps: float, _: Phase) -> TrialOutcome:
        tried.append(rate_rps)
        return "holds" if rate_rps < 600 or rate_rps > 2048 else "fails"  # the objective does not apply above 2048/s

    found = RateSearch(SearchPlan(start_rps=2048, duration_s=10, stops_rps=(2048,)), server_of(outcome)).run()
    assert found.capacity_rps is not None
    assert found.capacity_rps < 600
    assert max(tried) == 2048

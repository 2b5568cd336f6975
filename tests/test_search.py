"""The search for the highest rate that holds, on queues that are computed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loadtests.schedule import Schedule, Segment
from loadtests.search import Attempt, Plan, Search
from loadtests.trial import (
    Outcome,
    Phase,
    Trial,
)

PLAN = Plan(start_rps=20, duration_s=10)


def trial(rate_rps: float, outcome: Outcome, phase: Phase = "bisect", **changes: Any) -> Trial:
    """One that answered all that it was asked."""
    failed = ("p99_ms",) if outcome == "fails" else ()
    facts = {"achieved_rps": rate_rps, "p50_ms": 5.0, "p99_ms": 20.0, "error_rate": 0.0, "duration_s": 10.0}
    return Trial(rate_rps=rate_rps, phase=phase, outcome=outcome, failed=failed, **facts | changes)


def server_of(outcome: Callable[[float, Phase], Outcome]) -> Attempt:
    """Trials whose outcome is a function of the rate."""
    return lambda rate_rps, phase, duration_s, seed: trial(
        rate_rps, outcome(rate_rps, phase), phase, duration_s=duration_s
    )


def queue(service_s: float, p99_ms: float, luck: int) -> Attempt:
    """One server in front of a queue: the arrivals are the schedule's, how long each request takes is `luck`'s."""

    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        schedule = Schedule((Segment(duration_s=duration_s + 2, rate_rps=rate_rps),), seed=seed)
        arrives = schedule.times_s()
        takes = service_s * np.random.default_rng([seed, luck]).lognormal(0, 0.2, len(arrives))
        before = np.cumsum(takes) - takes
        answered = np.maximum.accumulate(arrives - before) + before + takes
        seen_ms = float(np.percentile((answered - arrives)[arrives > 2], 99)) * 1000
        achieved = np.count_nonzero((answered > 2) & (answered < duration_s + 2)) / duration_s
        outcome: Outcome = "holds" if seen_ms < p99_ms else "fails"
        return trial(rate_rps, outcome, phase, p99_ms=seen_ms, achieved_rps=achieved, duration_s=duration_s)

    return attempt


@pytest.mark.parametrize("start_rps", [3.0, 20.0, 700.0])
def test_the_highest_rate_that_holds_is_found_from_anywhere_and_confirmed(start_rps: float) -> None:
    search = Search(
        Plan(start_rps=start_rps, duration_s=10), server_of(lambda rate, _: "holds" if rate < 95 else "fails")
    )
    found = search.run()
    assert found.capacity_rps is not None
    assert found.first_failing_rps is not None
    assert 95 / 1.05 <= found.capacity_rps < 95 <= found.first_failing_rps <= found.capacity_rps * 1.051
    assert (found.confirmed, found.limited_by) == (True, "p99_ms")
    assert (search.trials[-1].phase, search.trials[-1].duration_s) == ("confirm", 30)


def test_repeated_on_the_same_queue_three_searches_agree_within_ten_percent() -> None:
    for first in range(0, 30, 3):
        plan = Plan(start_rps=20, duration_s=10, needed_s=lambda rate_rps: 918 / rate_rps)
        searches = [Search(plan, queue(0.02, 500, luck)).run() for luck in range(first, first + 3)]
        found = [each.capacity_rps for each in searches if each.capacity_rps is not None]
        assert len(found) == 3
        assert max(found) <= 1.1 * min(found)
        assert max(found) < 50  # what 20 ms a request allow


def shared_machine(service_s: float, p99_ms: float, luck: int) -> Attempt:
    """The same on a machine that is a tenth faster or slower for half a minute at a time, one trial after the other."""
    generator = np.random.default_rng([luck, 1])
    speeds = [0.0]
    for _ in range(3000):
        speeds.append(math.exp(-1 / 30) * speeds[-1] + math.sqrt(1 - math.exp(-2 / 30)) * generator.standard_normal())
    passed_s = 0.0

    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        nonlocal passed_s
        slower = float(np.exp(0.1 * np.mean(speeds[int(passed_s) : int(passed_s + duration_s) + 1])))
        passed_s += duration_s + 5
        return queue(service_s * slower, p99_ms, luck)(rate_rps, phase, duration_s, seed)

    return attempt


def test_on_a_shared_machine_searches_still_find_a_rate_and_mostly_agree() -> None:
    found = []
    for luck in range(18):
        plan = Plan(start_rps=20, duration_s=10, needed_s=lambda rate_rps: 918 / rate_rps)
        found.append(Search(plan, shared_machine(0.005, 50, luck)).run())
    assert all(each.confirmed for each in found)
    rates = np.log([each.capacity_rps or 0 for each in found])
    assert rates.std() < 0.07  # a single confirming run: 0.1, and one search in eight confirms nothing


def test_one_stall_does_not_end_the_search_far_too_low() -> None:
    tried: list[float] = []

    def stalls_once(rate_rps: float, phase: Phase) -> Outcome:
        tried.append(rate_rps)
        return "fails" if rate_rps > 95 or tried.count(rate_rps) == 1 else "holds"

    found = Search(PLAN, server_of(stalls_once)).run()
    assert found.capacity_rps is not None
    assert found.capacity_rps > 95 / 1.1


def test_an_overloaded_trial_counts_at_once() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        outcome: Outcome = "holds" if rate_rps < 50 else "fails"
        return trial(rate_rps, outcome, phase, achieved_rps=min(rate_rps, 50), duration_s=duration_s)

    search = Search(PLAN, attempt)
    search.run()
    assert [each.rate_rps for each in search.trials].count(80) == 1
    assert [each.rate_rps for each in search.trials].count(56.6) == 2  # nearly kept up with: repeated


def test_from_an_overloaded_server_the_search_steps_down_to_what_it_answered() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        outcome: Outcome = "holds" if rate_rps < 9 else "fails"
        return trial(rate_rps, outcome, phase, achieved_rps=min(rate_rps, 8.0), duration_s=duration_s)

    search = Search(Plan(start_rps=100, duration_s=10), attempt)
    assert search.run().confirmed
    assert [each.rate_rps for each in search.trials][:2] == [100, 8]


def test_what_a_longer_run_refutes_is_stepped_down_from() -> None:
    found = Search(
        PLAN, server_of(lambda rate, phase: "holds" if rate < (95 if phase != "confirm" else 88) else "fails")
    ).run()
    assert found.capacity_rps is not None
    assert 80 < found.capacity_rps < 88
    assert found.confirmed


def test_what_a_repetition_refuted_limits_nothing() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        outcome: Outcome = (
            "invalid" if seed == 0 else "holds" if rate_rps < (115 if phase == "bisect" else 103) else "fails"
        )
        return trial(rate_rps, outcome, phase, duration_s=duration_s)

    found = Search(Plan(start_rps=100, duration_s=10), attempt).run()
    assert (found.confirmed, found.limited_by) == (True, "p99_ms")
    assert found.first_failing_rps is not None
    assert found.first_failing_rps > 103


@pytest.mark.parametrize(("knee_rps", "held_rps"), [(1e9, 198), (195, 189)], ids=["never", "with its last step"])
def test_a_walk_that_hardly_turned_confirms_nothing(knee_rps: float, held_rps: float) -> None:
    def outcome(rate_rps: float, phase: Phase) -> Outcome:  # something else had the machine during the bisection
        return "holds" if rate_rps < (knee_rps if phase == "confirm" else 108) else "fails"

    found = Search(Plan(start_rps=100, duration_s=10), server_of(outcome)).run()
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (held_rps, False, "trials")


def test_above_a_limit_of_the_generator_the_answer_is_at_least() -> None:
    found = Search(PLAN, server_of(lambda rate, _: "holds" if rate < 95 else "invalid")).run()
    assert found.capacity_rps is not None
    assert 90 < found.capacity_rps < 95
    assert (found.confirmed, found.limited_by, found.first_failing_rps) == (True, "generator", None)


def test_a_failing_rate_below_the_generators_limit_is_found_all_the_same() -> None:
    outcome = server_of(lambda rate, _: "holds" if rate < 95 else "fails" if rate < 120 else "invalid")
    assert Search(PLAN, outcome).run().limited_by == "p99_ms"


@pytest.mark.parametrize(
    ("plan", "limited_by"),
    [({"max_trials": 4}, "trials"), ({"max_s": 45}, "time")],
    ids=["trials", "seconds"],
)
def test_a_search_is_bounded_and_says_what_it_knew(plan: dict[str, Any], limited_by: str) -> None:
    passed = iter(range(0, 10_000, 10))
    outcome = server_of(lambda rate, _: "holds" if rate < 95 else "fails")
    search = Search(Plan(start_rps=20, duration_s=10, **plan), outcome, clock=lambda: next(passed))
    assert (found := search.run()).limited_by == limited_by
    assert (found.capacity_rps, found.confirmed) == (
        max(each.rate_rps for each in search.trials if each.outcome == "holds"),
        False,
    )


def test_where_no_rate_holds_there_is_no_capacity() -> None:
    search = Search(PLAN, server_of(lambda rate, phase: "fails"))
    found = search.run()
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (None, False, "p99_ms")
    assert 0.1 <= search.trials[-1].rate_rps < 0.2


@pytest.mark.parametrize("start_rps", [30, 50, 100])
@pytest.mark.parametrize("knee_rps", [105, 142, 165, 184, 191, 193, 196, 199, 200])
def test_no_rate_beyond_one_that_an_objective_is_bound_to_is_tried_before_that_one_holds(
    knee_rps: float, start_rps: float
) -> None:
    # From the knee to 200/s something fails that is not asked for above, where the next knee is at 500/s.
    outcome = server_of(lambda rate, _: "fails" if knee_rps <= rate <= 200 or rate >= 500 else "holds")
    search = Search(Plan(start_rps=start_rps, duration_s=10, stops_rps=(200.0,)), outcome)
    found = search.run()
    assert found.capacity_rps is not None
    assert 0.95 * knee_rps / 1.05 < found.capacity_rps < knee_rps
    assert found.confirmed
    assert max(each.rate_rps for each in search.trials) <= 200


def test_of_two_bound_rates_within_a_step_the_second_is_not_passed_either() -> None:
    outcome = server_of(lambda rate, _: "fails" if 200 < rate <= 201 else "holds")
    found = Search(Plan(start_rps=100, duration_s=10, stops_rps=(200.0, 201.0)), outcome).run()
    assert (found.capacity_rps, found.first_failing_rps, found.confirmed) == (200, 201, True)


def test_a_bound_rate_of_four_digits_is_tried_as_it_is() -> None:
    tried: list[float] = []

    def outcome(rate_rps: float, _: Phase) -> Outcome:
        tried.append(rate_rps)
        return "holds" if rate_rps < 600 or rate_rps > 2048 else "fails"  # above it the objective is not asked for

    found = Search(Plan(start_rps=2048, duration_s=10, stops_rps=(2048,)), server_of(outcome)).run()
    assert found.capacity_rps is not None
    assert found.capacity_rps < 600
    assert max(tried) == 2048

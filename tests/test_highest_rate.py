"""The search for the highest rate that holds, on computed queues."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loadtests.results.schedule import Segment, send_times_s
from loadtests.search.highest_rate import SAMPLES, TIME, HighestRate, RateSearch, SearchPlan, TryRate, rounded
from loadtests.search.rate_trial import Phase, RateTrial, TrialOutcome
from tests.computed_server import server_of, trial


def searched(
    outcome: Callable[[float, Phase], TrialOutcome], start_rps: float = 20, **plan: Any
) -> tuple[HighestRate, list[RateTrial]]:
    """The result of a search, and its trials, on a server with these outcomes."""
    search = RateSearch(SearchPlan(start_rps=start_rps, duration_s=10, **plan), server_of(outcome))
    return search.run(), search.trials


def up_to(limit_rps: float, **of_phase: float) -> Callable[[float, Phase], TrialOutcome]:
    """A server that holds below a limit, which may differ for a phase."""
    return lambda rate_rps, phase: "holds" if rate_rps < of_phase.get(phase, limit_rps) else "fails"


def queue(service_s: float, p99_ms: float, luck: int) -> TryRate:
    """One server with a queue: the schedule gives the arrivals, `luck` the service time of each request."""

    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        arrives = send_times_s([Segment(duration_s=duration_s + 2, rate_rps=rate_rps)], seed=seed)
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
    found, trials = searched(up_to(95), start_rps)
    assert 95 / 1.05 <= (found.capacity_rps or 0) < 95 <= (found.first_failing_rps or 0) <= 95 * 1.051
    assert (found.confirmed, found.limited_by) == (True, "p99_ms")
    assert (trials[-1].phase, trials[-1].duration_s) == ("confirm", 30)


@pytest.mark.parametrize("confirm", [True, False])
def test_the_result_is_a_rate_that_holds_with_confidence(confirm: bool) -> None:
    proof: dict[str, Any] = {"proof_s": lambda rate_rps: 9000 / rate_rps, "confirm": confirm}
    found, trials = searched(up_to(95, prove=88), **proof)
    assert 80 < (found.capacity_rps or 0) < 88
    assert (found.confirmed, found.limited_by, trials[-1].phase) == (True, "p99_ms", "prove")
    assert trials[-1].duration_s == math.ceil(9000 / (found.capacity_rps or 0))
    assert {each.phase for each in trials} == {"bracket", "bisect", "prove", *(["confirm"] if confirm else [])}


def test_a_search_of_short_runs_leaves_the_time_for_the_proof() -> None:
    now_s = 0.0
    server = server_of(up_to(95))

    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        nonlocal now_s
        now_s += duration_s
        return server(rate_rps, phase, duration_s, seed)

    plan = SearchPlan(start_rps=20, duration_s=10, confirm=False, proof_s=lambda rate_rps: 100, max_s=135)
    search = RateSearch(plan, attempt, clock=lambda: now_s)
    found = search.run()
    assert [each.phase for each in search.trials] == ["bracket", "bracket", "bracket", "prove"]
    assert (found.confirmed, found.capacity_rps, now_s) == (True, rounded(80 / 1.05), 130)


@pytest.mark.parametrize(
    ("outcome", "max_s", "limited_by"), [("fails", 1e9, "p99_ms"), ("inconclusive", 1e9, SAMPLES), ("holds", 250, TIME)]
)
def test_a_rate_that_is_not_proved_is_no_result(outcome: TrialOutcome, max_s: float, limited_by: str) -> None:
    def judged(rate_rps: float, phase: Phase) -> TrialOutcome:
        return outcome if phase == "prove" else up_to(95)(rate_rps, phase)

    found, trials = searched(judged, proof_s=lambda rate_rps: 300, confirm=False, max_s=max_s)
    assert (found.confirmed, found.limited_by) == (False, limited_by)
    if limited_by != TIME:
        assert found.capacity_rps is None
        assert [each.phase for each in trials].count("prove") == 5


def test_repeated_on_the_same_queue_three_searches_agree_within_ten_percent() -> None:
    for first in range(0, 30, 3):
        plan = SearchPlan(start_rps=20, duration_s=10, needed_s=lambda rate_rps: 918 / rate_rps)
        found = [RateSearch(plan, queue(0.02, 500, first + luck)).run().capacity_rps or 0 for luck in range(3)]
        assert max(found) <= 1.1 * min(found)
        assert max(found) < 50  # 20 ms a request allow no more


def test_one_stall_does_not_end_the_search_far_too_low() -> None:
    tried: list[float] = []

    def stalls_once(rate_rps: float, phase: Phase) -> TrialOutcome:
        tried.append(rate_rps)
        return "fails" if rate_rps > 95 or tried.count(rate_rps) == 1 else "holds"

    assert (searched(stalls_once)[0].capacity_rps or 0) > 95 / 1.1


@pytest.mark.parametrize(("limit_rps", "repeated"), [(50, {80: 1, 56.6: 2}), (9, {20: 1})])
def test_an_overloaded_trial_counts_at_once_and_the_next_rate_is_what_it_answered(
    limit_rps: float, repeated: dict[float, int]
) -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        outcome: TrialOutcome = "holds" if rate_rps < limit_rps else "fails"
        return trial(rate_rps, outcome, phase, achieved_rps=min(rate_rps, limit_rps - 1), duration_s=duration_s)

    search = RateSearch(SearchPlan(start_rps=20, duration_s=10), attempt)
    assert search.run().confirmed
    rates = [each.rate_rps for each in search.trials]
    assert {rate: rates.count(rate) for rate in repeated} == repeated  # at 56.6 the server nearly keeps up: repeated
    assert rates[1] == (8 if limit_rps == 9 else 40)


def test_the_search_steps_down_from_a_rate_that_a_longer_run_refutes() -> None:
    found, _ = searched(up_to(95, confirm=88))
    assert 80 < (found.capacity_rps or 0) < 88
    assert found.confirmed


def test_a_failure_that_the_repetition_refutes_sets_no_limit() -> None:
    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        outcome: TrialOutcome = "invalid" if seed == 0 else up_to(103, bisect=115)(rate_rps, phase)
        return trial(rate_rps, outcome, phase, duration_s=duration_s)

    found = RateSearch(SearchPlan(start_rps=100, duration_s=10), attempt).run()
    assert (found.confirmed, found.limited_by) == (True, "p99_ms")
    assert (found.first_failing_rps or 0) > 103


@pytest.mark.parametrize(("knee_rps", "held_rps"), [(1e9, 198), (195, 189)], ids=["never", "with its last step"])
def test_a_walk_with_too_few_turns_confirms_nothing(knee_rps: float, held_rps: float) -> None:
    found, _ = searched(up_to(108, confirm=knee_rps), 100)  # another process has the machine during the bisection
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (held_rps, False, "walk")


def test_at_the_generators_limit_the_capacity_is_a_lower_bound() -> None:
    found, _ = searched(lambda rate, _: "holds" if rate < 95 else "invalid")
    assert 90 < (found.capacity_rps or 0) < 95
    assert (found.confirmed, found.limited_by, found.first_failing_rps) == (True, "generator", None)
    below, _ = searched(lambda rate, _: "holds" if rate < 95 else "fails" if rate < 120 else "invalid")
    assert below.limited_by == "p99_ms"


@pytest.mark.parametrize(("plan", "limited_by"), [({"max_trials": 4}, "trials"), ({"max_s": 45}, "time")])
def test_a_search_that_reaches_a_bound_returns_its_best_rate(plan: dict[str, Any], limited_by: str) -> None:
    passed = iter(range(0, 10_000, 10))
    bounded = SearchPlan(start_rps=20, duration_s=10, **plan)
    search = RateSearch(bounded, server_of(up_to(95)), clock=lambda: next(passed))
    found, held = search.run(), [each.rate_rps for each in search.trials if each.outcome == "holds"]
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (max(held), False, limited_by)


def test_if_no_rate_holds_there_is_no_capacity() -> None:
    found, trials = searched(up_to(0))
    assert (found.capacity_rps, found.confirmed, found.limited_by) == (None, False, "p99_ms")
    assert 0.1 <= trials[-1].rate_rps < 0.2


@pytest.mark.parametrize("start_rps", [30, 50, 100])
@pytest.mark.parametrize("knee_rps", [105, 142, 165, 184, 191, 193, 196, 199, 200])
def test_the_rate_of_a_bound_objective_must_hold_before_a_higher_one_is_tried(
    knee_rps: float, start_rps: float
) -> None:
    def outcome(rate_rps: float, _: Phase) -> TrialOutcome:
        # From the knee to 200/s an objective fails that does not apply above 200/s, where the next knee is at 500/s.
        return "fails" if knee_rps <= rate_rps <= 200 or rate_rps >= 500 else "holds"

    found, trials = searched(outcome, start_rps, stops_rps=(200.0,))
    assert 0.95 * knee_rps / 1.05 < (found.capacity_rps or 0) < knee_rps
    assert found.confirmed
    assert max(each.rate_rps for each in trials) <= 200


def test_bound_rates_within_one_step_must_all_hold_and_are_not_rounded() -> None:
    found, _ = searched(lambda rate, _: "fails" if 200 < rate <= 201 else "holds", 100, stops_rps=(200.0, 201.0))
    assert (found.capacity_rps, found.first_failing_rps, found.confirmed) == (200, 201, True)
    found, trials = searched(lambda rate, _: "fails" if 600 <= rate <= 2048 else "holds", 2048, stops_rps=(2048,))
    assert (found.capacity_rps or 0) < 600
    assert max(each.rate_rps for each in trials) == 2048

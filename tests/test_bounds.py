"""How often a verdict is wrong about a service, counted over thousands of simulated runs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from loadtests.slo.bounds import completed_bounds, more_requests, ratio_bounds, share_bounds

RUNS, RATE, SECONDS, LOOKS = 1000, 100, 90, 3  # looks after 90, 180 and 360 s
ALLOWED = 0.01  # of a p99
SHARES = (0.005, 0.009, 0.01, 0.011, 0.015, 0.02)
BURSTS = {"independent": 1, "bursts of 10": 10, "bursts of 20": 20}
WRONG = 0.05
NOISE = 2.6 * (WRONG * (1 - WRONG) / RUNS) ** 0.5  # 99.5 % of the estimates of a true 5 % are below


STALLS_S, LENGTHS_S = (0.2, 0.5, 1, 2), (90, 400, 800, 1600)  # mean bursts, and runs, in seconds
SLOW_RATE = 20  # requests/s of the long runs: it makes no difference, and they are shorter to simulate
ENOUGH = 800  # times the burst: the length that docs/loadtests.md asks for


@cache
def slow_each_second(
    share: float, burst: int, seconds: int = SECONDS * 2 ** (LOOKS - 1), rate: int = RATE
) -> np.ndarray:
    """Slow requests of each second: each request, or a burst of `burst` requests on average (geometric)."""
    generator = np.random.default_rng(round(1e6 * share) + burst)
    if burst == 1:
        return generator.binomial(rate, share, (RUNS, seconds))
    begins = share / (1 - share) / burst  # a fast request is followed by a slow one
    slow, counts = generator.random(RUNS) < share, np.zeros((RUNS, seconds), int)
    for second in range(seconds):
        drawn = generator.random((rate, RUNS))
        starts, remains, found = drawn < begins, drawn >= 1 / burst, np.empty((rate, RUNS), bool)
        for place in range(rate):
            found[place] = slow = np.where(slow, remains[place], starts[place])
        counts[:, second] = found.sum(0)
    return counts


def judged(slow: np.ndarray, confidence: float, rate: int = RATE) -> np.ndarray:
    """1 holds, -1 violated, 0 inconclusive, for each run."""
    planned = np.full(slow.shape, rate)
    bounds = share_bounds(slow, planned, seconds=slow.shape[1], confidence=confidence)
    return np.where(bounds.high <= ALLOWED, 1, np.where(bounds.low > ALLOWED, -1, 0))


def fixed(share: float, burst: int) -> np.ndarray:
    return judged(slow_each_second(share, burst)[:, :SECONDS], 1 - WRONG)


def until_decided(share: float, burst: int) -> np.ndarray:
    """The verdicts on runs that go on until they are decided, or the last look."""
    slow, found = slow_each_second(share, burst), np.zeros(RUNS, int)
    for look in range(LOOKS):
        found = np.where(found, found, judged(slow[:, : SECONDS * 2**look], 1 - WRONG / LOOKS))
    return found


RULES = {"fixed": fixed, "until decided": until_decided}


def table() -> list[str]:
    """The rows of the table in docs/explanation/load-testing.md: passes and fails in %."""
    rows = []
    for rule, verdicts in RULES.items():
        for name, burst in BURSTS.items():
            found = [verdicts(share, burst) for share in SHARES]
            cells = [f"{100 * (each == 1).mean():.1f} / {100 * (each == -1).mean():.1f}" for each in found]
            rows.append(f"| {rule} | {name} | {' | '.join(cells)} |")
    return rows


def wrong_passes(stall_s: float) -> list[float]:
    """The share of runs that hold, by LENGTHS_S, at a share of 1 % of slow requests in bursts of `stall_s`."""
    slow = slow_each_second(ALLOWED, round(stall_s * SLOW_RATE), LENGTHS_S[-1], SLOW_RATE)
    return [float((judged(slow[:, :length], 1 - WRONG, SLOW_RATE) == 1).mean()) for length in LENGTHS_S]


def stalls_table() -> list[str]:
    """The rows of the table of bursts in docs/loadtests.md, in %."""
    return [
        f"| {stall:g} s | {' | '.join(f'{100 * each:.0f}' for each in wrong_passes(stall))} |" for stall in STALLS_S
    ]


@pytest.mark.parametrize("stall_s", STALLS_S)
def test_a_run_of_800_bursts_is_long_enough(stall_s: float) -> None:
    enough = [length >= ENOUGH * stall_s for length in LENGTHS_S]
    assert max(np.array(wrong_passes(stall_s))[enough]) <= WRONG + NOISE


@pytest.mark.parametrize("burst", BURSTS.values(), ids=BURSTS)
@pytest.mark.parametrize("rule", RULES)
def test_at_most_one_verdict_in_twenty_is_wrong(rule: str, burst: int) -> None:
    verdicts = {share: RULES[rule](share, burst) for share in SHARES}
    passes = {share: float((found == 1).mean()) for share, found in verdicts.items() if share >= ALLOWED}
    fails = {share: float((found == -1).mean()) for share, found in verdicts.items() if share <= ALLOWED}
    assert max(passes.values()) <= WRONG + NOISE, passes
    assert max(fails.values()) <= WRONG + NOISE, fails


def test_the_documentation_prints_the_counted_table() -> None:
    for page, rows in (("explanation/load-testing.md", table()), ("loadtests.md", stalls_table())):
        text = Path("docs", page).read_text()
        assert [row for row in rows if row not in text] == []


def test_without_a_slow_request_the_bound_assumes_bursts() -> None:
    bounds = share_bounds(np.zeros(60, int), np.full(60, 100), seconds=60.0)
    assert (float(bounds.low), float(bounds.bursts)) == (0, 20)  # 0.2 s at 100/s
    assert float(bounds.high) == pytest.approx(1 - 0.05 ** (1 / 300))
    alone = share_bounds(np.zeros(299, int), np.ones(299, int), seconds=299.0)
    assert (float(alone.bursts), float(alone.high) <= 0.01) == (1, True)


def test_the_bounds_of_independent_requests_are_nearly_clopper_and_pearsons() -> None:
    slow = np.tile([9, 10, 11, 10], 250)  # 10,000 of 100,000
    bounds = share_bounds(slow, np.full(1000, 100), seconds=1000.0)
    assert (float(bounds.low), float(bounds.high)) == pytest.approx((0.0984, 0.1016), abs=2e-4)


def test_the_requests_that_would_decide_do_decide() -> None:
    slow, planned = np.tile([0, 0, 0, 0, 1], 4), np.full(20, 50)  # 0.4 %
    bounds = share_bounds(slow, planned, seconds=20.0)
    more = more_requests(4, 1000, bounds, ALLOWED, 0.95)
    assert float(bounds.high) > ALLOWED
    assert more is not None
    longer = 1 + round(more / 1000 + 0.5)
    assert float(share_bounds(np.tile(slow, longer), np.tile(planned, longer), seconds=20.0 * longer).high) < ALLOWED
    assert more_requests(10, 1000, bounds, ALLOWED, 0.95) is None  # exactly at the limit
    one = share_bounds(np.zeros(1), np.ones(1), seconds=1.0)
    assert more_requests(0, 1, one, 0.001, 0.95) == pytest.approx(2994, rel=0.02)


def test_a_means_bounds_hold_the_true_mean_in_nineteen_of_twenty_runs() -> None:
    generator, found = np.random.default_rng(1), []
    for _ in range(500):
        weights = generator.poisson(50, 60)
        totals = np.array([generator.exponential(3.0, weight).sum() for weight in weights])
        low, high = ratio_bounds(totals, weights)
        found.append((low <= 3.0, high >= 3.0))
    assert np.mean(found, axis=0) == pytest.approx([0.95, 0.95], abs=0.03)
    assert np.isnan(ratio_bounds(np.array([1.0, 0.0]), np.array([1.0, 0.0]))).all()  # one request proves nothing


@pytest.mark.parametrize(
    ("rate", "answer_s", "lost", "least", "most"),
    [
        (5, 0.06, 0.0, 0.95, 1.0),  # a service that answers all holds its rate, also with few requests
        (20, 0.5, 0.0, 0.95, 1.0),
        (100, 1.0, 0.0, 0.99, 1.0),
        (20, 0.06, 0.01, 0.0, 0.1),  # exactly at the limit
        (100, 0.06, 0.01, 0.0, 0.1),
        (20, 0.06, 0.03, 0.0, 0.0),
    ],
)
def test_a_service_that_answers_99_percent_of_the_rate_holds_it(
    rate: int, answer_s: float, lost: float, least: float, most: float
) -> None:
    generator, seconds, found = np.random.default_rng(1), 90, []

    def counts(times_s: np.ndarray) -> np.ndarray:
        return np.histogram(times_s, np.arange(seconds + 1))[0].astype(float)

    for _ in range(200):
        planned_s = generator.uniform(0, seconds, rate * seconds)
        answered_s = planned_s[generator.random(len(planned_s)) >= lost]
        before_s = generator.uniform(-5, 0, 5 * rate)  # the warm-up
        sent_s = np.concatenate([before_s, answered_s])
        completed_s = sent_s + answer_s * generator.lognormal(0, 0.3, len(sent_s))
        low, high = completed_bounds(counts(completed_s), counts(answered_s), counts(planned_s))
        assert low <= high
        found.append(low >= 0.99)
    assert least <= np.mean(found) <= most


def test_a_service_slower_than_its_load_is_below_its_rate() -> None:
    planned, completed = np.full(60, 100.0), np.full(60, 95.0)  # the queue grows
    _, high = completed_bounds(completed, planned, planned)
    assert high < 0.99
    assert np.isnan(completed_bounds(np.ones(1), np.ones(1), np.ones(1))).all()


def test_a_rate_and_a_mean_have_no_negative_bound() -> None:
    planned, completed = np.full(5, 100.0), np.array([98.0, 0.0, 0.0, 0.0, 0.0])  # the server died
    low, high = completed_bounds(completed, completed, planned)
    assert (low, ratio_bounds(completed, planned)[0]) == (0.0, 0.0)
    assert high > 0.5

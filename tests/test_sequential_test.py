"""The sequential test of `make tune`: its errors over simulated comparisons, and when it ends.

`settled` with 4000 runs gives a row of the table in docs/research/2026-11-tune-sequential-test.md.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from loadtests.tune.sequential_test import LEAST_GAIN, LEAST_PAIRS, judge, nominal_level

ERROR, MOST_PAIRS = 0.05, 24


def settled(ratio: float, spread: float, stalls: float, runs: int) -> tuple[Counter[str], float]:
    """Outcomes of comparisons with a true p99 ratio, candidate / default, and their median number of pairs.

    `spread`: standard deviation of a pair's log ratio. `stalls`: share of pairs that another program disturbs, with a
    standard deviation of 1.
    """
    generator, level = np.random.default_rng(round(1000 * ratio)), nominal_level(ERROR, MOST_PAIRS)
    found, counts = Counter[str](), list[int]()
    for _ in range(runs):
        noise = np.where(generator.random(MOST_PAIRS) < stalls, 1.0, spread) * generator.standard_normal(MOST_PAIRS)
        gains = list(np.exp(noise) / ratio)
        for count in range(LEAST_PAIRS, MOST_PAIRS + 1):
            outcome = judge(gains[:count], level).outcome
            if outcome != "undecided":
                break
        found[outcome] += 1
        counts.append(count)
    return found, float(np.median(counts))


@pytest.mark.parametrize("stalls", [0, 0.1])
@pytest.mark.parametrize("ratio", [1.0, 1 / LEAST_GAIN])
def test_a_gain_that_is_none_is_rarely_proved(ratio: float, stalls: float) -> None:
    found, _ = settled(ratio, 0.2, stalls, 400)
    assert found["better"] / 400 <= ERROR / 2 + 0.02  # one side of the interval, and the noise of 400 runs
    assert found["worse"] / 400 <= ERROR / 2 + 0.02


def test_half_the_latency_is_proved_in_a_few_pairs() -> None:
    found, pairs = settled(0.5, 0.2, 0, 200)
    assert (found["better"], pairs) == (200, LEAST_PAIRS)


def test_all_intervals_of_a_test_hold_together() -> None:
    generator, level = np.random.default_rng(5), nominal_level(0.2, 12)
    missed = 0
    for _ in range(500):
        gains = list(np.exp(generator.standard_normal(12)))
        judged = [judge(gains[:count], level) for count in range(LEAST_PAIRS, 13)]
        missed += any(not each.low <= 1 <= each.high for each in judged)
    assert missed / 500 == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize(
    ("gains", "outcome"),
    [
        ([2.0, 2.1, 1.9, 2.0], "better"),
        ([0.8, 0.81, 0.79, 0.8], "worse"),
        ([1.0, 1.01, 1.0, 1.01], "no difference"),
        ([1.04, 1.041, 1.04, 1.041], "no difference"),
        ([1.0, 2.0, 0.5, 1.5], "undecided"),
    ],
    ids=["better", "worse", "the same", "hardly better", "noise"],
)
def test_a_comparison_ends_when_its_interval_settles_it(gains: list[float], outcome: str) -> None:
    assert judge(gains, nominal_level(ERROR, MOST_PAIRS)).outcome == outcome

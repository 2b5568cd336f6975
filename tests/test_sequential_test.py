"""The sequential test of `make tune`: its errors over simulated comparisons, and when it ends.

`settled` with 4000 runs gives a row of the table in docs/research/2026-11-tune-sequential-test.md.
"""

from __future__ import annotations

import math
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
            outcome = judge(gains[:count], level)[1]
            if outcome != "undecided":
                break
        found[outcome] += 1
        counts.append(count)
    return found, float(np.median(counts))


@pytest.mark.parametrize(("ratio", "stalls"), [(1.0, 0), (1.0, 0.1), (1 / LEAST_GAIN, 0)])
def test_a_gain_that_is_none_is_rarely_proved(ratio: float, stalls: float) -> None:
    found, _ = settled(ratio, 0.2, stalls, 400)
    assert max(found["better"], found["worse"]) / 400 <= ERROR / 2 + 0.02  # the noise of 400 runs


def test_half_the_latency_is_proved_in_the_fewest_pairs() -> None:
    found, pairs = settled(0.5, 0.2, 0, 200)
    assert (found["better"], pairs) == (200, LEAST_PAIRS)


@pytest.mark.parametrize(
    ("gains", "outcome"),
    [
        ([2.0, 2.1, 1.9, 2.0, 2.2, 1.8, 2.0, 2.1, 1.9], "better"),
        ([0.8, 0.81, 0.79, 0.8, 0.82, 0.78, 0.8, 0.81, 0.79], "worse"),
        ([1.0, 1.01, 1.0, 1.01, 1.02, 0.99, 1.0, 1.01, 1.0], "no difference"),
        ([1.04, 1.041, 1.04, 1.041, 1.042, 1.039, 1.04, 1.041, 1.04], "no difference"),
        ([1.0, 2.0, 0.5, 1.5, 0.7, 1.0, 2.0, 0.5, 1.5], "undecided"),
        # MiniLM on two quiet cores, batches of 32 over batches of 4: the setting was better in every pair, and one run
        # of the default was three times as slow as the others.
        ([1.57, 1.34, 1.04, 1.33, 1.22, 3.91, 1.26, 1.20, 1.11, 1.08], "better"),
    ],
)
def test_a_comparison_ends_when_its_interval_settles_it(gains: list[float], outcome: str) -> None:
    assert judge(gains, nominal_level(ERROR, MOST_PAIRS))[1] == outcome


def test_the_interval_is_that_of_signed_ranks() -> None:
    """25 of the 1024 ways to choose 10 signs give a rank sum of up to 8: a chance of 0.0244."""
    gains = [float(gain) for gain in np.exp([0.1, -0.3, 0.5, 0.7, 1.1, -0.2, 0.4, 0.9, 1.3, 0.6])]
    interval, _ = judge(gains, 2 * 0.0245)
    means = sorted(math.sqrt(one * other) for k, one in enumerate(gains) for other in gains[k:])
    assert (interval.low, interval.high) == pytest.approx((means[8], means[-9]))
    assert interval.ratio == pytest.approx(means[27])

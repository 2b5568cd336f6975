"""A sequential test on pairs of latencies: is a candidate better than the default?

Contract: the gain is default / candidate, so more is better. After each pair, from LEAST_PAIRS on, `judge` gives its
interval by Wilcoxon's signed ranks over the log ratios, and ends the test as soon as that interval settles it. A pair
that a stall disturbs counts no more than any other. All intervals of a test hold together with its confidence, however
early it ends: they are repeated confidence intervals (Jennison and Turnbull, Interim analyses: the repeated confidence
interval approach, 1989) with one nominal level for all looks (Pocock, Group sequential methods in the design and
analysis of clinical trials, 1977). The level is exact for log ratios that are as likely to lie above their median as
below it, by any distance. docs/research/2026-11-tune-sequential-test.md counts the errors.

Example:
    judge([1.9, 2.1, 2.0, 2.2, 1.8, 2.3, 1.9, 2.0, 2.1], nominal_level(0.05, 24))      # Interval(...), "better"
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from loadtests.slo.paired_intervals import Interval

Outcome = Literal["better", "worse", "no difference", "undecided"]
LEAST_PAIRS = 9  # with fewer, the intervals of two comparisons at 95 % have no ends
LEAST_GAIN = 1.05  # a smaller one does not justify a change: the whole interval of a gain is above it
PRACTICAL_GAIN = 1.1  # one that is certainly below it is not worth more time
_SIMULATED = 50_000


@lru_cache
def nominal_level(error: float, most_pairs: int) -> float:
    """The error of each interval with which all of them, after LEAST_PAIRS to `most_pairs` pairs, are wrong with
    probability `error`, at most: that quantile of the smallest p-value of a simulated test without a difference."""
    drawn = np.random.default_rng(0).standard_normal((_SIMULATED, most_pairs))
    size, gained = np.abs(drawn), drawn > 0
    ranks, smallest = np.zeros(_SIMULATED, int), np.ones(_SIMULATED)  # ranks: the sum of those of the gains
    for count in range(1, most_pairs + 1):
        new, old = count - 1, slice(count - 1)
        above = size[:, old] > size[:, [new]]
        ranks += gained[:, new] * (count - above.sum(1)) + (above & gained[:, old]).sum(1)
        if count >= LEAST_PAIRS:
            fewer = np.minimum(ranks, count * (count + 1) // 2 - ranks)
            smallest = np.minimum(smallest, 2 * _chance(count)[fewer])
    levels, times = np.unique(smallest, return_counts=True)
    return float(levels[times.cumsum() <= error * _SIMULATED].max(initial=0))


@lru_cache
def _chance(count: int) -> np.ndarray:  # (1 + count (count + 1) / 2,)
    """The chance that signed ranks 1 ... `count` sum up to at most 0, 1, 2 ... if each sign is a toss of a coin."""
    ways = np.ones(1)
    for rank in range(1, count + 1):
        ways = np.pad(ways, (0, rank)) + np.pad(ways, (rank, 0))
    return ways.cumsum() / 2.0**count


def judge(gains: Sequence[float], level: float) -> tuple[Interval, Outcome]:
    """The interval of LEAST_PAIRS or more gains at a nominal level, and what it settles.

    The ratio is the median of the geometric means of all pairs of gains (Hodges and Lehmann, Estimates of location
    based on rank tests, 1963). The ends are two of these means.
    """
    logs = np.log(gains)
    first, second = np.triu_indices(len(logs))
    means = np.exp(np.sort(logs[first] + logs[second]) / 2)
    beyond = int((_chance(len(logs)) <= level / 2).sum())  # this many means are outside at each end, but for the last
    ends = (means[beyond - 1], means[-beyond]) if beyond else (0.0, np.inf)
    found = Interval(ratio=float(np.median(means)), low=float(ends[0]), high=float(ends[1]))
    if found.low >= LEAST_GAIN:
        return found, "better"
    if found.high < 1:
        return found, "worse"
    return found, "no difference" if found.high < PRACTICAL_GAIN else "undecided"

"""A sequential test on pairs of latencies: is a candidate better than the default?

Contract: the gain is default / candidate, so more is better. After each pair, from LEAST_PAIRS on, `judge` gives its
interval by Student's t over the log ratios, and ends the test as soon as that interval settles it. All intervals of a
test hold together with its confidence, however early it ends: they are repeated confidence intervals (Jennison and
Turnbull, Interim analyses: the repeated confidence interval approach, 1989) with one nominal level for all looks
(Pocock, Group sequential methods in the design and analysis of clinical trials, 1977). The level is exact for
log-normal ratios. docs/research/2026-11-tune-sequential-test.md counts the errors.

Example:
    judge([1.9, 2.1, 2.0, 2.2], nominal_level(0.05, 24))      # Interval(...), "better"
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy.special import stdtr

from loadtests.slo.paired_intervals import Interval, paired_ratio

Outcome = Literal["better", "worse", "no difference", "undecided"]
LEAST_PAIRS = 4
LEAST_GAIN = 1.05  # a smaller one does not justify a change: the whole interval of a gain is above it
PRACTICAL_GAIN = 1.1  # one that is certainly below it is not worth more time
_SIMULATED = 50_000


@lru_cache
def nominal_level(error: float, most_pairs: int) -> float:
    """The error of each interval with which all of them, after LEAST_PAIRS to `most_pairs` pairs, are wrong with
    probability `error`: that quantile of the smallest p-value of a simulated test without a difference."""
    count = np.arange(1, most_pairs + 1)
    drawn = np.random.default_rng(0).standard_normal((_SIMULATED, most_pairs))
    mean, squares = drawn.cumsum(1) / count, (drawn**2).cumsum(1)
    looks = slice(LEAST_PAIRS - 1, None)
    variance = (squares - count * mean**2)[:, looks] / (count[looks] - 1)
    t = np.abs(mean[:, looks]) * np.sqrt(count[looks] / variance)
    return float(np.quantile(2 * stdtr(count[looks] - 1.0, -t).min(1), error))


def judge(gains: Sequence[float], level: float) -> tuple[Interval, Outcome]:
    """The interval of LEAST_PAIRS or more gains at a nominal level, and what it settles."""
    found = paired_ratio(gains, 1 - level)
    if found.low >= LEAST_GAIN:
        return found, "better"
    if found.high < 1:
        return found, "worse"
    return found, "no difference" if found.high < PRACTICAL_GAIN else "undecided"

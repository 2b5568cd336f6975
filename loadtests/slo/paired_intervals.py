"""Confidence intervals for the difference of two versions, from interleaved pairs of runs.

Contract: a resample draws whole pairs of runs (blocks), since the state of the machine correlates the seconds of a run
and the two runs of a pair. The histograms of a draw are added, never averaged. The interval is the *expanded*
percentile interval (Hesterberg, What Teachers Should Know About the Bootstrap, 2015, section 5.3): its tails are those
of Student's t, widened by sqrt(n / (n - 1)). No draw of n pairs leaves the range that they span, and the truth lies
outside that range in 2 of 2**n cases, so n pairs give no interval of higher confidence.

Example:
    draws = draws_of(8)
    ratio_interval(percentiles(candidate, draws, 99), percentiles(baseline, draws, 99), pairs=8, confidence=0.95)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from loadtests.results.histogram import VALUES_US
from loadtests.results.stretch import Stretch

RESAMPLES = 4000


def draws_of(pairs: int) -> np.ndarray:  # (1 + RESAMPLES, pairs)
    """The count of each pair in each draw; the first draw is the measurement itself."""
    drawn = np.random.default_rng(0).multinomial(pairs, np.full(pairs, 1 / pairs), size=RESAMPLES)
    return np.concatenate([np.ones((1, pairs), np.int64), drawn])


@dataclass(frozen=True)
class PooledStretches:
    """The same stretch of several runs, ready to be summed: one row per run."""

    counts: np.ndarray  # (runs, values): answered requests
    values_ms: np.ndarray  # (values,)
    failed: np.ndarray  # (runs,)
    planned: np.ndarray

    @classmethod
    def of(cls, stretches: Sequence[Stretch]) -> "PooledStretches":
        counts = np.stack([each.latency("intended").counts for each in stretches])
        used = np.flatnonzero(counts.any(axis=0))
        return cls(
            counts=counts[:, used],
            values_ms=VALUES_US[used] / 1000,
            failed=np.array([each.failed for each in stretches]),
            planned=np.array([each.planned for each in stretches]),
        )

    @property
    def total(self) -> int:
        return int(self.counts.sum() + self.failed.sum())


def percentiles(pooled: PooledStretches, draws: np.ndarray, percent: float) -> np.ndarray:
    """The percentile of each draw in ms; inf if it falls on a failed request, nan without requests."""  # (draws,)
    # Requests up to each value, in each run; the failed ones come last.
    reached = np.cumsum(np.column_stack([pooled.counts, pooled.failed]), axis=1).T  # (values + 1, runs)
    total = (draws * reached[-1]).sum(axis=1)
    rank = np.ceil(percent / 100 * total - 1e-9)
    # Binary search in all draws at once: a draw's histograms are added only where the search looks.
    low, high = np.zeros(len(draws), np.int64), np.full(len(draws), len(reached) - 1)
    while (low < high).any():
        middle = (low + high) // 2
        enough = (draws * reached[middle]).sum(axis=1) >= rank
        low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
    return np.where(total > 0, np.append(pooled.values_ms, math.inf)[low], math.nan)


def error_rates(pooled: PooledStretches, draws: np.ndarray) -> np.ndarray:
    return draws @ pooled.failed / np.maximum(1, draws @ pooled.planned)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio with its confidence interval; nan if unknown."""

    ratio: float
    low: float
    high: float


def ratio_interval(over: np.ndarray, under: np.ndarray, *, pairs: int, confidence: float) -> Interval:
    """The interval of over / under; the first element of each is the measurement, the rest are draws.

    With too few pairs its ends are nan.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = over / under
    if pairs < least_pairs(confidence) or np.isnan(ratios).any():
        return Interval(ratio=float(ratios[0]), low=math.nan, high=math.nan)
    tail = expanded_tail(pairs, confidence)
    low, high = np.quantile(ratios[1:], [tail, 1 - tail], method="inverted_cdf")
    return Interval(ratio=float(ratios[0]), low=float(low), high=float(high))


def paired_ratio(ratios: Sequence[float], confidence: float) -> Interval:
    """The geometric mean of paired ratios, with an interval by Student's t over their logarithms.

    Exact for log-normal ratios, even with two or three pairs, where a bootstrap is too narrow.
    """
    logs, count = np.log(ratios), len(ratios)
    mean, half = logs.mean(), -stdtrit(count - 1, (1 - confidence) / 2) * logs.std(ddof=1) / math.sqrt(count)
    return Interval(ratio=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def least_pairs(confidence: float) -> int:
    """The minimum of pairs: with fewer, the truth lies beyond all pairs more often than the interval may miss it."""
    return math.ceil(-math.log2((1 - confidence) / 2))


def expanded_tail(blocks: int, confidence: float) -> float:
    """The share of draws to cut at each end, for an interval of this confidence from `blocks`."""
    student = -stdtrit(blocks - 1, (1 - confidence) / 2)
    return float(ndtr(-math.sqrt(blocks / (blocks - 1)) * student))

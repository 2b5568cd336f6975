"""Confidence intervals for how much two sides differ, from pairs of runs that were made in turn.

Contract: the unit that is drawn again is a whole pair of runs (a block): what the machine did at that time stays
together, within a run and between the two of a pair. Of each draw the histograms are added, never averaged, and the
percentiles are read from the sum. The interval is the *expanded* percentile interval (Hesterberg, What Teachers Should
Know About the Bootstrap, 2015, section 5.3): with few blocks the plain one is too narrow, so its tails are those of
Student's t, widened by sqrt(n / (n - 1)). No draw of n pairs leaves what they span, and the truth lies beyond that in 2
of 2**n cases: an interval that is to be surer is none.

Example:
    draws = Draws.of(8, 8)
    ratio_interval(percentiles(new, draws.new, 99), percentiles(base, draws.base, 99), pairs=8, confidence=0.95)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtrit

from loadtests.results import VALUES_US, Stretch

RESAMPLES = 4000
_CHUNK = 256  # resamples at once: their pooled histograms are in memory


@dataclass(frozen=True)
class Draws:
    """How often each run of a side is in each draw; the first draw is what was seen."""

    base: np.ndarray  # (1 + RESAMPLES, runs)
    new: np.ndarray

    @classmethod
    def of(cls, base: int, new: int, seed: int = 0, *, paired: bool = True) -> Draws:
        """For so many runs a side: pairs, of which there are equally many, are drawn together, else each by itself."""
        generator = np.random.default_rng(seed)
        first = _draws(base, generator)
        return cls(first, first if paired else _draws(new, generator))


def _draws(runs: int, generator: np.random.Generator) -> np.ndarray:
    drawn = generator.multinomial(runs, np.full(runs, 1 / runs), size=RESAMPLES)
    return np.concatenate([np.ones((1, runs), np.int64), drawn])


@dataclass(frozen=True)
class Stretches:
    """One stretch of each run of a side, ready to be added up: a row a run."""

    counts: np.ndarray  # (runs, values): answered requests
    values_ms: np.ndarray  # (values,)
    failed: np.ndarray  # (runs,)
    planned: np.ndarray
    completed_rps: np.ndarray

    @classmethod
    def of(cls, stretches: Sequence[Stretch]) -> Stretches:
        """By intended latency."""
        counts = np.stack([each.latency("intended").counts for each in stretches])
        used = np.flatnonzero(counts.any(axis=0))
        return cls(
            counts=counts[:, used],
            values_ms=VALUES_US[used] / 1000,
            failed=np.array([each.failed for each in stretches]),
            planned=np.array([each.planned for each in stretches]),
            completed_rps=np.array([each.throughput_rps for each in stretches]),
        )

    @property
    def total(self) -> int:
        """Requests of all runs."""
        return int(self.counts.sum() + self.failed.sum())


def percentiles(side: Stretches, draws: np.ndarray, percent: float) -> np.ndarray:
    """The percentile of each draw in ms; inf where failures reach it, nan of nothing."""  # (draws,)
    found = []
    for start in range(0, len(draws), _CHUNK):
        part = draws[start : start + _CHUNK]
        cumulated = np.cumsum(part @ side.counts, axis=1)
        answered = cumulated[:, -1] if cumulated.shape[1] else np.zeros(len(part))
        total = answered + part @ side.failed
        rank = np.maximum(1, np.ceil(percent / 100 * total - 1e-9))
        reached = (cumulated < rank[:, None]).sum(axis=1)
        values = np.append(side.values_ms, math.inf)[reached]
        found.append(np.where(total > 0, values, math.nan))
    return np.concatenate(found)


def means_ms(side: Stretches, draws: np.ndarray) -> np.ndarray:
    """The mean of what was answered in each draw; inf where nothing was, nan of nothing."""
    answered = draws @ side.counts.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = draws @ (side.counts @ side.values_ms) / answered
    return np.where((answered == 0) & (draws @ side.failed > 0), math.inf, means)


def error_rates(side: Stretches, draws: np.ndarray) -> np.ndarray:
    """Share of failed requests of each draw."""
    return draws @ side.failed / np.maximum(1, draws @ side.planned)


def throughputs_rps(side: Stretches, draws: np.ndarray) -> np.ndarray:
    """Answers/s of each draw."""
    return draws @ side.completed_rps / draws.sum(axis=1)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A ratio and how far it may be off; nan where it cannot be said."""

    ratio: float
    low: float
    high: float


def ratio_interval(over: np.ndarray, under: np.ndarray, *, pairs: int, confidence: float) -> Interval:
    """Of over / under; the first of each is what was seen, the rest are draws. Of too few pairs it has no ends."""
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = over / under
    if pairs < least_pairs(confidence) or np.isnan(ratios).any():
        return Interval(ratio=float(ratios[0]), low=math.nan, high=math.nan)
    tail = expanded_tail(pairs, confidence)
    low, high = np.quantile(ratios[1:], [tail, 1 - tail], method="inverted_cdf")
    return Interval(ratio=float(ratios[0]), low=float(low), high=float(high))


def least_pairs(confidence: float) -> int:
    """With fewer, the truth lies beyond all of the pairs, on one side, more often than such an interval may miss it."""
    return math.ceil(-math.log2((1 - confidence) / 2))


def expanded_tail(blocks: int, confidence: float) -> float:
    """The share of draws to leave out at either end, for an interval of this confidence from so few blocks."""
    student = -stdtrit(blocks - 1, (1 - confidence) / 2)
    return float(ndtr(-math.sqrt(blocks / (blocks - 1)) * student))

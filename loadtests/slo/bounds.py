"""Confidence bounds on what a run says about the service: shares of requests, and means.

Contract: one-sided bounds, each at the given confidence. Slow answers come in bursts, so requests are not independent:
the counts of each second give the design effect (Kish), the mean number of requests that share one fate, and the bounds
are those of Clopper and Pearson on `requests / design effect`. Few bursts say little about their length, so the design
effect is pulled towards a burst of `BURST_S`, and without any burst it is that. So no share below 1 % is proved in less
than a minute, at any rate: 299 bursts of 0.2 s, at 95 %.

`tests/test_bounds.py` measures how often the verdict is wrong; docs/explanation/load-testing.md has its table.

Example:
    share_bounds(np.zeros(90), np.full(90, 100), seconds=90)    # low 0, high 0.0066: p99 holds
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, stdtrit

from deepseek.spec.objectives import BURST_S, CONFIDENCE

_UNSEEN_BURSTS = 2  # of that length, added to the bursts seen
_DOUBT = 2  # widens a design effect above 1 by this share over the root of the bursts seen: runs with few and short
# bursts would pass too often, since both make a service look better
_MOST_LONGER = 1000.0  # times the run, if that has many requests: beyond, the share is too close to the limit


@dataclass(frozen=True)
class Bounds:
    """One-sided bounds of a share or mean; arrays if several runs were given."""

    low: np.ndarray
    high: np.ndarray
    bursts: np.ndarray
    """Requests that count as one: the design effect."""


def share_bounds(over: np.ndarray, planned: np.ndarray, *, seconds: float, confidence: float = CONFIDENCE) -> Bounds:
    """Bounds of the share of requests over a limit, from the counts of each second: (..., seconds)."""
    found, total = over.sum(-1), planned.sum(-1)
    effect = _design_effect(over, planned, seconds)
    low, high = _clopper_pearson(found / effect, total / effect, confidence)
    return Bounds(low, high, effect)


def _clopper_pearson(found: np.ndarray, total: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    others = np.maximum(total - found, 0)
    tiny = np.finfo(float).tiny
    low = np.where(found > 0, betaincinv(np.maximum(found, tiny), others + 1, 1 - confidence), 0.0)
    return low, np.where(others > 0, betaincinv(found + 1, np.maximum(others, tiny), confidence), 1.0)


def _design_effect(over: np.ndarray, planned: np.ndarray, seconds: float) -> np.ndarray:
    """The variance of the count over that of independent requests, at least 1."""
    found, total, blocks = over.sum(-1), planned.sum(-1), over.shape[-1]
    share = found / np.maximum(total, 1)
    expected = total * share * (1 - share)
    seen = _variance(over - share[..., None] * planned) / np.where(expected > 0, expected, 1.0)
    seen = np.maximum(1.0, np.where(expected > 0, seen, 1.0))
    bursts = np.minimum(found, total - found) / seen
    unseen = np.maximum(1.0, BURST_S * total / max(seconds, 1e-9))
    pulled = np.maximum(seen, (bursts * seen + _UNSEEN_BURSTS * unseen) / (bursts + _UNSEEN_BURSTS))
    widened = pulled * (1 + _DOUBT * (1 - 1 / seen) / np.sqrt(bursts + 1))
    return np.clip(widened, 1.0, np.maximum(total, 1)) if blocks else np.ones_like(share)


def _variance(residuals: np.ndarray) -> np.ndarray:
    """The variance of the sum of residuals that depend on their neighbours (Newey and West)."""
    blocks = residuals.shape[-1]
    lags = min(blocks - 1, round(blocks ** (1 / 3)))
    found = (residuals**2).sum(-1)
    for lag in range(1, lags + 1):
        found = found + 2 * (1 - lag / (lags + 1)) * (residuals[..., lag:] * residuals[..., :-lag]).sum(-1)
    return found * blocks / max(1, blocks - 1)


def ratio_bounds(totals: np.ndarray, weights: np.ndarray, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of sum(totals) / sum(weights), neither negative, by Student's t over the seconds with a weight.

    They are nan with fewer than two such seconds.
    """
    totals, weights = totals[weights > 0], weights[weights > 0]
    if len(totals) < 2:
        return math.nan, math.nan
    ratio = totals.sum() / weights.sum()
    error = math.sqrt(max(0.0, float(_variance(totals - ratio * weights)))) / weights.sum()
    half = float(stdtrit(len(totals) - 1, confidence)) * error
    return max(0.0, float(ratio - half)), float(ratio + half)


def completed_bounds(
    completed: np.ndarray, answered: np.ndarray, planned: np.ndarray, *, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Bounds of sum(completed) / sum(planned), by Student's t; nan with fewer than two seconds.

    Args:
        completed: answers that arrived in each second.
        answered: requests planned in each second that were answered, whenever that was.
        planned: requests planned in each second.

    Two things make it random. Requests are lost: the variance of their number over the seconds, at least one more than
    were lost. And some are in flight at the start and at the end: twice the variance of their number. The seconds of
    `completed` alone would count all that are in flight at the end of a second as noise.
    """
    total = planned.sum()
    if len(planned) < 2 or not total:
        return math.nan, math.nan
    lost = max(float(total - answered.sum() + 1), float(_variance(answered - answered.sum() / total * planned)))
    in_flight = float(np.cumsum(answered - completed).var())
    half = float(stdtrit(len(planned) - 1, confidence)) * math.sqrt(lost + 2 * in_flight) / total
    ratio = completed.sum() / total
    return max(0.0, float(ratio - half)), float(ratio + half)


def more_requests(over: int, total: int, bounds: Bounds, limit: float, confidence: float) -> int | None:
    """About how many more requests decide, if they go on as so far; None if the share is too close to the limit."""
    found, independent = over / bounds.bursts, total / bounds.bursts
    enough = math.log(1 - confidence) / math.log1p(-limit)  # independent requests, all inside the limit

    def decided(longer: float) -> bool:
        low, high = _clopper_pearson(found * longer, independent * longer, confidence)
        return bool(high <= limit or low > limit)

    longer, most = 1.0, max(_MOST_LONGER, 2 * enough / float(independent))
    while not decided(longer):
        longer *= 1.02
        if longer > most:
            return None
    return math.ceil((longer - 1) * total)

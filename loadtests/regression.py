"""Judges whether one side of a comparison is worse than the other, from runs that were made in turn.

Contract: reads runs only, so that a comparison can be judged again. All runs have the same first rate, at which latency
is compared, and what failed, where anything did: as much may as the SLO allows, or a tenth more than of base. Where the
runs go on over a ladder of rates, capacity is compared, too: the rate at which the added-up runs of a side first break
the SLO, read between two rungs of the ladder. Each measure is worse where the whole interval of its
ratio lies beyond the threshold, no worse where it lies within, and inconclusive otherwise; the intervals hold together
with the confidence asked for (Bonferroni).

Exit codes: 0 no measure is worse, 1 one is, 3 inconclusive.

Example:
    comparison = compare(base_runs, new_runs, spec.slo, Thresholds())
    comparison.verdict      # "no worse"
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from deepseek.spec import InputError, InvalidMeasurement, Objective, SloSpec
from loadtests.bootstrap import (
    RESAMPLES,
    Draws,
    Interval,
    Stretches,
    error_rates,
    least_pairs,
    means_ms,
    percentiles,
    ratio_interval,
    throughputs_rps,
)
from loadtests.limits import samples_needed
from loadtests.results import Run
from loadtests.slo import RATE_TOLERANCE, generator_problems
from loadtests.trial import bound_rates, slo_at

Verdict = Literal["no worse", "worse", "inconclusive"]
EXIT_CODES: dict[Verdict, int] = {"no worse": 0, "worse": 1, "inconclusive": 3}
CONFIDENCE = 0.95  # of all rows together
LEAST_PAIRS = least_pairs(
    1 - (1 - CONFIDENCE) / 4
)  # for p50, p99, capacity, and failures, of which nobody knows before
MOST_PAIRS = 200  # more are not advised: a smaller difference is not to be told apart this way
MORE_FAILURES = 0.10  # than of base, where more fail there than the SLO allows
TINY = 1e-9  # a share that no run reaches, in place of none
CLOSE = 0.02  # of the threshold: no number of pairs tells on which side of it such a ratio lies


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """How much worse a side may be, as a share."""

    p50: float = 0.05
    p99: float = 0.10
    """A tail is read from few requests, and wanders more."""
    capacity: float = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measure of both sides."""

    name: str
    unit: Literal["ms", "rps", "share"]
    base: float
    new: float
    change: Interval
    """new / base; of failed requests ("share"): new / what is allowed."""
    allowed: float
    """The ratio up to which (capacity: down to which) the new side is no worse."""
    verdict: Verdict
    note: str = ""

    @property
    def better(self) -> bool:
        """The whole interval is on the good side of 1."""
        return self.unit != "share" and (self.change.high < 1 if self.unit == "ms" else self.change.low > 1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All measures together."""

    rate_rps: float
    ladder_rps: tuple[float, ...]
    runs: tuple[int, int]
    """Valid ones, of base and of new."""
    paired: bool
    dropped: tuple[str, ...]
    """Why runs were left out."""
    confidence: float
    rows: tuple[Row, ...]

    @property
    def verdict(self) -> Verdict:
        """The worst of the rows."""
        found = {row.verdict for row in self.rows}
        return "worse" if "worse" in found else "inconclusive" if "inconclusive" in found else "no worse"


def step(run: Run, rate_rps: float) -> Run:
    """The part of a run at one rate, as a run of its own."""
    stretch = run.at_rate(rate_rps)
    assert stretch is not None
    seconds = tuple(replace(second, second=place) for place, second in enumerate(stretch.seconds))
    settings = replace(run.settings, rate_rps=rate_rps, shape=None, duration_s=stretch.duration_s)
    return replace(run, settings=settings, seconds=seconds, lengths={})


def problems_at(run: Run, rate_rps: float, slo: SloSpec) -> list[str]:
    """Why a run says nothing of the server at this rate."""
    part = step(run, rate_rps)
    return generator_problems(part, slo_at(slo, rate_rps, part.settings.duration_s))


def compare(
    base: Sequence[Run],
    new: Sequence[Run],
    slo: SloSpec,
    thresholds: Thresholds,
    confidence: float = CONFIDENCE,
    *,
    capacity: bool = False,
) -> Comparison:
    """Judges; InputError where the runs are not of one kind, InvalidMeasurement where none is valid.

    With `capacity` runs without a ladder of rates leave that in doubt; without, they are about latencies alone.
    """
    rate, ladder = _rates([*base, *new], slo)
    paired = len(base) == len(new)  # as they were made: what is left of unequal many may be equally many
    base, new, dropped = _valid(base, new, rate, slo)
    draws = Draws.of(len(base), len(new), paired=paired)
    sides = [Stretches.of([step(run, rate).window for run in runs]) for runs in (base, new)]
    allowed = _allowed_failures(slo, rate, error_rates(sides[0], draws.base))
    failing = allowed is not None and any(side.failed.any() for side in sides)
    each = 1 - (1 - confidence) / (2 + bool(ladder or capacity) + failing)
    judge = _Judge(pairs=min(len(base), len(new)), confidence=each)
    rows = []
    for percent, threshold in ((50, thresholds.p50), (99, thresholds.p99)):
        seen = [percentiles(side, drawn, percent) for side, drawn in zip(sides, (draws.base, draws.new), strict=True)]
        least = min(side.total for side in sides)
        few = f"{least} requests, {samples_needed(percent)} needed" if least < samples_needed(percent) else ""
        rows.append(judge.row(f"p{percent} at {rate:g}/s", "ms", seen[0], seen[1], threshold, few))
    if allowed is not None and failing:
        failed = judge.row(
            f"failed at {rate:g}/s (new / allowed)", "share", allowed, error_rates(sides[1], draws.new), 0.0
        )
        rows.append(replace(failed, base=float(error_rates(sides[0], draws.base)[0])))
    if ladder:
        rows.append(_capacity_row(judge, base, new, draws, ladder, slo, thresholds.capacity))
    elif capacity:
        none = np.array([math.nan])
        rows.append(judge.row("capacity", "rps", none, none, thresholds.capacity, "no rate was found that base holds"))
    return Comparison(
        rate_rps=rate,
        ladder_rps=ladder,
        runs=(len(base), len(new)),
        paired=paired,
        dropped=tuple(dropped),
        confidence=confidence,
        rows=tuple(rows),
    )


def _allowed_failures(slo: SloSpec, rate_rps: float, base: np.ndarray) -> np.ndarray | None:
    """The share of requests that may fail at a rate in each draw; None where the SLO does not bound it there."""
    lines = [line for line in slo.all_objectives() if line.kind == "error_rate"]
    limits = [line.limit for line in lines if line.rate_rps is None or rate_rps <= line.rate_rps]
    return np.maximum(max(min(limits), TINY), base * (1 + MORE_FAILURES)) if limits else None


def _rates(runs: Sequence[Run], slo: SloSpec) -> tuple[float, tuple[float, ...]]:
    """The rate of the latencies, and the ladder's, which all runs share.

    An objective that is bound to the former makes it a rung, too: at none above is it asked for.
    """
    for run in runs:
        if not run.settings.open_loop or run.settings.segments[0].end_rps is not None:
            raise InputError(f"{run.folder}: no open loop that starts at a steady rate; make loadtest RATE=")
    rate = runs[0].settings.segments[0].rate_rps
    for run in runs:
        if run.settings.segments[0].rate_rps != rate:
            other = run.settings.segments[0].rate_rps
            raise InputError(f"{run.folder}: measured at {other:g}/s, {runs[0].folder} at {rate:g}/s; give one rate")
    shared = set.intersection(*(set(run.rates_rps) for run in runs)) - ({rate} - set(bound_rates(slo)))
    return rate, tuple(sorted(shared)) if len(shared) > 1 else ()


def _valid(
    base: Sequence[Run], new: Sequence[Run], rate: float, slo: SloSpec
) -> tuple[Sequence[Run], Sequence[Run], list[str]]:
    """Without the runs in which the generator was the limit; of pairs both go."""
    wrong = {run.folder: found[0] for run in (*base, *new) if (found := problems_at(run, rate, slo))}
    if len(base) == len(new):
        pairs = [pair for pair in zip(base, new, strict=True) if not {run.folder for run in pair} & wrong.keys()]
        base, new = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    else:
        base, new = ([run for run in runs if run.folder not in wrong] for runs in (base, new))
    dropped = [f"{folder}: {why}" for folder, why in wrong.items()]
    if not base or not new:
        raise InvalidMeasurement(f"no run is valid: {'; '.join(dropped[:1])}")
    return base, new, dropped


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Makes rows, all by the same intervals."""

    pairs: int
    confidence: float

    def row(
        self,
        name: str,
        unit: Literal["ms", "rps", "share"],
        base: np.ndarray,
        new: np.ndarray,
        threshold: float,
        doubt: str = "",
    ) -> Row:
        """From the draws of both sides; with a `doubt` nothing is concluded."""
        change = ratio_interval(new, base, pairs=self.pairs, confidence=self.confidence)
        upper = unit != "rps"
        allowed = 1 + threshold if upper else 1 / (1 + threshold)
        if doubt or math.isnan(change.low):
            verdict: Verdict = "inconclusive"
            doubt = doubt or self._why(change)
        elif (change.low > allowed) if upper else (change.high < allowed):
            verdict = "worse"
        elif (change.high <= allowed) if upper else (change.low >= allowed):
            verdict = "no worse"
        else:
            verdict, doubt = "inconclusive", self._advice(change, allowed)
        seen = {"base": float(base[0]), "new": float(new[0])}
        return Row(name=name, unit=unit, **seen, change=change, allowed=allowed, verdict=verdict, note=doubt)

    def _why(self, change: Interval) -> str:
        if self.pairs < (least := least_pairs(self.confidence)):
            return f"{self.pairs} pairs, {least} needed"
        return "not answered often enough on either side" if math.isnan(change.ratio) else "not in every draw"

    def _advice(self, change: Interval, allowed: float) -> str:
        """How many pairs would do, if the ratio stays what it is: an interval shrinks with their root."""
        if not 0 < change.ratio < math.inf or not 0 < change.low <= change.high < math.inf:
            return "the interval has no end"
        distance = abs(math.log(allowed / change.ratio))
        end = change.high if allowed > change.ratio else change.low  # the one that lies beyond the threshold
        pairs = math.ceil(self.pairs * (math.log(end / change.ratio) / distance) ** 2) if distance else math.inf
        pairs = max(pairs, self.pairs + 1)
        if pairs <= MOST_PAIRS:
            return f"about {pairs} pairs would tell"
        if distance < CLOSE:
            return "too close to the threshold to tell"
        return f"more than {MOST_PAIRS} pairs would tell; runs of one side differ: a quieter machine, or longer runs"


def _capacity_row(
    judge: _Judge,
    base: Sequence[Run],
    new: Sequence[Run],
    draws: Draws,
    ladder: tuple[float, ...],
    slo: SloSpec,
    threshold: float,
) -> Row:
    both = [capacities(runs, drawn, ladder, slo) for runs, drawn in ((base, draws.base), (new, draws.new))]
    seen = float(both[0][0])
    doubt = _generator_limited(base, new, ladder[: bisect_left(ladder, seen) + 1], slo)
    if seen == ladder[0]:
        doubt = doubt or f"base's lies below the ladder, {ladder[0]:g} to {ladder[-1]:g}/s"
    row = judge.row("capacity", "rps", both[0], both[1], threshold, doubt)
    if seen == ladder[-1] and row.verdict != "worse":  # it is so much or more: a worse one is worse all the same
        above = f"base's lies above the ladder, {ladder[0]:g} to {ladder[-1]:g}/s"
        return replace(row, verdict="inconclusive", note=doubt or above)
    ends = {ladder[0]: "new's lies below the ladder", ladder[-1]: "new's lies above the ladder"}
    return replace(row, note=row.note or ends.get(row.new, ""))


def _generator_limited(base: Sequence[Run], new: Sequence[Run], rates: Sequence[float], slo: SloSpec) -> str:
    """Where most runs of a side were limited by the generator at a rate that capacity is read from."""
    for rate in rates:
        for runs in (base, new):
            if sum(bool(problems_at(run, rate, slo)) for run in runs) > len(runs) / 2:
                return f"the generator is the limit at {rate:g}/s"
    return ""


def capacities(runs: Sequence[Run], draws: np.ndarray, ladder: tuple[float, ...], slo: SloSpec) -> np.ndarray:
    """The rate at which each draw first breaks the SLO; an end of the ladder where it lies beyond."""  # (draws,)
    usage = []
    for rate in ladder:
        windows = [step(run, rate).window for run in runs]
        asked = slo_at(slo, rate, min(window.duration_s for window in windows))
        usage.append(usages(Stretches.of(windows), draws, asked, rate))
    # Of a rung that is far beyond its limit only that matters: else the size of the excess would move the knee.
    beyond = np.log2(np.clip(np.nan_to_num(np.stack(usage), nan=np.inf), 0.5, 2))  # (rungs, draws)
    breaks = beyond > 0
    upper = np.where(breaks.any(axis=0), breaks.argmax(axis=0), len(ladder) - 1)
    lower = np.maximum(upper - 1, 0)
    column = np.arange(beyond.shape[1])
    high, low = beyond[upper, column], beyond[lower, column]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, np.clip(-low / (high - low), 0, 1), 1.0)
    rungs = np.log(np.array(ladder))
    found = np.exp(rungs[lower] + share * (rungs[upper] - rungs[lower]))
    return np.where(~breaks.any(axis=0), ladder[-1], np.where(breaks[0], ladder[0], found))


def usages(side: Stretches, draws: np.ndarray, slo: SloSpec, rate_rps: float) -> np.ndarray:
    """How much of its limit the objective that is nearest to it uses, in each draw; above 1 it is broken."""
    return np.max(np.stack(list(_shares(side, draws, slo, rate_rps))), axis=0)


def _shares(side: Stretches, draws: np.ndarray, slo: SloSpec, rate_rps: float) -> Iterator[np.ndarray]:
    for line in slo.all_objectives():
        if line.kind == "throughput":  # of what may be lost of the rate: the rest is near its limit at every rate
            yield (1 - throughputs_rps(side, draws) / rate_rps) / (1 - line.limit * (1 - RATE_TOLERANCE) / rate_rps)
            continue
        value = error_rates(side, draws) if line.kind == "error_rate" else _latency(side, draws, line)
        with np.errstate(divide="ignore", invalid="ignore"):
            yield np.where((value == 0) & (line.limit == 0), 0.0, value / line.limit)


def _latency(side: Stretches, draws: np.ndarray, line: Objective) -> np.ndarray:
    if line.percent is not None:
        return percentiles(side, draws, line.percent)
    return means_ms(side, draws) if line.measure == "mean_ms" else percentiles(side, draws, 100)


def method(comparison: Comparison) -> str:
    """How it was judged, in a sentence or two."""
    base, new = comparison.runs
    unit = f"{base} pairs of runs" if comparison.paired else f"{base} and {new} runs, not paired"
    drawn = "pairs" if comparison.paired else "runs"
    each = 1 - (1 - comparison.confidence) / len(comparison.rows)
    return (
        f"{unit}; percentiles of the added-up HDR histograms of intended latency, failures slower than any; expanded "
        f"percentile bootstrap over whole {drawn}, {RESAMPLES} draws, {each:.1%} each, so "
        f"that all {len(comparison.rows)} hold together at {comparison.confidence:.0%}."
    )

"""Judges whether a candidate is worse than a baseline, from interleaved pairs of runs.

Contract: reads only runs, so a comparison can be judged again. All runs start at the same rate, at which latencies and
failed requests are compared. The candidate may fail as many requests as the SLO allows, or a tenth more than the
baseline. If the runs climb a ladder of rates, capacity is compared too (`loadtests.regression.ladder_capacity`). A
measure is worse if the whole interval of its ratio lies beyond the threshold, no worse if it lies within, and
inconclusive otherwise. All intervals together have a confidence of CONFIDENCE (Bonferroni).

Example:
    comparison = compare(baseline_runs, candidate_runs, spec.slo, Thresholds())
    comparison.verdict      # "no worse"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from deepseek.spec import ExitCode, InputError, InvalidMeasurement, SloSpec
from deepseek.spec.objectives import samples_needed
from loadtests.regression.ladder_capacity import capacities, generator_limit, problems_at, step
from loadtests.results.run import Run
from loadtests.search.slo_at_rate import bound_rates, error_limit_at
from loadtests.slo.confidence import (
    RESAMPLES,
    Interval,
    PooledStretches,
    draws_of,
    error_rates,
    least_pairs,
    percentiles,
    ratio_interval,
)

Conclusion = Literal["no worse", "worse", "inconclusive"]
EXIT_CODES: dict[Conclusion, ExitCode] = {
    "no worse": ExitCode.PASS,
    "worse": ExitCode.GATE_FAILED,
    "inconclusive": ExitCode.INVALID,
}
Unit = Literal["ms", "rps", "share"]
CONFIDENCE = 0.95  # of all rows together
MOST_ROWS = 4  # p50, p99, capacity, and failures if there are any
LEAST_PAIRS = least_pairs(1 - (1 - CONFIDENCE) / MOST_ROWS)
MORE_FAILURES = 0.10  # allowed over the baseline, if the baseline itself exceeds the SLO's limit
TINY = 1e-9  # replaces a limit of 0, which a ratio cannot use


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """How much worse a candidate may be, as a share."""

    p50: float = 0.05
    p99: float = 0.10
    """Larger than p50's: few requests make up the tail, so it varies more."""
    capacity: float = 0.05


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One measure of both versions; latencies in ms, capacity in requests/s, failures as a share."""

    name: str
    unit: Unit
    baseline: float
    candidate: float
    change: Interval
    """candidate / baseline; for failed requests ("share"): candidate / allowed share."""
    allowed: float
    """The worst ratio at which the candidate is no worse: a maximum, for capacity a minimum."""
    verdict: Conclusion
    note: str = ""

    @property
    def better(self) -> bool:
        """Whether the whole interval is on the good side of 1."""
        return self.unit != "share" and (self.change.high < 1 if self.unit == "ms" else self.change.low > 1)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The judged comparison: its rows and what they were made from."""

    rate_rps: float
    ladder_rps: tuple[float, ...]
    pairs: int
    """Valid pairs."""
    dropped: tuple[str, ...]
    """Why runs were dropped."""
    dropped_by_side: tuple[int, int] = (0, 0)
    """Dropped runs of the baseline and of the candidate."""
    rows: tuple[ComparisonRow, ...]

    @property
    def verdict(self) -> Conclusion:
        """The worst verdict of the rows."""
        found = {row.verdict for row in self.rows}
        undecided = "inconclusive" in found or self.starves is not None
        return "worse" if "worse" in found else "inconclusive" if undecided else "no worse"

    @property
    def starves(self) -> str | None:
        """The side whose runs alone were dropped, more often than chance explains: it takes the generator's CPU time.

        The runs that are left are then its better ones.
        """
        baseline, candidate = self.dropped_by_side
        if min(baseline, candidate) or 2 * 0.5 ** (baseline + candidate) > 1 - CONFIDENCE:
            return None
        return "baseline" if baseline else "candidate"

    @property
    def method(self) -> str:
        """One sentence on how the runs were judged."""
        each = 1 - (1 - CONFIDENCE) / len(self.rows)
        return (
            f"{self.pairs} pairs of runs. Percentiles: merged HDR histograms of intended latency, failed requests "
            f"count as slowest. Intervals: expanded percentile bootstrap over whole pairs, {RESAMPLES} draws, "
            f"{each:.1%} each, so that all {len(self.rows)} hold together at {CONFIDENCE:.0%}."
        )


def compare(
    baseline: Sequence[Run], candidate: Sequence[Run], slo: SloSpec, thresholds: Thresholds, *, capacity: bool = False
) -> Comparison:
    """Judges the runs; InputError if they do not form comparable pairs, InvalidMeasurement if none is valid.

    `capacity`: require a row for it, which is inconclusive if the runs have no ladder of rates.
    """
    rate, rates = _rates([*baseline, *candidate], slo)
    baseline, candidate, dropped, by_side = _valid(baseline, candidate, rate, slo)
    pairs, draws, limit = len(baseline), draws_of(len(baseline)), error_limit_at(slo, rate)
    both = [PooledStretches.of([step(run, rate).window for run in runs]) for runs in (baseline, candidate)]
    failing = limit is not None and any(each.failed.any() for each in both)
    rows = 2 + bool(rates or capacity) + failing
    judge = RowJudge(pairs=pairs, confidence=1 - (1 - CONFIDENCE) / rows)
    found = [judge.latency(50, rate, both, draws, thresholds.p50), judge.latency(99, rate, both, draws, thresholds.p99)]
    if failing and limit is not None:
        found.append(judge.failures(rate, limit, both, draws))
    if rates:
        base_rps, new_rps = (capacities(runs, rates, slo, draws) for runs in (baseline, candidate))
        seen = float(base_rps[0])
        doubt = generator_limit(baseline, rates, slo, seen) or generator_limit(candidate, rates, slo, seen)
        found.append(judge.capacity(rates, base_rps, new_rps, doubt, thresholds.capacity))
    elif capacity:
        none = np.array([math.nan])
        found.append(judge.row("capacity", "rps", none, none, thresholds.capacity, "the baseline holds no rate"))
    return Comparison(
        rate_rps=rate,
        ladder_rps=rates,
        pairs=pairs,
        dropped=tuple(dropped),
        dropped_by_side=by_side,
        rows=tuple(found),
    )


def _rates(runs: Sequence[Run], slo: SloSpec) -> tuple[float, tuple[float, ...]]:
    """The rate of the latencies and the rates of the ladder, which all runs share.

    The rate of the latencies is a rung only if an objective is bound to it: the objective applies at no higher rate.
    """
    for run in runs:
        if not run.settings.open_loop or run.settings.segments[0].end_rps is not None:
            raise InputError(f"{run.folder}: not an open loop that starts at a steady rate; use make loadtest RATE=")
    rate = runs[0].settings.segments[0].rate_rps
    for run in runs:
        if run.settings.segments[0].rate_rps != rate:
            other = run.settings.segments[0].rate_rps
            raise InputError(f"{run.folder}: measured at {other:g}/s, {runs[0].folder} at {rate:g}/s; use one rate")
    shared = set.intersection(*(set(run.rates_rps) for run in runs)) - ({rate} - set(bound_rates(slo)))
    return rate, tuple(sorted(shared)) if len(shared) > 1 else ()


def _valid(
    baseline: Sequence[Run], candidate: Sequence[Run], rate: float, slo: SloSpec
) -> tuple[list[Run], list[Run], list[str], tuple[int, int]]:
    """The pairs in which the generator was not the limit; why the other runs were dropped, and how many a side."""
    if len(baseline) != len(candidate):
        counts = f"{len(baseline)} runs of the baseline, {len(candidate)} of the candidate"
        raise InputError(f"{counts}; runs are compared in pairs, so both need the same number")
    kept, dropped, sides = [], list[str](), [0, 0]
    for pair in zip(baseline, candidate, strict=True):
        wrong = [problems_at(run, rate, slo)[:1] for run in pair]
        dropped += [f"{run.folder}: {why[0]}" for run, why in zip(pair, wrong, strict=True) if why]
        sides = [count + bool(why) for count, why in zip(sides, wrong, strict=True)]
        if not any(wrong):
            kept.append(pair)
    if not kept:
        raise InvalidMeasurement(f"no run is valid: {dropped[0]}")
    return [pair[0] for pair in kept], [pair[1] for pair in kept], dropped, (sides[0], sides[1])


@dataclass(frozen=True, kw_only=True)
class RowJudge:
    """Makes the rows, with intervals of the same confidence."""

    pairs: int
    confidence: float

    def latency(
        self, percent: int, rate_rps: float, both: list[PooledStretches], draws: np.ndarray, threshold: float
    ) -> ComparisonRow:
        """The row of a percentile at the first rate."""
        baseline, candidate = (percentiles(each, draws, percent) for each in both)
        least, needed = min(each.total for each in both), samples_needed(percent)
        few = f"{least} requests, {needed} needed" if least < needed else ""
        return self.row(f"p{percent} at {rate_rps:g}/s", "ms", baseline, candidate, threshold, few)

    def failures(self, rate_rps: float, limit: float, both: list[PooledStretches], draws: np.ndarray) -> ComparisonRow:
        """The row of failed requests; allowed are the SLO's limit or a tenth more than the baseline's."""
        baseline, candidate = (error_rates(each, draws) for each in both)
        allowed = np.maximum(max(limit, TINY), baseline * (1 + MORE_FAILURES))
        row = self.row(f"failed at {rate_rps:g}/s (candidate / allowed)", "share", allowed, candidate, 0.0)
        return replace(row, baseline=float(baseline[0]))

    def capacity(
        self, rates_rps: Sequence[float], baseline: np.ndarray, candidate: np.ndarray, doubt: str, threshold: float
    ) -> ComparisonRow:
        """The row of the rate at which the SLO first breaks; inconclusive if the baseline's is beyond the ladder."""
        lowest, highest = rates_rps[0], rates_rps[-1]
        seen, ends = float(baseline[0]), f"the ladder, {lowest:g} to {highest:g}/s"
        if seen == lowest:
            doubt = doubt or f"the baseline's is below {ends}"
        row = self.row("capacity", "rps", baseline, candidate, threshold, doubt)
        if seen == highest and row.verdict != "worse":  # a lower bound: it can still prove that the candidate is worse
            return replace(row, verdict="inconclusive", note=doubt or f"the baseline's is above {ends}")
        beyond = {lowest: "the candidate's is below the ladder", highest: "the candidate's is above the ladder"}
        return replace(row, note=row.note or beyond.get(row.candidate, ""))

    def row(
        self, name: str, unit: Unit, baseline: np.ndarray, candidate: np.ndarray, threshold: float, doubt: str = ""
    ) -> ComparisonRow:
        """A row from the draws of both versions; a `doubt` makes it inconclusive."""
        change = ratio_interval(candidate, baseline, pairs=self.pairs, confidence=self.confidence)
        allowed = 1 / (1 + threshold) if unit == "rps" else 1 + threshold
        good, bad = change.high <= allowed, change.low > allowed
        if unit == "rps":
            good, bad = change.low >= allowed, change.high < allowed
        if not doubt and math.isnan(change.low):
            least = least_pairs(self.confidence)
            doubt = f"{self.pairs} pairs, {least} needed" if self.pairs < least else "not answered in every draw"
        verdict: Conclusion = "inconclusive" if doubt else "worse" if bad else "no worse" if good else "inconclusive"
        if verdict == "inconclusive":
            doubt = doubt or "try more pairs, longer runs or a quieter machine"
        seen = {"baseline": float(baseline[0]), "candidate": float(candidate[0])}
        return ComparisonRow(name=name, unit=unit, **seen, change=change, allowed=allowed, verdict=verdict, note=doubt)

"""Judges whether a candidate is worse than a baseline, from interleaved pairs of runs.

Contract: reads only runs, so a comparison can be judged again. All runs start at the same rate, at which latencies and
failed requests are compared. The candidate may fail as many requests as the SLO allows, or a tenth more than the
baseline. A latency is worse if the whole interval of its ratio lies beyond the threshold, no worse if it lies within,
and inconclusive otherwise. If the runs have more rates, the candidate must hold the SLO up to the highest of them that
the baseline holds, both by the verdict of a load test (`loadtests.regression.held_rates`). All intervals and verdicts
together have a confidence of CONFIDENCE (Bonferroni).

Example:
    comparison = compare(baseline_runs, candidate_runs, spec.slo, Thresholds())
    comparison.verdict      # "no worse"
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from deepseek.spec import ExitCode, InputError, InvalidMeasurement, SloSpec
from deepseek.spec.objectives import samples_needed
from loadtests.regression.held_rates import HeldRates, problems_at, step
from loadtests.results.run import Run
from loadtests.search.slo_at_rate import error_limit_at
from loadtests.slo.paired_intervals import (
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
CAPACITY = "highest rate that holds"
CONFIDENCE = 0.95  # of all rows together
MOST_ROWS = 4  # p50, p99, the rate that holds, and failures if there are any
LEAST_PAIRS = least_pairs(1 - (1 - CONFIDENCE) / MOST_ROWS)
MORE_FAILURES = 0.10  # allowed over the baseline, if the baseline itself exceeds the SLO's limit
TINY = 1e-9  # replaces a limit of 0, which a ratio cannot use


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """How much worse a candidate may be, as a share."""

    p50: float = 0.05
    p99: float = 0.10
    """Larger than p50's: few requests make up the tail, so it varies more."""


@dataclass(frozen=True, kw_only=True)
class ComparisonRow:
    """One measure of both versions; latencies in ms, rates in requests/s, failures as a share."""

    name: str
    unit: Unit
    baseline: float
    candidate: float
    change: Interval
    """candidate / baseline, without an interval for rates; for failed requests ("share"): candidate / allowed share."""
    allowed: float
    """The worst ratio at which the candidate is no worse: a maximum, for rates a minimum."""
    verdict: Conclusion
    note: str = ""

    @property
    def better(self) -> bool:
        """Whether the whole interval is on the good side of 1."""
        return self.unit == "ms" and self.change.high < 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    over: str
    """The protocol, or the OpenAI route."""
    rate_rps: float
    rates_rps: tuple[float, ...]
    """At which both versions were judged by the SLO, ascending."""
    pairs: int
    """Valid pairs."""
    dropped: tuple[str, ...]
    """Why runs were dropped."""
    dropped_by_side: tuple[int, int] = (0, 0)
    """Dropped runs of the baseline and of the candidate."""
    rows: tuple[ComparisonRow, ...]

    @property
    def verdict(self) -> Conclusion:
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
        each = 1 - (1 - CONFIDENCE) / len(self.rows)
        return (
            f"{self.pairs} pairs of runs over {self.over}. Percentiles: merged HDR histograms of intended latency, "
            f"failed requests count as slowest. Intervals: expanded percentile bootstrap over whole pairs, {RESAMPLES} "
            f"draws, {each:.1%} each, so that all {len(self.rows)} hold together at {CONFIDENCE:.0%}."
        )


def compare(
    baseline: Sequence[Run], candidate: Sequence[Run], slo: SloSpec, thresholds: Thresholds, *, capacity: bool = False
) -> Comparison:
    """Judges the runs; InputError if they do not form comparable pairs, InvalidMeasurement if none is valid.

    `capacity`: judge runs of one rate by the SLO too.
    """
    rate, rates = _rates([*baseline, *candidate])
    rates = rates or (rate,) * capacity
    baseline, candidate, dropped, by_side = _valid(baseline, candidate, rate, slo)
    pairs, draws, limit = len(baseline), draws_of(len(baseline)), error_limit_at(slo, rate)
    both = [PooledStretches.of([step(run, rate).window for run in runs]) for runs in (baseline, candidate)]
    failing = limit is not None and any(each.failed.any() for each in both)
    rows = 2 + bool(rates) + failing
    judge = RowJudge(pairs=pairs, confidence=1 - (1 - CONFIDENCE) / rows)
    found = [judge.latency(50, rate, both, draws, thresholds.p50), judge.latency(99, rate, both, draws, thresholds.p99)]
    if failing and limit is not None:
        found.append(judge.failures(rate, limit, both, draws))
    if rates:
        looks = rows * len(rates)
        found.append(held(*(HeldRates.of(runs, rates, slo, looks) for runs in (baseline, candidate))))
    return Comparison(
        over=baseline[0].settings.over,
        rate_rps=rate,
        rates_rps=rates,
        pairs=pairs,
        dropped=tuple(dropped),
        dropped_by_side=by_side,
        rows=tuple(found),
    )


def _rates(runs: Sequence[Run]) -> tuple[float, tuple[float, ...]]:
    """The rate of the latencies, and the other rates that all runs share, ascending."""
    for run in runs:
        if not run.settings.open_loop or run.settings.segments[0].end_rps is not None:
            raise InputError(f"{run.folder}: not an open loop that starts at a steady rate; use make loadtest RATE=")
    rate, over = runs[0].settings.segments[0].rate_rps, runs[0].settings.over
    for run in runs:
        if (other := (run.settings.segments[0].rate_rps, run.settings.over)) != (rate, over):
            seen = f"{run.folder}: measured at {other[0]:g}/s over {other[1]}"
            raise InputError(f"{seen}, {runs[0].folder} at {rate:g}/s over {over}; use one rate and one protocol")
    return rate, tuple(sorted(set.intersection(*(set(run.settings.rates_rps) for run in runs)) - {rate}))


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
    pairs: int
    confidence: float

    def latency(
        self, percent: int, rate_rps: float, both: list[PooledStretches], draws: np.ndarray, threshold: float
    ) -> ComparisonRow:
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

    def row(
        self, name: str, unit: Unit, baseline: np.ndarray, candidate: np.ndarray, threshold: float, doubt: str = ""
    ) -> ComparisonRow:
        """A row from the draws of both versions; a `doubt` makes it inconclusive."""
        change = ratio_interval(candidate, baseline, pairs=self.pairs, confidence=self.confidence)
        allowed = 1 + threshold
        if not doubt and math.isnan(change.low):
            least = least_pairs(self.confidence)
            doubt = f"{self.pairs} pairs, {least} needed" if self.pairs < least else "not answered in every draw"
        verdict: Conclusion = (
            "worse" if change.low > allowed else "no worse" if change.high <= allowed else "inconclusive"
        )
        verdict = "inconclusive" if doubt else verdict
        if verdict == "inconclusive":
            doubt = doubt or "try more pairs, longer runs or a quieter machine"
        seen = {"baseline": float(baseline[0]), "candidate": float(candidate[0])}
        return ComparisonRow(name=name, unit=unit, **seen, change=change, allowed=allowed, verdict=verdict, note=doubt)


def held(baseline: HeldRates, candidate: HeldRates) -> ComparisonRow:
    """The row of the highest rate that the baseline holds: the candidate must hold it, and those below it."""
    asked, reached = baseline.highest_rps, candidate.highest_rps
    verdict: Conclusion = "inconclusive"
    note = ""
    if math.isnan(asked):
        note = f"the baseline is not proved: {next(baseline.reasons())}"
    elif reached >= asked:
        verdict = "no worse"
    else:
        reached = min(reached, asked)
        note = next(candidate.reasons(asked))
        if any(each.verdict == "violated" for rate, each in candidate.at.items() if rate <= asked):
            verdict = "worse"
    change = Interval(ratio=reached / asked, low=math.nan, high=math.nan)
    figures = {"baseline": asked, "candidate": reached, "allowed": 1.0}
    return ComparisonRow(name=CAPACITY, unit="rps", **figures, change=change, verdict=verdict, note=note)

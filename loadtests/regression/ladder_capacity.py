"""Reads the rate at which a version first violates its SLO from runs over a ladder of rates.

Contract: each draw of the bootstrap merges its runs at every rung. The capacity lies between the last rung that holds
and the first that violates an objective, where the ratio of measured value to limit crosses 1 on logarithmic axes. A
capacity beyond the ladder is reported as the end of the ladder.

The rungs are judged by the sample: this capacity serves only for the ratio of two versions, which the comparison judges
by its interval over the pairs. `loadtests.search` proves a rate by the verdict's bounds; a rung is too short for that.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from deepseek.spec import SloSpec
from loadtests.results.run import Run
from loadtests.search.slo_at_rate import slo_at
from loadtests.slo.confidence import PooledStretches, error_rates, means_ms, percentiles, throughputs_rps
from loadtests.slo.generator_health import generator_problems
from loadtests.slo.judge import RATE_TOLERANCE


def step(run: Run, rate_rps: float) -> Run:
    """The part of a run at one rate, as a run whose seconds count from 0."""
    stretch = run.at_rate(rate_rps)
    assert stretch is not None
    seconds = tuple(replace(second, second=place) for place, second in enumerate(stretch.seconds))
    settings = replace(run.settings, rate_rps=rate_rps, shape=None, duration_s=stretch.duration_s)
    return replace(run, settings=settings, seconds=seconds, lengths={})


def problems_at(run: Run, rate_rps: float, slo: SloSpec) -> list[str]:
    """Why a run is invalid at this rate (the generator was the limit); empty if it is valid."""
    part = step(run, rate_rps)
    return generator_problems(part, slo_at(slo, rate_rps, part.settings.duration_s))


def generator_limit(runs: Sequence[Run], rates_rps: Sequence[float], slo: SloSpec, capacity_rps: float) -> str:
    """The first rate up to this capacity at which the generator limited most runs, as text; empty if there is none."""
    for rate in rates_rps[: bisect_left(rates_rps, capacity_rps) + 1]:
        if sum(bool(problems_at(run, rate, slo)) for run in runs) > len(runs) / 2:
            return f"the generator is the limit at {rate:g}/s"
    return ""


def capacities(runs: Sequence[Run], rates_rps: Sequence[float], slo: SloSpec, draws: np.ndarray) -> np.ndarray:
    """The capacity in requests/s for each draw; `rates_rps` are ascending, two or more."""  # (draws,)
    rungs = np.log(np.array(rates_rps))
    usage = np.stack([_usage(runs, draws, slo, rate) for rate in rates_rps])
    # Clipped: how far a rung is beyond its limit must not move the result.
    beyond = np.log2(np.clip(np.nan_to_num(usage, nan=np.inf), 0.5, 2))  # (rungs, draws)
    breaks = beyond > 0
    upper = np.where(breaks.any(axis=0), breaks.argmax(axis=0), len(rungs) - 1)
    lower = np.maximum(upper - 1, 0)
    column = np.arange(beyond.shape[1])
    high, low = beyond[upper, column], beyond[lower, column]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(high > low, np.clip(-low / (high - low), 0, 1), 1.0)
    found = np.exp(rungs[lower] + share * (rungs[upper] - rungs[lower]))
    return np.where(~breaks.any(axis=0), rates_rps[-1], np.where(breaks[0], rates_rps[0], found))


def _usage(runs: Sequence[Run], draws: np.ndarray, slo: SloSpec, rate_rps: float) -> np.ndarray:
    """The largest ratio of measured value to limit over all objectives, for each draw; above 1 the SLO is violated."""
    windows = [step(run, rate_rps).window for run in runs]
    asked = slo_at(slo, rate_rps, min(window.duration_s for window in windows))
    return np.max(np.stack(list(_shares(PooledStretches.of(windows), draws, asked, rate_rps))), axis=0)


def _shares(pooled: PooledStretches, draws: np.ndarray, slo: SloSpec, rate_rps: float) -> Iterator[np.ndarray]:
    for line in slo.all_objectives():
        if line.measure == "max_ms":  # a bootstrap says nothing about a maximum
            continue
        if line.kind == "throughput":  # lost share over allowed loss: throughput itself is near its limit at any rate
            yield (1 - throughputs_rps(pooled, draws) / rate_rps) / (1 - line.limit * (1 - RATE_TOLERANCE) / rate_rps)
            continue
        if line.kind == "error_rate":
            value = error_rates(pooled, draws)
        elif line.measure == "mean_ms":
            value = means_ms(pooled, draws)
        else:
            assert line.percent is not None
            value = percentiles(pooled, draws, line.percent)
        with np.errstate(divide="ignore", invalid="ignore"):
            yield np.where((value == 0) & (line.limit == 0), 0.0, value / line.limit)

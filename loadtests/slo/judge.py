"""Judges a saved run against an SLO.

Contract: reads only files, so a run can be judged again later, or against another SLO. Failed requests (errors,
time-outs, drops) count as slower than any limit; only means are over the answered requests. An objective holds if the
confidence bound is inside its limit, is violated if the bound is outside, and is inconclusive between (`bounds`). One
request over the limit violates a maximum, and an error rate of 0. The task metric is judged as measured.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from deepseek.spec import Objective, SloSpec, variables_for
from deepseek.spec.objectives import RATE_TOLERANCE, Kind, formatted
from loadtests.results.run import Run
from loadtests.results.stretch import Stretch
from loadtests.slo.bounds import completed_bounds, more_requests, ratio_bounds, share_bounds
from loadtests.slo.generator_health import generator_problems
from loadtests.slo.judged_objectives import JudgedObjective, ObjectiveStatus, SloStatus, SloVerdict, value_of
from loadtests.slo.slo_demands import confidence_of, rate_of


def judge(run: Run, slo: SloSpec, *, alone: bool = True) -> SloVerdict:
    """The verdict on a saved run; `alone` is false if the other models of its mix are judged with it."""
    problems = generator_problems(run, slo)
    if not run.window.planned:
        problems.insert(0, "no request was measured")
    objectives = tuple(_judged(run, slo)) if run.window.planned else ()
    if problems:  # the figures are shown, but prove nothing
        objectives = tuple(replace(objective, status="inconclusive") for objective in objectives)
    statuses = {objective.status for objective in objectives}
    verdict: SloStatus = "holds"
    if problems:
        verdict = "invalid"
    elif "violated" in statuses:
        verdict = "violated"
    elif "inconclusive" in statuses:
        verdict = "inconclusive"
    return SloVerdict(
        verdict=verdict, objectives=objectives, problems=tuple(problems), notes=tuple(_notes(run, slo, alone))
    )


def _judged(run: Run, slo: SloSpec) -> Iterator[JudgedObjective]:
    confidence = confidence_of(run.settings, slo)
    for line in slo.all_objectives():
        if not line.facts.of_load:
            yield _judged_quality(run, line)
            continue
        rate = rate_of(line, run.settings, slo)
        stretch = run.at_rate(rate)
        if stretch is None:
            judged = _unmeasured(run, replace(line, rate_rps=rate))
        elif not stretch.planned:
            judged = _with_status(line, math.nan, "inconclusive", "no request was due; measure longer")
        else:
            judged = JUDGES[line.kind](run, stretch, line, confidence)
        yield judged if rate is None else replace(judged, name=f"{line.name} @ {rate:.15g} rps")


def _with_status(
    line: Objective, seen: float, status: ObjectiveStatus, note: str = "", **facts: Any
) -> JudgedObjective:
    """The objective with the measured value and the status that its bounds give."""
    upper = line.relation[0] == "<"
    share = seen / line.limit if line.limit else math.inf if seen else 1.0
    margin = 1 - share if upper else share - 1
    facts = {"limit": line.limit, "margin": margin, "within": line.holds(seen), **facts}
    about: dict[str, Any] = {"name": line.name, "kind": line.kind, "relation": line.relation}
    return JudgedObjective(**about, seen=seen, status=status, note=note, **facts)


def _unmeasured(run: Run, line: Objective) -> JudgedObjective:
    offered = ", ".join(f"{rate:.15g}" for rate in run.settings.rates_rps)
    note = f"measured at {offered}/s" if offered else "no steady rate was measured"
    mix, model, rate = run.settings.mix, run.settings.model, f"{line.rate_rps:.15g}"
    which = f"{variables_for(model)} RATE={rate}" if mix is None else f"MIX={mix}, with {rate}/s for {model}"
    note += f"; make loadtest {which}"
    return _with_status(line, math.nan, "inconclusive", note, offered=False)


def _judged_latency(run: Run, stretch: Stretch, line: Objective, confidence: float) -> JudgedObjective:
    seen = value_of(stretch.latency(run.judged), line)
    if line.percent is not None:
        over = stretch.over(run.judged, line.holds)
        return _judged_share(line, stretch, seen, over, 1 - line.percent / 100, confidence, "over")
    if line.measure == "max_ms":
        return _judged_worst(line, stretch, seen, stretch.over(run.judged, line.holds), confidence)
    low, high = ratio_bounds(*stretch.sums_ms(run.judged), confidence=confidence)
    return _within(line, seen, math.inf if math.isinf(seen) else low, high)


def _judged_errors(run: Run, stretch: Stretch, line: Objective, confidence: float) -> JudgedObjective:
    seen, over = stretch.failed / stretch.planned, np.array([each.failed for each in stretch.seconds])
    if line.limit == 0:
        judged = replace(_judged_worst(line, stretch, seen, over, confidence), margin=0.0 - seen)
    else:
        judged = _judged_share(line, stretch, seen, over, line.limit, confidence, "failed")
    kinds = [f"{count} {kind}" for kind, count in stretch.errors.most_common()]
    return replace(judged, note=", ".join([*kinds, *filter(None, [judged.note])]))


def _judged_share(
    line: Objective, stretch: Stretch, seen: float, over: np.ndarray, allowed: float, confidence: float, what: str
) -> JudgedObjective:
    """Judges the share of requests over a limit, of which `allowed` may be."""
    planned = stretch.planned_each
    bounds = share_bounds(over, planned, seconds=stretch.duration_s, confidence=confidence)
    low, high = float(bounds.low), float(bounds.high)
    status: ObjectiveStatus = "holds" if high <= allowed else "violated" if low > allowed else "inconclusive"
    if status == "holds":
        note, more = f"at most {_percent(high)} {what}", None
    elif status == "violated":
        note, more = f"at least {_percent(low)} {what}", None
    else:
        more = more_requests(int(over.sum()), int(planned.sum()), bounds, allowed, confidence)
        decides = f"about {more} more requests would decide" if more else "too close to the limit to decide"
        note = f"{_percent(low)} to {_percent(high)} {what}, {_percent(allowed)} allowed; {decides}"
    return _with_status(line, seen, status, note, low=low, high=high, more_requests=more)


def _percent(share: float) -> str:
    if share < 1e-6:
        return "0%"
    return f"{100 * share:.{2 if share < 0.99 else 4}g}%"  # two digits of 99.9 would be 1e+02


def _judged_worst(
    line: Objective, stretch: Stretch, seen: float, over: np.ndarray, confidence: float
) -> JudgedObjective:
    """Judges an objective that allows no request over its limit: one is enough to violate it."""
    bounds = share_bounds(over, stretch.planned_each, seconds=stretch.duration_s, confidence=confidence)
    note = "" if over.any() else f"none of {stretch.planned} in this run, so at most {_percent(float(bounds.high))}"
    status: ObjectiveStatus = "holds" if line.holds(seen) else "violated"
    return _with_status(line, seen, status, note, low=float(bounds.low), high=float(bounds.high))


def _within(line: Objective, seen: float, low: float, high: float) -> JudgedObjective:
    near, far = (low, high) if line.relation[0] == "<" else (high, low)
    figures: dict[str, Any] = {"low": low, "high": high}
    if math.isnan(low) and math.isnan(high):
        return _with_status(line, seen, "inconclusive", "too few seconds with answers; measure longer", **figures)
    if line.holds(far):
        return _with_status(line, seen, "holds", **figures)
    if not line.holds(near):
        return _with_status(line, seen, "violated", **figures)
    bounds = f"{formatted(line.kind, low)} to {formatted(line.kind, high)}"
    return _with_status(line, seen, "inconclusive", f"{bounds}; a longer run would decide", **figures)


def _judged_throughput(run: Run, stretch: Stretch, line: Objective, confidence: float) -> JudgedObjective:
    completed = np.array([float(each.completed) for each in stretch.seconds])
    if run.settings.open_loop:
        # The share of the offered load that was answered: the randomness of the arrivals is not the service's.
        offered, answered = stretch.planned_each, np.array([float(each.ok) for each in stretch.seconds])
        bounds = completed_bounds(completed, answered, offered, confidence=confidence)
    else:
        offered = np.ones_like(completed)
        bounds = ratio_bounds(completed, offered, confidence=confidence)
    low, high = (bound * offered.sum() / stretch.duration_s for bound in bounds)
    seen, users = stretch.throughput_rps, run.settings.users
    enough = replace(line, limit=line.limit * (1 - RATE_TOLERANCE))
    found = _within(enough, seen, low, high)
    judged = _with_status(line, seen, found.status, found.note, low=low, high=high, within=found.within)
    if judged.status == "holds":
        return judged
    if users is not None:
        return replace(
            judged,
            status="inconclusive",
            offered=False,
            note=f"{users} users in a closed loop; more users may reach it",
        )
    if stretch.planned_rps < enough.limit:
        return replace(
            judged, status="inconclusive", offered=False, note=f"only {stretch.planned_rps:.4g}/s was offered"
        )
    return judged


JUDGES: dict[Kind, Callable[[Run, Stretch, Objective, float], JudgedObjective]] = {
    "ms": _judged_latency,
    "error_rate": _judged_errors,
    "throughput": _judged_throughput,
}
"""Judges of the kinds that depend on load."""


def _judged_quality(run: Run, line: Objective) -> JudgedObjective:
    """Judges the metric of the served model that the run has stored."""
    found = run.quality.get(line.measure)
    if found is None:
        note = f"not measured for what is served; make parity {variables_for(run.settings.model)}"
        return _with_status(line, math.nan, "inconclusive", note, offered=False)
    note = f"{found['source']}; fp32 PyTorch {found['baseline']:.4f}"
    line = line.against(found["baseline"])
    return _with_status(line, found["seen"], "holds" if line.holds(found["seen"]) else "violated", note)


def _notes(run: Run, slo: SloSpec, alone: bool) -> Iterator[str]:
    if not run.settings.open_loop:
        yield (
            "closed loop: this is service latency, and a stalled server gets no requests, so stalls hardly count "
            "(coordinated omission); RATE= measures what users would see"
        )
    if run.settings.looks > 1:
        yield (
            f"{run.settings.looks} looks were planned, so each is judged at "
            f"{confidence_of(run.settings, slo):.2%} confidence"
        )
    if run.settings.mix and alone:
        yield f"part of the mix {run.settings.mix}; to judge the whole mix: make verdict MIX={run.settings.mix}"
    rates = [rate for each in run.settings.segments for rate in (each.rate_rps, each.end_rps) if rate is not None]
    if slo.rate_rps is not None and rates and min(rates) > slo.rate_rps:
        yield f"measured at {min(rates):g}/s, more than the {slo.rate_rps:g}/s that the SLO asks for"


def overall(verdicts: Iterable[SloStatus]) -> SloStatus:
    """The verdict on several models: violated first, then invalid, inconclusive, holds."""
    order: tuple[SloStatus, ...] = ("violated", "invalid", "inconclusive", "holds")
    return min(verdicts, key=order.index)

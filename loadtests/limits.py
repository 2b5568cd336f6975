"""What an SLO asks of a load before it starts: rates, deadlines, requests in flight, and how many samples.

Contract: reads nothing but the SLO and the settings of a run, so that what a run cannot prove is said before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from scipy.special import betaincinv

from deepseek.spec import InputError, Objective, Parser, SloSpec
from loadtests.results import IN_FLIGHT, Settings

CONFIDENCE = 0.99
TIMEOUT_S = 5.0  # of a request, at least, where none is asked for
PATIENCE = 2  # times the largest latency limit: what is not answered by then is late beyond doubt
MOST_IN_FLIGHT = 8192  # of a worker: below the 10,000 files that Locust lets a process open


def latency_limits(slo: SloSpec) -> dict[float, float]:
    """Percentile -> limit in milliseconds, of those that the SLO has at its own rate."""
    found = {line.percent: line.limit for line in slo.all_objectives() if line.rate_rps is None}
    return {percent: limit for percent, limit in found.items() if percent is not None}


def largest_limit_s(*slos: SloSpec) -> float:
    """The largest latency, in seconds, that they allow, at whatever rate; 0 where they bound none."""
    return max((line.limit for slo in slos for line in slo.all_objectives() if line.kind == "ms"), default=0.0) / 1000


def timeout_for(asked_s: float | None, *slos: SloSpec) -> float:
    """A request's deadline, in seconds: as asked for, or so that it cuts off no answer that is in time by these SLOs.

    InputError where the one asked for would.
    """
    limit_s = largest_limit_s(*slos)
    enough_s = max(TIMEOUT_S, PATIENCE * limit_s)
    if asked_s is not None and 0 < asked_s <= limit_s:
        raise InputError(
            f"--timeout-s {asked_s:g}: the SLO allows an answer {limit_s:g} s, and what is given up before counts as "
            f"failed; it must be more than that ({enough_s:g} where it is left out)"
        )
    return enough_s if asked_s is None else asked_s


def add_timeout_argument(parser: Parser) -> None:
    """--timeout-s, as every command takes it that loads a server; `timeout_for` makes a number of it."""
    fallback = f"{TIMEOUT_S:g}, or {PATIENCE} times the SLO's largest latency where that is more"
    parser.add_argument("--timeout-s", type=float, help=f"deadline of a request (default: {fallback})")


def in_flight_for(settings: Settings, slo: SloSpec) -> int:
    """Unanswered requests that a worker may have, so that none is dropped that could still be in time.

    InputError where those are more than it can have.
    """
    highest_rps = max((max(each.rate_rps, each.end_rps or 0.0) for each in settings.segments), default=0.0)
    for line in (each for each in slo.all_objectives() if each.kind == "ms"):
        rate_rps = min(highest_rps, rate_of(line, settings, slo) or highest_rps)  # of none above is it asked
        in_time = rate_rps * line.limit / 1000
        if in_time > MOST_IN_FLIGHT * settings.workers:
            raise InputError(
                f"{settings.model} at {rate_rps:g}/s: the SLO allows an answer {line.limit / 1000:g} s, so that "
                f"{in_time:.0f} requests may be in flight and in time; a worker can have {MOST_IN_FLIGHT}, and there "
                f"{'is' if settings.workers == 1 else 'are'} {settings.workers}: send less, or from "
                f"{math.ceil(in_time / MOST_IN_FLIGHT)} workers (--workers, WORKERS=)"
            )
    needed = math.ceil(PATIENCE * highest_rps * largest_limit_s(slo) / settings.workers)
    return min(max(IN_FLIGHT, needed), MOST_IN_FLIGHT)


def rates(slo: SloSpec) -> list[float]:
    """Every rate that an objective is about, in requests/s, ascending; throughput above the SLO's own rate is one."""
    lines, own = slo.all_objectives(), slo.rate_rps or 0.0
    found = {line.rate_rps for line in lines} | {slo.rate_rps}
    found |= {line.limit for line in lines if line.kind == "throughput" and not line.rate_rps and line.limit > own}
    return sorted(rate for rate in found if rate is not None)


def samples_needed(percent: float) -> int:
    """Requests without which nothing is claimed of a percentile."""
    return samples_to_bound(1 - percent / 100)


def samples_to_bound(share: float) -> int:
    """Requests of which none may fail to show that less than this share of all do."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log1p(-share))


def largest_share(failed: int, planned: int) -> float:
    """The largest share of failures that may well give so few of so many (Clopper and Pearson's upper bound)."""
    return float(betaincinv(failed + 1, planned - failed, CONFIDENCE)) if failed < planned else 1.0


def too_short(settings: Settings, slo: SloSpec) -> Iterator[str]:
    """What a run will be too short for, known before it starts."""
    for line in slo.all_objectives():
        rate = rate_of(line, settings, slo)
        meant = [
            each
            for each in settings.segments
            if rate is None or (each.rate_rps == rate and each.end_rps in (None, each.rate_rps))
        ]
        planned = sum(each.arrivals for each in meant)
        if line.percent is not None and 0 < planned < (needed := samples_needed(line.percent)):
            seconds = math.ceil(needed / planned * sum(each.duration_s for each in meant))
            yield f"{planned} requests cannot prove {line.name}, {needed} can: run for {seconds} s or more"


def rate_of(line: Objective, settings: Settings, slo: SloSpec) -> float | None:
    """The rate that a line is judged at: where it names none the SLO's own; None where that is the whole run.

    Throughput is judged where as much was asked for, if it was.
    """
    asked = line.limit if line.kind == "throughput" and len(settings.segments) > 1 else None
    return line.rate_rps or (asked if asked in settings.rates_rps else own_rate(settings, slo))


def own_rate(settings: Settings, slo: SloSpec) -> float | None:
    """Of rates that change the SLO's own, which a line without a rate is about; None where that is the whole run.

    A ramp passes over any rate.
    """
    segments, held = settings.segments, settings.rates_rps
    stepwise = len(held) > 1 and all(each.end_rps in (None, each.rate_rps) for each in segments)
    return slo.rate_rps if stepwise or (len(segments) > 1 and slo.rate_rps in held) else None

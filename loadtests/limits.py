"""What an SLO asks of a load before it starts: rates, deadlines, requests in flight, and how many samples.

Contract: reads nothing but the SLO and the settings of a run, so that what a run cannot prove is said before it begins.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from deepseek.spec import InputError, Parser, SloSpec
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
    """Unanswered requests that a worker may have, so that none is dropped that could still be in time."""
    highest_rps = max((max(each.rate_rps, each.end_rps or 0.0) for each in settings.segments), default=0.0)
    needed = math.ceil(PATIENCE * highest_rps * largest_limit_s(slo) / settings.workers)
    return min(max(IN_FLIGHT, needed), MOST_IN_FLIGHT)


def rates(slo: SloSpec) -> list[float]:
    """Every rate that an objective is about, in requests/s, ascending."""
    found = {line.rate_rps for line in slo.all_objectives()} | {slo.rate_rps}
    return sorted(rate for rate in found if rate is not None)


def samples_needed(percent: float) -> int:
    """Requests without which nothing is claimed of a percentile."""
    return math.ceil(math.log(1 - CONFIDENCE) / math.log(percent / 100))


def too_short(settings: Settings, slo: SloSpec) -> Iterator[str]:
    """What a run will be too short for, known before it starts."""
    own = own_rate(settings, slo)
    for line in slo.all_objectives():
        rate = line.rate_rps or own
        meant = [
            each
            for each in settings.segments
            if rate is None or (each.rate_rps == rate and each.end_rps in (None, each.rate_rps))
        ]
        planned = sum(each.arrivals for each in meant)
        if line.percent is not None and 0 < planned < (needed := samples_needed(line.percent)):
            seconds = math.ceil(needed / planned * sum(each.duration_s for each in meant))
            yield f"{planned} requests cannot prove {line.name}, {needed} can: run for {seconds} s or more"


def own_rate(settings: Settings, slo: SloSpec) -> float | None:
    """Of rates that change the SLO's own, which a line without a rate is about; None where that is the whole run.

    A ramp passes over any rate.
    """
    segments, held = settings.segments, settings.rates_rps
    stepwise = len(held) > 1 and all(each.end_rps in (None, each.rate_rps) for each in segments)
    return slo.rate_rps if stepwise or (len(segments) > 1 and slo.rate_rps in held) else None

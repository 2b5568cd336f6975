"""What an SLO demands of a load: rates, deadlines, requests in flight, and samples.

Contract: reads only the SLO and the settings of a run, so that it can report before the run what that cannot prove.
"""

import math
from collections.abc import Iterator

from deepseek.spec import InputError, Objective, SloSpec
from deepseek.spec.objectives import requests_to_prove
from loadtests.results.settings import IN_FLIGHT, LoadSettings

TIMEOUT_S = 5.0  # smallest default time-out of a request
PATIENCE = 2  # default time-out in largest latency limits: a later answer is clearly late
MOST_IN_FLIGHT = 8192  # of a worker: below the 10,000 files that Locust lets a process open


def largest_limit_s(*slos: SloSpec) -> float:
    """The largest latency in seconds that the SLOs allow at any rate; 0 if they limit none."""
    return max((line.limit for slo in slos for line in slo.all_objectives() if line.kind == "ms"), default=0.0) / 1000


def timeout_for(asked_s: float | None, *slos: SloSpec) -> float:
    """A request's time-out in seconds: `asked_s`, or a default that is longer than any answer these SLOs allow.

    InputError if `asked_s` is not longer than the answers they allow.
    """
    limit_s = largest_limit_s(*slos)
    enough_s = max(TIMEOUT_S, PATIENCE * limit_s)
    if asked_s is not None and 0 < asked_s <= limit_s:
        raise InputError(
            f"--timeout-s {asked_s:g}: the SLO allows answers up to {limit_s:g} s, which this would count as failed; "
            f"give more than that, or leave it out (default {enough_s:g})"
        )
    return enough_s if asked_s is None else asked_s


def in_flight_for(settings: LoadSettings, slo: SloSpec) -> int:
    """The limit on unanswered requests of a worker, high enough to drop no request that could still be in time.

    InputError if that is more than a worker can have.
    """
    highest_rps = max((max(each.rate_rps, each.end_rps or 0.0) for each in settings.segments), default=0.0)
    if settings.replay is not None:
        highest_rps = settings.replay.peak_rps
    for line in (each for each in slo.all_objectives() if each.kind == "ms"):
        rate_rps = min(highest_rps, rate_of(line, settings, slo) or highest_rps)  # it applies at no higher rate
        in_time = rate_rps * line.limit / 1000
        if in_time > MOST_IN_FLIGHT * settings.workers:
            raise InputError(
                f"{settings.model} at {rate_rps:g}/s: the SLO allows answers up to {line.limit / 1000:g} s, so "
                f"{in_time:.0f} requests may be in flight and in time; a worker can have {MOST_IN_FLIGHT}, and there "
                f"{'is' if settings.workers == 1 else 'are'} {settings.workers}: lower the rate, or use "
                f"{math.ceil(in_time / MOST_IN_FLIGHT)} workers (--workers, WORKERS=)"
            )
    needed = math.ceil(PATIENCE * highest_rps * largest_limit_s(slo) / settings.workers)
    return min(max(IN_FLIGHT, needed), MOST_IN_FLIGHT)


def rates(slo: SloSpec) -> list[float]:
    """The rates in requests/s at which objectives apply, ascending, including throughput above the SLO's own rate."""
    lines, own = slo.all_objectives(), slo.rate_rps or 0.0
    found = {line.rate_rps for line in lines} | {slo.rate_rps}
    found |= {line.limit for line in lines if line.kind == "throughput" and not line.rate_rps and line.limit > own}
    return sorted(rate for rate in found if rate is not None)


def confidence_of(settings: LoadSettings, slo: SloSpec) -> float:
    """The confidence of each bound: the SLO's, whose error the looks of a run share equally (Bonferroni)."""
    return 1 - (1 - slo.confidence) / settings.looks


def too_short(settings: LoadSettings, slo: SloSpec) -> Iterator[str]:
    """Notes on the percentiles, error rates and throughputs that a run is too short to prove."""
    for line in slo.all_objectives():
        rate = rate_of(line, settings, slo)
        meant = [
            each
            for each in settings.segments
            if rate is None or (each.rate_rps == rate and each.end_rps in (None, each.rate_rps))
        ]
        planned, duration_s = sum(each.arrivals for each in meant), sum(each.duration_s for each in meant)
        needed = requests_to_prove(line, planned / duration_s, confidence_of(settings, slo)) if planned else None
        if needed is not None and planned < needed:
            seconds = math.ceil(needed / planned * duration_s)
            do = f"run for {seconds} s or more" if settings.replay is None else "replay a longer file"
            yield f"{planned} requests cannot prove {line.name}, {needed} can: {do}"


def rate_of(line: Objective, settings: LoadSettings, slo: SloSpec) -> float | None:
    """The rate at which an objective is judged: its own, or else the SLO's; None means the whole run.

    Throughput is judged at the rate of its limit, if the run has that rate.
    """
    asked = line.limit if line.kind == "throughput" and len(settings.segments) > 1 else None
    return line.rate_rps or (asked if asked in settings.rates_rps else own_rate(settings, slo))


def own_rate(settings: LoadSettings, slo: SloSpec) -> float | None:
    """The SLO's own rate, at which objectives without a rate are judged; None if the whole run counts.

    In a run of one rate or a ramp the whole run counts.
    """
    segments, held = settings.segments, settings.rates_rps
    stepwise = len(held) > 1 and all(each.end_rps in (None, each.rate_rps) for each in segments)
    return slo.rate_rps if stepwise or (len(segments) > 1 and slo.rate_rps in held) else None

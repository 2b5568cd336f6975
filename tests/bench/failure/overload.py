"""Three times the server's capacity for a minute: accepted requests, refused requests, and recovery.

In an overload, a first-in-first-out queue is always full up to its time-out, so an accepted request has waited about
that long. Accepted requests are on time because `queue_timeout_ms` leaves time for their batch before the SLO's p99.

The load generator has the last core to itself: real callers run on other machines, and a thousand requests a second
cost half a core.
"""

from __future__ import annotations

import os
import time

import numpy as np

from deepseek.spec import InvalidMeasurement
from loadtests.load.request_log import RequestLog
from tests.bench.claims import Row
from tests.bench.failure.setting import Service, Setting, Way, counted, watched_memory
from tests.bench.setting import on

WAYS_OVERLOADED: tuple[Way, ...] = ("grpc", "http by gateway")
USERS = 16  # of the closed loop that measures the capacity
CAPACITY_S = 8.0
TIMES = 3
AFTERWARDS_S = 15
RECOVERED_S = 5.0
GOODPUT = 0.8  # of the capacity
GROWTH_MIB = 64.0
LATEST_MS = 50.0  # limit on the p99 of the send lag
REFUSED_AS = {"ServerBusy"}  # 503, UNAVAILABLE


def overload(setting: Setting) -> list[Row]:
    cores = sorted(os.sched_getaffinity(0))
    with on(cores[:-1] or cores), setting.service("overload") as service:
        return [row for way in WAYS_OVERLOADED for row in _overload(setting, service, way, cores[-1:])]


def capacity_rps(setting: Setting, service: Service, way: Way, load_cores: list[int]) -> float:
    """Answers per second to users who send back to back."""
    stream = setting.stream(service, way, None, setting.other, users=USERS)
    with on(load_cores):
        load = setting.load(service, [stream])
    with load:
        time.sleep(2 + CAPACITY_S)
        answers = load.stop()[stream.name].answered
    return sum(2 < each.finished_s <= 2 + CAPACITY_S for each in answers.requests) / CAPACITY_S


def _overload(setting: Setting, service: Service, way: Way, load_cores: list[int]) -> list[Row]:
    capacity = capacity_rps(setting, service, way, load_cores)
    before_mib = sum(service.memory_mib().values())
    shape = f"{TIMES * capacity:.1f}x{setting.overload_s}, {capacity / 2:.1f}x{AFTERWARDS_S}"
    stream = setting.stream(service, way, shape, setting.other)
    with on(load_cores):
        load = setting.load(service, [stream])
    with watched_memory(service) as samples, load:
        answers = load.wait()[stream.name]
    if not (lag_ms := answers.lag_ms(99)) <= LATEST_MS or answers.errors["dropped"]:
        raise InvalidMeasurement(
            f"requests left late: p99 {lag_ms:.0f} ms, allowed {LATEST_MS:g} ms; use a less busy machine"
        )
    ends_s = setting.overload_s
    during, after = answers.between(0, ends_s), answers.between(ends_s)
    grown_mib = max(sum(each.values()) for each in samples) - before_mib
    goodput = len(during.answered) / setting.overload_s / capacity
    p99_ms, limit_ms = during.answered.latency_ms(99), setting.other.p99_ms
    refused_ms, recovered_s = during.failed.latency_ms(99), _recovered_s(after, ends_s, limit_ms)
    what = (
        f"{TIMES} times capacity, {setting.other.name} over {way}, {TIMES * capacity:.0f}/s for {setting.overload_s} s"
    )
    return [
        Row(
            what=f"{what}: accepted requests",
            asked=f"p99 within the SLO's {limit_ms:g} ms",
            seen=f"p99 {p99_ms:.0f} ms, p50 {during.answered.latency_ms(50):.0f} ms, of {len(during.answered)}",
            holds=p99_ms <= limit_ms,
        ),
        Row(
            what="    how many are answered",
            asked=f"{GOODPUT:.0%} of the capacity",
            seen=f"{goodput:.0%}",
            holds=goodput >= GOODPUT,
        ),
        Row(
            what="    the rest",
            asked="refused as busy (503, UNAVAILABLE) within the SLO",
            seen=f"{counted(during.errors)}; p50 {during.failed.latency_ms(50):.0f} ms, p99 {refused_ms:.0f} ms",
            holds=set(during.errors) == REFUSED_AS and refused_ms <= limit_ms,
        ),
        Row(
            what="    memory",
            asked=f"{GROWTH_MIB:g} MiB more at most",
            seen=f"{grown_mib:+.0f} MiB on {before_mib:.0f}",
            holds=grown_mib <= GROWTH_MIB,
        ),
        Row(
            what="    afterwards, at half the capacity",
            asked=f"as usual within {RECOVERED_S:g} s",
            seen=f"after {recovered_s:.1f} s",
            holds=recovered_s <= RECOVERED_S,
        ),
    ]


def _recovered_s(after: RequestLog, ends_s: float, limit_ms: float) -> float:
    """Seconds until the first second in which all requests are answered, 99 % of them in time."""
    for start_s in np.arange(0, AFTERWARDS_S, 0.25):
        found = after.between(ends_s + start_s, ends_s + start_s + 1)
        if len(found) and not len(found.failed) and found.latency_ms(99) <= limit_ms:
            return float(start_s)
    return float("inf")

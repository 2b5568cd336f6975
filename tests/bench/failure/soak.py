"""A long steady load on every way: memory and latency must not drift, and no request may fail."""

from __future__ import annotations

import itertools

import numpy as np

from loadtests.load.request_log import RequestLog
from tests.bench.claims import Row
from tests.bench.failure.setting import WAYS, Setting, lost, told, watched_memory

RATE = 10  # requests/s of each stream of each model
PARTS = 3  # the first, which includes the warm-up, is compared with the last
GROWTH = 0.05  # limit on the growth of memory, as a share
GROWTH_MIB = 16.0
SLOWER_TIMES = 1.5
SLICES = 10  # per part: its latency is the median over the slices, so one disturbance of the machine does not count


def soak(setting: Setting) -> list[Row]:
    """Loads both models over HTTP and gRPC, directly and through the gateway."""
    with setting.service("soak") as service:
        shape = f"{RATE}x{setting.soak_s}"
        models = (setting.model, setting.other)
        streams = [
            setting.stream(service, way, shape, model, retries=3) for way, model in itertools.product(WAYS, models)
        ]
        every_s = max(1.0, setting.soak_s / 300)
        with watched_memory(service, every_s) as samples, setting.load(service, streams) as load:
            answers = load.wait()
    sent = sum(len(each) for each in answers.values())
    thirds = {place: _thirds([each[place] for each in samples]) for place in samples[0]}
    first_mib, last_mib = (sum(each[part] for each in thirds.values()) for part in (0, -1))
    places = "; ".join(f"{place} {', '.join(f'{mib:.0f}' for mib in parts)}" for place, parts in thirds.items())
    limit_mib = max(first_mib * (1 + GROWTH), first_mib + GROWTH_MIB)
    name = f"soak of {setting.soak_s / 60:g} minutes, {sent} requests over {len(streams)} streams"
    return [
        Row(
            what=name, asked="no request fails", seen=f"{lost(answers)} failed{told(answers)}", holds=lost(answers) == 0
        ),
        Row(
            what="    memory of server and gateway, last third against first",
            asked=f"at most {limit_mib:.0f} MiB",
            seen=f"{last_mib:.0f} MiB, {first_mib:.0f} MiB ({places})",
            holds=last_mib <= limit_mib,
        ),
        *(_latency(name, each, setting.soak_s) for name, each in answers.items()),
    ]


def _thirds(values_mib: list[float]) -> list[float]:
    return [float(np.median(part)) for part in np.array_split(values_mib, PARTS)]


def _latency(name: str, answers: RequestLog, soak_s: int) -> Row:
    edges = np.linspace(0, soak_s, PARTS * SLICES + 1)
    p50s, p99s = (
        [answers.between(*edge).answered.latency_ms(percent) for edge in itertools.pairwise(edges)]
        for percent in (50, 99)
    )
    first_ms, last_ms = (float(np.median(part)) for part in (p50s[:SLICES], p50s[-SLICES:]))
    first_p99_ms, last_p99_ms = (float(np.median(part)) for part in (p99s[:SLICES], p99s[-SLICES:]))
    return Row(
        what=f"    p50 of {name}, last third against first",
        asked=f"at most {SLOWER_TIMES:g} times",
        seen=f"{last_ms:.1f} ms, {first_ms:.1f} ms (p99 {last_p99_ms:.0f} ms, {first_p99_ms:.0f} ms)",
        holds=last_ms <= SLOWER_TIMES * first_ms,
    )

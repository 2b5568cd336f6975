"""When each request of an open-loop run is to be sent.

Contract: the whole schedule is fixed before the first request, by its arguments and its seed alone;
nothing that the server does can move it. Times are seconds from the start of the run, ascending. They are worked
out in blocks of some thousands, each when it is needed, so that a soak takes no more memory than a minute.

Every segment has exactly as many arrivals as its rate asks for, so the rate achieved can be set
against the rate planned without luck. Poisson arrivals are those of a Poisson process given that
number: independent, uniform over the segment's cumulative rate, sorted.

Examples:
    Schedule((Segment(duration_s=5, rate_rps=100), Segment(duration_s=20, rate_rps=100))).times_s()
    Schedule((Segment(duration_s=60, rate_rps=10, end_rps=200),), arrivals="constant").times_s()  # a ramp
    segments_of("50x30, 500x5, 50x30")  # a spike: requests/s x seconds, one segment after the other
    segments_of("10-200x60, 200x300")   # a ramp, then a soak
    for times_s in Schedule(segments_of("200x86400")).blocks(): ...  # a day, some thousand times at once
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepseek.spec import InputError

Arrivals = Literal["constant", "poisson"]
BLOCK = 4096  # arrivals, about, that are worked out at once


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the schedule: one rate, or a ramp to `end_rps`."""

    duration_s: float
    rate_rps: float
    end_rps: float | None = None

    @property
    def arrivals(self) -> int:
        """How many requests it holds: the area under its rate."""
        end_rps = self.rate_rps if self.end_rps is None else self.end_rps
        return round((self.rate_rps + end_rps) / 2 * self.duration_s)

    def time_at(self, share: np.ndarray) -> np.ndarray:
        """Seconds into the segment at which `share` (0 to 1) of its arrivals have come."""
        start, end = self.rate_rps, self.rate_rps if self.end_rps is None else self.end_rps
        if start == end:
            return share * self.duration_s
        # The cumulative rate is a parabola; this is its root, relative to the duration.
        return self.duration_s * (np.sqrt(start**2 + (end**2 - start**2) * share) - start) / (end - start)


_SEGMENT = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?x(\d+)")


def segments_of(shape: str) -> tuple[Segment, ...]:
    """The segments of a shape, `<requests/s>[-<requests/s>]x<whole seconds>` each, with commas between."""
    segments = []
    for part in shape.split(","):
        found = _SEGMENT.fullmatch(part.strip())
        if found is None or int(found[3]) == 0 or not 0 < float(found[1]) + float(found[2] or 0) < math.inf:
            raise InputError(
                f"--shape {shape!r}: seen {part.strip()!r}; a segment is RATExSECONDS or RATE-RATExSECONDS, "
                'seconds whole and more than 0, such as "50x30, 50-200x60, 200x30"'
            )
        end = None if found[2] is None else float(found[2])
        segments.append(Segment(duration_s=int(found[3]), rate_rps=float(found[1]), end_rps=end))
    return tuple(segments)


@dataclass(frozen=True)
class Schedule:
    """Planned send times of a whole run, warm-up included."""

    segments: tuple[Segment, ...]
    arrivals: Arrivals = "poisson"
    seed: int = 0

    def times_s(self, worker: int = 0, workers: int = 1) -> np.ndarray:
        """The times, or every `workers`-th of them from the `worker`-th: together the workers send it all."""
        return np.concatenate([np.empty(0), *self.blocks(worker, workers)])

    def blocks(self, worker: int = 0, workers: int = 1) -> Iterator[np.ndarray]:
        """As `times_s`, one stretch after the other."""
        passed = 0
        for times in self._all_blocks():
            yield times[(worker - passed) % workers :: workers]
            passed += len(times)

    def _all_blocks(self) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(self.seed)
        start_s = 0.0
        for segment in self.segments:
            for share in self._shares(segment.arrivals, generator):
                yield start_s + segment.time_at(share)
            start_s += segment.duration_s

    def _shares(self, count: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
        """Where the `count` arrivals of a segment lie in its cumulative rate, from 0 to 1."""
        blocks = max(1, math.ceil(count / BLOCK))
        if self.arrivals == "constant":
            for first in range(0, count, BLOCK):
                yield np.arange(first, min(first + BLOCK, count)) / count
            return
        # How many of `count` independent, uniform places fall into each of so many equal parts; then those of a part.
        for block, inside in enumerate(generator.multinomial(count, np.full(blocks, 1 / blocks))):
            yield (block + np.sort(generator.random(inside))) / blocks

"""The planned send times of an open-loop run.

Contract: the arguments and the seed alone determine the schedule. Times are seconds from the start of the run,
ascending, and computed in blocks of thousands, so that a long soak test needs little memory. Every segment has exactly
the number of arrivals of its rate. Poisson arrivals are those of a Poisson process given that number: independent,
uniform over the segment's cumulative rate, sorted.

Examples:
    segments_of("50x30, 500x5, 50x30")  # a spike: requests/s x seconds, segment by segment
    Schedule(segments_of("10-200x60, 200x300")).times_s()   # a ramp, then a soak
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
BLOCK = 4096  # about the number of arrivals that are computed at once


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the schedule: one rate, or a ramp to `end_rps`."""

    duration_s: float
    rate_rps: float
    end_rps: float | None = None

    @property
    def arrivals(self) -> int:
        """The number of requests: the area under the rate."""
        end_rps = self.rate_rps if self.end_rps is None else self.end_rps
        return round((self.rate_rps + end_rps) / 2 * self.duration_s)

    def time_at(self, share: np.ndarray) -> np.ndarray:
        """Seconds into the segment after which `share` (0 to 1) of its arrivals are due."""
        start, end = self.rate_rps, self.rate_rps if self.end_rps is None else self.end_rps
        if start == end:
            return share * self.duration_s
        # The cumulative rate is a parabola; this is its root, relative to the duration.
        return self.duration_s * (np.sqrt(start**2 + (end**2 - start**2) * share) - start) / (end - start)


_SEGMENT = re.compile(r"(\d+(?:\.\d+)?)(?:-(\d+(?:\.\d+)?))?x(\d+)")


def segments_of(shape: str) -> tuple[Segment, ...]:
    """Parses a shape: comma-separated segments `<requests/s>[-<requests/s>]x<whole seconds>`."""
    segments = []
    for part in shape.split(","):
        found = _SEGMENT.fullmatch(part.strip())
        if found is None or int(found[3]) == 0 or not 0 < float(found[1]) + float(found[2] or 0) < math.inf:
            raise InputError(
                f"--shape {shape!r}: seen {part.strip()!r}; a segment is RATExSECONDS or RATE-RATExSECONDS, with "
                'whole seconds above 0, such as "50x30, 50-200x60, 200x30"'
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
        """Every `workers`-th time from the `worker`-th; together the workers send the whole schedule."""
        return np.concatenate([np.empty(0), *self.blocks(worker, workers)])

    def blocks(self, worker: int = 0, workers: int = 1) -> Iterator[np.ndarray]:
        """The same times in blocks."""
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
        """The places of the `count` arrivals of a segment in its cumulative rate, from 0 to 1."""
        blocks = max(1, math.ceil(count / BLOCK))
        if self.arrivals == "constant":
            for first in range(0, count, BLOCK):
                yield np.arange(first, min(first + BLOCK, count)) / count
            return
        # First the number of independent, uniform places in each of `blocks` equal parts, then the places of each part.
        for block, inside in enumerate(generator.multinomial(count, np.full(blocks, 1 / blocks))):
            yield (block + np.sort(generator.random(inside))) / blocks

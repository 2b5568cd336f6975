"""The planned send times of an open-loop run.

Contract: the arguments and the seed alone determine the schedule. Times are seconds from the start of the run,
ascending. Every segment has exactly the number of arrivals of its rate. Poisson arrivals are those of a Poisson process
given that number: independent, uniform over the segment's cumulative rate, sorted.

Examples:
    segments_of("50x30, 500x5, 50x30")  # a spike: requests/s x seconds, segment by segment
    send_times_s(segments_of("10-200x60, 200x300"))   # a ramp, then a soak
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deepseek.spec import InputError

Arrivals = Literal["constant", "poisson"]


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A stretch of the schedule: one rate, or a ramp to `end_rps`."""

    duration_s: float
    rate_rps: float
    end_rps: float | None = None

    @property
    def area(self) -> float:
        """The area under the rate; infinite if it is too large for a float."""
        end_rps = self.rate_rps if self.end_rps is None else self.end_rps
        return (self.rate_rps / 2 + end_rps / 2) * self.duration_s

    @property
    def arrivals(self) -> int:
        """The number of requests: the area, rounded."""
        return round(self.area)

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
        numbers = [0.0] if found is None else [float(each) for each in found.groups("0")]
        if found is None or not max(numbers) < math.inf or not sum(numbers[:2]) or not numbers[2]:
            raise InputError(
                f"--shape {shape!r}: seen {part.strip()!r}; a segment is RATExSECONDS or RATE-RATExSECONDS, with a "
                'rate and whole seconds above 0, such as "50x30, 50-200x60, 200x30"'
            )
        rate_rps, end_rps, duration_s = numbers
        segments.append(
            Segment(duration_s=duration_s, rate_rps=rate_rps, end_rps=None if found[2] is None else end_rps)
        )
    return tuple(segments)


def send_times_s(segments: Sequence[Segment], arrivals: Arrivals = "poisson", seed: int = 0) -> np.ndarray:
    """The planned send times of a whole run, warm-up included."""
    generator, start_s, found = np.random.default_rng(seed), 0.0, [np.empty(0)]
    for segment in segments:
        count = segment.arrivals
        even = np.arange(count) / max(1, count)
        share = even if arrivals == "constant" else np.sort(generator.random(count))
        found.append(start_s + segment.time_at(share))
        start_s += segment.duration_s
    return np.concatenate(found)

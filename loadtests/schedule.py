"""When each request of an open-loop run is to be sent.

Contract: the whole schedule is fixed before the first request, by its arguments and its seed alone;
nothing that the server does can move it. Times are seconds from the start of the run, ascending.

Every segment has exactly as many arrivals as its rate asks for, so the rate achieved can be set
against the rate planned without luck. Poisson arrivals are those of a Poisson process given that
number: independent, uniform over the segment's cumulative rate, sorted.

Examples:
    Schedule((Segment(duration_s=5, rate_rps=100), Segment(duration_s=20, rate_rps=100))).times_s()
    Schedule((Segment(duration_s=60, rate_rps=10, end_rps=200),), arrivals="constant").times_s()  # a ramp
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import Literal

import gevent
import numpy as np

Arrivals = Literal["constant", "poisson"]


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


@dataclass(frozen=True)
class Schedule:
    """Planned send times of a whole run, warm-up included."""

    segments: tuple[Segment, ...]
    arrivals: Arrivals = "poisson"
    seed: int = 0

    def times_s(self, worker: int = 0, workers: int = 1) -> np.ndarray:
        """The times, or every `workers`-th of them from the `worker`-th: together the workers send it all."""
        generator = np.random.default_rng(self.seed)
        start_s = 0.0
        times = []
        for segment in self.segments:
            count = segment.arrivals
            if self.arrivals == "constant":
                share = np.arange(count) / max(count, 1)
            else:
                share = np.sort(generator.random(count))
            times.append(start_s + segment.time_at(share))
            start_s += segment.duration_s
        return np.concatenate(times)[worker::workers]


def take_precedence() -> bool:
    """Lets this thread run as soon as it is due, whatever else the machine does; whether it may.

    On a busy machine one wake-up in fifty waits for the kernel's next tick (4 ms) otherwise. It takes
    root or a `ulimit -r`. Threads and processes started later do not inherit it.
    """
    try:
        os.sched_setscheduler(0, os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    except (AttributeError, OSError):
        return False
    return True


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


class Clock:
    """Waits for points of `time.perf_counter()` to some tens of microseconds, without spinning.

    gevent's own sleep rounds up to whole milliseconds (epoll's timeout), which would be the largest
    error of the instrument; Linux's timerfd has none of that. Elsewhere it falls back to the sleep.
    """

    _CLOCK_MONOTONIC = 1  # linux/time.h: what time.perf_counter() reads there
    _TFD_TIMER_ABSTIME = 1
    _FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        create = getattr(self._libc, "timerfd_create", None)
        self._fd = -1 if create is None else create(self._CLOCK_MONOTONIC, self._FLAGS)
        if self._fd >= 0:
            self._watcher = gevent.get_hub().loop.io(self._fd, 1)
        self._spec = _Itimerspec()

    def wait_until(self, due_s: float, now_s: float) -> None:
        """Lets other greenlets run until `due_s`."""
        if self._fd < 0:
            gevent.sleep(due_s - now_s)
            return
        value = self._spec.value
        value.seconds = int(due_s)
        value.nanoseconds = int((due_s - value.seconds) * 1e9)
        self._libc.timerfd_settime(self._fd, self._TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)
        gevent.get_hub().wait(self._watcher)

    def close(self) -> None:
        """Gives the timer back."""
        if self._fd >= 0:
            self._watcher.stop()
            self._watcher.close()
            os.close(self._fd)
            self._fd = -1

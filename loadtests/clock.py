"""Keeps the planned times of an open loop: wakes when a request is due, on a busy machine too.

Contract: waits on `time.perf_counter()`, beside gevent's other greenlets.

Example:
    clock = Clock()
    clock.wait_until(due_s, time.perf_counter())
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import gevent


def take_precedence() -> bool:
    """Lets this process run as soon as it is due, whatever else the machine does; whether it may.

    On a busy machine one wake-up in fifty waits for the kernel's next tick (4 ms) otherwise, and an answer over gRPC,
    which several threads hand on, for some of them. It takes root or a `ulimit -r`. Threads started later inherit it.
    """
    try:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))
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
            loop = gevent.get_hub().loop
            self._watcher = loop.io(self._fd, 1, priority=loop.MAXPRI)  # before answers that came at the same time
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

"""Keeps the planned times of an open loop: wakes when a request is due, also on a busy machine.

Contract: times are those of `time.perf_counter()`; other greenlets run during a wait.
"""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import gevent


def take_precedence() -> bool:
    """Gives this process real-time priority; returns whether the system allows it (as root or with `ulimit -r`).

    Without it, on a busy machine one wake-up in fifty waits for the kernel's next tick (4 ms), and an answer over gRPC,
    which passes through several threads, for several ticks. Threads started later inherit the priority.
    """
    try:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # the thread has just ended
                os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))
    except OSError:
        return False
    return True


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


class Clock:
    """Waits for points of `time.perf_counter()` to some tens of microseconds, without spinning.

    gevent's own sleep rounds up to whole milliseconds (epoll's timeout), which would be the largest
    error of the measurement. Linux's timerfd does not round.
    """

    _CLOCK_MONOTONIC = 1  # linux/time.h: the clock of time.perf_counter()
    _TFD_TIMER_ABSTIME = 1
    _FLAGS = os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(self._CLOCK_MONOTONIC, self._FLAGS)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        loop = gevent.get_hub().loop
        self._watcher = loop.io(self._fd, 1, priority=loop.MAXPRI)  # ahead of answers that arrive at the same time
        self._spec = _Itimerspec()

    def wait_until(self, due_s: float) -> None:
        """Lets other greenlets run until `due_s`."""
        value = self._spec.value
        value.seconds = int(due_s)
        value.nanoseconds = int((due_s - value.seconds) * 1e9)
        self._libc.timerfd_settime(self._fd, self._TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)
        gevent.get_hub().wait(self._watcher)

    def close(self) -> None:
        self._watcher.stop()
        self._watcher.close()
        os.close(self._fd)

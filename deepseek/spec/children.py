"""Child processes that end when the process that started them ends, even if it is killed."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import partial

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """Sends this process SIGTERM when the thread that started it ends; at once if the parent has already ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def ends_with_us() -> Callable[[], None]:
    """A `preexec_fn` that ties a child process to this one."""
    return partial(end_with, os.getpid())

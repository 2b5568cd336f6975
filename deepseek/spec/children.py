"""Child processes that end with the process that started them, however that ends: also where it is killed.

Examples:
    subprocess.Popen(command, preexec_fn=ends_with_us())
    end_with(int(os.environ["PARENT"]))  # in the child itself, where its parent must not run anything after its fork
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from functools import partial

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def end_with(parent: int) -> None:
    """This process gets SIGTERM when the thread that started it ends; at once where its parent has ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def ends_with_us() -> Callable[[], None]:
    """What a child runs before its program."""
    return partial(end_with, os.getpid())

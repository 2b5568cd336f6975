"""Child processes that end with the process that started them, however that ends: also where it is killed.

Example:
    subprocess.Popen(command, preexec_fn=ends_with_us())
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def ends_with_us() -> Callable[[], None]:
    """What a child runs before its program: from then on it gets SIGTERM when the thread that started it ends."""
    parent = os.getpid()

    def before() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # killed before that was asked for
            os._exit(1)

    return before

"""Child processes: tied to this process, even if it is killed; their environment, free ports, last words."""

import ctypes
import os
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)
_ROOT = str(Path(__file__).parents[3])  # of the checkout


def end_with(parent: int) -> None:
    """Sends this process SIGTERM when the thread that started it ends; at once if the parent has already ended."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def ends_with_us() -> Callable[[], None]:
    """A `preexec_fn` that ties a child process to this one."""
    return partial(end_with, os.getpid())


def our_environment(**more: str) -> dict[str, str]:
    """This process's environment, with the project on PYTHONPATH and the variables in `more`."""
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 on which nothing listens now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def last_line(text: str) -> str:
    """The last line of a command's output, without "error: ": why it ended."""
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""

"""The environment and free ports for the processes that a load test starts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

_ROOT = str(Path(__file__).parents[2])


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

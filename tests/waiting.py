"""Waits for what holds a little later: tests wait for events, never for a fixed time."""

import time
from collections.abc import Callable
from typing import Any


def wait_for(ask: Callable[[], Any], holds: Callable[[Any], bool] = bool, wait_s: float = 60) -> Any:
    """Calls `ask` until the result holds, and returns it: a request is counted and logged after its answer."""
    deadline = time.monotonic() + wait_s
    while not holds(found := ask()):
        assert time.monotonic() < deadline, found
        time.sleep(0.02)
    return found

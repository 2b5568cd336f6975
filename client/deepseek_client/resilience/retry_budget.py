"""The retry budget limits retries and hedges to a small share of the calls.

Contract: at most `RESERVE` + share * calls extra requests in the last `WINDOW_S` whole seconds. A server that fails
every request sees about (1 + share) times the calls, not (1 + retries) times; a client with few calls may still retry.
Finagle's RetryBudget works the same way.

Example:
    >>> budget = RetryBudget(0.1)
    >>> budget.count_call()
    >>> budget.take()
    True
"""

import threading
import time
from collections.abc import Callable

WINDOW_S = 10
RESERVE = 10


class RetryBudget:
    """Counts calls and extra requests per second. `share` None: no limit."""

    def __init__(self, share: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._clock = clock
        self._lock = threading.Lock()
        self._second = int(clock())
        self._calls = [0] * WINDOW_S  # by second modulo WINDOW_S
        self._extras = [0] * WINDOW_S

    def count_call(self) -> None:
        if self._share is not None:
            with self._lock:
                self._calls[self._now()] += 1

    def take(self) -> bool:
        """Whether one more extra request is allowed; if so, counts it."""
        if self._share is None:
            return True
        with self._lock:
            now = self._now()
            if sum(self._extras) + 1 > RESERVE + self._share * sum(self._calls):
                return False
            self._extras[now] += 1
            return True

    def _now(self) -> int:
        """This second's index; clears the seconds that have left the window."""
        second = int(self._clock())
        for passed in range(max(self._second + 1, second - WINDOW_S + 1), second + 1):
            self._calls[passed % WINDOW_S] = self._extras[passed % WINDOW_S] = 0
        self._second = max(self._second, second)
        return second % WINDOW_S

"""Makes the attempts of a call: retries, hedges, and the choice of replica.

Contract: up to `retries` attempts follow the first, within the retry budget. It retries requests that certainly
did not run, and those that may have run if they only read or the client is `idempotent`. An untried replica
is tried at once. Otherwise the k-th retry waits a random time between 0 and min(2 s, 25 ms * 2^k) ("full jitter") plus
Retry-After. If that would pass the deadline, the error is raised at once.
"""

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from deepseek_client.concurrency import Attempt, Cancel, Concurrency
from deepseek_client.errors import InferenceError, ServerBusy, Unreachable
from deepseek_client.options import ClientOptions
from deepseek_client.resilience.replicas import Replica, Replicas
from deepseek_client.resilience.retry_budget import RetryBudget
from deepseek_client.statistics import Counters
from deepseek_client.transport import Deadline

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
UNKNOWN_SHARE = 0.25

Result = TypeVar("Result")
Operation = Callable[[Replica, Cancel | None], Coroutine[Any, Any, Result]]


class Retrier:
    def __init__(
        self, options: ClientOptions, concurrency: Concurrency, replicas: Replicas, counters: Counters
    ) -> None:
        self._options = options
        self._concurrency = concurrency
        self._replicas = replicas
        self._counters = counters
        self._budget = RetryBudget(options.retry_budget)
        self._closed = False

    def close(self) -> None:
        """Starts no further attempt: its connection would stay open."""
        self._closed = True

    async def call(
        self,
        operation: Operation[Result],
        deadline: Deadline,
        model: str | None,
        *,
        repeatable: bool = True,
        hedged: bool = False,
    ) -> Result:
        """The result of the first attempt that succeeds. Raises the last error if none does.

        `repeatable`: the operation may run twice.
        """
        self._budget.count_call()
        tried: list[Replica] = []  # by hedges too
        attempt = 0
        while True:
            replica = self._replicas.pick(tried)
            tried.append(replica)
            try:
                if hedged and (after_s := self._hedge_after_s(model, deadline)) is not None:
                    return await self._hedged(operation, replica, tried, model, after_s)
                return await self._attempt(operation, replica, model, None)
            except InferenceError as error:
                if not (error.did_not_run or (error.may_have_run and repeatable)):
                    raise
                pause_s = self._pause_s(error, attempt, tried, deadline)
                if pause_s is None or not self._may_retry(error, model):
                    raise
                if pause_s:
                    await self._concurrency.sleep(pause_s)
                if self._closed:
                    raise
                attempt += 1

    async def _attempt(
        self, operation: Operation[Result], replica: Replica, model: str | None, cancel: Cancel | None
    ) -> Result:
        try:
            result = await operation(replica, cancel)
        except InferenceError as error:
            if cancel is None or not cancel.cancelled:
                self._replicas.failed(replica, error, model)
            raise
        self._replicas.answered(replica)
        return result

    def _pause_s(
        self, error: InferenceError, attempt: int, tried: Sequence[Replica], deadline: Deadline
    ) -> float | None:
        """Seconds to wait after an attempt, counted from 0; None: make no further attempt."""
        if attempt >= self._options.retries:
            return None
        if self._replicas.another(tried):
            return 0.0 if deadline.left_s() > 0 else None
        pause_s = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 10)))
        if isinstance(error, ServerBusy) and error.retry_after_s is not None:
            pause_s += error.retry_after_s
        return pause_s if pause_s < deadline.left_s() else None

    def _may_retry(self, error: InferenceError, model: str | None) -> bool:
        """Asks the budget. Always true after Unreachable: nothing reached a server, so a retry adds no load."""
        allowed = isinstance(error, Unreachable) or self._budget.take()
        if model:
            self._counters.of(model).add("retries" if allowed else "denied")
        return allowed

    def _hedge_after_s(self, model: str | None, deadline: Deadline) -> float | None:
        """Seconds until the hedge; a share of the time left while there are too few calls for a percentile."""
        percent = self._options.hedge_percent()
        counters = self._counters.get(model or "")  # an unknown name gets none
        known_ms = None if percent is None or counters is None else counters.recent_ms(percent)
        after_ms = self._options.hedge_after_ms if percent is None else known_ms
        return max(0.0, deadline.left_s()) * UNKNOWN_SHARE if after_ms is None else float(after_ms) / 1000

    async def _hedged(
        self, operation: Operation[Result], replica: Replica, tried: list[Replica], model: str | None, after_s: float
    ) -> Result:
        def count(name: str) -> None:
            self._counters.of(model or "").add(name)

        def second() -> Attempt[Result] | None:
            if self._closed:
                return None
            if not self._budget.take():
                count("denied")
                return None
            other = self._replicas.pick(tried)
            tried.append(other)
            count("hedges")
            return lambda cancel: won(other, cancel)

        async def won(other: Replica, cancel: Cancel | None) -> Result:
            result = await self._attempt(operation, other, model, cancel)
            if cancel is None or not cancel.cancelled:
                count("hedges_won")
                if other is not replica:
                    self._replicas.overtaken(replica)
            return result

        return await self._concurrency.race(
            lambda cancel: self._attempt(operation, replica, model, cancel), second, after_s
        )

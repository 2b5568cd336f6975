"""Where the client's logic runs: in the calling thread, or on an asyncio loop.

The logic (`calls`, `replicas`, the transports) is written once, as coroutines. Under `ThreadRuntime` everything that
they await blocks the calling thread instead of suspending, so that `run` drives a coroutine to its end in one step;
under `AsyncRuntime` they suspend as usual. Threads become greenlets where gevent has patched the standard library.

Contract: `race` gives the first answer of two attempts and stops the other; a lone attempt is never delayed by it.
"""

import asyncio
import contextlib
import sys
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from deepseek_client.errors import InferenceError

Result = TypeVar("Result")

MOST_HEDGED_CALLS = 64
"""Calls of one blocking client that can wait for their hedge at a time; more go on without one."""


class Cancel:
    """Stops an attempt from another thread, by whatever the attempt says that stops it."""

    def __init__(self) -> None:
        self.cancelled = False
        self._lock = threading.Lock()
        self._stop: Callable[[], object] | None = None

    def stopped_by(self, stop: Callable[[], object] | None) -> None:
        """Called at once where it was cancelled before; None: there is nothing more to stop."""
        with self._lock:
            self._stop = stop
            if stop is not None and self.cancelled:
                stop()

    def cancel(self) -> None:
        """Stops it, now or as soon as it can be."""
        with self._lock:
            self.cancelled = True
            if self._stop is not None:
                self._stop()


Attempt = Callable[[Cancel | None], Coroutine[Any, Any, Result]]
Follower = Callable[[], Attempt[Result] | None]
"""Makes the second attempt when its time has come; None where there is to be none."""


class Runtime(Protocol):
    """What the logic needs of its surroundings."""

    async def sleep(self, seconds: float) -> None:
        """Waits; less where the client is closed meanwhile."""

    async def race(self, first: Attempt[Result], second: Follower[Result], after_s: float) -> Result:
        """The first answer of `first` and, where that takes longer than `after_s`, of what `second` gives."""

    def spawn(self, background: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs it beside the calls, until it ends or the client is closed."""

    def close(self) -> None:
        """Ends what runs in the background."""


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("suspended in a thread: what it awaited must block")


def is_gevent_patched() -> bool:
    """Whether threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


class ThreadRuntime:
    """Blocks the calling thread."""

    def __init__(self) -> None:
        self._closed = threading.Event()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    async def sleep(self, seconds: float) -> None:
        """See Runtime."""
        self._closed.wait(seconds)

    async def race(self, first: Attempt[Result], second: Follower[Result], after_s: float) -> Result:
        """See Runtime. `first` runs in the calling thread, `second` in one of a pool."""
        with self._lock:
            self._pool = self._pool or ThreadPoolExecutor(MOST_HEDGED_CALLS, thread_name_prefix="deepseek-hedge")
        race: _Race[Result] = _Race()
        hedge = self._pool.submit(race.follow, second, after_s)
        return race.lead(first, hedge)

    def spawn(self, background: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See Runtime."""
        threading.Thread(target=lambda: run(background()), name="deepseek-probe", daemon=True).start()

    def close(self) -> None:
        """See Runtime."""
        self._closed.set()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class _Race(Generic[Result]):
    """Two attempts in two threads, of which either may stop the other."""

    def __init__(self) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._followed = False
        self._cancels = Cancel(), Cancel()

    def lead(self, first: Attempt[Result], hedge: "Future[list[Result]]") -> Result:
        """Runs the first attempt, here; where it fails or is stopped, the second's answer counts if there is one."""
        try:
            result = run(first(self._cancels[0]))
        except InferenceError:
            if self._ended_alone() or not (answers := _answers(hedge)):
                raise
            return answers[0]
        except BaseException:  # Ctrl-C, a gevent time-out
            self._ended_alone()
            self._cancels[1].cancel()
            raise
        self._ended_alone()
        self._cancels[1].cancel()
        hedge.cancel()
        return result

    def follow(self, second: Follower[Result], after_s: float) -> list[Result]:
        """Waits, runs the second attempt, and stops the first when there is an answer; no answer: an empty list."""
        if self._over.wait(after_s):
            return []
        with self._lock:
            attempt = None if self._over.is_set() else second()
            self._followed = attempt is not None
        if attempt is None:
            return []
        result = run(attempt(self._cancels[1]))
        self._cancels[0].cancel()
        return [result]

    def _ended_alone(self) -> bool:
        """The first attempt is over: no second one begins any more; whether none had."""
        with self._lock:
            self._over.set()
            return not self._followed


def _answers(hedge: "Future[list[Result]]") -> list[Result]:
    """Of a second attempt that has begun, when it ends; its own error is of no interest beside the first's."""
    with contextlib.suppress(InferenceError):
        return hedge.result()
    return []


class AsyncRuntime:
    """Suspends on the running loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def sleep(self, seconds: float) -> None:
        """See Runtime."""
        await asyncio.sleep(seconds)

    async def race(self, first: Attempt[Result], second: Follower[Result], after_s: float) -> Result:
        """See Runtime."""
        tasks = [asyncio.ensure_future(first(None))]
        try:
            _, running = await asyncio.wait(tasks, timeout=after_s)
            if running and (attempt := second()):
                tasks.append(asyncio.ensure_future(attempt(None)))
            return await _first_answer(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def spawn(self, background: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """See Runtime."""
        task = asyncio.ensure_future(background())
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)

    def close(self) -> None:
        """See Runtime."""
        for task in list(self._tasks):
            task.cancel()


async def _first_answer(tasks: "list[asyncio.Task[Result]]") -> Result:
    """Of the first that succeeds; where all fail, the first task's error."""
    running = set(tasks)
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.exception():
                return task.result()
    return tasks[0].result()

"""Runs the client's logic in the calling thread, or on an asyncio loop.

The logic (`core`, `retry`, `replicas`, the transports) is written once, as coroutines. With `ThreadConcurrency` every
await blocks the calling thread instead of suspending, so `run` completes a coroutine in one step. With
`AsyncConcurrency` coroutines suspend as usual. gevent's patching turns threads into greenlets.

Contract: `race` returns the first answer, or raises the first definite error, of two attempts and stops the other
without waiting for it. If both fail, it raises the first attempt's error. If the first fails before the second begins,
it raises at once.
"""

import asyncio
import queue
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from deepseek_client.errors import DeadlineExceeded, InferenceError

Result = TypeVar("Result")


class Cancel:
    """Stops an attempt from another thread, through the function that the attempt registered."""

    def __init__(self) -> None:
        self.cancelled = False
        self._lock = threading.Lock()
        self._stop: Callable[[], object] | None = None

    def stopped_by(self, stop: Callable[[], object] | None) -> None:
        """Registers `stop`; calls it at once if already cancelled. None: there is nothing left to stop."""
        with self._lock:
            self._stop = stop
            if stop is not None and self.cancelled:
                stop()

    def cancel(self) -> None:
        """Stops the attempt, now or as soon as it registers how."""
        with self._lock:
            self.cancelled = True
            if self._stop is not None:
                self._stop()


Attempt = Callable[[Cancel | None], Coroutine[Any, Any, Result]]
Follower = Callable[[], Attempt[Result] | None]
"""Makes the second attempt when it is due; returns None to make none."""


def run(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """The result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("suspended in a thread: what it awaits must block")


def is_gevent_patched() -> bool:
    """Whether threads are greenlets."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched("threading")


def is_definite(error: BaseException | None) -> bool:
    """Whether another attempt would end the same way: a refusal by one server counts for all."""
    if not isinstance(error, InferenceError):
        return True
    return not (error.did_not_run or error.may_have_run or isinstance(error, DeadlineExceeded))


def _started(work: Callable[[], None], name: str) -> bool:
    """Runs `work` in a daemon thread; False if the process may start no more."""
    try:
        threading.Thread(target=work, name=name, daemon=True).start()
    except RuntimeError:
        return False
    return True


class ThreadConcurrency:
    def __init__(self) -> None:
        self._closed = threading.Event()

    async def sleep(self, seconds: float) -> None:
        """Waits; ends early if the client is closed."""
        self._closed.wait(seconds)

    async def race(self, first: Attempt[Result], second: Follower[Result], after_s: float) -> Result:
        """The attempts run in daemon threads, so that no attempt can hold up the caller or the end of the process.

        Without a thread for the first, it runs here and there is no second.
        """
        ended: queue.SimpleQueue[tuple[int, Result | None, BaseException | None]] = queue.SimpleQueue()
        cancels: list[Cancel] = []

        def start(attempt: Attempt[Result]) -> bool:
            number, cancel = len(cancels), Cancel()
            cancels.append(cancel)

            def work() -> None:
                try:
                    ended.put((number, run(attempt(cancel)), None))
                except BaseException as error:
                    ended.put((number, None, error))

            if not (started := _started(work, "deepseek-hedge")):
                cancels.pop()
            return started

        try:
            if not start(first):
                return run(first(None))
            try:
                number, result, error = ended.get(timeout=after_s)
            except queue.Empty:
                if attempt := second():
                    start(attempt)
                number, result, error = ended.get()
            if error is not None and not is_definite(error) and len(cancels) > 1:
                kept = error
                number, result, error = ended.get()
                if error is not None and not is_definite(error) and number == 1:
                    error = kept
            if error is not None:
                raise error
            return result  # type: ignore[return-value]
        finally:  # also after Ctrl-C and a gevent time-out
            for cancel in cancels:
                cancel.cancel()

    def spawn(self, background: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        """Runs it in the background until it ends or the client is closed; False if it cannot run."""
        return _started(lambda: run(background()), "deepseek-probe")

    def close(self) -> None:
        self._closed.set()


class AsyncConcurrency:
    """Suspends on the running loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def race(self, first: Attempt[Result], second: Follower[Result], after_s: float) -> Result:
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

    def spawn(self, background: Callable[[], Coroutine[Any, Any, None]]) -> bool:
        task = asyncio.ensure_future(background())
        self._tasks.add(task)  # the loop keeps only weak references
        task.add_done_callback(self._tasks.discard)
        return True

    def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()


Concurrency = ThreadConcurrency | AsyncConcurrency


async def _first_answer(tasks: "list[asyncio.Task[Result]]") -> Result:
    """The first answer or definite error; if all fail, the first task's error."""
    running = set(tasks)
    while running:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            if not task.exception() or is_definite(task.exception()):
                return task.result()
    return tasks[0].result()

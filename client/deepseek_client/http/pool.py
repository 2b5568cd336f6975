"""A pool of HTTP connections to one server: kept alive, used by one call at a time, opened when needed.

Contract: a call that finds no idle connection waits until one is opened or given back, within its deadline. At most
`MOST_OPENING` are opened at a time. Without this limit, each waiting call would start a handshake, and an overloaded
server would spend its time on handshakes. On a loop, a handshake continues when the call that began it has ended.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from deepseek_client.concurrency import Cancel
from deepseek_client.http.connection import CANCELLED_WITHIN_S, Connection
from deepseek_client.transport import Deadline

MOST_OPENING = 16
LONGEST_OPENING_S = 10.0  # on a loop
OpenConnection = Callable[[Deadline, Cancel | None], Coroutine[Any, Any, Connection]]


class _Idle:
    def __init__(self, open_connection: OpenConnection) -> None:
        self._open_connection = open_connection
        self._idle: deque[Connection] = deque()  # append and pop are atomic, so threads need no lock
        self._closed = False

    def _pop_alive(self) -> Connection | None:
        with contextlib.suppress(IndexError):
            while not (connection := self._idle.pop()).is_alive():
                connection.close()
            return connection
        return None

    def _put(self, connection: Connection) -> None:
        self._idle.append(connection)
        if self._closed:  # checked after the append, so that a `close` in another thread misses none
            self.close()

    def close(self) -> None:
        """Closes idle connections now, the others when they are given back."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class BlockingPool(_Idle):
    """A pool for threads; each call opens its own connection."""

    def __init__(self, open_connection: OpenConnection) -> None:
        super().__init__(open_connection)
        self._changed = threading.Condition()
        self._waiting = self._waiting_for_new = self._opening = 0

    async def take(self, deadline: Deadline, *, idle: bool = True, cancel: Cancel | None = None) -> Connection:
        """A usable connection; with `idle` False a new one. Raises OSError; TimeoutError at the deadline."""
        if connection := (idle and self._pop_alive()) or self._wait(deadline, idle, cancel):
            return connection
        try:
            return await self._open_connection(deadline, cancel)
        finally:
            with self._changed:
                self._opening -= 1
                self._changed.notify()

    def _wait(self, deadline: Deadline, idle: bool, cancel: Cancel | None) -> Connection | None:
        """Waits for a connection that is given back. Returns None if the caller may open one."""
        with self._changed:
            self._waiting += 1
            self._waiting_for_new += not idle
            try:
                while not (connection := (idle and self._pop_alive()) or None) and self._opening >= MOST_OPENING:
                    left_s = deadline.socket_timeout_s()
                    self._changed.wait(left_s if cancel is None else min(left_s, CANCELLED_WITHIN_S))
                    if cancel is not None and cancel.cancelled:
                        raise ConnectionAbortedError("another attempt was answered first")
            except BaseException:
                self._changed.notify()  # pass the wake-up on to another waiting call
                raise
            finally:
                self._waiting -= 1
                self._waiting_for_new -= not idle
            self._opening += connection is None
            return connection

    def give_back(self, connection: Connection) -> None:
        self._put(connection)
        if self._waiting:
            with self._changed:
                self._changed.notify(1 + self._waiting_for_new)  # so that at least one of them can take it


class AsyncPool(_Idle):
    """A pool for the tasks of a loop; separate tasks open the connections."""

    def __init__(self, open_connection: OpenConnection) -> None:
        super().__init__(open_connection)
        self._waiting: dict[asyncio.Future[Connection], None] = {}  # in order
        self._openers: set[asyncio.Task[None]] = set()

    async def take(self, deadline: Deadline, *, idle: bool = True, cancel: Cancel | None = None) -> Connection:
        if idle and (connection := self._pop_alive()):
            return connection
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiting[waiter] = None
        if len(self._openers) < MOST_OPENING:
            self._openers.add(asyncio.ensure_future(self._open()))
        try:
            async with asyncio.timeout(deadline.socket_timeout_s()):
                return await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled() and not waiter.exception():
                self.give_back(waiter.result())
            raise
        finally:
            self._waiting.pop(waiter, None)
            self._end_openers()

    async def _open(self) -> None:
        """Opens connections, one at a time, while calls wait."""
        try:
            while self._waiting:
                try:
                    self.give_back(await self._open_connection(Deadline(LONGEST_OPENING_S), None))
                except TimeoutError:
                    continue
                except OSError as error:
                    if waiter := self._first():
                        waiter.set_exception(error)
        finally:
            self._openers.discard(asyncio.current_task())  # at once: the next call needs an opener

    def _first(self) -> "asyncio.Future[Connection] | None":
        while self._waiting:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            if not waiter.done():
                return waiter
        return None

    def give_back(self, connection: Connection) -> None:
        if waiter := self._first():
            waiter.set_result(connection)
        else:
            self._put(connection)

    def close(self) -> None:
        super().close()
        self._end_openers()

    def _end_openers(self) -> None:
        if self._closed and not self._waiting:
            for opener in self._openers:
                opener.cancel()

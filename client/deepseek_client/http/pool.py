"""A pool of HTTP connections to one server: kept alive, used by one call at a time, opened when needed.

Contract: a call that finds no idle connection waits until one is opened or given back, within its deadline. At most
`MOST_OPENING` are opened at a time. Without this limit, each waiting call would start a handshake, and an overloaded
server would spend its time on handshakes. Each call opens its own connection. A forked process opens new ones.
"""

import asyncio
import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from deepseek_client.concurrency import Cancel
from deepseek_client.http.connection import CANCELLED_WITHIN_S, Connection
from deepseek_client.transport import Deadline

MOST_OPENING = 16
OpenConnection = Callable[[Deadline, Cancel | None], Coroutine[Any, Any, Connection]]


class _Idle:
    def __init__(self, open_connection: OpenConnection) -> None:
        self._open_connection = open_connection
        self._idle: deque[Connection] = deque()  # append and pop are atomic, so threads need no lock
        self._closed = False
        self._process = os.getpid()

    def _pop_alive(self) -> Connection | None:
        if self._process != os.getpid():  # forked: the answers on these would be the parent's
            self.drop_idle()
            self._process = os.getpid()
        with contextlib.suppress(IndexError):
            while not (connection := self._idle.pop()).is_alive():
                connection.close()
            return connection
        return None

    def _put(self, connection: Connection) -> None:
        self._idle.append(connection)
        if self._closed:  # checked after the append, so that a `close` in another thread misses none
            self.close()

    def drop_idle(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()

    def close(self) -> None:
        """Closes idle connections now, the others when they are given back."""
        self._closed = True
        self.drop_idle()


class BlockingPool(_Idle):
    """A pool for threads."""

    def __init__(self, open_connection: OpenConnection) -> None:
        super().__init__(open_connection)
        self._changed = threading.Condition()
        self._waiting = self._opening = 0

    async def take(self, deadline: Deadline, cancel: Cancel | None = None) -> Connection:
        """A usable connection. Raises OSError; TimeoutError at the deadline."""
        if connection := self._pop_alive() or self._wait(deadline, cancel):
            return connection
        try:
            return await self._open_connection(deadline, cancel)
        finally:
            with self._changed:
                self._opening -= 1
                self._changed.notify()

    def _wait(self, deadline: Deadline, cancel: Cancel | None) -> Connection | None:
        """Waits for a connection that is given back. Returns None if the caller may open one."""
        with self._changed:
            self._waiting += 1
            try:
                while not (connection := self._pop_alive()) and self._opening >= MOST_OPENING:
                    left_s = deadline.socket_timeout_s()
                    self._changed.wait(left_s if cancel is None else min(left_s, CANCELLED_WITHIN_S))
                    if cancel is not None and cancel.cancelled:
                        raise ConnectionAbortedError("another attempt was answered first")
            except BaseException:
                self._changed.notify()  # pass the wake-up on to another waiting call
                raise
            finally:
                self._waiting -= 1
            self._opening += connection is None
            return connection

    def give_back(self, connection: Connection) -> None:
        self._put(connection)
        if self._waiting:
            with self._changed:
                self._changed.notify()


class AsyncPool(_Idle):
    """A pool for the tasks of a loop."""

    def __init__(self, open_connection: OpenConnection) -> None:
        super().__init__(open_connection)
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._opening = 0

    async def take(self, deadline: Deadline, cancel: Cancel | None = None) -> Connection:
        """As above; cancelled through its task."""
        while not (connection := self._pop_alive()) and self._opening >= MOST_OPENING:
            async with asyncio.timeout(deadline.socket_timeout_s()):
                await self._wait()
        if connection:
            return connection
        self._opening += 1
        try:
            return await self._open_connection(deadline, cancel)
        finally:
            self._opening -= 1
            self._wake()

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self._wake()  # pass the wake-up on to another waiting call
            raise

    def _wake(self) -> None:
        while self._waiting:
            if not (waiter := self._waiting.popleft()).done():
                waiter.set_result(None)
                return

    def give_back(self, connection: Connection) -> None:
        self._put(connection)
        self._wake()

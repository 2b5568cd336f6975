"""Connections of the HTTP transport to one server: kept alive, lent to one call at a time, opened as they are needed.

Contract: a call that finds none idle waits until one is opened or given back, as long as its deadline lets it. At most
`MOST_OPENING` are being opened at a time: a server that is short of time would otherwise get a handshake for each call
that waits, which takes its time from the calls, and one that ends with a call's deadline was for nothing. On a loop a
handshake therefore outlives the call that it was begun for.
"""

import asyncio
import contextlib
import ssl
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Protocol

from deepseek_client.http_connections import Connection
from deepseek_client.transports import Deadline

MOST_OPENING = 16
LONGEST_OPENING_S = 10.0  # on a loop
OpenConnection = Callable[[str, int, ssl.SSLContext | None, Deadline], Coroutine[Any, Any, Connection]]


class Pool(Protocol):
    """See the module."""

    async def take(self, deadline: Deadline, *, idle: bool = True) -> Connection:
        """One that still stands; with `idle` False none that lay idle.

        Raises OSError, of which TimeoutError is that the deadline has passed.
        """

    def give_back(self, connection: Connection) -> None:
        """One that is of further use."""

    def close(self) -> None:
        """Closes those that are idle now, and the others when they are given back."""


class _Idle:
    """Those that nobody uses."""

    def __init__(self, connect: OpenConnection, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        self._open_until = lambda deadline: connect(host, port, tls, deadline)
        self._idle: deque[Connection] = deque()  # append and pop are atomic, so threads need no lock
        self._closed = False

    def _standing(self) -> Connection | None:
        with contextlib.suppress(IndexError):
            while not (connection := self._idle.pop()).is_alive():
                connection.close()
            return connection
        return None

    def _put(self, connection: Connection) -> None:
        self._idle.append(connection)
        if self._closed:  # asked after the append, so that none slips past a `close` in another thread
            self.close()

    def close(self) -> None:
        """See Pool."""
        self._closed = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().close()


class BlockingPool(_Idle):
    """For threads, each of which opens its own."""

    def __init__(self, connect: OpenConnection, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(connect, host, port, tls)
        self._changed = threading.Condition()
        self._waiting = self._picky = self._opening = 0  # picky: who waits for one that has not lain there

    async def take(self, deadline: Deadline, *, idle: bool = True) -> Connection:
        """See Pool."""
        if standing := (idle and self._standing()) or self._wait(deadline, idle):
            return standing
        try:
            return await self._open_until(deadline)
        finally:
            with self._changed:
                self._opening -= 1
                self._changed.notify()

    def _wait(self, deadline: Deadline, idle: bool) -> Connection | None:
        """Until one is given back; None: until one more may be opened."""
        with self._changed:
            self._waiting += 1
            self._picky += not idle
            try:
                while not (standing := (idle and self._standing()) or None) and self._opening >= MOST_OPENING:
                    self._changed.wait(deadline.socket_timeout_s())
            except BaseException:
                self._changed.notify()  # what woke this one is for another
                raise
            finally:
                self._waiting -= 1
                self._picky -= not idle
            self._opening += standing is None
            return standing

    def give_back(self, connection: Connection) -> None:
        """See Pool."""
        self._put(connection)
        if self._waiting:
            with self._changed:
                self._changed.notify(1 + self._picky)  # one of them at least can take it


class AsyncPool(_Idle):
    """For the tasks of a loop, beside which others open them."""

    def __init__(self, connect: OpenConnection, host: str, port: int, tls: ssl.SSLContext | None) -> None:
        super().__init__(connect, host, port, tls)
        self._waiting: dict[asyncio.Future[Connection], None] = {}  # in order
        self._openers: set[asyncio.Task[None]] = set()

    async def take(self, deadline: Deadline, *, idle: bool = True) -> Connection:
        """See Pool."""
        if idle and (standing := self._standing()):
            return standing
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
        """One after the other, while somebody waits."""
        try:
            while self._waiting:
                try:
                    self.give_back(await self._open_until(Deadline(LONGEST_OPENING_S)))
                except TimeoutError:
                    continue
                except OSError as error:
                    if waiter := self._first():
                        waiter.set_exception(error)
        finally:
            self._openers.discard(asyncio.current_task())  # at once: who comes next needs one

    def _first(self) -> "asyncio.Future[Connection] | None":
        """Who has waited longest."""
        while self._waiting:
            waiter = next(iter(self._waiting))
            del self._waiting[waiter]
            if not waiter.done():
                return waiter
        return None

    def give_back(self, connection: Connection) -> None:
        """See Pool."""
        if waiter := self._first():
            waiter.set_result(connection)
        else:
            self._put(connection)

    def close(self) -> None:
        """See Pool."""
        super().close()
        self._end_openers()

    def _end_openers(self) -> None:
        if self._closed and not self._waiting:
            for opener in self._openers:
                opener.cancel()

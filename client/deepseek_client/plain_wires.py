"""gRPC over a plain socket, without TLS: for greenlets and for the tasks of an asyncio loop.

Contract: `over_grpc.Wire`, over `http2`. One connection a server, opened when it is needed and again when it broke or
the server goes away. A call waits for nothing but its answer, as long as its deadline lets it. What the server says not
to have looked at is sent again, as gRPC itself does. `GreenWire` waits as threads do, which gevent makes greenlets, its
two threads that read and write the socket as well; `AsyncPlainWire` is of one loop, on which the requests of one turn
leave together.
"""

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from deepseek_client.errors import ConnectionLost
from deepseek_client.grpc_message import SERVICE, Metadata
from deepseek_client.http2 import CallFailed, Exchange, Frames, NotHttp2, answer_of, framed, header_block
from deepseek_client.http_connections import connected, connected_on_loop
from deepseek_client.runtimes import Cancel
from deepseek_client.transports import Deadline

READ_BYTES = 65536
AT_ONCE = 4  # callers that are woken before gevent's loop may look at its timers again: a burst of answers has hundreds
ATTEMPTS = 3  # of a call that no server looked at
MOST_BLOCKS = 100  # of headers that are kept ready
TIMEOUT = b"\x00\x0cgrpc-timeout"  # a header field up to its value
CLOSED = "the server closed the connection"
CLIENT_CLOSED = "the client was closed"
SILENT_MS = 20_000  # after which a connection whose other end acknowledges nothing is given up, as gRPC does


class Messages:
    """What a call looks like on the wire, and its answer."""

    def __init__(self, url: str) -> None:
        parsed = urlsplit(f"//{url}")
        self.address = parsed.hostname or "", parsed.port or 0
        self._url = url
        self._blocks: dict[tuple[str, Metadata], bytes] = {}
        self._answers: dict[str, Any] = {}

    def block(self, method: str, metadata: Metadata, timeout_s: float) -> bytes:
        """The headers; all but the time-out are the same for each call of a method."""
        block = self._blocks.get((method, metadata))
        if block is None:
            fixed = {":method": "POST", ":scheme": "http", ":path": f"{SERVICE}{method}", ":authority": self._url}
            fixed |= {"te": "trailers", "content-type": "application/grpc", "user-agent": "deepseek-client"}
            block = header_block(fixed) + b"".join(header_block({name: value}) for name, value in metadata)
            if len(self._blocks) >= MOST_BLOCKS:
                self._blocks.clear()
            self._blocks[method, metadata] = block
        timeout = _timeout(timeout_s)
        return block + TIMEOUT + bytes((len(timeout),)) + timeout

    def answer(self, method: str, exchange: Exchange) -> Any:
        """The message. Raises CallFailed."""
        parse = self._answers.get(method)
        if parse is None:
            parse = self._answers[method] = getattr(service_pb2, f"{method}Response").FromString
        try:
            return parse(answer_of(exchange))
        except DecodeError as error:
            raise CallFailed(grpc.StatusCode.INTERNAL, f"an answer that cannot be read ({error})") from None


def _timeout(seconds: float) -> bytes:
    """At most eight digits."""
    micros = max(1, int(seconds * 1e6))
    return b"%du" % micros if micros < 10**8 else b"%dm" % min(micros // 1000, 10**8 - 1)


def _too_late() -> CallFailed:
    return CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


def _not_connected(error: OSError) -> CallFailed:
    """As gRPC says it."""
    if isinstance(error, socket.gaierror):
        return CallFailed(grpc.StatusCode.UNAVAILABLE, f"DNS resolution failed: {error.strerror}")
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return CallFailed(grpc.StatusCode.UNAVAILABLE, f"failed to connect to all addresses: {why}")


def _tune(opened: socket.socket) -> None:
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)


def _broke(error: Exception | None) -> str:
    return CLOSED if error is None else f"the connection broke: {getattr(error, 'strerror', None) or error}"


class GreenWire:
    """See the module."""

    def __init__(self, url: str) -> None:
        self._messages = Messages(url)
        self._opening = threading.Lock()
        self._connection: _Connection | None = None
        self._closed = False

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """See Wire."""
        ends_at = time.monotonic() + timeout_s
        message = framed(request)
        for attempt in range(1, ATTEMPTS + 1):
            connection = self._connected(ends_at)
            block = self._messages.block(method, metadata, ends_at - time.monotonic())
            exchange = connection.exchange(block, message, ends_at, cancel)
            if not exchange.unprocessed or attempt == ATTEMPTS:
                break
        return self._messages.answer(method, exchange)

    async def close(self) -> None:
        """See Wire."""
        self._closed = True
        if self._connection is not None:
            self._connection.close(CLIENT_CLOSED)

    def _connected(self, ends_at: float) -> "_Connection":
        """The connection, or a new one."""
        if (standing := self._connection) is not None and standing.usable:
            return standing
        if not self._opening.acquire(timeout=max(0.0, ends_at - time.monotonic())):
            raise _too_late()
        try:
            if (standing := self._connection) is None or not standing.usable:
                self._connection = standing = _Connection(self._open(ends_at))
                if self._closed:  # asked after the assignment, so that none slips past a `close` in another thread
                    standing.close(CLIENT_CLOSED)
                    raise CallFailed(grpc.StatusCode.UNAVAILABLE, CLIENT_CLOSED)
            return standing
        finally:
            self._opening.release()

    def _open(self, ends_at: float) -> socket.socket:
        try:
            found = connected(*self._messages.address, Deadline(ends_at - time.monotonic()))
        except TimeoutError:
            raise _too_late() from None
        except OSError as error:
            raise _not_connected(error) from None
        found.settimeout(None)
        _tune(found)
        return found


class _Connection:
    """One socket and whoever waits for its answers."""

    def __init__(self, opened: socket.socket) -> None:
        self.lost = ""
        """Why it is of no use any more."""
        self._socket = opened
        self._frames = Frames()
        self._lock = threading.Lock()  # of the frames
        self._idle = threading.Lock()  # locked while there is nothing to write
        self._writing = True  # the writer has something in hand, which goes first
        self._at_once = not os.get_blocking(opened.fileno())  # under gevent: a caller may write without waiting
        self._let_others_run: Callable[[], None] = getattr(sys.modules.get("gevent"), "idle", lambda: None)
        for work in (self._read, self._write):
            threading.Thread(target=work, name="deepseek-grpc", daemon=True).start()

    @property
    def usable(self) -> bool:
        """Whether a call may begin here."""
        return not self.lost and not self._frames.closing

    def exchange(self, block: bytes, message: bytes, ends_at: float, cancel: Cancel | None) -> Exchange:
        """Sends and waits for the end of the call. Raises CallFailed where that is too late."""
        waiter = threading.Lock()
        waiter.acquire()
        with self._lock:
            exchange = self._frames.begin(block, message)
            exchange.waiter = waiter
            if exchange.done:
                return exchange
            self._leave()
        try:
            if cancel is not None:
                cancel.stopped_by(lambda: _release(waiter))
            waiter.acquire(timeout=max(0.0, ends_at - time.monotonic()))
        finally:
            if cancel is not None:
                cancel.stopped_by(None)
            answered = exchange.done
            if not answered:  # too late, stopped, or the greenlet was killed
                self._cancel(exchange)
        if answered:
            return exchange
        if cancel is not None and cancel.cancelled:
            raise ConnectionLost("stopped: another attempt was answered first")
        raise _too_late()

    def close(self, why: str) -> None:
        """Ends it and every call on it."""
        with self._lock:
            if self.lost:
                return
            self.lost = why
            left = self._frames.abandon(why)
            self._leave()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        _tell(left)

    def _cancel(self, exchange: Exchange) -> None:
        with self._lock:
            self._frames.cancel(exchange)
            self._leave()

    def _leave(self) -> None:
        """Sends what there is, here if that takes no wait, else from the writer."""
        if self._at_once and not self._writing and not self.lost:
            data, sent = self._frames.take(), 0
            with suppress(OSError):  # there is no room, or a broken connection, which the reader notices
                sent = os.write(self._socket.fileno(), data) if data else 0
            if sent == len(data):
                return
            self._frames.put_back(data[sent:])
        if self._idle.locked():
            self._idle.release()

    def _read(self) -> None:
        error: Exception | None = None
        try:
            while data := self._socket.recv(READ_BYTES):
                with self._lock:
                    ended = self._frames.feed(data)
                    self._leave()
                for start in range(0, len(ended), AT_ONCE):
                    if start:
                        self._let_others_run()
                    _tell(ended[start : start + AT_ONCE])
        except OSError as failure:
            error = failure
        finally:  # whatever it was: nobody else would notice
            self.close(_broke(error))
            self._socket.close()

    def _write(self) -> None:
        try:
            while not self.lost:
                with self._lock:
                    data = self._frames.take()
                    self._writing = bool(data)
                if data:
                    self._socket.sendall(data)
                else:
                    self._idle.acquire()
        except OSError as error:
            self.close(_broke(error))


def _tell(ended: list[Exchange]) -> None:
    for exchange in ended:
        _release(exchange.waiter)


def _release(waiter: Any) -> None:
    with suppress(RuntimeError, ValueError):  # answered and stopped at the same moment; the latter is gevent's
        waiter.release()


class AsyncPlainWire:
    """See the module."""

    def __init__(self, url: str) -> None:
        self._messages = Messages(url)
        self._opening = asyncio.Lock()
        self._connection: _AsyncConnection | None = None
        self._closed = False

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """See Wire. It is stopped as every task is, by its own `cancel()`."""
        ends_at, message = time.monotonic() + timeout_s, framed(request)
        try:
            async with asyncio.timeout(timeout_s):
                for attempt in range(1, ATTEMPTS + 1):
                    if (connection := self._connection) is None or not connection.usable:
                        connection = await self._connected()
                    block = self._messages.block(method, metadata, ends_at - time.monotonic())
                    exchange = await connection.exchange(block, message)
                    if not exchange.unprocessed or attempt == ATTEMPTS:
                        break
        except TimeoutError:
            raise _too_late() from None
        return self._messages.answer(method, exchange)

    async def close(self) -> None:
        """See Wire."""
        self._closed = True
        if self._connection is not None:
            self._connection.close(CLIENT_CLOSED)

    async def _connected(self) -> "_AsyncConnection":
        """The connection, or a new one."""
        loop = asyncio.get_running_loop()
        async with self._opening:
            if (standing := self._connection) is None or not standing.usable:
                try:
                    opened = await connected_on_loop(*self._messages.address)
                    _, standing = await loop.create_connection(lambda: _AsyncConnection(loop), sock=opened)
                except TimeoutError:
                    raise
                except OSError as error:
                    raise _not_connected(error) from None
                self._connection = standing
                if self._closed:  # meanwhile
                    standing.close(CLIENT_CLOSED)
                    raise CallFailed(grpc.StatusCode.UNAVAILABLE, CLIENT_CLOSED)
            return standing


class _AsyncConnection(asyncio.Protocol):
    """The same on a loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.lost = ""
        self._loop = loop
        self._frames = Frames()
        self._transport: Any = None
        self._leaving = False

    @property
    def usable(self) -> bool:
        """Whether a call may begin here."""
        return not self.lost and not self._frames.closing

    async def exchange(self, block: bytes, message: bytes) -> Exchange:
        """Sends and waits for the end of the call."""
        exchange = self._frames.begin(block, message)
        if exchange.done:
            return exchange
        exchange.waiter = self._loop.create_future()
        self._leave()
        try:
            await exchange.waiter
        finally:
            if not exchange.done:
                self._frames.cancel(exchange)
                self._leave()
        return exchange

    def close(self, why: str) -> None:
        """Ends it and every call on it."""
        if not self.lost:
            self.lost = why
            self._tell(self._frames.abandon(why))
            self._transport.abort()

    def _leave(self) -> None:
        """What is to be sent goes together at the end of this turn of the loop."""
        if not self._leaving:
            self._leaving = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._leaving = False
        if not self.lost and (data := self._frames.take()):
            self._transport.write(data)

    def _tell(self, ended: list[Exchange]) -> None:
        for exchange in ended:
            if not exchange.waiter.done():
                exchange.waiter.set_result(None)

    def connection_made(self, transport: Any) -> None:
        """Of asyncio.Protocol."""
        self._transport = transport
        _tune(transport.get_extra_info("socket"))
        self._leave()

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        try:
            ended = self._frames.feed(data)
        except NotHttp2 as error:
            self.close(_broke(error))
        else:
            self._tell(ended)
            self._leave()

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self.close(_broke(error))

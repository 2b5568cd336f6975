"""HTTP connections: a blocking socket, and an asyncio protocol.

Contract: every wait ends at the call's deadline with TimeoutError; a broken connection is an OSError. One call uses a
connection at a time.
"""

import asyncio
import contextlib
import errno
import os
import select
import selectors
import socket
import ssl
from collections.abc import Callable
from typing import Any, Protocol

from aiohappyeyeballs import start_connection

from deepseek_client.concurrency import Cancel
from deepseek_client.transport import Deadline

NEXT_ADDRESS_S = 0.25  # then the host's next address is tried in parallel (RFC 8305)
CANCELLED_WITHIN_S = 0.05  # how soon a cancelled attempt ends that still connects, or waits for a connection
LEAST_BYTES, MOST_BYTES = 65536, 1 << 20  # per read: small buffers for small answers, few reads for large ones


class Connection(Protocol):
    reused: bool
    """Whether it has carried a call before: the server may close it while the next one is sent."""

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        """Sends the parts in order."""

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        """The next bytes, at most `wanted` if that is above 0; empty at the end of the stream."""

    def is_alive(self) -> bool:
        """Whether it can be reused: the server has neither closed it nor sent stray bytes."""

    def stop(self) -> None:
        """Makes the waiting call fail; any thread may call it."""

    def close(self) -> None:
        """Closes the socket."""


class BlockingConnection:
    reused = False

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    async def open(
        cls, host: str, port: int, tls: ssl.SSLContext | None, deadline: Deadline, cancel: Cancel | None = None
    ) -> "BlockingConnection":
        """Connects; raises OSError."""
        connection = connected(host, port, deadline, cancel)
        try:
            connection.settimeout(deadline.socket_timeout_s())  # the handshake gets the time left
            if tls is None:
                return cls(connection)
            connection = tls.wrap_socket(connection, server_hostname=host, do_handshake_on_connect=False)
            opened = cls(connection)
            if cancel is not None:
                cancel.stopped_by(opened.stop)
            connection.do_handshake()
            return opened
        except BaseException:
            connection.close()
            raise

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        for part in parts:
            self._socket.settimeout(deadline.socket_timeout_s())
            self._socket.sendall(part)

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        self._socket.settimeout(deadline.socket_timeout_s())
        return self._socket.recv(min(max(wanted, LEAST_BYTES), MOST_BYTES))

    def is_alive(self) -> bool:
        try:
            self._socket.settimeout(0)
            self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            # SSLSocket.shutdown would drop TLS, and a reader would mistake ciphertext for the answer.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


class AsyncConnection(asyncio.Protocol):
    """An asyncio protocol: asyncio's streams cannot tell whether an idle connection has stray bytes."""

    reused = False

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = bytearray()
        self._ended = False
        self._error: Exception | None = None
        self._full = False
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def open(
        cls, host: str, port: int, tls: ssl.SSLContext | None, deadline: Deadline, cancel: Cancel | None = None
    ) -> "AsyncConnection":
        """Connects; raises OSError. Cancelled through its task."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(deadline.socket_timeout_s()):
            opened = await connected_on_loop(host, port)
            name = host if tls else None
            _, protocol = await loop.create_connection(cls, sock=opened, ssl=tls, server_hostname=name)
        return protocol

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        if self._error is not None:
            raise self._error
        for part in parts:
            self._transport.write(part)
        await self._wait(lambda: not self._full or self._ended, deadline)

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        await self._wait(lambda: bool(self._received) or self._ended, deadline)
        if not self._received and self._error is not None:
            raise self._error
        data, self._received = self._received, bytearray()
        return data

    def is_alive(self) -> bool:
        if self._received or self._ended or self._transport.is_closing():
            return False
        return not _is_readable(self._transport.get_extra_info("socket").fileno())  # the loop may not have seen it yet

    def close(self) -> None:
        """Unsent bytes are dropped."""
        with contextlib.suppress(RuntimeError):  # of a loop that has ended, and its connections with it
            self._transport.abort()

    stop = close

    async def _wait(self, condition: Callable[[], bool], deadline: Deadline) -> None:
        """Waits until an event of the loop makes `condition` true."""
        if condition():
            return
        async with asyncio.timeout(deadline.socket_timeout_s()):
            while not condition():
                self._waiter = asyncio.get_running_loop().create_future()
                try:
                    await self._waiter
                finally:
                    self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._wake()

    def eof_received(self) -> None:
        """The transport closes itself."""
        self._ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        self._wake()

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._wake()


def _is_readable(descriptor: int) -> bool:
    """Whether there is something to read, including the end of the stream. False on Windows, which has no poll."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


async def connected_on_loop(host: str, port: int) -> socket.socket:
    """A connected socket for a loop. Raises OSError.

    asyncio's own connection race leaks the socket if it is cancelled at the moment of connecting. That of
    aiohappyeyeballs drops a cancel that comes while it ends the slower address.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    task = asyncio.current_task()
    assert task is not None
    cancels = task.cancelling()
    opened = await start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS_S)
    if task.cancelling() > cancels:
        opened.close()
        raise asyncio.CancelledError
    return opened


def _connect(connection: socket.socket, address: Any, deadline: Deadline, cancel: Cancel | None) -> None:
    """Connects; ends with an OSError soon after `cancel`."""
    if cancel is None:
        connection.settimeout(deadline.socket_timeout_s())
        connection.connect(address)
        return
    connection.setblocking(False)
    failure = connection.connect_ex(address)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_WRITE)
        while failure in (errno.EINPROGRESS, errno.EWOULDBLOCK):
            if cancel.cancelled:
                raise ConnectionAbortedError(errno.ECONNABORTED, "another attempt was answered first")
            if selector.select(min(CANCELLED_WITHIN_S, deadline.socket_timeout_s())):
                failure = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if failure:
        raise OSError(failure, os.strerror(failure))


def connected(host: str, port: int, deadline: Deadline, cancel: Cancel | None = None) -> socket.socket:
    """Like socket.create_connection, but each address gets an equal share of the time: one may hang."""
    failure = OSError("the host has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for left, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found, strict=True):
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:  # for example, this machine has no IPv6
            failure = error
            continue
        try:
            _connect(connection, address, Deadline(deadline.socket_timeout_s() / left), cancel)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            connection.close()
            no_ipv6 = family == socket.AF_INET6 and error.errno == errno.EADDRNOTAVAIL
            if left == len(found) or not no_ipv6:  # a missing IPv6 must not hide why the first address failed
                failure = error
    raise failure

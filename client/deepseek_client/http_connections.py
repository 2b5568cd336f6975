"""Connections of the HTTP transport: one face over a blocking socket and over an asyncio protocol.

Contract: every wait ends at the call's deadline with TimeoutError; a broken connection is an OSError. A connection is
used by one call at a time.
"""

import asyncio
import contextlib
import errno
import select
import socket
import ssl
from collections.abc import Callable
from typing import Any, Protocol

from aiohappyeyeballs import start_connection

from deepseek_client.transports import Deadline

NEXT_ADDRESS_S = 0.25  # after which a host's next address is tried beside the first (RFC 8305)
LEAST_BYTES, MOST_BYTES = 65536, 1 << 20  # of one read: small answers cost no large buffer, large ones few reads


class Connection(Protocol):
    """To one server."""

    reused: bool
    """Whether it has carried a call before: the server may be closing it as the next one is sent."""

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        """Sends them one after the other."""

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        """Some bytes, of `wanted` ones if that is known (else 0); none at the end."""

    def is_alive(self) -> bool:
        """Whether an idle connection has nothing to read: its end, or stray bytes, make it useless."""

    def stop(self) -> None:
        """From any thread: makes whoever waits for it fail."""

    def close(self) -> None:
        """Frees it."""


class BlockingConnection:
    """A socket; under gevent, where it is for TLS alone, one that lets other greenlets run."""

    reused = False

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    @classmethod
    async def open(cls, host: str, port: int, tls: ssl.SSLContext | None, deadline: Deadline) -> "BlockingConnection":
        """Connects; raises OSError."""
        connection = connected(host, port, deadline)
        try:
            connection.settimeout(deadline.socket_timeout_s())  # of the handshake: what connecting has left
            return cls(tls.wrap_socket(connection, server_hostname=host) if tls else connection)
        except BaseException:
            connection.close()
            raise

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        """See Connection."""
        for part in parts:
            self._socket.settimeout(deadline.socket_timeout_s())
            self._socket.sendall(part)

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        """See Connection."""
        self._socket.settimeout(deadline.socket_timeout_s())
        return self._socket.recv(min(max(wanted, LEAST_BYTES), MOST_BYTES))

    def is_alive(self) -> bool:
        """See Connection."""
        try:
            self._socket.settimeout(0)
            self._socket.recv(1)
        except (BlockingIOError, ssl.SSLWantReadError):
            return True
        except OSError:
            pass
        return False

    def stop(self) -> None:
        """See Connection."""
        with contextlib.suppress(OSError):
            # Not SSLSocket's own: whoever is reading would go on without TLS, and take ciphertext for the answer.
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """See Connection."""
        self._socket.close()


class AsyncConnection(asyncio.Protocol):
    """An asyncio protocol: asyncio's streams cannot say whether an idle one has stray bytes."""

    reused = False

    def __init__(self) -> None:
        self._transport: Any = None
        self._received = bytearray()
        self._ended = False
        self._error: Exception | None = None
        self._full = False
        self._waiter: asyncio.Future[None] | None = None

    @classmethod
    async def open(cls, host: str, port: int, tls: ssl.SSLContext | None, deadline: Deadline) -> "AsyncConnection":
        """Connects; raises OSError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(deadline.socket_timeout_s()):
            opened = await connected_on_loop(host, port)
            name = host if tls else None
            _, protocol = await loop.create_connection(cls, sock=opened, ssl=tls, server_hostname=name)
        return protocol

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        """See Connection."""
        if self._error is not None:
            raise self._error
        for part in parts:
            self._transport.write(part)
        await self._wait(lambda: not self._full or self._ended, deadline)

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        """See Connection."""
        await self._wait(lambda: bool(self._received) or self._ended, deadline)
        if not self._received and self._error is not None:
            raise self._error
        data, self._received = self._received, bytearray()
        return data

    def is_alive(self) -> bool:
        """See Connection."""
        if self._received or self._ended or self._transport.is_closing():
            return False
        return not _is_readable(self._transport.get_extra_info("socket").fileno())  # what the loop has not seen yet

    def stop(self) -> None:
        """See Connection."""
        self._transport.abort()

    def close(self) -> None:
        """See Connection. What is still to be sent is for nobody."""
        self._transport.abort()

    async def _wait(self, condition: Callable[[], bool], deadline: Deadline) -> None:
        """Until the loop reports something that makes `condition` true."""
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
        """Of asyncio.Protocol."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Of asyncio.Protocol."""
        self._received += data
        self._wake()

    def eof_received(self) -> None:
        """Of asyncio.Protocol. The transport closes itself."""
        self._ended = True
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """Of asyncio.Protocol."""
        self._ended, self._error = True, error
        self._wake()

    def pause_writing(self) -> None:
        """Of asyncio.Protocol."""
        self._full = True

    def resume_writing(self) -> None:
        """Of asyncio.Protocol."""
        self._full = False
        self._wake()


def _is_readable(descriptor: int) -> bool:
    """Whether there is something to read now, the end included. False on Windows, which has no poll."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


async def connected_on_loop(host: str, port: int) -> socket.socket:
    """For a loop, which closes it with a protocol's transport. Raises OSError.

    asyncio's own race of a host's addresses leaves the socket open where it is cancelled as that is connected.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:  # a name, for which the loop's threads wait
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return await start_connection(found, happy_eyeballs_delay=NEXT_ADDRESS_S)


def connected(host: str, port: int, deadline: Deadline) -> socket.socket:
    """As socket.create_connection, but each address has a like share of what is left: a mute one hides no other."""
    failure = OSError("the host has no address")
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for left, (family, kind, protocol, _, address) in zip(range(len(found), 0, -1), found, strict=True):
        try:
            connection = socket.socket(family, kind, protocol)
        except OSError as error:  # this machine has no IPv6, say
            failure = error
            continue
        try:
            connection.settimeout(deadline.socket_timeout_s() / left)
            connection.connect(address)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        except OSError as error:
            connection.close()
            no_ipv6 = family == socket.AF_INET6 and error.errno == errno.EADDRNOTAVAIL
            if left == len(found) or not no_ipv6:  # that this machine has no IPv6 must not hide why the first failed
                failure = error
    raise failure

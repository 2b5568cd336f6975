"""A connection of the HTTP transport for gevent's greenlets, without TLS.

Contract: `http_connections.Connection`. gevent's own sockets first try and fail to read what is not there yet, then
build a time-out object and wait; under a load of small requests that is a good part of what a request costs. This one
waits at once, with a bare timer of gevent's loop for the deadline.
"""

import contextlib
import socket
import ssl

import gevent
from gevent import monkey

from deepseek_client.http_connections import LEAST_BYTES, MOST_BYTES, connected
from deepseek_client.transports import Deadline

READABLE, WRITABLE = 1, 2  # libev's names for them
NativeSocket: type[socket.socket] = monkey.get_original("socket", "socket")


class GreenConnection:
    """See the module."""

    reused = False

    def __init__(self, opened: socket.socket) -> None:
        self._socket = NativeSocket(fileno=opened.detach())
        self._socket.setblocking(False)

    @classmethod
    async def open(cls, host: str, port: int, tls: ssl.SSLContext | None, deadline: Deadline) -> "GreenConnection":
        """Connects; raises OSError."""
        assert tls is None, "gevent's own socket speaks TLS"
        return cls(connected(host, port, deadline))

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        """See Connection."""
        for part in parts:
            sent = 0
            while sent < len(part):
                try:
                    sent += self._socket.send(memoryview(part)[sent:])
                except BlockingIOError:
                    self._wait(WRITABLE, deadline)

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        """See Connection."""
        while True:
            self._wait(READABLE, deadline)
            with contextlib.suppress(BlockingIOError):
                return self._socket.recv(min(max(wanted, LEAST_BYTES), MOST_BYTES))

    def is_alive(self) -> bool:
        """See Connection."""
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def stop(self) -> None:
        """See Connection."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """See Connection."""
        self._socket.close()

    def _wait(self, event: int, deadline: Deadline) -> None:
        """Lets other greenlets run until the socket is ready, which one that was ready all along is in a moment."""
        hub, waiter = gevent.get_hub(), gevent.getcurrent()
        timer = hub.loop.timer(deadline.socket_timeout_s())
        watcher = hub.loop.io(self._socket.fileno(), event)
        try:
            watcher.start(waiter.switch)
            timer.start(waiter.throw, TimeoutError, update=True)  # else by the time at which the loop last looked
            hub.switch()
        finally:
            for each in (watcher, timer):
                each.stop()
                each.close()

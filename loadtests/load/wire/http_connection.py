"""An HTTP connection for gevent's greenlets, without TLS.

Contract: implements `deepseek_client.http.connection.Connection`. gevent's own sockets first try to read before data
has arrived, then create a time-out object and wait, which is a large part of the cost of a small request. This
connection waits at once, with a timer of gevent's loop for the deadline.
"""

import contextlib
import socket

import gevent
from deepseek_client.concurrency import Cancel
from deepseek_client.http.connection import LEAST_BYTES, MOST_BYTES, connected
from deepseek_client.transport import Deadline
from gevent import monkey

READABLE, WRITABLE = 1, 2  # libev's names for them
NativeSocket: type[socket.socket] = monkey.get_original("socket", "socket")


def native(opened: socket.socket) -> socket.socket:
    """The same connection as a non-blocking socket."""
    found = NativeSocket(fileno=opened.detach())
    found.setblocking(False)
    return found


class GreenConnection:
    reused = False

    def __init__(self, opened: socket.socket) -> None:
        self._socket = native(opened)

    @classmethod
    async def open(cls, host: str, port: int, deadline: Deadline, cancel: Cancel | None = None) -> "GreenConnection":
        """Connects; ignores `cancel`, since the load generator does not hedge requests."""
        return cls(connected(host, port, deadline))

    async def send(self, *parts: bytes, deadline: Deadline) -> None:
        for part in parts:
            sent = 0
            while sent < len(part):
                try:
                    sent += self._socket.send(memoryview(part)[sent:])
                except BlockingIOError:
                    self._wait(WRITABLE, deadline)

    async def receive(self, wanted: int, deadline: Deadline) -> bytes | bytearray:
        while True:
            self._wait(READABLE, deadline)
            with contextlib.suppress(BlockingIOError):
                return self._socket.recv(min(max(wanted, LEAST_BYTES), MOST_BYTES))

    def is_alive(self) -> bool:
        try:
            self._socket.recv(1)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()

    def _wait(self, event: int, deadline: Deadline) -> None:
        """Lets other greenlets run until the socket is ready."""
        hub, waiter = gevent.get_hub(), gevent.getcurrent()
        timer = hub.loop.timer(deadline.socket_timeout_s())
        watcher = hub.loop.io(self._socket.fileno(), event)
        try:
            watcher.start(waiter.switch)
            timer.start(waiter.throw, TimeoutError, update=True)  # else the time counts from the loop's last wake-up
            hub.switch()
        finally:
            for each in (watcher, timer):
                each.stop()
                each.close()

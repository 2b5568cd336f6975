"""gRPC for gevent's greenlets over a plain socket, without TLS.

Contract: implements `deepseek_client.grpc.channel.Channel` with `frames`. It opens one connection on demand, and a new
one after a failure or GOAWAY. A call waits only for its answer, within its deadline. Like gRPC, it retries a call that
the server has not processed.
"""

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

import gevent
import grpc
from deepseek_client.client import address_of
from deepseek_client.concurrency import Cancel
from deepseek_client.grpc.channel import SERVICE, Metadata
from deepseek_client.http.connection import connected
from deepseek_client.transport import Deadline
from gevent.hub import Waiter
from gevent.lock import BoundedSemaphore
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from loadtests.load.wire.frames import Frames, UnaryCall, answer_of, call_failed, framed, header_block
from loadtests.load.wire.http_connection import READABLE, WRITABLE, native

READ_BYTES = 65536
WOKEN_AT_ONCE = 4  # callers; then gevent's loop checks its timers, since a burst has hundreds of answers
ATTEMPTS = 3  # of a call that the server has not processed
MOST_BLOCKS = 100  # cached header blocks
TIMEOUT_HEADER = b"\x00\x0cgrpc-timeout"  # a header field up to its value
SILENT_MS = 20_000  # without an acknowledgement for this time the connection is closed, as in gRPC


@lru_cache(MOST_BLOCKS)
def _fixed_headers(url: str, method: str, metadata: Metadata) -> bytes:
    """The header fields that all calls of a method share; only the time-out differs."""
    fixed = {":method": "POST", ":scheme": "http", ":path": f"{SERVICE}{method}", ":authority": url}
    fixed |= {"te": "trailers", "content-type": "application/grpc", "user-agent": "deepseek-load-generator"}
    return header_block([*fixed.items(), *metadata])


def request_headers(url: str, method: str, metadata: Metadata, timeout_s: float) -> bytes:
    timeout = _timeout(timeout_s)
    return _fixed_headers(url, method, metadata) + TIMEOUT_HEADER + bytes((len(timeout),)) + timeout


def response(method: str, call: UnaryCall) -> Any:
    """The message of a call that ended. Raises CallFailed."""
    try:
        return getattr(service_pb2, f"{method}Response").FromString(answer_of(call))
    except DecodeError as error:
        raise call_failed(grpc.StatusCode.INTERNAL, f"an unreadable answer ({error})") from None


def _timeout(seconds: float) -> bytes:
    """The value of grpc-timeout: at most eight digits and a unit."""
    micros = max(1, int(seconds * 1e6))
    return b"%du" % micros if micros < 10**8 else b"%dm" % min(micros // 1000, 10**8 - 1)


class GreenChannel:
    def __init__(self, url: str) -> None:
        self._url = url
        self._opening = BoundedSemaphore()
        self._connection: _Connection | None = None

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """Makes a call; ignores `cancel`, since the load generator does not hedge requests."""
        ends_at = time.monotonic() + timeout_s
        message = framed(request)
        for attempt in range(1, ATTEMPTS + 1):
            connection = self._connected(ends_at)
            block = request_headers(self._url, method, metadata, ends_at - time.monotonic())
            call = connection.call(block, message, ends_at)
            if not call.unprocessed or attempt == ATTEMPTS:
                break
        return response(method, call)

    def is_connected(self) -> bool:
        known = self._connection
        return known is not None and known.usable

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.close("the client was closed")

    def _connected(self, ends_at: float) -> "_Connection":
        if (known := self._connection) is not None and known.usable:
            return known
        if not self._opening.acquire(timeout=max(0.0, ends_at - time.monotonic())):
            raise _too_late()
        try:
            if (known := self._connection) is None or not known.usable:
                self._connection = known = _Connection(self._open(ends_at))
            return known
        finally:
            self._opening.release()

    def _open(self, ends_at: float) -> socket.socket:
        try:
            found = connected(*address_of(self._url), Deadline(ends_at - time.monotonic()))
        except TimeoutError:
            raise _too_late() from None
        except OSError as error:
            raise _not_connected(error) from None
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENT_MS)
        return found


def _too_late() -> Exception:
    return call_failed(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")


def _not_connected(error: OSError) -> Exception:
    if isinstance(error, socket.gaierror):
        return call_failed(grpc.StatusCode.UNAVAILABLE, f"DNS resolution failed: {error.strerror}")
    why = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
    return call_failed(grpc.StatusCode.UNAVAILABLE, f"failed to connect to all addresses: {why}")


class _Connection:
    """One socket and its unanswered calls."""

    def __init__(self, opened: socket.socket) -> None:
        self._socket = native(opened)
        self._frames = Frames()
        self._lost = False
        self._hub = gevent.get_hub()
        self._writable = self._hub.loop.io(self._socket.fileno(), WRITABLE)
        gevent.spawn(self._read)

    @property
    def usable(self) -> bool:
        return not self._lost and not self._frames.closing

    def call(self, block: bytes, message: bytes, ends_at: float) -> UnaryCall:
        """Sends and waits for the end of the call. Raises CallFailed after `ends_at`."""
        call = self._frames.begin(block, message)
        if call.done:
            return call
        call.waiter = waiter = Waiter(self._hub)
        timer = self._hub.loop.timer(max(0.0, ends_at - time.monotonic()))
        try:
            timer.start(waiter.switch, None, update=True)  # else the time counts from the loop's last wake-up
            self._flush()
            waiter.get()
        finally:
            timer.stop()
            timer.close()
            if not (answered := call.done):  # timed out, or the greenlet was killed
                self._frames.cancel(call)
                self._flush()
        if not answered:
            raise _too_late()
        return call

    def close(self, why: str) -> None:
        """Closes the connection and ends every call on it."""
        if self._lost:
            return
        self._lost = True
        self._writable.stop()
        self._writable.close()
        self._wake(self._frames.abandon(why))
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # the reader notices and closes the socket

    def _flush(self) -> None:
        """Sends what the socket accepts now; the rest follows when it is writable."""
        out = self._frames.out
        with suppress(OSError):  # a broken connection: the reader notices
            while out and not self._lost:
                try:
                    del out[: self._socket.send(out)]
                except BlockingIOError:
                    self._writable.start(self._flush)
                    return
        if not self._lost:
            self._writable.stop()

    def _read(self) -> None:
        why = "the server closed the connection"
        readable = self._hub.loop.io(self._socket.fileno(), READABLE)
        try:
            while True:
                self._hub.wait(readable)
                with suppress(BlockingIOError):
                    if not (data := self._socket.recv(READ_BYTES)):
                        break
                    ended = self._frames.feed(data)
                    self._flush()
                    for start in range(0, len(ended), WOKEN_AT_ONCE):
                        if start:
                            gevent.idle()
                        self._wake(ended[start : start + WOKEN_AT_ONCE])
        except OSError as error:
            why = f"the connection broke: {error.strerror or error}"
        finally:  # after any error, since no other greenlet would notice
            readable.close()
            self.close(why)
            self._socket.close()

    def _wake(self, ended: Sequence[UnaryCall]) -> None:
        for call in ended:
            if call.waiter is not None:
                self._hub.loop.run_callback(call.waiter.switch, None)

"""grpcio's channels behind one interface: one connection for all threads of a process, or for all tasks of a loop."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import grpc
from tritonclient.grpc import service_pb2

from deepseek_client.concurrency import Cancel, is_gevent_patched
from deepseek_client.errors import ConnectionLost

SERVICE = "/inference.GRPCInferenceService/"
CLOSED = "the client was closed"
Metadata = tuple[tuple[str, str], ...]
"""Headers of a call."""
OPTIONS = [
    ("grpc.max_send_message_length", -1),
    # After a refused connection gRPC fails every call until it reconnects, by default after up to two minutes. With
    # this it finds a restarted server within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 5000),  # how long a connection may take; a closed channel still waits this long
    ("grpc.use_local_subchannel_pool", 1),  # otherwise all clients of the process share a connection and its back-off
    ("grpc.enable_http_proxy", 0),
]


class Channel(Protocol):
    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """The response message. Raises grpc.RpcError."""

    def is_connected(self) -> bool:
        """False while no connection can be made. gRPC stays in TRANSIENT_FAILURE from then until it is connected."""

    async def close(self) -> None:
        """Closes it."""


class BlockingChannel:
    """For threads, and for greenlets if gevent has patched the standard library."""

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None, max_response_bytes: int) -> None:
        options = [*OPTIONS, ("grpc.max_receive_message_length", max_response_bytes)]
        self._closed = False
        self._gevent = is_gevent_patched()
        if self._gevent:
            from grpc.experimental import gevent as grpc_gevent

            grpc_gevent.init_gevent()  # otherwise a call blocks the whole loop; calling it twice does no harm
        if credentials:
            self._channel = grpc.secure_channel(url, credentials, options)
        else:
            self._channel = grpc.insecure_channel(url, options)
        self._stubs: dict[str, Callable[..., Any]] = {}

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        stub: Any = self._stubs.get(method) or self._stubs.setdefault(method, _stub(self._channel, method))
        try:
            # Under gevent, each blocking call would occupy one of its ten threads.
            if cancel is None and not self._gevent:
                return stub(request, timeout=timeout_s, metadata=metadata)
            future = stub.future(request, timeout=timeout_s, metadata=metadata)  # slower, but can be cancelled
        except ValueError:
            if self._closed:  # by another thread, just now
                raise ConnectionLost(CLOSED) from None
            raise
        if cancel is None:
            return future.result()
        cancel.stopped_by(future.cancel)
        try:
            return future.result()
        except grpc.FutureCancelledError:
            raise ConnectionLost("stopped: another attempt was answered first") from None
        finally:
            cancel.stopped_by(None)

    def is_connected(self) -> bool:
        try:  # not `subscribe`, which would start a thread that polls
            state = self._channel._channel.check_connectivity_state(False)
        except ValueError:  # the client was closed during the call
            return True
        return state != grpc.ChannelConnectivity.TRANSIENT_FAILURE.value[0]

    async def close(self) -> None:
        self._closed = True
        self._channel.close()


class AsyncChannel:
    """For the tasks of the loop that is running at the first call."""

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None, max_response_bytes: int) -> None:
        self._options = [*OPTIONS, ("grpc.max_receive_message_length", max_response_bytes)]
        self._url, self._credentials = url, credentials
        self._channel: grpc.aio.Channel | None = None
        self._closed = False
        self._stubs: dict[str, Callable[..., Any]] = {}

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """Cancelled through the task's own `cancel()`."""
        if self._closed:  # while the call waited for something else
            raise ConnectionLost(CLOSED)
        stub = self._stubs.get(method)
        if stub is None:
            stub = self._stubs[method] = _stub(self._open(), method)
        try:
            return await stub(request, timeout=timeout_s, metadata=metadata)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._closed and not (task and task.cancelling()):  # `close` cancels the calls, not their tasks
                raise ConnectionLost(CLOSED) from None
            raise

    def is_connected(self) -> bool:
        return self._channel is None or self._channel.get_state() is not grpc.ChannelConnectivity.TRANSIENT_FAILURE

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            if self._credentials:
                self._channel = grpc.aio.secure_channel(self._url, self._credentials, self._options)
            else:
                self._channel = grpc.aio.insecure_channel(self._url, self._options)
        return self._channel

    async def close(self) -> None:
        self._closed = True
        if self._channel is not None:
            await self._channel.close()


def _stub(channel: Any, method: str) -> Callable[..., Any]:
    """A stub that does not serialize, unlike tritonclient's: a prepared request is already bytes."""
    response = getattr(service_pb2, f"{method}Response")
    return channel.unary_unary(f"{SERVICE}{method}", response_deserializer=response.FromString)

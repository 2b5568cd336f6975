"""KServe v2 over gRPC: one HTTP/2 connection for all threads, or all tasks of a loop.

Contract: `transports.Transport`. $http_proxy is not looked at. The transport is the same over a blocking channel and
over an asyncio one; a `Wire` hides which.
"""

import contextlib
import importlib.util
import re
import struct
from collections.abc import Callable
from typing import Any, Protocol

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2

from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerBusy,
    ServerError,
    Unreachable,
    untrusted,
)
from deepseek_client.grpc_message import SERVICE, Encoder, Metadata, message_of, timeout_field
from deepseek_client.runtimes import Cancel, is_gevent_patched
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import (
    NO_HEADERS,
    Deadline,
    Headers,
    Placement,
    PreparedRequest,
    error_of_status,
    means_not_ready,
    metadata_from_json,
    one_line,
    placed_array,
    retry_after_s,
    to_numpy,
)

OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # After a refused connection gRPC fails every call until it tries again, by default after up to two minutes;
    # a server that is back is to be found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.use_local_subchannel_pool", 1),  # else all clients of the process share a connection, and that wait
    ("grpc.enable_http_proxy", 0),
]


class Wire(Protocol):
    """A channel."""

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """The answer's message. Raises grpc.RpcError."""

    async def close(self) -> None:
        """Closes it."""


class BlockingWire:
    """A channel for many threads."""

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None) -> None:
        secure = grpc.secure_channel
        self._channel = secure(url, credentials, OPTIONS) if credentials else grpc.insecure_channel(url, OPTIONS)
        self._methods: dict[str, Callable[..., Any]] = {}
        self._gevent = is_gevent_patched()

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """See Wire."""
        stub: Any = self._methods.get(method) or self._methods.setdefault(method, _stub(self._channel, method))
        # Under gevent each blocking call would hold one of its ten threads, and an eleventh be seen answered too late.
        if cancel is None and not self._gevent:
            return stub(request, timeout=timeout_s, metadata=metadata)
        future = stub.future(request, timeout=timeout_s, metadata=metadata)  # slower, and can be stopped
        if cancel is None:
            return future.result()
        cancel.stopped_by(future.cancel)
        try:
            return future.result()
        except grpc.FutureCancelledError:
            raise ConnectionLost("stopped: another attempt was answered first") from None
        finally:
            cancel.stopped_by(None)

    async def close(self) -> None:
        """See Wire."""
        self._channel.close()


def blocking_wire(url: str, credentials: grpc.ChannelCredentials | None) -> Wire:
    """A channel of gRPC's own library; under gevent, where that costs several times the call, a plain connection."""
    if credentials is None and is_gevent_patched() and _can_be_plain():
        from deepseek_client.plain_wires import GreenWire

        return GreenWire(url)
    return BlockingWire(url, credentials)


def async_wire(url: str, credentials: grpc.ChannelCredentials | None) -> Wire:
    """A plain connection where it can be, else a channel of gRPC's own library."""
    if credentials is None and _can_be_plain():
        from deepseek_client.plain_wires import AsyncPlainWire

        return AsyncPlainWire(url)
    return AsyncWire(url, credentials)


def _can_be_plain() -> bool:
    """Without TLS, and where header compression is installed: deepseek-client[fast]."""
    return importlib.util.find_spec("hpack") is not None


class AsyncWire:
    """A channel for the tasks of one loop: the one that is running at the first call."""

    def __init__(self, url: str, credentials: grpc.ChannelCredentials | None) -> None:
        self._url, self._credentials = url, credentials
        self._channel: grpc.aio.Channel | None = None
        self._methods: dict[str, Callable[..., Any]] = {}

    async def call(
        self, method: str, request: bytes, timeout_s: float, metadata: Metadata, cancel: Cancel | None
    ) -> Any:
        """See Wire. It is stopped as every task is, by its own `cancel()`."""
        stub = self._methods.get(method)
        if stub is None:
            stub = self._methods.setdefault(method, _stub(self._open(), method))
        return await stub(request, timeout=timeout_s, metadata=metadata)

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            secure, insecure = grpc.aio.secure_channel, grpc.aio.insecure_channel
            url, credentials = self._url, self._credentials
            self._channel = secure(url, credentials, OPTIONS) if credentials else insecure(url, OPTIONS)
        return self._channel

    async def close(self) -> None:
        """See Wire."""
        if self._channel is not None:
            await self._channel.close()


def _stub(channel: Any, method: str) -> Callable[..., Any]:
    """Not tritonclient's, which would serialize: a prepared request is bytes already."""
    answer = getattr(service_pb2, f"{method}Response")
    return channel.unary_unary(f"{SERVICE}{method}", response_deserializer=answer.FromString)


class GrpcTransport:
    """See the module."""

    def __init__(
        self, url: str, make_wire: Callable[..., Wire], *, tls: bool, ca_cert: bytes | None, api_key: str | None
    ) -> None:
        self._url = url
        self._wire = make_wire(url, grpc.ssl_channel_credentials(ca_cert) if tls else None)
        self._metadata: Metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._encoder = Encoder()

    async def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """See Transport."""
        try:
            if model:
                return (await self._ask("ModelReady", deadline, name=model, version=version)).ready
            return (await self._ask("ServerReady", deadline)).ready
        except (ModelNotFound, ModelNotReady):
            return False

    async def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """See Transport."""
        signature = _as_json(await self._ask("ModelMetadata", deadline, name=model, version=version))
        config = None
        with contextlib.suppress(AccessDenied, ModelNotFound):  # a gateway may not show it
            config = _as_json((await self._ask("ModelConfig", deadline, name=model, version=version)).config)
        return metadata_from_json(signature, config)

    def encode(self, request: PreparedRequest) -> tuple[bytes, ...]:
        """See Transport. The one part: the message."""
        return (self._encoder.encode(request),)

    async def send(
        self,
        request: PreparedRequest,
        deadline: Deadline,
        headers: Headers = NO_HEADERS,
        cancel: Cancel | None = None,
        placement: Placement | None = None,
    ) -> dict[str, np.ndarray]:
        """See Transport."""
        if placement is None:
            body = (request.parts or self.encode(request))[0]
        else:
            body = message_of(request, placement).SerializeToString()
        metadata = self._metadata
        if headers:
            metadata += tuple((name.lower(), value) for name, value in headers.items())
        whole = body + timeout_field(deadline.left_us())
        answer = await self._call("ModelInfer", whole, deadline, metadata, cancel)
        try:
            return _arrays(answer, placement)
        except (TypeError, ValueError, struct.error) as error:
            raise ServerError(f"{self._url}: an answer that cannot be read ({error!r})") from None

    async def register(self, region: str, size_bytes: int, deadline: Deadline, cancel: Cancel | None = None) -> None:
        """See Transport."""
        place = {"name": region, "key": f"/{region}", "byte_size": size_bytes}
        await self._ask("SystemSharedMemoryRegister", deadline, cancel, **place)

    async def unregister(self, region: str, deadline: Deadline) -> None:
        """See Transport."""
        await self._ask("SystemSharedMemoryUnregister", deadline, name=region)

    async def close(self) -> None:
        """See Transport."""
        await self._wire.close()

    async def _ask(self, method: str, deadline: Deadline, cancel: Cancel | None = None, **fields: Any) -> Any:
        request = getattr(service_pb2, f"{method}Request")(**fields)
        return await self._call(method, request.SerializeToString(), deadline, self._metadata, cancel)

    async def _call(
        self, method: str, request: bytes, deadline: Deadline, metadata: Metadata, cancel: Cancel | None = None
    ) -> Any:
        try:
            return await self._wire.call(method, request, deadline.left_s(), metadata, cancel)
        except grpc.RpcError as error:
            raise _error(self._url, error, deadline) from None


def _arrays(answer: Any, placement: Placement | None) -> dict[str, np.ndarray]:
    """The outputs by name, out of the message or the shared memory."""
    if placement is None or not placement.outputs:
        pairs = zip(answer.outputs, answer.raw_output_contents, strict=True)
        return {output.name: to_numpy(output.datatype, output.shape, data) for output, data in pairs}
    return {
        output.name: placed_array(placement, output.name, output.datatype, output.shape) for output in answer.outputs
    }


def _as_json(message: Any) -> dict:
    """As the HTTP endpoint says it."""
    return MessageToDict(message, preserving_proto_field_name=True)


def _error(url: str, error: Any, deadline: Deadline) -> InferenceError:
    """The error for a gRPC status, from Triton, a gateway before it, or gRPC itself."""
    code = error.code()
    reason = one_line(error.details() or code.name)
    of_a_model = code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)  # its own failure, perhaps of another one
    if not of_a_model and means_not_ready(reason):
        return ModelNotReady(f"{url}: {reason}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline.exceeded(url)
    if status := re.search(r"http2 header with status: (\d{3})", reason):  # a gateway's page, as gRPC reports it
        return error_of_status(int(status[1]), f"{url}: {reason}", _retry_after_s(error))
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(url, reason, error)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in reason:
        return InvalidInput(f"{url}: {reason}")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return ServerBusy(f"{url}: {reason}", _retry_after_s(error))
    kinds: dict[grpc.StatusCode, type[InferenceError]] = {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
        grpc.StatusCode.NOT_FOUND: ModelNotFound,
        grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
        grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
        grpc.StatusCode.CANCELLED: ConnectionLost,  # by a server that ends, perhaps in the middle of it
    }
    return kinds.get(code, ServerError)(f"{url}: {reason}")


# BoringSSL's reason, and gRPC's own check of the name.
_UNTRUSTED = re.compile(r"CERTIFICATE_VERIFY_FAILED: ([^:()]*[^:() ])|Hostname Verification Check failed")


def _unavailable(url: str, reason: str, error: Any) -> InferenceError:
    """One code for four things, told apart by the text: what it does not show to be safe counts as lost.

    gRPC says UNAVAILABLE of a refused connection (nothing was sent), of Triton's full queue (did not run), of its
    restricted protocols, and of a connection that broke (may have run).
    """
    if reason.startswith(("failed to connect", "errors resolving", "DNS resolution failed")):
        if found := _UNTRUSTED.search(reason):
            return untrusted(url, found[1] or found[0])
        last = reason.rpartition(": ")[2].rstrip("]")
        return Unreachable(
            f"nothing serves gRPC at {url} ({last}); "
            "start Triton there, or correct the url (its gRPC port is 8001 by default)"
        )
    if "This protocol is restricted" in reason:
        return AccessDenied(f"{url}: {reason}")
    if any(text in reason for text in ("maximum queue size", "timeout expired")):
        return ServerBusy(f"{url}: {reason}")
    wait_s = _retry_after_s(error)
    if wait_s is not None:  # whoever says when to come again has refused
        return ServerBusy(f"{url}: {reason}", wait_s)
    return ConnectionLost(f"{url}: the connection broke before the answer was complete ({reason})")


def _retry_after_s(error: Any) -> float | None:
    """What the answer's metadata say of when to come again."""
    found: dict[str, Any] = {}
    for said in (error.initial_metadata(), error.trailing_metadata()):
        found.update(said or ())
    with contextlib.suppress(KeyError, ValueError):  # gRPC's own (proposal A6); negative: do not retry
        return max(0, int(found["grpc-retry-pushback-ms"])) / 1000
    return retry_after_s(str(found.get("retry-after", "")))

"""KServe v2 over gRPC: one HTTP/2 connection for all threads.

Contract: `transports.Transport`. $http_proxy is not looked at.
"""

import contextlib
import struct
from collections.abc import Sequence
from typing import Any

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
)
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import (
    Deadline,
    PreparedRequest,
    means_not_ready,
    metadata_from_json,
    one_line,
    to_bytes,
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


class GrpcTransport:
    """See the module."""

    def __init__(self, url: str, *, tls: bool, ca_cert: bytes | None, api_key: str | None) -> None:
        self._url = url
        if tls:
            self._channel = grpc.secure_channel(url, grpc.ssl_channel_credentials(ca_cert), OPTIONS)
        else:
            self._channel = grpc.insecure_channel(url, OPTIONS)
        self._headers = (("authorization", f"Bearer {api_key}"),) if api_key else None
        # Not by tritonclient's stub, which would serialize: a prepared request is bytes already.
        self._infer = self._channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            response_deserializer=service_pb2.ModelInferResponse.FromString,
        )

    def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """See Transport."""
        try:
            if model:
                return self._call("ModelReady", deadline, name=model, version=version).ready
            return self._call("ServerReady", deadline).ready
        except (ModelNotFound, ModelNotReady):
            return False

    def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """See Transport."""
        signature = _as_json(self._call("ModelMetadata", deadline, name=model, version=version))
        config = None
        with contextlib.suppress(AccessDenied, ModelNotFound):  # a gateway may not show it
            config = _as_json(self._call("ModelConfig", deadline, name=model, version=version).config)
        return metadata_from_json(signature, config)

    def encode(
        self,
        metadata: ModelMetadata,
        version: str,
        arrays: Sequence[np.ndarray | None],
        outputs: Sequence[str] | None,
        request_id: str,
    ) -> PreparedRequest:
        """See Transport. The one part: the message."""
        kind = service_pb2.ModelInferRequest
        given = [(spec, array) for spec, array in zip(metadata.inputs, arrays, strict=True) if array is not None]
        message = kind(
            model_name=metadata.name,
            model_version=version,
            id=request_id,
            inputs=[kind.InferInputTensor(name=s.name, datatype=s.datatype, shape=array.shape) for s, array in given],
            outputs=[kind.InferRequestedOutputTensor(name=name) for name in outputs or ()],
            raw_input_contents=[to_bytes(spec, array) for spec, array in given],
        )
        return PreparedRequest(model=metadata.name, version=version, parts=(message.SerializeToString(),))

    def send(self, request: PreparedRequest, deadline: Deadline) -> dict[str, np.ndarray]:
        """See Transport."""
        timeout = service_pb2.InferParameter(int64_param=deadline.left_us())
        # Serialized messages put end to end parse as one merged message: the large part is left as it is.
        tail = service_pb2.ModelInferRequest(parameters={"timeout": timeout}).SerializeToString()
        try:
            answer = self._infer(request.parts[0] + tail, timeout=deadline.left_s(), metadata=self._headers)
        except grpc.RpcError as error:
            raise _error(self._url, error, deadline) from None
        try:
            return {
                output.name: to_numpy(output.datatype, output.shape, data)
                for output, data in zip(answer.outputs, answer.raw_output_contents, strict=True)
            }
        except (TypeError, ValueError, struct.error) as error:
            raise ServerError(f"{self._url}: an answer that cannot be read ({error!r})") from None

    def close(self) -> None:
        """See Transport."""
        self._channel.close()

    def _call(self, method: str, deadline: Deadline, **fields: str) -> Any:
        request = getattr(service_pb2, f"{method}Request")(**fields)
        call = self._channel.unary_unary(
            f"/inference.GRPCInferenceService/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=getattr(service_pb2, f"{method}Response").FromString,
        )
        try:
            return call(request, timeout=deadline.left_s(), metadata=self._headers)
        except grpc.RpcError as error:
            raise _error(self._url, error, deadline) from None


def _as_json(message: Any) -> dict:
    """As the HTTP endpoint says it."""
    return MessageToDict(message, preserving_proto_field_name=True)


def _error(url: str, error: Any, deadline: Deadline) -> InferenceError:
    """The error for a gRPC status, from Triton, a gateway before it, or gRPC itself."""
    code = error.code()
    reason = one_line(error.details() or code.name)
    if means_not_ready(reason):
        return ModelNotReady(f"{url}: {reason}")
    if code is grpc.StatusCode.UNAVAILABLE:
        return _unavailable(url, reason)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return deadline.exceeded(url)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in reason:
        return InvalidInput(f"{url}: {reason}")
    kinds: dict[grpc.StatusCode, type[InferenceError]] = {
        grpc.StatusCode.INVALID_ARGUMENT: InvalidInput,
        grpc.StatusCode.NOT_FOUND: ModelNotFound,
        grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
        grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
        grpc.StatusCode.RESOURCE_EXHAUSTED: ServerBusy,
    }
    return kinds.get(code, ServerError)(f"{url}: {reason}")


def _unavailable(url: str, reason: str) -> InferenceError:
    """One code for three things, told apart by the text: what it does not show to be safe counts as lost.

    gRPC says UNAVAILABLE of a refused connection (nothing was sent), of Triton's full queue (did not run) and of a
    connection that broke (may have run).
    """
    if reason.startswith(("failed to connect", "errors resolving", "DNS resolution failed")):
        last = reason.rpartition(": ")[2].rstrip("]")
        return Unreachable(
            f"nothing serves gRPC at {url} ({last}); "
            "start Triton there, or correct the url (its gRPC port is 8001 by default)"
        )
    if any(text in reason for text in ("maximum queue size", "timeout expired", "status: 503", "status: 429")):
        return ServerBusy(f"{url}: {reason}")
    return ConnectionLost(f"{url}: the connection broke before the answer was complete ({reason})")

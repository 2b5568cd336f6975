"""KServe v2 over gRPC. Contract: `deepseek_client.transport.Transport`. $http_proxy is ignored."""

import contextlib
from typing import Any

import grpc
import numpy as np
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2

from deepseek_client.concurrency import Cancel
from deepseek_client.errors import AccessDenied, ModelNotFound, ModelNotReady, ServerError
from deepseek_client.grpc.channel import Channel, Metadata
from deepseek_client.grpc.message import encoded, message_of, timeout_field
from deepseek_client.grpc.status import error_of_rpc
from deepseek_client.metadata import DTYPES, UNREADABLE, ModelMetadata, metadata_from_json
from deepseek_client.tensors import listed_to_numpy, placed_array, to_numpy
from deepseek_client.transport import NO_HEADERS, Deadline, Headers, Placement, PreparedRequest


class GrpcTransport:
    def __init__(self, url: str, channel: Channel, api_key: str | None = None) -> None:
        self._url = url
        self._channel = channel
        self._metadata: Metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    async def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        try:
            if model:
                return (await self._ask("ModelReady", deadline, name=model, version=version)).ready
            return (await self._ask("ServerReady", deadline)).ready
        except (ModelNotFound, ModelNotReady):
            return False

    async def metadata(
        self, model: str, version: str, deadline: Deadline, cancel: Cancel | None = None
    ) -> ModelMetadata:
        signature = _as_json(await self._ask("ModelMetadata", deadline, cancel, name=model, version=version))
        config = None
        with contextlib.suppress(AccessDenied, ModelNotFound, ServerError):  # hidden by a gateway, or not implemented
            config = _as_json((await self._ask("ModelConfig", deadline, cancel, name=model, version=version)).config)
        return metadata_from_json(self._url, signature, config)

    async def model_statistics(self, model: str, deadline: Deadline) -> dict:
        return _as_json(await self._ask("ModelStatistics", deadline, name=model))

    def encode(self, request: PreparedRequest) -> tuple[bytes, ...]:
        """One part: the message."""
        return (encoded(request),)

    async def send(
        self,
        request: PreparedRequest,
        deadline: Deadline,
        headers: Headers = NO_HEADERS,
        cancel: Cancel | None = None,
        placement: Placement | None = None,
    ) -> dict[str, np.ndarray]:
        if placement is None:
            body = (request.parts or self.encode(request))[0]
        else:
            body = message_of(request, placement).SerializeToString()
        answer = await self._call("ModelInfer", body + timeout_field(deadline.left_us()), deadline, cancel, headers)
        try:
            return _arrays(answer, placement)
        except UNREADABLE as error:
            raise ServerError(f"{self._url}: an answer that cannot be read ({error!r})") from None

    async def register(self, region: str, size_bytes: int, deadline: Deadline, cancel: Cancel | None = None) -> None:
        place = {"name": region, "key": f"/{region}", "byte_size": size_bytes}
        await self._ask("SystemSharedMemoryRegister", deadline, cancel, **place)

    async def unregister(self, region: str, deadline: Deadline) -> None:
        await self._ask("SystemSharedMemoryUnregister", deadline, name=region)

    async def close(self) -> None:
        await self._channel.close()

    async def _ask(self, method: str, deadline: Deadline, cancel: Cancel | None = None, **fields: Any) -> Any:
        request = getattr(service_pb2, f"{method}Request")(**fields)
        return await self._call(method, request.SerializeToString(), deadline, cancel)

    async def _call(
        self,
        method: str,
        request: bytes,
        deadline: Deadline,
        cancel: Cancel | None = None,
        headers: Headers = NO_HEADERS,
    ) -> Any:
        metadata = self._metadata
        if headers:
            metadata += tuple((name.lower(), value) for name, value in headers.items())
        try:
            answer = await self._channel.call(method, request, deadline.left_s(), metadata, cancel)
        except grpc.RpcError as error:
            raise error_of_rpc(self._url, error, deadline, connected=self._channel.is_connected()) from None
        if answer is None:  # grpc.aio returns this for bytes that are no message
            raise ServerError(f"{self._url}: an answer that cannot be read as gRPC's {method}Response")
        return answer


def _arrays(answer: Any, placement: Placement | None) -> dict[str, np.ndarray]:
    """The outputs by name, from the message or from shared memory. Raises one of UNREADABLE."""
    outputs, raw = answer.outputs, answer.raw_output_contents
    if len({output.name for output in outputs}) < len(outputs):
        raise ValueError(f"two outputs have one name: {[output.name for output in outputs]}")
    if placement is not None and placement.outputs:
        return {each.name: placed_array(placement, each.name, each.datatype, each.shape) for each in outputs}
    if raw:
        pairs = zip(outputs, raw, strict=True)
        return {output.name: to_numpy(output.datatype, output.shape, data) for output, data in pairs}
    return {output.name: listed_to_numpy(output.datatype, output.shape, list(_values(output))) for output in outputs}


def _values(output: Any) -> Any:
    """The values of a server that does not send bytes. Raises KeyError for FP16 and BF16, which have no such field."""
    kind = DTYPES[output.datatype].kind
    wide = "64" if output.datatype.endswith("64") else ""
    fields = {"b": "bool", "i": f"int{wide}", "u": f"uint{wide}", "f": output.datatype.lower(), "O": "bytes"}
    return getattr(output.contents, f"{fields[kind]}_contents")


def _as_json(message: Any) -> dict:
    """The message as the JSON of the HTTP endpoint."""
    return MessageToDict(message, preserving_proto_field_name=True)

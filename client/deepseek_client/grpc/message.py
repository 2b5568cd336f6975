"""Encodes an inference request as protobuf bytes; nothing is serialized twice.

Contract: serialized messages that are concatenated parse as one merged message, so a request is made of pieces. The
head has the model, the inputs' names, types and shapes, and the requested outputs. It is cached: all requests of one
shape share it. The id, the parameters, the tensors' bytes and, for each attempt, the time left follow. This module
writes most of these fields in protobuf's wire format.

Example:
    body = encoded(request)
    stub(body + timeout_field(500_000))
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from tritonclient.grpc import service_pb2

from deepseek_client.transport import Placement, PreparedRequest, Tensor

MOST_HEADS = 1000
# Field numbers of ModelInferRequest and InferParameter, with wire type 2 (length, then bytes) or 0 (varint).
ID, PARAMETERS, RAW_INPUT_CONTENTS = b"\x1a", b"\x22", b"\x3a"  # 3, 4, 7
KEY_TIMEOUT, VALUE, INT64 = b"\x0a\x07timeout", b"\x12", b"\x10"  # of a map's entry 1, 2; of a parameter 2


def encoded(request: PreparedRequest) -> bytes:
    """The request without its time-out."""
    tensors = request.tensors
    shapes = tuple([(tensor.name, tensor.datatype, tensor.shape) for tensor in tensors])
    pieces = [_head(request.model, request.version, request.outputs, shapes)]
    if request.request_id:
        name = request.request_id.encode()
        pieces += (ID, varint(len(name)), name)
    if request.parameters:
        pieces.append(service_pb2.ModelInferRequest(parameters=_parameters(request)).SerializeToString())
    for tensor in tensors:
        pieces += (RAW_INPUT_CONTENTS, varint(len(tensor.data)), tensor.data)
    return b"".join(pieces)


@lru_cache(MOST_HEADS)
def _head(
    model: str, version: str, outputs: tuple[str, ...], shapes: tuple[tuple[str, str, tuple[int, ...]], ...]
) -> bytes:
    tensors = tuple(Tensor(name=name, datatype=datatype, shape=shape, data=b"") for name, datatype, shape in shapes)
    bare = PreparedRequest(model=model, version=version, request_id="", outputs=outputs, parts=(), tensors=tensors)
    return message_of(bare).SerializeToString()


def varint(value: int) -> bytes:
    """A non-negative number as a varint: seven bits per byte, lowest first."""
    if value < 0x80:
        return bytes((value,))
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def timeout_field(left_us: int) -> bytes:
    """The request parameter `timeout`: an entry of the map `parameters`."""
    value = INT64 + varint(left_us)
    entry = KEY_TIMEOUT + VALUE + varint(len(value)) + value
    return PARAMETERS + varint(len(entry)) + entry


def message_of(request: PreparedRequest, placement: Placement | None = None) -> Any:
    """The request message without the tensors' bytes."""
    kind = service_pb2.ModelInferRequest
    message = kind(
        model_name=request.model,
        model_version=request.version,
        id=request.request_id,
        parameters=_parameters(request),
        inputs=[
            kind.InferInputTensor(
                name=tensor.name,
                datatype=tensor.datatype,
                shape=tensor.shape,
                parameters=_placed(placement.region, placement.inputs[tensor.name]) if placement else None,
            )
            for tensor in request.tensors
        ],
    )
    if placement is not None and placement.outputs:
        for name, place in placement.outputs.items():
            message.outputs.add(name=name, parameters=_placed(placement.region, place))
    else:
        for name in request.outputs:
            message.outputs.add(name=name)
    return message


def _parameters(request: PreparedRequest) -> Mapping[str, Any]:
    def field(value: str | int) -> str:
        return "string_param" if isinstance(value, str) else "bool_param" if isinstance(value, bool) else "int64_param"

    return {name: service_pb2.InferParameter(**{field(value): value}) for name, value in request.parameters.items()}


def _placed(region: str, place: tuple[int, int]) -> Mapping[str, Any]:
    kind = service_pb2.InferParameter
    return {
        "shared_memory_region": kind(string_param=region),
        "shared_memory_offset": kind(int64_param=place[0]),
        "shared_memory_byte_size": kind(int64_param=place[1]),
    }

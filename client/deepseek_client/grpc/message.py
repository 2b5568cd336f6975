"""Encodes an inference request as protobuf bytes; a large tensor is copied once.

Contract: serialized messages that are concatenated parse as one merged message. So the tensors' bytes and, for each
attempt, the time left follow the message of the rest, each tensor in protobuf's wire format: protobuf itself would copy
it twice more.

Example:
    body = encoded(request)
    stub(body + timeout_field(500_000))
"""

from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from deepseek_client.errors import InvalidInput
from deepseek_client.transport import Placement, PreparedRequest

MOST_BYTES = 2**31 - 100  # of a request: servers take messages below 2 GiB, and the time-out follows
RAW_INPUT_CONTENTS = b"\x3a"  # field 7 of ModelInferRequest, of wire type 2: length, then bytes


def encoded(request: PreparedRequest) -> bytes:
    """The request without its time-out. Raises InvalidInput if gRPC allows none of this size."""
    pieces = [message_of(request).SerializeToString()]
    for tensor in request.tensors:
        pieces += (RAW_INPUT_CONTENTS, varint(len(tensor.data)), tensor.data)
    if (size := sum(map(len, pieces))) > MOST_BYTES:
        raise InvalidInput(
            f"{request.model}: a request of {size} bytes; gRPC allows at most {MOST_BYTES}: send fewer rows at once, "
            'or use protocol="http"'
        )
    return b"".join(pieces)


def varint(value: int) -> bytes:
    """A non-negative number as a varint: seven bits per byte, lowest first."""
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def timeout_field(left_us: int) -> bytes:
    """A message that only has the request parameter `timeout`."""
    timeout = {"timeout": service_pb2.InferParameter(int64_param=left_us)}
    return service_pb2.ModelInferRequest(parameters=timeout).SerializeToString()


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
    fields = {str: "string_param", bool: "bool_param", int: "int64_param", float: "double_param"}

    def parameter(value: str | float) -> Any:
        field = next(fields[kind] for kind in fields if isinstance(value, kind))  # a bool is an int too
        return service_pb2.InferParameter(**{field: value})

    return {name: parameter(value) for name, value in request.parameters.items()}


def _placed(region: str, place: tuple[int, int]) -> Mapping[str, Any]:
    kind = service_pb2.InferParameter
    return {
        "shared_memory_region": kind(string_param=region),
        "shared_memory_offset": kind(int64_param=place[0]),
        "shared_memory_byte_size": kind(int64_param=place[1]),
    }

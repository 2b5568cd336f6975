"""An inference request as protobuf bytes, of which nothing is serialized twice.

Contract: serialized messages put end to end parse as one merged message. So a request is made of pieces: a head with
the model, its inputs' names, types and shapes and the outputs asked for, which is kept, since it is the same for all
requests of one shape; the id; the tensors' own bytes; and at each sending what is left of the time. The last three are
fields written here as protobuf's wire format has them (tests/test_client_message.py holds them against protobuf).

Example:
    body = Encoder().encode(request)
    stub(body + timeout_field(500_000))
"""

from collections.abc import Mapping
from typing import Any

from tritonclient.grpc import service_pb2

from deepseek_client.transports import Placement, PreparedRequest

SERVICE = "/inference.GRPCInferenceService/"
Metadata = tuple[tuple[str, str], ...]
"""Headers that go with a call."""

MOST_HEADS = 1000
# Field numbers of ModelInferRequest and InferParameter, with wire type 2 (a length and so many bytes) or 0 (a number).
ID, PARAMETERS, RAW_INPUT_CONTENTS = b"\x1a", b"\x22", b"\x3a"  # 3, 4, 7
KEY_TIMEOUT, VALUE, INT64 = b"\x0a\x07timeout", b"\x12", b"\x10"  # of a map's entry 1, 2; of a parameter 2


class Encoder:
    """Encodes requests and keeps their heads."""

    def __init__(self) -> None:
        self._heads: dict[tuple, bytes] = {}

    def encode(self, request: PreparedRequest) -> bytes:
        """All of the request but its time-out."""
        tensors = request.tensors
        shapes = tuple([(tensor.name, tensor.datatype, tensor.shape) for tensor in tensors])
        key = (request.model, request.version, request.outputs, shapes)
        head = self._heads.get(key)
        if head is None:
            message = message_of(request)
            message.ClearField("id")
            head = message.SerializeToString()
            if len(self._heads) >= MOST_HEADS:
                self._heads.clear()
            self._heads[key] = head
        pieces = [head]
        if request.request_id:
            name = request.request_id.encode()
            pieces += (ID, varint(len(name)), name)
        for tensor in tensors:
            pieces += (RAW_INPUT_CONTENTS, varint(len(tensor.data)), tensor.data)
        return b"".join(pieces)


def varint(value: int) -> bytes:
    """A number that is not negative, seven bits a byte, the lowest first."""
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
    """The request without its tensors' bytes."""
    kind = service_pb2.ModelInferRequest
    message = kind(
        model_name=request.model,
        model_version=request.version,
        id=request.request_id,
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


def _placed(region: str, place: tuple[int, int]) -> Mapping[str, Any]:
    kind = service_pb2.InferParameter
    return {
        "shared_memory_region": kind(string_param=region),
        "shared_memory_offset": kind(int64_param=place[0]),
        "shared_memory_byte_size": kind(int64_param=place[1]),
    }

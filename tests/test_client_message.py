"""A request's bytes, pieced together: protobuf reads from them what was meant."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from deepseek_client import ConnectionLost, InferenceClient, InvalidInput
from deepseek_client.grpc_message import MOST_HEADS, Encoder, timeout_field, varint
from deepseek_client.over_http import HttpTransport
from deepseek_client.runtimes import run
from deepseek_client.transports import Deadline, PreparedRequest, Tensor
from tritonclient.grpc import service_pb2


def request_of(**changes: Any) -> PreparedRequest:
    tensors = (
        Tensor(name="ids", datatype="INT64", shape=(1, 300), data=bytes(range(256)) * 10),
        Tensor(name="mask", datatype="FP32", shape=(1, 1), data=b"\0\0\0\0"),
    )
    fixed: dict[str, Any] = {"model": "m", "version": "2", "request_id": "", "outputs": ("y",), "parts": ()}
    return PreparedRequest(**{**fixed, "tensors": tensors, **changes})


def parsed(data: bytes) -> Any:
    return service_pb2.ModelInferRequest.FromString(data)


def by_protobuf(request: PreparedRequest, left_us: int) -> Any:
    """The same, by protobuf alone."""
    kind = service_pb2.ModelInferRequest
    message = kind(model_name=request.model, model_version=request.version, id=request.request_id)
    message.parameters["timeout"].int64_param = left_us
    for tensor in request.tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


@pytest.mark.parametrize("left_us", [1, 127, 128, 500_000, 2**40])
@pytest.mark.parametrize("request_id", ["", "order-7", "é" * 100])
def test_the_pieces_parse_as_the_message_that_protobuf_would_have_made(request_id: str, left_us: int) -> None:
    encoder = Encoder()
    request = request_of(request_id=request_id)
    for _ in range(2):  # the second has its head from the first
        assert parsed(encoder.encode(request) + timeout_field(left_us)) == by_protobuf(request, left_us)


def test_requests_of_other_shapes_outputs_and_versions_have_heads_of_their_own() -> None:
    encoder = Encoder()
    shorter = Tensor(name="ids", datatype="INT64", shape=(2, 3), data=bytes(48))
    kinds = [request_of(), request_of(tensors=(shorter,)), request_of(outputs=()), request_of(version="")]
    for each in (*kinds, *kinds):
        assert parsed(encoder.encode(each) + timeout_field(1)) == by_protobuf(each, 1)


def test_heads_are_not_kept_without_end() -> None:
    encoder = Encoder()
    for size in range(MOST_HEADS + 10):
        encoder.encode(request_of(tensors=(Tensor(name="x", datatype="BOOL", shape=(1, size), data=b""),)))
    assert len(encoder._heads) == 10


def test_numbers_are_written_as_protobuf_has_them() -> None:
    assert [varint(value) for value in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\x01", b"\xac\x02"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize(
    ("model", "version", "said"),
    [
        ("m", "1 2", "version='1 2'; it must be a number"),
        ("m", "1/ready HTTP/1.1\r\n", "it must be a number"),
        ("", "", "model=''; pass a model's name, or None"),
        ("\udcff", "", "cannot be written in UTF-8"),
    ],
    ids=["blank", "injection", "no name", "no UTF-8"],
)
def test_a_name_or_version_that_is_none_is_refused_before_anything_is_sent(
    protocol: Any, model: str, version: str, said: str
) -> None:
    with InferenceClient("127.0.0.1:9", protocol) as client, pytest.raises(InvalidInput, match=re.escape(said)):
        client.ready(model, version=version)


class Sends:
    """A connection that is waited for, keeps what it is sent, and ends."""

    reused = False
    sent = b""

    async def take(self, *_: Any, **__: Any) -> Any:
        time.sleep(0.3)
        return self

    async def send(self, *parts: bytes, **_: Any) -> None:
        self.sent = b"".join(parts)

    async def receive(self, *_: Any) -> bytes:
        return b""

    def close(self) -> None:
        """Nothing is open."""


def test_over_http_triton_is_told_what_the_wait_for_a_connection_has_left() -> None:
    pool = Sends()
    make: Any = lambda *_: pool  # noqa: E731
    transport = HttpTransport("h:1", make, idempotent=False, tls=False, ca_cert=None, api_key=None)
    with pytest.raises(ConnectionLost):
        run(transport.send(request_of(), Deadline(2)))
    told = re.search(rb'"timeout": (\d+)', pool.sent)
    assert told is not None
    assert 0 < int(told[1]) <= 1_700_000
    head, _, body = pool.sent.partition(b"\r\n\r\n")
    assert b"\r\nContent-Length: %d" % len(body) in head

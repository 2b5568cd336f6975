"""Requests encoded in pieces: protobuf parses them as intended."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
from deepseek_client import ConnectionLost, InferenceClient, InvalidInput
from deepseek_client.concurrency import run
from deepseek_client.grpc.message import encoded, timeout_field
from deepseek_client.http.transport import HttpTransport
from deepseek_client.transport import Deadline, PreparedRequest, Tensor
from tritonclient.grpc import service_pb2

from tests.failing_servers import options_of


def request_of(**changes: Any) -> PreparedRequest:
    tensors = (
        Tensor(name="ids", datatype="INT64", shape=(1, 300), data=bytes(range(256)) * 10),
        Tensor(name="mask", datatype="FP32", shape=(1, 1), data=b"\0\0\0\0"),
    )
    fixed: dict[str, Any] = {"model": "m", "version": "2", "request_id": "", "outputs": ("y",), "parts": ()}
    return PreparedRequest(**{**fixed, "tensors": tensors, **changes})


def by_protobuf(request: PreparedRequest, left_us: int) -> Any:
    kind = service_pb2.ModelInferRequest
    message = kind(model_name=request.model, model_version=request.version, id=request.request_id)
    message.parameters["timeout"].int64_param = left_us
    for parameter, value in request.parameters.items():
        setattr(
            message.parameters[parameter],
            {bool: "bool_param", int: "int64_param", float: "double_param"}.get(type(value), "string_param"),
            value,
        )
    for tensor in request.tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        message.raw_input_contents.append(tensor.data)
    for name in request.outputs:
        message.outputs.add(name=name)
    return message


def test_the_pieces_parse_as_protobufs_own_message() -> None:
    shorter = Tensor(name="ids", datatype="INT64", shape=(2, 3), data=bytes(48))
    kinds = [request_of(request_id=request_id) for request_id in ("", "order-7", "é" * 100)]
    kinds += [request_of(parameters=each) for each in ({"priority": 2}, {"priority": True, "prompt": "é"}, {"x": 0.5})]
    kinds += [request_of(tensors=(shorter,)), request_of(outputs=()), request_of(version="")]
    for request in kinds:
        for left_us in (1, 127, 128, 500_000, 2**40):
            data = encoded(request) + timeout_field(left_us)
            assert service_pb2.ModelInferRequest.FromString(data) == by_protobuf(request, left_us)


def test_a_request_that_grpc_cannot_carry_is_refused_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(encoded(request_of()))
    monkeypatch.setattr("deepseek_client.grpc.message.MOST_BYTES", size)
    encoded(request_of())
    monkeypatch.setattr("deepseek_client.grpc.message.MOST_BYTES", size - 1)
    with pytest.raises(InvalidInput, match=f"m: a request of {size} bytes; gRPC allows at most {size - 1}: send fewer"):
        encoded(request_of())


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
def test_a_wrong_name_or_version_is_refused_before_anything_is_sent(
    protocol: Any, model: str, version: str, said: str
) -> None:
    with InferenceClient("127.0.0.1:9", protocol) as client, pytest.raises(InvalidInput, match=re.escape(said)):
        client.ready(model, version=version)


class Sends:
    """A pool with one connection that is slow to take, records what is sent, and ends without an answer."""

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
        """Does nothing."""


def test_the_time_sent_over_http_excludes_the_wait_for_a_connection() -> None:
    pool: Any = Sends()
    transport = HttpTransport("h:1", pool, options_of(urls=("h:1",), protocol="http"))
    with pytest.raises(ConnectionLost):
        run(transport.send(request_of(), Deadline(60)))
    told = re.search(rb'"timeout": (\d+)', pool.sent)
    assert told is not None
    assert 0 < int(told[1]) <= 59_700_000
    head, _, body = pool.sent.partition(b"\r\n\r\n")
    assert b"\r\nContent-Length: %d" % len(body) in head

"""Answers that do not fit: each is one error; answers as JSON, as MLServer sends them, are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    ConnectionLost,
    InferenceClient,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ServerError,
)
from deepseek_client.cli.commands import connect
from deepseek_client.tensors import listed_to_numpy
from tritonclient.grpc import service_pb2

from tests.failing_servers import answering, grpc_answering, refuse, status
from tests.fake_kserve import SIGNATURE, Y, binary, grpc_serving, http_answer, http_json, http_serving, triton
from tests.saved_runs import load_settings

X = {"x": np.ones((1, 3), np.float32)}
DATA = np.arange(3, dtype=np.float32).tobytes()
NESTED = b"[" * 100_000
Kind = service_pb2.ModelInferResponse


def http_answered(raw: bytes, **options: Any) -> dict[str, np.ndarray]:
    with http_serving(triton(lambda: raw)) as url, InferenceClient(url, "http", **options) as client:
        return client.infer("m", X)


def grpc_answered(answer: Any, **options: Any) -> dict[str, np.ndarray]:
    with grpc_serving(lambda _: answer.SerializeToString()) as url, InferenceClient(url, **options) as client:
        return client.infer("m", X)


def message(*outputs: dict, raw: tuple[bytes, ...] = (DATA,)) -> Any:
    return Kind(model_name="m", outputs=[Kind.InferOutputTensor(**each) for each in outputs], raw_output_contents=raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(http_json({"outputs": [binary(datatype=None)]}, DATA), id="null datatype"),
        pytest.param(http_json({"outputs": [binary(datatype="FP33")]}, DATA), id="unknown datatype"),
        pytest.param(http_json({"outputs": [binary(shape=[1, -1])]}, DATA), id="negative shape"),
        pytest.param(http_json({"outputs": [binary(shape=[1, 3.0])]}, DATA), id="fraction"),
        pytest.param(http_json({"outputs": [binary(shape=[1] * 100_000)]}, DATA), id="dimensions without end"),
        pytest.param(http_json({"outputs": [binary(shape=[3, 1])]}, DATA), id="another dimension"),
        pytest.param(http_json({"outputs": [binary(), binary()]}, DATA + DATA), id="twice"),
        pytest.param(http_json({"outputs": [binary(parameters={"binary_data_size": 9999})]}, DATA), id="beyond the body"),
        pytest.param(http_json({"outputs": [binary()]}, DATA + b"x"), id="trailing bytes"),
        pytest.param(http_json({"outputs": [{**Y, "data": [1, 2]}]}), id="too few values"),
        pytest.param(http_json({"outputs": [{**Y, "data": [[1], [2, 3]]}]}), id="ragged"),
        pytest.param(http_json({"outputs": [{**Y, "data": [True, False, True]}]}), id="truths"),
        pytest.param(http_answer(b"{}", "Inference-Header-Content-Length: 9"), id="head beyond the body"),
        pytest.param(http_answer(NESTED), id="nested"),
    ],
)  # fmt: skip
def test_an_http_answer_that_does_not_fit_is_one_error(raw: bytes) -> None:
    with pytest.raises(ServerError) as caught:
        http_answered(raw)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(message({**Y, "datatype": ""}), id="no datatype"),
        pytest.param(message({**Y, "datatype": "INT32"}), id="another datatype"),
        pytest.param(message({**Y, "shape": [1, -1]}), id="negative shape"),
        pytest.param(message({**Y, "name": "z"}), id="another name"),
        pytest.param(message(Y, Y, raw=(DATA, DATA)), id="twice"),
        pytest.param(message(Y, raw=(DATA, DATA)), id="trailing bytes"),
        pytest.param(message(Y, raw=()), id="no bytes"),
        pytest.param(message({**Y, "contents": {"fp32_contents": [1, 2]}}, raw=()), id="too few values"),
    ],
)
def test_a_grpc_answer_that_does_not_fit_is_one_error(answer: Any) -> None:
    with pytest.raises(ServerError):
        grpc_answered(answer)


@pytest.mark.parametrize(
    "signature",
    [
        pytest.param({"name": "m", "inputs": [{}]}, id="no names"),
        pytest.param({"name": "m", "inputs": [{"name": "x", "datatype": "FP33", "shape": [1]}]}, id="unknown datatype"),
        pytest.param({"name": "m", "inputs": [{"name": "x", "datatype": "FP32", "shape": [-2]}]}, id="negative"),
        pytest.param({"name": "m", "inputs": [SIGNATURE["inputs"][0]] * 2}, id="twice"),
        pytest.param({"name": "m", "inputs": 3}, id="a number"),
        pytest.param(NESTED, id="nested"),
    ],
)
def test_faulty_metadata_is_one_error(signature: Any) -> None:
    raw = http_answer(signature if isinstance(signature, bytes) else json.dumps(signature).encode())
    with http_serving(lambda path, _: raw) as url, InferenceClient(url, "http") as client, pytest.raises(ServerError):
        client.metadata("m")


def test_an_answer_of_a_new_version_is_checked_against_its_own_metadata() -> None:
    signature = dict(SIGNATURE)
    raw = [http_json({"outputs": [binary()]}, DATA)]
    with http_serving(triton(lambda: raw[0], signature)) as url, InferenceClient(url, "http") as client:
        client.infer("m", X)
        raw[0] = http_json({"outputs": [binary(datatype="INT32")]}, DATA)
        signature["outputs"] = [{"name": "y", "datatype": "INT32", "shape": [-1, 3]}]
        assert client.infer("m", X)["y"].dtype == np.int32


@pytest.mark.parametrize("framing", ["Content-Length: 99999999999", "Transfer-Encoding: chunked", "A: b"])
def test_a_body_without_end_is_not_read_beyond_the_limit(framing: str) -> None:
    sent, piece = [0], b"10000\r\n" + bytes(65536) + b"\r\n" if "chunked" in framing else bytes(65536)

    def answer(connection: Any) -> None:
        connection.sendall(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n".encode())
        while True:
            sent[0] += connection.send(piece)

    too_large = pytest.raises(ServerError, match="larger than max_response_bytes=1048576; allow more")
    with (
        answering(answer) as (url, _),
        InferenceClient(url, "http", max_response_bytes=1 << 20) as client,
        too_large,
    ):
        client.metadata("m")
    assert sent[0] < 64 << 20  # the rest was in the buffers of the sockets


@pytest.mark.parametrize("made_by", ["commands", "load test"])
def test_commands_take_answers_beyond_the_clients_limit(made_by: str) -> None:
    """The answer ends early, so that nothing large is sent."""
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n"
    with answering(lambda connection: connection.sendall(head)) as (url, _):
        made = (
            connect(url, "http")
            if made_by == "commands"
            else InferenceClient(url, "http", retries=0, **load_settings().access)
        )
        with made as client, pytest.raises(ConnectionLost, match="before the answer was complete"):
            client.metadata("m")


def test_a_large_grpc_message_is_refused() -> None:
    answer = message({**Y, "shape": [1, 1 << 20]}, raw=(bytes(4 << 20),))
    with pytest.raises(ServerError, match="which is max_response_bytes; allow more"):
        grpc_answered(answer, max_response_bytes=1 << 20)


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.ready(),
        lambda client: client.metadata("m"),
        lambda client: client.model_statistics("m"),
        lambda client: client.infer("m", X),
    ],
    ids=["ready", "metadata", "statistics", "infer"],
)
def test_bytes_that_are_no_message_are_one_error(call: Callable[[Any], Any]) -> None:
    answers = grpc_answering(lambda request, context: b"\xff\x01")
    with answers as (url, _), InferenceClient(url, retries=0) as client, pytest.raises(ServerError):
        call(client)


@pytest.mark.parametrize(
    ("model", "line", "body"),
    [
        pytest.param(None, "400 Bad Request", "", id="Triton"),
        pytest.param("m", "400 Bad Request", '{"error":"Model version not ready"}', id="Triton's model"),
        pytest.param("m", "404 Not Found", '{"error":"Model m not found"}', id="MLServer's model"),
        pytest.param(
            "m", "503 Service Unavailable", '{"error":"Model with name m is not ready."}', id="KServe's model"
        ),
    ],
)
def test_servers_say_that_they_are_not_ready(model: str | None, line: str, body: str) -> None:
    with answering(status(line, body)) as (url, seen), InferenceClient(url, "http") as client:
        assert not client.ready(model)
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("line", "body", "error", "says"),
    [
        ("400 Bad Request", '{"error":"this port needs https://"}', InvalidInput, "this port needs https://"),
        (
            "400 Bad Request",
            "<html>The plain HTTP request was sent to HTTPS port</html>",
            InvalidInput,
            "400 Bad Request; it speaks TLS: pass ca_cert= or tls=True",
        ),
        ("404 Not Found", "<html>", ModelNotFound, "404 Not Found"),
        ("500 Internal Server Error", "", ServerError, "500 Internal Server Error"),
        ("500 Error", f'{{"error":"\\u001b{"x" * 10_000}"}}', ServerError, ": \ufffdx{4095}$"),
    ],
)
def test_an_answer_that_does_not_say_whether_the_server_is_ready_is_an_error(
    line: str, body: str, error: type[InferenceError], says: str
) -> None:
    with (
        answering(status(line, body)) as (url, _),
        InferenceClient(url, "http") as client,
        pytest.raises(error, match=says),
    ):
        client.ready()


def test_whether_a_server_is_ready_is_asked_again_while_a_gateway_is_busy_or_lost_it() -> None:
    lines = iter(["429 Too Many Requests", "502 Bad Gateway", "503 Service Unavailable", "200 OK"])
    busy = http_serving(lambda path, body: http_answer(b"", status=next(lines)))
    with busy as url, InferenceClient(url, "http") as client:
        assert client.ready()


# A server without the binary extension; these are the bytes of MLServer 1.7.1.

MLSERVER = {
    "/v2": http_answer(b'{"name":"mlserver","version":"1.7.1","extensions":[]}'),
    "/v2/models/m": http_json(SIGNATURE),
    "/v2/models/m/config": http_answer(b'{"detail":"Not Found"}', status="404 Not Found"),
}


BARE = {"name": "m", "versions": [], "platform": "", "inputs": [], "outputs": [], "parameters": {}}
INVALID_URL = http_answer(b'{"error":"Invalid request URL"}', status="400 Bad Request")  # of OpenVINO Model Server


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({}, id="described"),
        pytest.param({"/v2/models/m": http_json(BARE)}, id="not described"),
        pytest.param({"/v2/models/m/config": INVALID_URL}, id="configuration refused"),
    ],
)
def test_a_server_without_binary_tensors_is_asked_and_answers_in_json(other: dict[str, bytes]) -> None:
    asked: list[Any] = []

    def answer(path: str, body: bytes) -> bytes:
        if path in MLSERVER:
            return (MLSERVER | other)[path]
        asked.append(json.loads(body))
        y = {**Y, "parameters": {"content_type": "np"}, "data": [2.0, 3.0, 7.5]}
        return http_json({"model_name": "m", "id": "c8df", "parameters": {}, "outputs": [y]})

    with http_serving(answer) as url, InferenceClient(url, "http") as client:
        np.testing.assert_array_equal(client.infer("m", X, outputs=["y"])["y"], [[2, 3, 7.5]])
    (x,) = asked[0]["inputs"]
    assert x == {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 1.0, 1.0]}
    assert asked[0]["parameters"].keys() == {"timeout"}


def test_strings_pass_through_json() -> None:
    text = {"name": "t", "datatype": "BYTES", "shape": [2, 1]}
    signature = {"name": "m", "inputs": [{**text, "shape": [-1, 1]}], "outputs": [{**text, "shape": [-1, 1]}]}

    def answer(path: str, body: bytes) -> bytes:
        if path.endswith("/infer"):
            return http_json({"outputs": [{**text, "data": json.loads(body)["inputs"][0]["data"]}]})
        return http_json(signature) if path.endswith("/m") else MLSERVER[path]

    with http_serving(answer) as url, InferenceClient(url, "http") as client:
        got = client.infer("m", {"t": np.array([["a"], ["é"]], object)})["t"]
        assert got.tolist() == [[b"a"], ["é".encode()]]
        with pytest.raises(InvalidInput, match="is not UTF-8"):
            client.infer("m", {"t": np.array([[b"\xff"]], object)})


def test_values_of_grpc_messages_are_read() -> None:
    answer = message({**Y, "contents": {"fp32_contents": [1, 2, 3]}}, raw=())
    np.testing.assert_array_equal(grpc_answered(answer)["y"], [[1, 2, 3]])


def test_an_answer_that_does_not_fit_stays_the_error_if_the_metadata_cannot_be_fetched_again() -> None:
    served = [triton(lambda: http_json({"outputs": [binary()]}, DATA))]
    with (
        http_serving(lambda path, body: served[0](path, body)) as url,
        InferenceClient(url, "http", retries=0) as client,
    ):
        client.infer("m", X)
        wrong = http_json({"outputs": [binary(datatype="INT32")]}, DATA)
        busy = http_answer(b"", status="429 Too Many Requests")
        served[0] = lambda path, body: wrong if path.endswith("/infer") else busy
        with pytest.raises(ServerError, match="answered 'y' as int32") as error:
            client.infer("m", X)
    assert not error.value.did_not_run


@pytest.mark.parametrize(("datatype", "values"), [("UINT64", [1, 2**63 + 1]), ("INT64", [3.0, 2**53 + 1])])
def test_large_integers_of_json_are_exact(datatype: str, values: list[float]) -> None:
    assert listed_to_numpy(datatype, [2], values).tolist() == [int(value) for value in values]
    for wrong in (2**64, -(2**63) - 1, 0.5, float("nan"), None, "1"):
        with pytest.raises(ValueError, match=f"does not fit {datatype}|other than {datatype}"):
            listed_to_numpy(datatype, [2], [values[1], wrong])


def test_a_method_that_the_server_does_not_implement_is_a_server_error() -> None:
    refusing = refuse(
        grpc.StatusCode.UNIMPLEMENTED, "ModelInfer RPC doesn't support models with decoupled transaction policy"
    )
    with grpc_answering(refusing) as (url, _), InferenceClient(url, retries=0) as client:
        with pytest.raises(ServerError, match="decoupled"):
            client.metadata("m")
        with pytest.raises(ServerError):
            client.ready("m")


def test_unavailable_over_grpc_may_come_from_the_model() -> None:
    refusing = refuse(grpc.StatusCode.UNAVAILABLE, "no weights yet")
    with (
        grpc_answering(refusing) as (url, _),
        InferenceClient(url, retries=0) as client,
        pytest.raises(ConnectionLost, match=r"or the model is unavailable \(no weights yet\)"),
    ):
        client.metadata("m")


def test_replicas_with_different_outputs_each_answer_by_their_own_metadata() -> None:
    """As while one server of two has the new version."""
    y = {"name": "y", "datatype": "FP32", "shape": [-1, 3]}
    more = {**SIGNATURE, "outputs": [y, {**y, "name": "z"}]}
    old = triton(lambda: http_json({"outputs": [binary()]}, DATA))
    new = triton(lambda: http_json({"outputs": [binary(), binary(name="z")]}, DATA + DATA), more)
    with (
        http_serving(old) as first,
        http_serving(new) as second,
        InferenceClient([first, second], "http") as client,
    ):
        answers = [client.infer("m", X) for _ in range(8)]
    assert sorted(len(answer) for answer in answers) == [1] * 4 + [2] * 4

"""What is checked before anything is sent: shapes, types, strings, inputs read from files, settings of the client."""

from __future__ import annotations

import enum
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import (
    InferenceClient,
    InvalidInput,
    ModelMetadata,
    ModelNotReady,
    ServerError,
    TensorSpec,
)
from deepseek_client.inputs import filled, read_inputs
from deepseek_client.settings import check_headers
from deepseek_client.transports import error_of_status, to_bytes, to_numpy

MODEL = ModelMetadata(
    name="m",
    versions=("1",),
    platform="",
    inputs=(
        TensorSpec(name="ids", datatype="INT64", shape=(-1, 3)),
        TensorSpec(name="text", datatype="BYTES", shape=(-1, 1), optional=True),
    ),
    outputs=(),
    max_batch_size=4,
)
IDS = np.ones((2, 3), np.int64)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        pytest.param({}, "input 'ids' is missing; it takes ids (INT64 [-1, 3])", id="missing"),
        pytest.param({"ids": IDS, "id": IDS}, "m has no input 'id'; its inputs are ids", id="unknown"),
        pytest.param({"ids": [[1]]}, "is a list; pass a numpy array: np.asarray(..., dtype=np.int64)", id="list"),
        pytest.param({"ids": IDS.astype(np.int32)}, "is int32, the model takes int64; cast it", id="dtype"),
        pytest.param({"ids": IDS.astype(">i8")}, "inputs['ids'].astype(np.int64)", id="byte order"),
        pytest.param({"ids": IDS[0]}, "for a batch of one: inputs['ids'][None]", id="no batch"),
        pytest.param({"ids": IDS[None]}, "of 3 dimensions; the model takes 2: [-1, 3]", id="rank"),
        pytest.param({"ids": IDS[:, :2]}, "dimension 1 must be 3, not 2", id="fixed dimension"),
        pytest.param({"ids": IDS[:0]}, "a batch of 0; from 1 to 4 are allowed", id="empty batch"),
        pytest.param({"ids": np.ones((40, 3), np.int64)}, "split it into batches of 4", id="large batch"),
        pytest.param({"ids": IDS, "text": np.array([["a"]])}, "batch sizes disagree (ids 2, text 1)", id="batches"),
        pytest.param({"ids": IDS, "text": IDS[:, :1]}, "is int64, the model takes strings", id="no strings"),
        pytest.param({"ids": IDS, "text": np.array([[b"a"], [3]], object)}, "holds 3 (int)", id="a number"),
    ],
)
def test_what_does_not_fit_the_signature_is_refused_in_one_line(inputs: dict, says: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        MODEL.check(inputs)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_that_hides_its_configuration_decides_by_itself_on_batches_and_missing_inputs() -> None:
    spec = TensorSpec(name="ids", datatype="INT64", shape=(-1, 3), optional=True)
    hidden = ModelMetadata(name="m", versions=(), platform="", inputs=(spec,), outputs=(), max_batch_size=None)
    assert hidden.check({}) == [None]
    assert hidden.check({"ids": np.ones((40, 3), np.int64)})[0] is not None


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array([["Amélie", "日本"]]), id="text"),
        pytest.param(np.array([[b"\xff\x00a", b""]], object), id="bytes"),
        pytest.param(np.array([[np.bytes_(b"caf\xc3\xa9"), np.str_("é")]], object), id="numpy's own"),
        pytest.param(np.array([[b"ab", b"c"]]), id="bytes of one size"),
        pytest.param(np.empty((0, 2), object), id="none"),
    ],
)
def test_strings_survive_the_wire(array: np.ndarray) -> None:
    spec = TensorSpec(name="text", datatype="BYTES", shape=(-1, 2))
    back = to_numpy("BYTES", array.shape, to_bytes(spec, array))
    assert back.tolist() == [[v.encode() if isinstance(v, str) else v for v in row] for row in array.tolist()]


class Color(str, enum.Enum):  # noqa: UP042 - whose str() is its name
    RED = "red"


def test_of_a_text_that_is_more_than_one_the_text_is_sent_and_half_a_character_is_refused() -> None:
    spec = TensorSpec(name="text", datatype="BYTES", shape=(-1,))
    assert to_bytes(spec, np.array([Color.RED], object)) == b"\x03\x00\x00\x00red"
    with pytest.raises(InvalidInput, match=r"input 'text' holds .* no UTF-8"):
        to_bytes(spec, np.array(["\ud800"], object))


@pytest.mark.parametrize("outputs", ["y", np.array(["y"]), [["y"]], 3], ids=["text", "array", "list", "number"])
def test_outputs_are_a_list_of_names(outputs: Any) -> None:
    with pytest.raises(InvalidInput, match="pass a list of names"):
        MODEL.check({"ids": IDS}, outputs)


def test_a_name_of_a_header_is_a_text() -> None:
    with pytest.raises(InvalidInput, match="headers: 1 is no name"):
        check_headers({1: "a"})  # type: ignore[dict-item]


@pytest.mark.parametrize(("status", "kind"), [(500, ServerError), (404, ModelNotReady), (503, ModelNotReady)])
def test_a_models_own_failure_over_another_one_may_have_run(status: int, kind: type) -> None:
    assert type(error_of_status(status, "Failed: Model 'inner' is not ready.")) is kind


def test_rows_of_an_evaluation_file_are_picked_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.npz"
    np.savez(path, **{f"{k:05d}/ids": np.full((1, 3), k) for k in range(3)})  # type: ignore[arg-type]
    assert read_inputs(path, MODEL)["ids"].tolist() == [[0, 0, 0]]
    assert read_inputs(path, MODEL, row=2)["ids"].tolist() == [[2, 2, 2]]
    assert filled(read_inputs(path, MODEL, row=2), 2)["ids"].tolist() == [[2, 2, 2]] * 2
    with pytest.raises(InvalidInput, match="no row 3; it has rows 0 to 2"):
        read_inputs(path, MODEL, row=3)


@pytest.mark.parametrize(
    ("value", "datatype", "says"),
    [
        pytest.param([1.5], "INT64", "1.5 is no INT64", id="fraction"),
        pytest.param([300], "INT8", "300 is no INT8", id="too large"),
        pytest.param([-1], "UINT8", "-1 is no UINT8", id="negative"),
        pytest.param([2**63], "INT64", "9223372036854775808 is no INT64", id="beyond 64 bits"),
        pytest.param([16777217], "FP32", "16777217 is no FP32", id="inexact integer"),
        pytest.param([1e39], "FP32", "1e[+]39 is no FP32", id="overflow"),
        pytest.param([True], "INT64", "something else than INT64", id="truth"),
        pytest.param([1], "BOOL", "something else than BOOL", id="no truth"),
        pytest.param(["a"], "FP32", "something else than FP32", id="text"),
        pytest.param([None], "FP32", "something else than FP32", id="null"),
        pytest.param([[1], [1, 2]], "FP32", "differ in length", id="ragged"),
    ],
)
def test_a_json_value_that_would_lose_something_is_refused(
    tmp_path: Path, value: list, datatype: str, says: str
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"x": value}))
    spec = TensorSpec(name="x", datatype=datatype, shape=(-1,))
    metadata = ModelMetadata(name="m", versions=(), platform="", inputs=(spec,), outputs=(), max_batch_size=0)
    with pytest.raises(InvalidInput, match=says):
        read_inputs(tmp_path / "x.json", metadata)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        pytest.param({"url": "http://h:8000"}, "must be host:port without a scheme", id="scheme"),
        pytest.param({"url": "h"}, "must be host:port", id="no port"),
        pytest.param({"url": "h:99999"}, "must be host:port", id="no such port"),
        pytest.param({"url": f"h:{'9' * 5000}"}, "must be host:port", id="port of many digits"),
        pytest.param({"url": "foo..bar:8000"}, "must be host:port", id="empty label"),
        pytest.param({"url": ".foo:8000"}, "must be host:port", id="empty first label"),
        pytest.param({"url": f"{'a' * 64}.bar:8000"}, "must be host:port", id="long label"),
        pytest.param({"url": "[1]:8000"}, "must be host:port", id="no IPv6 address"),
        pytest.param({"url": "[127.0.0.1]:8000"}, "must be host:port", id="IPv4 address in brackets"),
        pytest.param({"protocol": "rest"}, "'grpc' or 'http'", id="protocol"),
        pytest.param({"retries": -1}, "0 or more", id="retries"),
        pytest.param({"retries": "3"}, "a whole number", id="retries as text"),
        pytest.param({"retry_budget": "0.1"}, "a share of the calls", id="budget as text"),
        pytest.param({"url": None}, "must be host:port", id="no url"),
        pytest.param({"tls": "no"}, "tls is of type str; it must be True or False", id="tls as text"),
        pytest.param({"ca_cert": 5}, "a file's path", id="certificate as a number"),
        pytest.param({"timeout_s": float("inf")}, "positive number of seconds", id="time-out"),
        pytest.param({"ca_cert": "/absent.pem"}, "No such file", id="no certificate"),
        pytest.param({"ca_cert": __file__}, "must be a PEM file", id="bad certificate"),
        pytest.param({"api_key": "k"}, "only sent over TLS", id="key in the clear"),
        pytest.param({"api_key": "k\r\nX: y", "tls": True}, "pass the bare key", id="key with a newline"),
    ],
)
def test_wrong_settings_are_refused_at_once(settings: dict, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        InferenceClient(**settings)


@pytest.mark.parametrize("host", ["localhost", "a.b-c.", "triton_1", "127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_names_and_addresses_are_hosts(host: str) -> None:
    InferenceClient(f"{host}:8001").close()


def test_the_package_brings_no_torch_no_gevent_and_nothing_of_ours() -> None:
    code = "import sys, deepseek_client; print(*{'torch', 'gevent', 'deepseek', 'pydantic'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""

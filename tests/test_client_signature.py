"""Checks before a request is sent: shapes, types, strings, inputs from files."""

from __future__ import annotations

import dataclasses
import enum
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InvalidInput, ModelMetadata, ModelNotReady, ServerBusy, ServerError, TensorMetadata
from deepseek_client.cli.input_file import filled, read_inputs
from deepseek_client.metadata import DTYPES
from deepseek_client.server_errors import error_of_status
from deepseek_client.tensors import to_bytes, to_numpy


def model_of(*inputs: TensorMetadata, max_batch_size: int | None = 0) -> ModelMetadata:
    """The signature of a model with these inputs."""
    return ModelMetadata(
        name="m", versions=("1",), platform="", inputs=inputs, outputs=(), max_batch_size=max_batch_size
    )


MODEL = model_of(
    TensorMetadata(name="ids", datatype="INT64", shape=(-1, 3)),
    TensorMetadata(name="text", datatype="BYTES", shape=(-1, 1), optional=True),
    max_batch_size=4,
)
IDS = np.ones((2, 3), np.int64)


class Color(str, enum.Enum):  # noqa: UP042 - its str() is its name
    RED = "red"


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        pytest.param({}, "input 'ids' is missing; it takes ids (INT64 [-1, 3])", id="missing"),
        pytest.param({"ids": IDS, "id": IDS}, "m has no input 'id'; its inputs are ids", id="unknown"),
        pytest.param({"ids": [[1]]}, "is a list; pass a numpy array: np.asarray(..., dtype=np.int64)", id="list"),
        pytest.param(
            {"ids": np.ma.array(IDS)},
            "a masked array; say what stands for the masked values: array.filled(value)",
            id="masked",
        ),
        pytest.param({"ids": IDS.astype(np.int32)}, "is int32, the model takes int64; cast it", id="dtype"),
        pytest.param({"ids": IDS.astype(">i8")}, "inputs['ids'].astype(np.int64)", id="byte order"),
        pytest.param({"ids": IDS[0]}, "for a batch of one: inputs['ids'][None]", id="no batch"),
        pytest.param({"ids": IDS[:, :2]}, "dimension 1 must be 3, not 2", id="fixed dimension"),
        pytest.param({"ids": IDS[:0]}, "a batch of 0; there is nothing to infer", id="empty batch"),
        pytest.param(
            {"ids": np.ones((40, 3), np.int64)}, "a batch of 40; at most 4 are allowed: split it", id="large batch"
        ),
        pytest.param({"ids": IDS, "text": np.array([["a"]])}, "batch sizes disagree (ids 2, text 1)", id="batches"),
        pytest.param({"ids": IDS, "text": np.array([[b"a"], [3]], object)}, "holds 3 (int)", id="a number"),
        pytest.param({"ids": IDS, "text": [["a"], ["b", "c"]]}, "has rows of different lengths", id="ragged"),
    ],
)
def test_inputs_that_do_not_fit_the_signature_are_refused(inputs: dict, says: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(says)):
        MODEL.check(inputs)


def test_without_the_configuration_the_server_checks_batches_and_missing_inputs() -> None:
    spec = TensorMetadata(name="ids", datatype="INT64", shape=(-1, 3), optional=True)
    hidden = model_of(spec, max_batch_size=None)
    assert hidden.check({}) == [None]
    assert hidden.check({"ids": np.ones((40, 3), np.int64)})[0] is not None


@pytest.mark.parametrize(
    "array",
    [
        pytest.param(np.array([["Amélie", "日本"]]), id="text"),
        pytest.param(np.array([[b"\xff\x00a", b""]], object), id="bytes"),
        pytest.param(np.array([[np.bytes_(b"caf\xc3\xa9"), np.str_("é")]], object), id="numpy's own"),
        pytest.param(np.array([[b"ab", b"c"]]), id="bytes of one size"),
        pytest.param(np.array([[Color.RED, "ab"]], object), id="an enum"),
        pytest.param(np.empty((0, 2), object), id="none"),
    ],
)
def test_strings_survive_encoding(array: np.ndarray) -> None:
    spec = TensorMetadata(name="text", datatype="BYTES", shape=(-1, 2))
    back = to_numpy("BYTES", array.shape, to_bytes(spec, array))
    assert back.tolist() == [[v.encode() if isinstance(v, str) else v for v in row] for row in array.tolist()]


def test_a_text_that_utf_8_cannot_encode_is_refused() -> None:
    spec = TensorMetadata(name="text", datatype="BYTES", shape=(-1,))
    with pytest.raises(InvalidInput, match=r"input 'text' holds .* UTF-8 cannot encode"):
        to_bytes(spec, np.array(["\ud800"], object))


@pytest.mark.parametrize(("status", "kind"), [(500, ServerError), (404, ModelNotReady), (503, ServerBusy)])
def test_only_a_refusal_says_that_a_model_is_not_ready(status: int, kind: type) -> None:
    """500 is a model's failure that names another model; 503 may come from a proxy that lost the server."""
    found = error_of_status(status, "Failed: Model 'inner' is not ready.")
    assert (type(found), found.did_not_run) == (kind, kind is ModelNotReady)


def test_rows_of_an_evaluation_file_are_picked_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.npz"
    np.savez(path, **{f"{k:05d}/ids": np.full((1, 3), k) for k in range(3)})  # type: ignore[arg-type]
    assert read_inputs(path, MODEL)["ids"].tolist() == [[0, 0, 0]]
    assert read_inputs(path, MODEL, row=2)["ids"].tolist() == [[2, 2, 2]]
    assert filled(read_inputs(path, MODEL, row=2), 2)["ids"].tolist() == [[2, 2, 2]] * 2
    with pytest.raises(InvalidInput, match="no row 3; it has rows 0 to 2"):
        read_inputs(path, MODEL, row=3)
    np.savez(path, ids=np.zeros((0, 3), np.int64))
    with pytest.raises(InvalidInput, match="no row 0; it has no rows"):
        read_inputs(path, MODEL, row=0)


def test_bf16_in_an_npz_file_keeps_its_type(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((1, 3), DTYPES["BF16"]))  # numpy writes it as |V2
    spec = TensorMetadata(name="x", datatype="BF16", shape=(-1, 3))
    metadata = model_of(spec, max_batch_size=4)
    found = metadata.check(read_inputs(tmp_path / "x.npz", metadata))[0]
    assert found is not None
    assert (found.dtype, found.tolist()) == (DTYPES["BF16"], [[1, 1, 1]])


def _npy(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def _objects(path: Path) -> None:
    np.savez(path, text=np.array([["a"]], object))


def _damaged(path: Path) -> None:
    np.savez_compressed(path, ids=np.arange(300).reshape(-1, 3))
    content = bytearray(path.read_bytes())
    content[50:90] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        pytest.param("x.npz", _npy, "not an .npz file of plain arrays", id="npy"),
        pytest.param("x.npz", _damaged, "not an .npz file of plain arrays", id="damaged"),
        pytest.param("x.npz", _objects, r"save texts as .astype\(str\)", id="objects"),
        pytest.param("x.json", lambda path: path.write_text("[" * 100_000), "not JSON", id="endless"),
        pytest.param("x.json", lambda path: path.write_text("[1]"), 'it must be an object: {"name of an', id="list"),
        pytest.param("x.json", lambda path: path.write_text('{"x": [[1], [1, 2]]}'), "differ in length", id="ragged"),
    ],
)
def test_a_file_without_a_request_is_refused_in_one_line(
    tmp_path: Path, name: str, write: Callable[[Path], object], says: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(InvalidInput, match=says):
        read_inputs(tmp_path / name, dataclasses.replace(MODEL, inputs=()))


def test_a_json_request_to_a_server_that_describes_no_inputs_has_numpys_types(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"ids": [[1, 2]], "prices": [1, 0.5], "new": [true], "names": ["é"]}')
    bare = dataclasses.replace(MODEL, inputs=())
    specs = bare.with_inputs(read_inputs(tmp_path / "x.json", bare)).inputs
    assert [str(spec) for spec in specs] == [
        "ids (INT64 [1, 2])",
        "prices (FP64 [2])",
        "new (BOOL [1])",
        "names (BYTES [1])",
    ]


@pytest.mark.parametrize(("datatype", "value"), [("INT64", 1), ("BYTES", "a")])
def test_more_dimensions_than_numpy_iterates_over_are_refused(tmp_path: Path, datatype: str, value: Any) -> None:
    (tmp_path / "x.json").write_text(f'{{"x": {"[" * 40}{json.dumps(value)}{"]" * 40}}}')
    metadata = model_of(TensorMetadata(name="x", datatype=datatype, shape=(-1,)))
    with pytest.raises(InvalidInput, match="of 40 dimensions; the model takes 1"):
        metadata.check(read_inputs(tmp_path / "x.json", metadata))


@pytest.mark.parametrize(
    ("value", "datatype", "says"),
    [
        pytest.param([1.5], "INT64", "1.5 does not fit INT64", id="fraction"),
        pytest.param([300], "INT8", "300 does not fit INT8", id="too large"),
        pytest.param([-1], "UINT8", "-1 does not fit UINT8", id="negative"),
        pytest.param([16777217], "FP32", "16777217 does not fit FP32", id="inexact integer"),
        pytest.param([1e39], "FP32", "1e[+]39 does not fit FP32", id="overflow"),
        pytest.param([True], "INT64", "something other than INT64", id="truth"),
        pytest.param([1, True], "INT64", "something other than INT64", id="truth beside an integer"),
        pytest.param([1.0, True], "INT64", "something other than INT64", id="truth beside a whole number"),
        pytest.param([0.5, True], "FP32", "something other than FP32", id="truth beside a fraction"),
        pytest.param([1], "BOOL", "something other than BOOL", id="no truth"),
        pytest.param(["a"], "FP32", "something other than FP32", id="text"),
        pytest.param([[1], [1, 2]], "FP32", "differ in length", id="ragged"),
    ],
)
def test_a_json_value_that_would_lose_precision_is_refused(
    tmp_path: Path, value: list, datatype: str, says: str
) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"x": value}))
    metadata = model_of(TensorMetadata(name="x", datatype=datatype, shape=(-1,)))
    with pytest.raises(InvalidInput, match=says):
        read_inputs(tmp_path / "x.json", metadata)

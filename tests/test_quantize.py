"""Precision written into the graph: found there, calibrated on real data, never silently missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from deepseek.quantization import QuantConfig
from deepseek.spec import DeploymentSpec, GateFailed, InputError
from export.quantize import Calibration, calibration_rows, found_precision, prove, quantize_model
from tests.conftest import run_module

IMAGE = DeploymentSpec.load("tests/models/image")


def test_each_graph_holds_what_was_asked(built: Path) -> None:
    for model, layers in (("image", 3), ("text", 4)):
        fp16 = found_precision(built / "build" / model / "fp16" / "model.onnx")
        assert fp16["compute_operators"] == {"fp16": layers}
        int8 = found_precision(built / "build" / model / "int8" / "model.onnx")
        assert int8["compute_operators"]["int8"] >= layers - 1
        assert int8["weight_bytes"]["int8"] > 1000


def test_inputs_and_outputs_keep_their_types(built: Path) -> None:
    def types(precision: str) -> list[tuple[str, int]]:
        graph = onnx.load(built / "build" / "text" / precision / "model.onnx").graph
        return [(value.name, value.type.tensor_type.elem_type) for value in [*graph.input, *graph.output]]

    assert types("fp32") == types("fp16") == types("int8")


def test_the_source_graph_is_left_as_it_was(built: Path) -> None:
    for model in ("image", "text"):
        source = built / "build" / model / "fp32" / "model.onnx"
        manifest = json.loads((built / "build" / model / "int8" / "manifest.json").read_text())
        assert hashlib.sha256(source.read_bytes()).hexdigest() == manifest["sources"]["onnx"]


def test_8_bits_without_calibration_data_is_refused(build: Path) -> None:
    with pytest.raises(InputError, match="no calibration data; random data would make a graph that is wrong"):
        quantize_model(IMAGE, QuantConfig())


def test_a_graph_that_stayed_fp32_fails_the_proof(built: Path) -> None:
    found = found_precision(built / "build" / "image" / "fp32" / "model.onnx")
    assert found["compute_operators"] == {"fp32": 3}
    for config in (QuantConfig(), QuantConfig(weight_bits=16, activation_bits=16)):
        with pytest.raises(GateFailed, match="was asked for, but no MatMul/Gemm/Conv of the graph runs in it"):
            prove(config, found)


def test_keep_high_leaves_nodes_alone(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(built / "build" / "text", tmp_path / "text")
    monkeypatch.setenv("BUILD", str(tmp_path))
    nodes = [
        node.name
        for node in onnx.load(tmp_path / "text" / "fp32" / "model.onnx").graph.node
        if node.op_type == "MatMul"
    ]
    data = tmp_path / "text" / "calibration.npz"
    config = QuantConfig(
        calibration_data=data, keep_high=(f"^{nodes[0]}$",), high_precision="fp32", calibration_method="max"
    )
    result = quantize_model(DeploymentSpec.load("tests/models/text"), config)
    assert result["found"]["compute_operators"] == {"int8": 3, "fp32": 1}


@pytest.mark.parametrize("suffix", ["npz", "npy", "bin"])
def test_a_calibration_file_may_be_npz_npy_or_raw_records(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    path = tmp_path / f"val_dataset.{suffix}"
    if suffix == "npz":
        np.savez(path, pixels=pixels)
    elif suffix == "npy":
        np.save(path, pixels)
    else:
        pixels.tofile(path)
    rows = calibration_rows(IMAGE, path, 4)
    assert [int(np.flatnonzero((pixels == row["pixels"]).all((1, 2, 3)))[0]) for row in rows] == [0, 1, 3, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes; raw records of this signature take 12288 bytes each"),
        (b"x" * 12289, "12289 bytes; raw records"),
    ],
    ids=["empty", "half a record"],
)
def test_a_broken_calibration_file_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "val_dataset.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        calibration_rows(IMAGE, path, 4)


def test_calibration_samples_of_another_type_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "c.npz", pixels=np.zeros((4, 3, 32, 32)))
    with pytest.raises(InputError, match="input 'pixels': seen float64"):
        calibration_rows(IMAGE, tmp_path / "c.npz", 4)


def test_calibration_starts_with_a_batch_and_uses_every_row() -> None:
    rows = [{"x": np.full((1, length), length)} for length in (3, 5, 5, 7)]
    calibration = Calibration(rows)
    assert len(calibration.get_first()["x"]) == 2
    seen = []
    while (batch := calibration.get_next()) is not None:
        seen += [int(row[0]) for row in batch["x"]]
    assert sorted(seen) == [3, 5, 5, 7]


def test_a_truncated_onnx_file_is_one_line_and_exit_2(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    path = tmp_path / "image" / "fp32" / "model.onnx"
    path.write_bytes(path.read_bytes()[:20000])
    before = (tmp_path / "image" / "fp16" / "model.onnx").read_bytes()
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp16")
    run = run_module("export.quantize", *flags, BUILD=str(tmp_path))
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert "not a valid ONNX file" in run.stderr
    assert (tmp_path / "image" / "fp16" / "model.onnx").read_bytes() == before

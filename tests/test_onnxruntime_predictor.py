"""Graphs that ONNX Runtime's optimizers break: run as they are served, and tried in a child process."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deepseek.spec import DeploymentSpec, GateFailed
from export.model_folder import ModelFolder
from export.runtimes import onnxruntime_predictor
from export.runtimes.isolation import Crashed, in_child
from export.runtimes.onnxruntime_predictor import onnx_predictor, optimizers_left_out
from export.stages.select_precision import compare
from export.triton_config import model_config

IMAGE = DeploymentSpec.load("tests/models/image")
FP16, FP32, FP8 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.FLOAT8E4M3FN


def saved(path: Path, nodes: list[onnx.NodeProto], *tensors: onnx.TensorProto) -> Path:
    """A graph from `pixels` to `scores` and `features`, as in the signature of the model `image`."""
    inputs = [helper.make_tensor_value_info("pixels", FP32, ["batch", 3, 32, 32])]
    outputs = [helper.make_tensor_value_info(name, FP32, None) for name in IMAGE.outputs]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.fixture
def transposed(tmp_path: Path) -> Path:
    """Swaps batch and first axis in fp16 before a product, like torch's attention over (batch, length, width)."""
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "last"], ["rows"], keepdims=0),  # (B, 3, 32)
        helper.make_node("Cast", ["rows"], ["half"], to=FP16),
        helper.make_node("Transpose", ["half"], ["swapped"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["swapped", "weight"], ["made"]),
        helper.make_node("Transpose", ["made"], ["back"], perm=[1, 0, 2]),
        helper.make_node("Cast", ["back"], ["scores"], to=FP32),
        helper.make_node("Identity", ["rows"], ["features"]),
    ]
    weight = numpy_helper.from_array(np.eye(32, dtype=np.float16), "weight")
    return saved(tmp_path / "half.onnx", nodes, weight, numpy_helper.from_array(np.array([3]), "last"))


@pytest.fixture
def rectified(tmp_path: Path) -> Path:
    """A Relu before a Q/DQ pair in fp8."""
    nodes = [
        helper.make_node("Relu", ["pixels"], ["positive"]),
        helper.make_node("QuantizeLinear", ["positive", "scale", "zero"], ["narrow"]),
        helper.make_node("DequantizeLinear", ["narrow", "scale", "zero"], ["scores"]),
        helper.make_node("Identity", ["scores"], ["features"]),
    ]
    zero = helper.make_tensor("zero", FP8, [], b"\0", raw=True)
    return saved(tmp_path / "rectified.onnx", nodes, helper.make_tensor("scale", FP32, [], [0.01]), zero)


@pytest.fixture
def crashing(transposed: Path) -> Path:
    """The same graph, if it crashes ONNX Runtime with all its optimizers; otherwise the test is skipped."""
    try:
        in_child("all optimizers", lambda: len(onnxruntime.InferenceSession(transposed).get_inputs()))
    except Crashed:
        return transposed
    pytest.skip(f"ONNX Runtime {onnxruntime.__version__} loads it on this machine (x86 with AVX crashes up to 1.32.0)")


def pixels() -> dict[str, np.ndarray]:
    return {"pixels": np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)}


def test_fp16_between_transposes_runs(transposed: Path) -> None:
    scores = onnx_predictor(IMAGE, transposed, "onnxruntime")(pixels())["scores"]
    np.testing.assert_allclose(scores, pixels()["pixels"].mean(3), atol=1e-3)


def test_fp8_keeps_its_relu(rectified: Path) -> None:
    scores = onnx_predictor(IMAGE, rectified, "onnxruntime")(pixels())["scores"]
    assert scores.min() == 0
    assert onnxruntime.InferenceSession(rectified).run(["scores"], pixels())[0].min() < 0, (
        "fixed upstream: see onnxruntime_predictor._FAULTY"
    )


def test_optimizers_are_disabled_only_for_graphs_with_such_types(
    build: Path, transposed: Path, rectified: Path
) -> None:
    assert optimizers_left_out(build / "image" / "fp32" / "model.onnx") == []
    assert optimizers_left_out(build / "image" / "fp16" / "model.onnx") == ["MatmulTransposeFusion"]
    assert optimizers_left_out(rectified) == ["ReluQuantRewrite"]


def test_the_disabled_optimizers_of_a_graph_are_in_its_configuration() -> None:
    config = model_config(IMAGE, "fp16", "onnxruntime", {}, left_out=["MatmulTransposeFusion"])
    assert config.parameters["left_out"].string_value == "MatmulTransposeFusion"
    own = IMAGE.model_copy(update={"onnxruntime": IMAGE.onnxruntime.model_copy(update={"backend": "onnxruntime"})})
    config = model_config(own, "fp16", "onnxruntime", {}, left_out=["MatmulTransposeFusion"])
    assert config.optimization.graph.level == -1
    assert "left_out" not in model_config(IMAGE, "fp32", "onnxruntime", {}).parameters


def test_a_candidate_that_crashes_the_runtime_is_refused_and_the_others_are_compared(
    built: Path, tmp_path: Path, crashing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    monkeypatch.setattr(onnxruntime_predictor, "_FAULTY", {})
    shutil.copy(crashing, tmp_path / "image" / "fp16" / "model.onnx")
    result = compare(ModelFolder("image", "tests/models"), "onnxruntime", None)
    assert result["refused"] == {"fp16": "ONNX Runtime crashed (SIGSEGV) on its graph"}
    assert result["chosen"] in ("fp32", "int8")
    with pytest.raises(GateFailed, match="ONNX Runtime crashed"):
        compare(ModelFolder("image", "tests/models"), "onnxruntime", "fp16")

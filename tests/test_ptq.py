"""ModelOpt's quantization: which layers it takes, and what it leaves of their attributes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from deepseek.precisions import Precision
from deepseek.quantization import QuantConfig
from deepseek.spec import Axis
from export.graphs.graph_file import save_graph
from export.precision.calibration import Calibration
from export.precision.ptq import qdq_from_onnx
from export.precision.qdq import quantize_weights, quantized_layers, use_one_scale_a_tensor


def quantized(
    folder: Path, nodes: str, precision: Precision = "int8", *, keep_high: tuple[str, ...] = ()
) -> onnx.ModelProto:
    """A graph from x (batch, 8) to y, with weights u (8, 32) and w (32, 32), the bias b and the table t (8, 32)."""
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
      g (float[batch, 8] x) => (float[batch, 32] y) {{ {nodes} }}""")
    random = np.random.default_rng(0)
    for node in model.graph.node:
        node.name = node.output[0]
    for name, shape in {"u": (8, 32), "w": (32, 32), "b": (32,), "t": (8, 32)}.items():
        values = random.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    (folder / "max").mkdir(parents=True)
    save_graph(model, folder / "max" / "model.onnx")
    rows = [{"x": random.standard_normal((1, 8)).astype(np.float32)} for _ in range(4)]
    config = QuantConfig.of_precision(precision, calibration_method="max", high_precision="fp32", keep_high=keep_high)
    return qdq_from_onnx(folder / "max" / "model.onnx", config, Calibration(rows, Axis(min=1, opt=4, max=4)))


def test_a_small_layer_does_not_keep_those_wide_whose_names_begin_with_its_own(tmp_path: Path) -> None:
    nodes = "linear = Gemm (x, u, b) linear_1 = Gemm (linear, w, b) y = Gemm (linear_1, w, b)"
    assert quantized_layers(quantized(tmp_path, nodes)) == {"linear_1": "Gemm", "y": "Gemm"}


def test_a_layer_to_keep_high_is_named_as_in_the_graph(tmp_path: Path) -> None:
    nodes = "linear = Gemm (x, u, b) linear_1 = Gemm (linear, w, b) y = Gemm (linear_1, w, b)"
    assert quantized_layers(quantized(tmp_path, nodes, keep_high=("^linear_1$",))) == {"y": "Gemm"}


def test_modelopt_does_not_ask_an_installed_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelopt.onnx.trt_utils.TRT_PYTHON_AVAILABLE", True)
    assert quantized_layers(quantized(tmp_path, "linear = Gemm (x, u, b) y = Gemm (linear, w, b)")) == {"y": "Gemm"}


def test_the_factor_of_a_bias_stays(tmp_path: Path) -> None:
    model = quantized(tmp_path, "linear = Gemm (x, u, b) y = Gemm <alpha = 2.0, beta = 0.5> (linear, w, b)")
    (gemm,) = [node for node in model.graph.node if node.name == "y"]
    found = {attribute.name: attribute.f for attribute in gemm.attribute}
    assert (found["alpha"], found["beta"]) == (2, pytest.approx(0.5))


@pytest.mark.parametrize(("precision", "largest"), [("int8", 127), ("fp8", 448)])
def test_one_scale_uses_the_whole_range_of_the_type(tmp_path: Path, precision: Precision, largest: int) -> None:
    model = quantized(tmp_path, "linear = Gemm (x, u, b) y = Gemm (linear, w, b)", precision)
    use_one_scale_a_tensor(model)
    quantize_weights(model)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    stored = onnx.numpy_helper.to_array(tensors["w_QuantizeLinear_Output"]).astype(np.float32)
    assert np.abs(stored).max() == largest


@pytest.mark.parametrize("external", [False, True], ids=["in the file", "beside it"])
def test_a_table_that_modelopt_does_not_see_makes_the_same_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    nodes = """zero = Constant <value_int = 0> () ids = Cast <to = 7> (x) first = Gather <axis = 1> (ids, zero)
        found = Gather (t, first) linear = Gemm (x, u, b) sum = Add (linear, found) y = Gemm (sum, w, b)"""
    monkeypatch.setattr("export.graphs.graph_file.EXTERNAL_DATA_BYTES", 0 if external else 1 << 30)
    graphs = []
    for least in (1 << 30, 1):
        monkeypatch.setattr("export.precision.lookup_tables.LARGE_BYTES", least)
        graphs.append(quantized(tmp_path / str(least), nodes).graph)
    seen, unseen = ({tensor.name: tensor for tensor in graph.initializer} for graph in graphs)
    assert [value.name for value in onnx.load(tmp_path / "1" / "max" / "model.onnx").graph.input] == ["x", "t"]
    assert seen == unseen
    assert list(graphs[0].node) == list(graphs[1].node)
    assert list(graphs[0].input) == list(graphs[1].input)

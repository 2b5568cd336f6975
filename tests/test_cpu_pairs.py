"""Q/DQ pairs for ONNX Runtime on a CPU: convolutions run in 8 bits, also behind a Relu and before an addition."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from export.precision.activation_ranges import with_ranges
from export.precision.cpu.pairs import pair_convolution_outputs, use_unsigned_activations
from export.precision.qdq import quantize_weights, with_high

STEP = np.float32(0.04)


def optimized(path: Path, folder: Path) -> onnx.GraphProto:
    """The graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx").graph


def executed(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The operators that ONNX Runtime runs, and y."""
    onnx.checker.check_model(model, full_check=True)
    path = folder / "model.onnx"
    onnx.save(model, path)
    operators = [node.op_type for node in optimized(path, folder).node]
    return operators, onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def pair(name: str) -> str:
    """The pair of a value: `<name>_q` between, `<name>_d` behind it."""
    return f"{name}_q = QuantizeLinear ({name}, s, z) {name}_d = DequantizeLinear ({name}_q, s, z)"


def quantized(nodes: str, weights: int = 1) -> onnx.ModelProto:
    """A graph from x to y (both 2, 8, 4, 4), with pairs of x and of the weights w0, w1, ..."""
    names = [f"w{number}" for number in range(weights)]
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
      g (float[2, 8, 4, 4] x) => (float[2, 8, 4, 4] y)
      <float least = {{-1}}, float low = {{0}}, float high = {{6}}, float s = {{{STEP}}}, int8 z = {{0}}> {{
        {" ".join(map(pair, ["x", *names]))} {nodes}
      }}""")
    random = np.random.default_rng(0)
    for node in model.graph.node:
        node.name = node.output[0]
    for name in names:
        weight = np.rint(random.standard_normal((8, 8, 1, 1)) * 5).astype(np.float32) * STEP
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight, name))
    return model


def served(model: onnx.ModelProto, folder: Path, x: np.ndarray) -> tuple[list[str], np.ndarray]:
    return executed(changed(model, quantize_weights, use_unsigned_activations), folder, x)


def changed(model: onnx.ModelProto, *changes: Callable[[onnx.ModelProto], None]) -> onnx.ModelProto:
    """A copy of a graph, changed."""
    copy = deepcopy(model)
    for change in changes:
        change(copy)
    return copy


def steps(shape: tuple[int, ...], most: int = 20) -> np.ndarray:
    return np.rint(np.random.default_rng(1).standard_normal(shape) * most).astype(np.float32) * STEP


@pytest.mark.parametrize("between", ["Relu (wide)", "Clip (wide, low, high)"], ids=["Relu", "ReLU6"])
def test_a_convolution_between_two_pairs_runs_in_integers_and_its_relu_gets_all_steps(
    tmp_path: Path, between: str
) -> None:
    model, x = quantized(f"wide = Conv (x_d, w0_d) r = {between} {pair('r')} y = Identity (r_d)"), steps((2, 8, 4, 4))
    weight = onnx.numpy_helper.to_array(model.graph.initializer[-1])
    operators, y = served(model, tmp_path, x)
    assert "QLinearConv" in operators
    exact = np.einsum("oi,nihw->nohw", weight[:, :, 0, 0], x).clip(0, 127 * STEP)
    assert np.abs(y - exact).max() <= STEP * 127 / 255 / 2 + 1e-5  # half a step of 255


@pytest.mark.parametrize(
    ("nodes", "lowest"),
    [
        ("a = Gelu (x)", -0.17),
        ('a = Gelu <approximate = "tanh"> (x)', -0.17),
        ("a = HardSwish (x)", -0.375),
        ("b = Sigmoid (x) a = Mul (x, b)", -0.2785),
        ("b = Sigmoid (x) a = Mul (b, x)", -0.2785),
        ("a = Sigmoid (x)", 0),
        ("b = Gelu (x) a = Transpose <perm = [0, 1, 3, 2]> (b)", -0.17),
    ],
)
def test_the_steps_behind_an_activation_function_cover_its_values_alone(
    tmp_path: Path, nodes: str, lowest: float
) -> None:
    x = np.linspace(-8, 127 * STEP, 256, dtype=np.float32).reshape(2, 8, 4, 4)
    _, wide = served(quantized(f"{nodes} y = Identity (a)"), tmp_path, x)
    _, y = served(quantized(f"{nodes} {pair('a')} y = Identity (a_d)"), tmp_path, x)
    step = (127 * STEP - lowest) / 255  # 127 * STEP is the largest value that the pair allows
    assert np.abs(y - wide).max() <= step * 0.51


def test_the_steps_stay_symmetric_if_values_are_smaller_than_the_least_of_the_function() -> None:
    model = quantized(f"a = HardSwish (x) {pair('a')} y = Identity (a_d)")
    (step,) = (tensor for tensor in model.graph.initializer if tensor.name == "s")
    step.CopyFrom(onnx.numpy_helper.from_array(np.array(0.001, np.float32), "s"))
    made = changed(model, use_unsigned_activations)
    zeros = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in made.graph.initializer}
    assert [zeros[node.input[2]] for node in made.graph.node if node.input[0] == "a"] == [128]


RANGES = {"first": 8.0, "second": 20.0, "third": 99.0}


def block(kept: str) -> onnx.ModelProto:
    """A residual block: `kept`, "first" or its Relu "r", is read by a product and by the addition."""
    return quantized(
        f"""first = Conv (x_d, w0_d) r = Relu (first) {pair(kept)} second = Conv ({kept}_d, w1_d)
        sum = Add (second, {kept}) {pair("sum")} third = Conv (sum_d, w2_d) y = Sigmoid (third)""",
        weights=3,
    )


@pytest.mark.parametrize("kept", ["r", "first"])
def test_convolutions_before_an_addition_or_another_operator_run_in_integers(tmp_path: Path, kept: str) -> None:
    model, x = block(kept), steps((2, 8, 4, 4), most=5)
    before, wide = served(model, tmp_path, x)
    assert before.count("QLinearConv") == 0
    pair_convolution_outputs(model, RANGES)
    after, y = served(model, tmp_path, x)
    assert after.count("QLinearConv") == 3
    assert np.abs(y - wide).mean() < 0.05


def test_a_convolution_before_a_clip_that_onnx_runtime_keeps_runs_in_integers(tmp_path: Path) -> None:
    model = quantized(f"first = Conv (x_d, w0_d) r = Clip (first, least, high) {pair('r')} y = Identity (r_d)")
    pair_convolution_outputs(model, RANGES)
    assert "QLinearConv" in served(model, tmp_path, steps((2, 8, 4, 4)))[0]


def test_a_pooling_behind_a_convolution_and_its_relu_runs_in_8_bits(tmp_path: Path) -> None:
    layer = "Relu ({0}) p{1} = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
    model = quantized(
        f"""first = Conv (x_d, w0_d) r = {layer.format("first", 0)} (r) {pair("p0")}
        second = Conv (p0_d, w1_d) t = {layer.format("second", 1)} (t) y = Identity (p1)""",
        weights=2,
    )
    x = steps((2, 8, 4, 4), most=5)
    _, wide = served(model, tmp_path, x)
    pair_convolution_outputs(model, {"first": 4.0, "second": 30.0})
    operators, y = served(model, tmp_path, x)
    assert operators.count("QLinearConv") == 2
    assert "Relu" not in operators
    assert operators.count("DequantizeLinear") == 1  # the last one
    assert np.abs(y - wide).mean() < 0.05


def test_the_scale_that_a_value_shares_with_its_maxima_is_changed_once() -> None:
    pooling = "p = MaxPool <kernel_shape = [1, 1]> (r)"
    model = quantized(f"first = Conv (x_d, w0_d) r = Relu (first) {pooling} {pair('p')} y = Identity (p_d)")
    pair_convolution_outputs(model, {"first": 9.0, "r": 8.0})
    halved = with_ranges(model, {"r": 4.0, "p": 4.0}, {"r": 8.0, "p": 8.0})
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in halved.graph.initializer}
    behind = {node.input[0]: scales[node.input[1]] for node in halved.graph.node if node.op_type == "QuantizeLinear"}
    assert behind["r"] == behind["p"] == STEP / 2


def test_a_convolution_that_keeps_the_high_precision_has_no_pair_behind_it() -> None:
    model = block("r")
    pair_convolution_outputs(model, RANGES)
    high = with_high(model, ["second"])
    assert [node.input[0] for node in high.graph.node if node.op_type == "Add"] == ["second"]
    assert [node.input[0] for node in high.graph.node if node.op_type == "QuantizeLinear"] == [
        *("x", "w0", "w2", "r", "sum", "third")
    ]


TURN = "Transpose <perm = [0, 1, 3, 2]>"


@pytest.mark.parametrize(
    "nodes",
    [
        f"first = Conv (x_d, w0_d) {pair('first')} y = {TURN} (first_d)",
        f"first = Conv (x_d, w0_d) r = Relu (first) {pair('r')} t = {TURN} (r_d) y = Neg (t)",
        "first = Conv (x_d, w0_d) n = Neg (x_d) y = Max (first, n)",
    ],
)
def test_no_pair_is_left_if_the_only_layer_keeps_the_high_precision(nodes: str) -> None:
    high = with_high(quantized(nodes), ["first"])
    assert not [node.name for node in high.graph.node if node.op_type.endswith("eLinear")]


def test_a_pair_that_another_layer_needs_stays() -> None:
    nodes = f"first = Conv (x_d, w0_d) {pair('first')} t = {TURN} (first_d) y = Conv (t, w1_d)"
    high = with_high(quantized(nodes, weights=2), ["first"])
    assert [node.input[0] for node in high.graph.node if node.op_type == "QuantizeLinear"] == ["w1", "first"]

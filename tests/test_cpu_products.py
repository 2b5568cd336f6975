"""Products for ONNX Runtime on a CPU: those with a bias run in integers as one operator, those of attention stay wide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.precision.cpu.pairs import use_unsigned_activations
from export.precision.cpu.products import batched_weights, merge_biases, separate_readers, with_wide_attention
from export.precision.qdq import quantize_weights, use_one_scale_a_tensor
from tests.test_cpu_pairs import STEP, changed, executed, pair, steps

INPUTS, OUTPUTS = 8, 6


def graph(nodes: str, *, shape: str = "2, 3, 8", transposed: bool = False) -> onnx.ModelProto:
    """A graph from x to y, with pairs of x and of the weight w; b is a bias."""
    axes = ", ".join(f"axis_{place}" for place in range(len(shape.split(","))))
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
      g (float[{shape}] x) => (float[{axes}] y)
      <float s = {{{STEP}}}, float least = {{-1}}, float low = {{0}}, float high = {{1}}, int8 z = {{0}}> {{ {pair("x")} {pair("w")} {nodes} }}""")
    for node in model.graph.node:
        node.name = node.output[0]
    random = np.random.default_rng(0)
    weight = np.rint(random.standard_normal((INPUTS, OUTPUTS)) * 20).astype(np.float32) * STEP
    tensors = {"w": weight.T if transposed else weight, "b": random.standard_normal(OUTPUTS).astype(np.float32)}
    tensors["column"] = random.standard_normal((3, 1)).astype(np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in tensors.items())
    return model


def wide(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without pairs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    source = {node.output[0]: node.input[0] for node in copy.graph.node if node.op_type.endswith("eLinear")}
    kept = [node for node in copy.graph.node if node.output[0] not in source]
    for node in kept:
        for place, name in enumerate(node.input):
            while name in source:
                name = source[name]
            node.input[place] = name
    del copy.graph.node[:]
    copy.graph.node.extend(kept)
    return copy


@pytest.mark.parametrize(
    ("nodes", "settings"),
    [
        ("p = MatMul (x_d, w_d) y = Add (p, b)", {}),
        ("p = MatMul (x_d, w_d) y = Add (b, p)", {}),
        ("p = MatMul (x_d, w_d) y = Add (p, b)", {"shape": "3, 8"}),
        ("p = MatMul (x_d, w_d) y = Add (p, b)", {"shape": "2, 2, 3, 8"}),
        ("p = MatMul (x_d, w_d) q = Add (p, b) y = Gelu (q)", {}),
        ("y = Gemm (x_d, w_d, b)", {"shape": "3, 8"}),
        ("y = Gemm <transB = 1> (x_d, w_d, b)", {"shape": "3, 8", "transposed": True}),
        ("p = Gemm (x_d, w_d, b) y = Gelu (p)", {"shape": "3, 8"}),
        ("p = Gemm (x_d, w_d, b) y = Sigmoid (p)", {"shape": "3, 8"}),
        *(
            (f"p = Gemm (x_d, w_d, b) r = {activation} {pair('r')} {last}", {"shape": "3, 8"})
            for activation in ("Relu (p)", "Clip (p, low)", "LeakyRelu (p)", "Tanh (p)")
            for last in ("y = Identity (r_d)", "y = Mul (r, r_d)")
        ),
    ],
)
def test_a_product_and_its_bias_run_in_integers(tmp_path: Path, nodes: str, settings: dict) -> None:
    model = graph(nodes, **settings)
    x = steps(tuple(map(int, settings.get("shape", "2, 3, 8").split(","))))
    made = changed(model, quantize_weights, use_unsigned_activations, merge_biases)
    operators, y = executed(made, tmp_path, x)
    assert "QGemm" in operators
    assert "Add" not in operators
    np.testing.assert_allclose(y, executed(wide(model), tmp_path, x)[1], rtol=0.02, atol=float(STEP) / 2 + 1e-3)


@pytest.mark.parametrize("product", ["Gemm (x_d, w_d, b)", "MatMul (x_d, w_d)"])
@pytest.mark.parametrize(
    "readers",
    [
        f"{pair('p')} y = Add (p, p_d)",
        f"{pair('p')} m = Neg (p) n = Neg (p_d) y = Max (m, n)",
        "r = Relu (p) y = Neg (r)",
        "r = Clip (p, low) y = Neg (r)",
        f"r = Clip (p, least, high) {pair('r')} y = Neg (r_d)",
        "r = LeakyRelu (p) y = Neg (r)",
        "y = Relu (p)",
    ],
)
def test_a_product_runs_in_integers_whatever_reads_it(tmp_path: Path, product: str, readers: str) -> None:
    model, x = graph(f"p = {product} {readers}", shape="3, 8"), steps((3, 8))
    made = changed(model, quantize_weights, use_unsigned_activations, merge_biases, separate_readers)
    operators, y = executed(made, tmp_path, x)
    assert {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul"} & set(operators), operators
    np.testing.assert_allclose(y, executed(wide(model), tmp_path, x)[1], rtol=0.02, atol=float(STEP) / 2 + 1e-3)


@pytest.mark.parametrize(
    ("nodes", "settings"),
    [
        ("p = MatMul (x_d, w_d) y = Add (p, column)", {}),  # not one value for each output
        ("p = MatMul (x_d, w_d) q = Add (p, b) r = Relu (p) y = Add (q, r)", {}),  # read without the bias too
        ("p = MatMul (x_d, w_d) y = Add (p, p)", {}),
        ("p = MatMul (x, w_d) y = Add (p, b)", {}),  # not in 8 bits
        ("y = Gemm <beta = 2.0> (x_d, w_d, b)", {"shape": "3, 8"}),
        ("y = Gemm <transA = 1> (x_d, w_d, b)", {"shape": "8, 3"}),
    ],
)
def test_other_sums_stay_as_they_are(nodes: str, settings: dict) -> None:
    model = changed(graph(nodes, **settings), quantize_weights)
    assert changed(model, merge_biases).graph.node == model.graph.node


def test_a_bias_too_large_for_the_steps_of_its_product_stays_wide() -> None:
    model = graph("y = Gemm (x_d, w_d, b)", shape="3, 8")
    model.graph.initializer[-2].CopyFrom(onnx.numpy_helper.from_array(np.full(OUTPUTS, 1e8, np.float32), "b"))
    quantize_weights(model)
    assert changed(model, merge_biases).graph.node == model.graph.node


def test_a_product_of_two_activations_reads_wide_values_and_one_of_weights_its_pair() -> None:
    attention = f"""k = MatMul (x_d, w_d) {pair("k")} t = Transpose <perm = [0, 2, 1]> (k_d)
        p = MatMul (k_d, t) {pair("p")} y = MatMul (p_d, k_d)"""
    made = {node.name: node for node in with_wide_attention(graph(attention)).graph.node}
    assert made["y"].input == ["p", "k"]
    assert made["p"].input[0] == "k"
    assert made["k"].input == ["x_d", "w_d"]
    assert "k_d" not in made


def test_weights_with_a_batch_axis_have_one_scale_and_their_product_runs_in_integers(tmp_path: Path) -> None:
    by_channel = "<axis = 1> (w, scales, zeros) w_d = DequantizeLinear <axis = 1> (w_q, scales, zeros)"
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
      g (float[1, 3, 8] x) => (float[2, 3, 6] y)
      <float s = {{{STEP}}}, int8 z = {{0}}> {{
        {pair("x")} w_q = QuantizeLinear {by_channel} y = MatMul (x_d, w_d)
      }}""")
    weight = np.random.default_rng(0).standard_normal((2, INPUTS, OUTPUTS)).astype(np.float32)
    weight[:, 2] = 0
    scales = np.abs(weight).max((0, 2)) / 127
    scales[2] = 1  # ModelOpt's scale of zeros
    for name, values in {"w": weight, "scales": scales, "zeros": np.zeros(INPUTS, np.int8)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    use_one_scale_a_tensor(model, batched_weights(model))
    x = steps((1, 3, 8))
    operators, y = executed(changed(model, quantize_weights, use_unsigned_activations), tmp_path, x)
    assert "MatMulIntegerToFloat" in operators
    np.testing.assert_allclose(y, x @ weight, atol=0.05)

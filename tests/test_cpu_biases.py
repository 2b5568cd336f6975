"""Scales of weights on a CPU: the bias of a channel whose weights are 0, or next to it, is added unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from export.precision.cpu.biases import fit_scales_to_biases
from export.precision.cpu.pairs import use_unsigned_activations
from export.precision.cpu.products import merge_biases
from export.precision.qdq import quantize_weights, use_one_scale_a_tensor
from tests.test_cpu_pairs import changed, executed, pair, steps
from tests.test_cpu_products import wide

CHANNELS = 6


def graph(nodes: str, *, shape: str, weights: tuple[int, ...], axis: int) -> onnx.ModelProto:
    """A graph from x to y. x has a pair, and the weight w has a pair with a scale for each channel."""
    axes = ", ".join(f"axis_{place}" for place in range(len(shape.split(","))))
    by_channel = f"<axis = {axis}> (w, scales, zeros) w_d = DequantizeLinear <axis = {axis}> (w_q, scales, zeros)"
    model = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 20]>
      g (float[{shape}] x) => (float[{axes}] y)
      <float s = {{0.04}}, int8 z = {{0}}> {{ {pair("x")} w_q = QuantizeLinear {by_channel} {nodes} }}""")
    weight = np.random.default_rng(0).standard_normal((CHANNELS, *weights)).astype(np.float32)
    weight[:3] *= np.array([0, 1e-12, 1e-30], np.float32).reshape(-1, *[1] * len(weights))
    largest = np.abs(weight).max(axis=tuple(range(1, weight.ndim)))
    tensors: dict[str, np.ndarray] = {
        "w": np.moveaxis(weight, 0, axis),
        "b": np.array([0.5, -0.5, 0.5, 1, -1e7, 0], np.float32),
        "scales": np.where(largest > 0, largest / 127, 1).astype(np.float32),
        "zeros": np.zeros(CHANNELS, np.int8),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in tensors.items())
    for node in model.graph.node:
        node.name = node.output[0]
    return model


@pytest.mark.parametrize("one_scale", [False, True])
@pytest.mark.parametrize(
    ("nodes", "settings"),
    [
        (f"p = Conv (x_d, w_d, b) {pair('p')} y = Identity (p_d)", {"shape": "2, 8, 4, 4", "weights": (8, 1, 1)}),
        ("y = Gemm <transB = 1> (x_d, w_d, b)", {"shape": "3, 8", "weights": (8,)}),
        (f"p = Gemm <transB = 1> (x_d, w_d, b) {pair('p')} y = Identity (p_d)", {"shape": "3, 8", "weights": (8,)}),
        ("p = MatMul (x_d, w_d) y = Add (p, b)", {"shape": "2, 3, 8", "weights": (8,), "axis": 1}),
    ],
    ids=["convolution", "Gemm", "Gemm with a pair", "MatMul"],
)
def test_a_channel_with_weights_next_to_0_keeps_its_bias(
    tmp_path: Path, nodes: str, settings: dict, one_scale: bool
) -> None:
    model = graph(nodes, **{"axis": 0, **settings})
    if one_scale:  # for all channels, so all are next to 0
        for tensor in model.graph.initializer:
            if tensor.name in ("w", "scales"):
                values = onnx.numpy_helper.to_array(tensor) * np.float32(1e-9)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        use_one_scale_a_tensor(model)
    x = steps(tuple(map(int, settings["shape"].split(","))))
    made = changed(model, fit_scales_to_biases, quantize_weights, use_unsigned_activations, merge_biases)
    operators, y = executed(made, tmp_path, x)
    assert {"QLinearConv", "QGemm"} & set(operators), operators
    exact = executed(wide(model), tmp_path, x)[1]
    if "p_d" in nodes:
        exact = exact.clip(-128 * 0.04, 127 * 0.04)
    np.testing.assert_allclose(y, exact, rtol=1e-3, atol=0.1)

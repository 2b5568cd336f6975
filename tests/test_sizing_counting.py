"""Parameters and FLOPs are equal from a Transformer's sizes, a traced module and a graph's shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.helper import make_node
from torch import nn

from deepseek.sizing import TrainingSetup, TransformerSize, presets, training_memory
from deepseek.sizing.devices import load_devices
from deepseek.sizing.memory import host_needs
from deepseek.sizing.model.counting import flops
from deepseek.sizing.model.onnx_graph import OnnxModel
from deepseek.sizing.model.traced import TracedModel, mean_square
from deepseek.sizing.parallel import training_layouts
from deepseek.sizing.plan import Request, make_plan, training_variants
from deepseek.sizing.training_step import saved_bytes
from deepseek.spec import InputError
from deepseek.transformer import Transformer
from tests.bench.training_memory import peak_of
from tests.test_sizing import saved
from tests.test_sizing_memory import config


def graph(path: Path, nodes: list[Any], weights: dict[str, tuple[int, ...]], shape: list[Any]) -> Path:
    """An ONNX file with an input x, an output y and weights of zeros."""
    kind = onnx.TensorProto.FLOAT
    held = [onnx.numpy_helper.from_array(np.zeros(dims, np.float32), name) for name, dims in weights.items()]
    x, y = onnx.helper.make_tensor_value_info("x", kind, shape), onnx.helper.make_tensor_value_info("y", kind, None)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [x], [y], held)), path)
    return path


def test_well_known_shapes_have_their_published_sizes() -> None:
    sizes = {name: size.parameters for name, size in presets().items()}
    assert sizes["bert-base"] == pytest.approx(110e6, rel=0.02)  # without pooler and segments
    assert sizes["bert-large"] == pytest.approx(336e6, rel=0.02)
    assert sizes["gpt2-xl"] == pytest.approx(1.56e9, rel=0.01)
    assert sizes["gpt3-175b"] == pytest.approx(175e9, rel=0.01)


def test_a_tied_head_adds_flops_but_no_parameters_and_an_untied_one_both() -> None:
    none, tied, untied = (TransformerSize(config=config(), head=head) for head in ("none", "tied", "untied"))
    assert none.parameters == tied.parameters == untied.parameters - 48 * 100
    logits = 2 * 2 * 16 * 48 * 100
    assert flops(tied.ops(2, 16)) == flops(untied.ops(2, 16)) == flops(none.ops(2, 16)) + logits


def test_a_trace_counts_like_the_sizes_and_needs_no_weights() -> None:
    size = TransformerSize(config=config(attention_dropout=0.0))
    with torch.device("meta"):
        module = Transformer(size.config)
    traced = TracedModel(module, lambda batch, length: (torch.ones(batch, length, dtype=torch.int64),))
    assert (traced.parameters, traced.product_parameters) == (size.parameters, size.product_parameters)
    for batch, length in ((1, 8), (3, 20)):
        assert flops(traced.ops(batch, length)) == flops(size.ops(batch, length))
    setup = TrainingSetup(batch=3, length=20, platform="cpu")
    assert traced.saved(setup).kept == saved_bytes(size, setup).kept


SHARED = nn.Linear(64, 64, bias=False)
CNN = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 64), SHARED, SHARED)
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)  # without its fast path


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        (CNN, (2, 3, 6, 6), 2 * 2 * (8 * 36 * 27 + 8 * 36 * 64 + 2 * 64 * 64)),
        (ENCODER, (1, 5, 32), 2 * (2 * 5 * (4 * 32 * 32 + 2 * 32 * 64) + 4 * 5 * 5 * 32)),
        (nn.LSTM(3, 4, batch_first=True), (2, 5, 3), 2 * 2 * 5 * 16 * (3 + 4)),
    ],
    ids=["shared", "encoder", "lstm"],
)
def test_a_trace_counts_other_layers(module: nn.Module, shape: tuple[int, ...], expected: int) -> None:
    traced = TracedModel(module, lambda batch, length: (torch.empty(shape),))
    assert flops(traced.ops(shape[0], 5)) == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("steps", [1, 2], ids=["one-batch", "accumulated"])
def test_the_peak_of_a_traced_step_equals_that_of_a_real_one(precision: Any, steps: int) -> None:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    module = nn.Sequential(*layers, nn.Linear(512, 50))
    traced = TracedModel(module, lambda batch, length: (torch.zeros(batch, 3, 16, 16),))
    setup = TrainingSetup(batch=16, length=1, precision=precision, accumulation_steps=steps, platform="cpu")
    planned = training_memory(traced, setup)
    real = peak_of(lambda: mean_square(module.train()(torch.zeros(16, 3, 16, 16))), module.parameters(), setup)
    assert planned.peak_bytes - planned.context_bytes == pytest.approx(real, rel=0.03)


class Experts(nn.Module):
    """Each row goes through one of four products, as in a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 16, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ends = torch.full((4,), len(x), dtype=torch.int32)
        return nn.functional.grouped_mm(x.to(self.weight.dtype), self.weight, offs=ends)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_experts_are_counted_in_any_type(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    traced = TracedModel(Experts().to(dtype), lambda batch, length: (torch.empty(batch, 16),))
    assert flops(traced.ops(8, 1)) == 2 * 8 * 16 * 32  # a row reads one expert
    assert sum(op.weights for op in traced.ops(2, 1)) == 2 * 16 * 32
    assert training_memory(traced, TrainingSetup(batch=8, length=1)).activation_bytes > 0
    assert not caplog.records


def test_training_is_planned_with_fp32_weights_also_of_a_module_with_16_bits() -> None:
    def planned(dtype: torch.dtype, precision: Any) -> float:
        module = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8)).to(dtype)
        traced = TracedModel(module, lambda batch, length: (torch.empty(batch, 8, dtype=dtype),))
        return training_memory(traced, TrainingSetup(batch=16, length=1, precision=precision)).peak_bytes

    for precision in ("fp32", "bf16"):
        assert planned(torch.bfloat16, precision) == planned(torch.float32, precision)


def test_frozen_parameters_get_no_gradient_and_no_moments() -> None:
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8))
    module[0].requires_grad_(False)
    traced = TracedModel(module, lambda batch, length: (torch.zeros(batch, 64),))
    setup = TrainingSetup(batch=4, length=1, platform="cpu")
    planned, trained = training_memory(traced, setup), 256 * 8 + 8
    assert (planned.gradient_bytes, planned.optimizer_bytes) == (4 * trained, 8 * trained)
    real = peak_of(lambda: mean_square(module.train()(torch.zeros(4, 64))), module.parameters(), setup)
    assert planned.peak_bytes - planned.context_bytes == pytest.approx(real, rel=0.03)
    assert host_needs(traced, planned).checkpoint_bytes == 4 * traced.parameters + 8 * trained
    ways = {layout.way: layout for layout in training_layouts(traced, setup, load_devices()["t4"])}
    assert ways["data"].sent_bytes == 4 * trained  # on two devices
    with pytest.raises(InputError, match="no parameter requires a gradient"):
        training_memory(TracedModel(module.requires_grad_(False), traced.inputs), setup)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_module_that_checkpoints_is_planned_like_its_sizes(precision: Any) -> None:
    size = TransformerSize(config=config(num_layers=4, attention_dropout=0.0))
    module = Transformer(size.config)
    module.gradient_checkpointing = True
    traced = TracedModel(module, lambda batch, length: (torch.ones(batch, length, dtype=torch.int64),))
    setup = TrainingSetup(batch=8, length=32, platform="cpu", precision=precision, checkpointing=True)
    one, other = training_memory(traced, setup), training_memory(size, setup)
    assert one.activation_bytes == other.activation_bytes
    assert one.peak_bytes == pytest.approx(other.peak_bytes, rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_traced_module_checkpoints_what_it_does_itself(checkpointing: bool) -> None:
    traced = TracedModel(nn.Linear(8, 8), lambda batch, length: (torch.empty(batch, 8),))
    found = training_variants(traced, TrainingSetup(batch=4, length=1, checkpointing=checkpointing))
    end = ", checkpointing" if checkpointing else ""
    assert list(found) == [f"fp32{end}", f"bf16{end}"]


def test_a_plan_traces_each_size_once_for_all_devices_and_no_batch_far_beyond_the_memory() -> None:
    traced_sizes: list[int] = []

    def inputs(batch: int, length: int) -> tuple[torch.Tensor]:
        traced_sizes.append(batch)
        return (torch.empty(batch, 1024),)

    t4 = load_devices()["t4"].model_copy(update={"memory_gib": 1.0})  # the process takes 0.6 GiB
    model, request = TracedModel(nn.Linear(1024, 1024), inputs), Request(training=TrainingSetup(batch=1, length=1))
    one = make_plan(model, request, {"a": t4})
    fits, traces = one.devices["a"].largest_training_batch, len(traced_sizes)
    assert max(traced_sizes) <= 2 * fits
    make_plan(model, request, {"a": t4, "b": t4, "c": t4})
    assert len(traced_sizes) == traces


def test_a_forward_that_depends_on_values_is_a_one_line_error() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if bool(x.sum() > 0) else -x

    traced = TracedModel(Asks(), lambda batch, length: (torch.empty(batch, 4),))
    with pytest.raises(InputError, match="Asks: forward cannot be traced at batch 2, length 1"):
        traced.ops(2, 1)


def test_a_cnns_onnx_file_is_counted(tmp_path: Path) -> None:
    nodes = [
        make_node("Conv", ["x", "k"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1], group=1),
        make_node("Relu", ["a"], ["b"]),
        make_node("Conv", ["b", "d"], ["c"], group=16),
        make_node("GlobalAveragePool", ["c"], ["p"]),
        make_node("Flatten", ["p"], ["f"]),
        make_node("Gemm", ["f", "w"], ["y"], transB=1),
    ]
    weights = {"k": (16, 3, 3, 3), "d": (16, 1, 3, 3), "w": (10, 16)}
    model = OnnxModel(graph(tmp_path / "cnn.onnx", nodes, weights, ["batch", 3, 32, 32]))
    assert model.parameters == model.product_parameters == 16 * 27 + 16 * 9 + 160
    assert flops(model.ops(4, 1)) == 4 * 2 * (16 * 16 * 16 * 27 + 16 * 14 * 14 * 9 + 160)
    assert model.open_axes == []


@pytest.mark.parametrize(("layer", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_a_recurrent_layer_is_counted_and_a_product_of_unknown_shape_named(
    layer: str, gates: int, tmp_path: Path
) -> None:
    nodes = [
        make_node("Shape", ["x"], ["s"]),
        make_node("ReduceMax", ["s", "zero"], ["m"], keepdims=1),  # shape inference does not follow values this far
        make_node("Concat", ["m", "m", "m"], ["t"], axis=0),
        make_node("Reshape", ["x", "t"], ["a"]),
        make_node(layer, ["x", "w", "r"], ["", "h"], hidden_size=4),
        make_node("MatMul", ["a", "k"], ["b"]),
        make_node("Add", ["b", "h"], ["y"]),
    ]
    weights = {"w": (1, gates * 4, 3), "r": (1, gates * 4, 4), "k": (3, 4)}
    model = OnnxModel(graph(tmp_path / "r.onnx", nodes, weights, [5, 2, 3]))
    assert flops(model.ops(5, 1)) == 5 * 2 * 2 * gates * 4 * (3 + 4)
    assert model.uncounted == ["MatMul"]


def test_a_recurrent_layer_whose_weights_the_graph_puts_together_is_counted(tmp_path: Path) -> None:
    """As torch exports layers of more than 8192 weights."""
    nodes = [make_node("Constant", [], ["first"], value_ints=[0])]
    for name in ("w", "r"):
        halves = [f"{name}-low", f"{name}-high"]
        nodes += [
            make_node("Split", [name], halves, axis=0, num_outputs=2),
            make_node("Concat", halves[::-1], [f"{name}-turned"], axis=0),
            make_node("Unsqueeze", [f"{name}-turned", "first"], [f"{name}-whole"]),
        ]
    nodes.append(make_node("LSTM", ["x", "w-whole", "r-whole"], ["", "y"], hidden_size=4))
    model = OnnxModel(graph(tmp_path / "r.onnx", nodes, {"w": (16, 3), "r": (16, 4)}, [5, 2, 3]))
    assert [op.kind for op in model.ops(5, 1)] == ["product"]
    assert flops(model.ops(5, 1)) == 5 * 2 * 2 * 16 * (3 + 4)


def test_operators_that_are_not_counted_are_named(tmp_path: Path) -> None:
    nodes = [
        make_node("Einsum", ["x", "x"], ["a"], equation="bi,bj->bij"),
        make_node("FusedMatMul", ["x", "x"], ["y"], domain="com.microsoft"),
    ]
    assert OnnxModel(graph(tmp_path / "e.onnx", nodes, {}, ["batch", 3])).uncounted == ["Einsum", "FusedMatMul"]


def test_a_local_function_of_the_graph_is_counted_by_its_content(tmp_path: Path) -> None:
    dense, product = make_node("Dense", ["x", "w"], ["y"], domain="own"), make_node("MatMul", ["a", "b"], ["c"])
    path = graph(tmp_path / "d.onnx", [dense], {"w": (8, 16)}, ["batch", 8])
    model = onnx.load(path)
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("own", 1)]
    model.functions.append(onnx.helper.make_function("own", "Dense", ["a", "b"], ["c"], [product], opsets[:1]))
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    onnx.save(model, path)
    assert flops(OnnxModel(path).ops(4, 1)) == 2 * 4 * 8 * 16


def test_the_values_of_large_weights_are_not_kept(tmp_path: Path) -> None:
    """A plan infers the shapes a hundred times, each time on copies of the graph."""
    nodes = [make_node("MatMul", ["x", "w"], ["y"])]
    path = graph(tmp_path / "m.onnx", nodes, {"w": (256, 1024)}, ["batch", 256])
    model = OnnxModel(path)
    assert (model.parameters, flops(model.ops(2, 1))) == (256 * 1024, 2 * 2 * 256 * 1024)
    assert path.stat().st_size > 2**20 > 1000 * model.proto.ByteSize()


def test_an_exported_graph_counts_like_its_module_also_in_int8(built: Path) -> None:
    for name in ("text", "image"):
        fp32, int8 = (OnnxModel(built / "build" / name / kind / "model.onnx") for kind in ("fp32", "int8"))
        assert flops(fp32.ops(2, 8)) == flops(int8.ops(2, 8)) > 0
        assert fp32.product_parameters == int8.product_parameters
        assert sum(op.weights for op in int8.ops(2, 8)) == sum(op.weights for op in fp32.ops(2, 8)) > 0


def test_an_open_axis_takes_the_size_it_is_given(tmp_path: Path) -> None:
    path = graph(tmp_path / "m.onnx", [make_node("MatMul", ["x", "w"], ["y"])], {"w": (6, 2)}, ["batch", "frames", 6])
    assert flops(OnnxModel(path).ops(1, 7)) == 2 * 7 * 12
    assert flops(OnnxModel(path, axes={"frames": 100}).ops(1, 7)) == 2 * 100 * 12
    with pytest.raises(InputError, match=r"m.onnx: axis: seen 'batch'; allowed: frames "):
        OnnxModel(path, axes={"batch": 100})


@pytest.mark.parametrize(
    ("text", "products"),
    [
        ("(float[2, n, 4] state, float[n, 4] x, float[4, 8] w) => (float[2, n, 8] y) "
         "{ a = Add(state, x) y = MatMul(a, w) }", 2 * 3 * 4 * 8),
        ("(float[1, 4] x, float[4, 8] w) => (float[1, 8] y) { y = MatMul(x, w) }", 3 * 4 * 8),
    ],
    ids=["open", "one batch size"],
)  # fmt: skip
def test_a_fixed_first_dimension_is_the_batch_only_in_a_graph_of_one_batch_size(
    text: str, products: int, tmp_path: Path
) -> None:
    model = OnnxModel(saved(tmp_path / "m.onnx", text))
    assert flops(model.ops(3, 5)) == 2 * products
    assert model.open_axes == []

"""Quantization: precision in the graph, calibration on real data, and no silent fallback."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

from deepseek.quantization import QuantConfig
from deepseek.spec import DeploymentSpec, GateFailed, InputError, build_dir
from export.artifact import refusal
from export.cache import STAGE_KEYS
from export.precision.ptq import _forget_dims
from export.precision.qdq import found_precision, share_equal_weights
from export.precision.sensitivity import output_error
from export.rows import load_rows, save_rows
from export.runtimes.batching import outputs_of
from export.runtimes.onnxruntime_predictor import onnx_predictor
from export.stages import quantize
from export.stages.quantize import prove, quantize_model
from export.stages.to_onnx import export_model
from tests.conftest import Refused, RunHere
from tests.test_cpu_pairs import optimized
from tests.test_sensitivity import small

pytestmark = pytest.mark.server
TEXT = DeploymentSpec.load("tests/models/text")


@pytest.fixture
def copied(built: Path, own_build: Path) -> Path:
    """A `build/` folder of the model `text` that the test may change."""
    shutil.copytree(built / "build" / "text", own_build / "text")
    return own_build


def settings(folder: Path, **changed: Any) -> QuantConfig:
    """Settings for a quick run on the model's own samples."""
    data = folder / "text" / "calibration.npz"
    return QuantConfig(**{"calibration_data": data, "calibration_method": "max", "high_precision": "fp32", **changed})


def layers(path: Path) -> list[str]:
    """Names of the products with weights."""
    return [node.name for node in onnx.load(path).graph.node if node.op_type == "Gemm"]


def test_an_8_bit_graph_is_cached_for_one_fingerprint(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[str | None] = []
    monkeypatch.setenv("DEEPSEEK_CACHE", str(copied / "cache"))
    monkeypatch.setenv(STAGE_KEYS, '{"": "k"}')
    monkeypatch.setattr(quantize, "put_in_place", lambda key, *_: keys.append(key))
    for told in ("a", "a", "b", None):
        source: Any = SimpleNamespace(data_digest=lambda told=told: told)
        quantize_model(TEXT, settings(copied), source)
    assert keys[0] == keys[1] != keys[2]
    assert keys[3] is None


def test_each_graph_has_the_precision_that_was_asked_for(built: Path) -> None:
    for model, layers in (("image", 3), ("text", 4)):
        fp16 = found_precision(built / "build" / model / "fp16" / "model.onnx")
        assert fp16["compute_operators"] == {"fp16": layers}
        int8 = found_precision(built / "build" / model / "int8" / "model.onnx")
        wide = 2 if model == "text" else 0  # the products of attention, on a CPU
        assert int8["compute_operators"]["int8"] >= layers - wide - 1
        assert int8["weight_bytes"]["int8"] > 1000


def test_inputs_and_outputs_keep_their_types(built: Path) -> None:
    def types(precision: str) -> list[tuple[str, int]]:
        graph = onnx.load(built / "build" / "text" / precision / "model.onnx").graph
        return [(value.name, value.type.tensor_type.elem_type) for value in [*graph.input, *graph.output]]

    assert types("fp32") == types("fp16") == types("int8")


def test_the_source_graph_is_unchanged(built: Path) -> None:
    for model in ("image", "text"):
        source = built / "build" / model / "fp32" / "model.onnx"
        manifest = json.loads((built / "build" / model / "int8" / "manifest.json").read_text())
        assert hashlib.sha256(source.read_bytes()).hexdigest() == manifest["sources"]["onnx"]


def test_a_graph_that_stayed_fp32_fails_the_proof(built: Path) -> None:
    found = found_precision(built / "build" / "image" / "fp32" / "model.onnx")
    assert found["compute_operators"] == {"fp32": 3}
    for config, why in ((QuantConfig(), "too small"), (QuantConfig(weight_bits=16, activation_bits=16), "too large")):
        message = rf"no MatMul, Gemm or Conv of the graph runs in \w+ \(found: 3 in fp32\); the layers may \w+.* {why}"
        with pytest.raises(GateFailed, match=message):
            prove(config, found)
    with pytest.raises(GateFailed, match="the graph has no MatMul, Gemm or Conv to run in int8"):  # only an LSTM
        prove(QuantConfig(), {"compute_operators": {}})


def test_a_pattern_is_not_a_prefix(copied: Path) -> None:
    """ModelOpt matches prefixes: node_MatMul_5 would also keep node_MatMul_54 high."""
    with pytest.raises(InputError, match=r"keep_high: 'nosuch' matches no node; names are for example"):
        quantize_model(TEXT, settings(copied, keep_high=("nosuch",)))
    nodes = sorted(layers(copied / "text" / "int8" / "model.onnx"))
    result = quantize_model(TEXT, settings(copied, keep_high=(f"^{nodes[0]}$",)))
    assert result["found"]["compute_operators"] == {"int8": 1, "fp32": 3}


def test_one_scale_per_tensor_shows_in_the_graph_and_in_the_outputs(copied: Path) -> None:
    rows = load_rows(copied / "text" / "evaluation.npz")
    outputs = {}
    for per_channel, name in ((True, "per_channel"), (False, "per_tensor")):
        result = quantize_model(TEXT, settings(copied, per_channel=per_channel))
        assert result["found"]["weight_scales"] == {name: 2}
        assert result["settings"]["per_channel"] == per_channel
        path = copied / "text" / "int8" / "model.onnx"
        outputs[name] = outputs_of(TEXT, onnx_predictor(TEXT, path, "onnxruntime"), rows)
    reference = outputs_of(TEXT, onnx_predictor(TEXT, copied / "text" / "fp32" / "model.onnx", "onnxruntime"), rows)
    errors = [output_error(each, reference) for each in outputs.values()]
    assert errors[0] != errors[1]
    assert max(errors) < 0.1


@pytest.mark.parametrize("bits", [16, 32])
def test_weight_only_stores_weights_at_8_bits_and_leaves_activations(copied: Path, bits: int) -> None:
    result = quantize_model(TEXT, settings(copied, activation_bits=bits, high_precision=f"fp{bits}"))
    assert result["found"]["compute_operators"] == {"int8_weights": 2, f"fp{bits}": 2}
    path = copied / "text" / "int8" / "model.onnx"
    assert not any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
    rows = load_rows(copied / "text" / "evaluation.npz")
    both = (
        outputs_of(TEXT, onnx_predictor(TEXT, copied / "text" / name / "model.onnx", "onnxruntime"), rows)
        for name in ("int8", "fp32")
    )
    assert 0 < output_error(*both) < 0.02


@pytest.mark.parametrize("high", ["fp16", "fp32"])
def test_both_methods_are_tried_and_the_curve_ends_at_the_final_graph(copied: Path, high: str) -> None:
    report = quantize_model(TEXT, settings(copied, calibration_method="auto", high_precision=high))["calibration"]
    assert report["errors"].keys() == {"max", "entropy"}
    assert report["method"] == min(report["errors"], key=report["errors"].__getitem__)
    assert [point["samples"] for point in report["curve"]] == [8, 16, 32]
    assert report["curve"][-1]["error"] == pytest.approx(report["errors"][report["method"]], rel=1e-3)
    assert len({point["error"] for point in report["curve"]}) > 1


def test_a_report_of_an_earlier_graph_is_removed(copied: Path) -> None:
    (copied / "text" / "fp16" / "calibration.json").write_text('{"method": "entropy"}')
    made = quantize_model(TEXT, QuantConfig.of_precision("fp16"))
    assert "calibration" not in made
    assert not (copied / "text" / "fp16" / "calibration.json").exists()


def test_an_opset_too_old_for_qdq_is_one_line(copied: Path) -> None:
    path = copied / "text" / "fp32" / "model.onnx"
    model = onnx.load(path)
    model.opset_import[0].version = 17
    onnx.save(model, path)
    with pytest.raises(InputError, match="opset 17; int8 needs 19 or newer, for Q/DQ and fp16 scales: export it again"):
        quantize_model(TEXT, settings(copied))


@pytest.mark.parametrize("batch", [1, 4])
def test_a_graph_of_one_batch_size_is_calibrated_with_it(tmp_path: Path, own_build: Path, batch: int) -> None:
    """ModelOpt skips products with a side of 1, which are all products with a batch of 1."""
    source = small(tmp_path, "return self.second(self.first(x).relu())", batch=(batch, batch))
    export_model(source)
    data = build_dir("small") / "calibration.npz"
    config = QuantConfig(calibration_data=data, calibration_method="max", high_precision="fp32")
    assert quantize_model(source.spec, config)["found"]["compute_operators"] == {"int8": 2}


def test_samples_without_a_range_refuse_a_candidate_but_not_the_build(
    built: Path, own_build: Path, no_children: None, run_here: RunHere
) -> None:
    shutil.copytree(built / "build" / "image", own_build / "image")
    path = own_build / "image" / "calibration.npz"
    rows = load_rows(path)
    rows[0]["pixels"][0, 0, 0, 0] = -np.inf
    save_rows(path, rows)
    run = run_here("quantize", "--models", "tests/models", "--model", "image", "--precision", "int8", "--candidate")
    assert run.returncode == 0, run.stderr
    reason = "activation 'pixels' is NaN or Inf on a calibration sample, so it has no range"
    assert f"int8 cannot be made; the build continues without it: {reason}" in run.stdout
    assert refusal(own_build / "image" / "int8" / "model.onnx")


@pytest.mark.parametrize("bits", [16, 8])
def test_missing_values_that_forward_replaces_do_not_refuse_a_candidate(
    tmp_path: Path, own_build: Path, bits: int
) -> None:
    source = small(tmp_path, "return self.second(self.first(torch.where(x.isnan(), x.new_ones(()), x)).relu())")
    export_model(source)
    data = build_dir("small") / "calibration.npz"
    rows = load_rows(data)
    for row in rows:
        row["x"][0, 0] = np.nan
    save_rows(data, rows)
    config = QuantConfig(weight_bits=bits, activation_bits=bits, calibration_data=data, high_precision="fp32")
    assert sum(quantize_model(source.spec, config)["found"]["compute_operators"].values()) == 2


def test_a_truncated_onnx_file_is_one_line_and_exit_2(copied: Path, no_children: None, refused: Refused) -> None:
    path = copied / "text" / "fp32" / "model.onnx"
    path.write_bytes(path.read_bytes()[:20000])
    before = (copied / "text" / "fp16" / "model.onnx").read_bytes()
    said = refused("quantize", "--models", "tests/models", "--model", "text", "--precision", "fp16")
    assert "not a valid ONNX file" in said
    assert (copied / "text" / "fp16" / "model.onnx").read_bytes() == before


def test_an_infinite_drop_is_null_in_the_report(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = onnx.load(copied / "text" / "int8" / "model.onnx")
    monkeypatch.setattr(quantize, "to_8_bits", lambda *_: (graph, {"sensitivity": {"drop": np.inf}}))
    quantize_model(TEXT, settings(copied))
    written = (copied / "text" / "int8" / "sensitivity.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail) == {"drop": None}


@pytest.mark.parametrize("model", ["text", "image"])
def test_every_int8_product_runs_in_integers_in_onnx_runtime(model: str, built: Path, tmp_path: Path) -> None:
    graph = optimized(built / "build" / model / "int8" / "model.onnx", tmp_path)
    constants = {tensor.name for tensor in graph.initializer}
    dequantized = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    assert dequantized == [], "weights dequantized at every call"
    assert {"QGemm", "QLinearConv"} & {node.op_type for node in graph.node}


def test_dimension_names_that_modelopt_adds_are_removed() -> None:
    value = onnx.helper.make_tensor_value_info("half", onnx.TensorProto.FLOAT, ["batch", "unk", 8])
    node = onnx.helper.make_node("If", ["x"], ["y"], then_branch=onnx.helper.make_graph([], "then", [], [value]))
    graph = onnx.helper.make_graph([node], "graph", [], [], value_info=[value])
    _forget_dims(graph, {"batch"})
    for left in (graph.value_info[0], graph.node[0].attribute[0].g.output[0]):
        assert [dim.dim_param or dim.dim_value for dim in left.type.tensor_type.shape.dim] == ["batch", 0, 8]


def test_equal_weights_are_stored_once() -> None:
    weight = np.arange(256, dtype=np.float32).reshape(16, 16)
    values: dict[str, np.ndarray] = {
        "first": weight,
        "same": weight,
        "half": weight.astype(np.float16),
        "turned": weight.T.copy(),
    }
    tensors = [onnx.numpy_helper.from_array(value, name) for name, value in values.items()]
    inner = onnx.helper.make_node("MatMul", ["x", "same"], ["y"])
    branch = onnx.helper.make_graph([inner], "branch", [], [onnx.helper.make_tensor_value_info("y", 1, None)])
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "first"], ["a"]),
        onnx.helper.make_node("If", ["which"], ["b"], then_branch=branch, else_branch=branch),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "graph", [], [], tensors))
    share_equal_weights(model)
    assert {tensor.name for tensor in model.graph.initializer} == {"first", "half", "turned"}
    assert [attribute.g.node[0].input[1] for attribute in model.graph.node[1].attribute] == ["first", "first"]

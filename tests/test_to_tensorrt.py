"""The graphs through a real TensorRT parser and builder (TensorRT for RTX: ahead of time, no GPU), and their layers."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Precision, TensorrtSpec
from export.runtimes import engine_layers
from export.runtimes.engine_layers import compute_layers, described, found_layers
from export.runtimes.onnxruntime_predictor import onnx_predictor
from export.runtimes.tensorrt_engine import engine_from_onnx, prove, tensorrt_module
from export.runtimes.tensorrt_predictor import tensorrt_predictor
from export.stages.to_tensorrt import build_engine
from tests.conftest import run_module
from tests.stand_ins import install_tensorrt

trt = pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize(("model", "precision"), [("image", "fp16"), ("text", "int8")])
def test_a_graph_builds_in_the_precision_and_with_the_options_asked_for(
    typed: Path, tmp_path: Path, model: str, precision: str
) -> None:
    shutil.copytree(typed / model, tmp_path / model)
    shutil.copytree(f"tests/models/{model}", tmp_path / "models" / model)
    with (tmp_path / "models" / model / "deploy.toml").open("a") as file:
        file.write("[tensorrt]\noptimization_level = 1\nworkspace_mib = 64\n")
    which = ("--models", str(tmp_path / "models"), "--model", model)
    flags = (*which, "--precision", precision, "--target", "tensorrt_rtx")
    run = run_module("cli", "to-tensorrt", *flags, "--json", DEEPSEEK_BUILD=str(tmp_path))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["found"]["compute_layers"].get(precision, 0) >= 2
    manifest = json.loads((tmp_path / model / precision / "tensorrt_rtx" / "manifest.json").read_text())
    assert manifest["target"] == "tensorrt_rtx"
    assert manifest["size_bytes"] == (tmp_path / model / precision / "tensorrt_rtx" / "model.plan").stat().st_size
    assert (manifest["settings"]["optimization_level"], manifest["settings"]["workspace_mib"]) == (1, 64)
    assert manifest["build_s"] > 0
    assert manifest["found"]["weight_bytes"] > 0


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_fp32_graph_named_as_another_precision_fails_and_leaves_no_engine(
    typed: Path, own_build: Path, precision: Precision
) -> None:
    shutil.copytree(typed / "text", own_build / "text")
    shutil.copy(own_build / "text" / "fp32" / "model.onnx", own_build / "text" / precision / "model.onnx")
    with pytest.raises(GateFailed, match=f"{precision} was asked for, but 0 compute layers of the network run in it"):
        build_engine(DeploymentSpec.load("tests/models/text"), precision, "tensorrt_rtx")
    assert not list((own_build / "text" / precision / "tensorrt_rtx").iterdir())


def graph_of(weights: int, counts: dict[str, int] | None = None) -> Any:
    """The facts of a typed graph's manifest."""
    return SimpleNamespace(found={"bytes_by_reader": weights, "compute_operators": counts or {}}, size_bytes=weights)


def layers(**counts: int) -> dict[str, Any]:
    """Layers as they are found in a built engine."""
    return {"compute_layers": counts, "read_from": "engine"}


def test_a_plan_with_the_size_of_fp32_weights_fails() -> None:
    found, weights = layers(fp16=36), 200 << 20
    prove("fp16", found, weights + (10 << 20), graph_of(weights), TensorrtSpec())
    prove("fp16", found, weights + (140 << 20), graph_of(weights), TensorrtSpec(version_compatible=True))
    with pytest.raises(GateFailed, match="the size of a wider precision"):
        prove("fp16", found, 2 * weights, graph_of(weights), TensorrtSpec())


@pytest.mark.parametrize(
    ("found", "graph", "passes"),
    [
        ({"int8": 1, "fp16": 47}, {"int8": 48}, False),
        ({"int8": 1, "fp16": 47}, {}, False),  # a graph that does not say
        ({"int8": 24, "fp16": 12}, {"int8": 48}, True),  # at the share; three projections fused into one
        ({"int8": 10, "fp16": 30}, {"int8": 12, "fp16": 36}, True),  # the other layers stay high on purpose
        ({"int8_weights": 40}, {"int8_weights": 48}, True),
    ],
)
def test_half_of_the_layers_that_the_graph_has_in_a_precision_have_to_run_in_it(
    found: dict[str, int], graph: dict[str, int], passes: bool
) -> None:
    wrong = r"int8 was asked for, but 1 compute layers of the engine run in it .*the graph has 48, and at least 50% of"
    with nullcontext() if passes else pytest.raises(GateFailed, match=wrong):
        prove("int8", layers(**found), 0, graph_of(1 << 20, graph), TensorrtSpec())


def write_unsupported(path: Path) -> None:
    """Writes a graph of the model `image` with an operator that TensorRT does not support."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 32, 32])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Det", ["pixels"], ["scores"], "last")], "g", [pixels], [scores])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)


def test_a_candidate_that_cannot_be_built_is_recorded_and_the_build_continues(typed: Path, tmp_path: Path) -> None:
    shutil.copytree(typed / "image", tmp_path / "image")
    write_unsupported(tmp_path / "image" / "fp16" / "model.onnx")
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp16", "--target", "tensorrt_rtx")
    run = run_module("cli", "to-tensorrt", *flags, DEEPSEEK_BUILD=str(tmp_path))
    assert (run.returncode, "node 'last' (Det): UNSUPPORTED_NODE" in run.stderr) == (1, True)
    run = run_module("cli", "to-tensorrt", *flags, "--candidate", DEEPSEEK_BUILD=str(tmp_path))
    assert (run.returncode, "fp16 cannot be made; the build continues without it" in run.stdout) == (0, True)
    assert "UNSUPPORTED_NODE" in (tmp_path / "image" / "fp16" / "tensorrt_rtx" / "refused.txt").read_text()


def test_axes_that_tensorrt_refuses_as_a_profile_are_one_line(built: Path) -> None:
    spec = DeploymentSpec.load("tests/models/image")
    upside_down = spec.axes["batch"].model_copy(update={"min": 8, "max": 1})  # deploy.toml refuses it
    source = built / "build" / "image" / "fp32" / "model.onnx"
    with pytest.raises(InputError, match=r"refuses the axes as its profile: .*MIN<=OPT<=MAX"):
        engine_from_onnx(trt, source, spec.model_copy(update={"axes": {"batch": upside_down}}))


def test_a_stand_in_for_tensorrt_loads_a_version_compatible_engine_only_where_that_is_allowed(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a plan contains code, which TensorRT runs only if it may."""
    spec, graph = DeploymentSpec.load("tests/models/image"), built / "build" / "image" / "fp32" / "model.onnx"
    compatible = spec.model_copy(update={"tensorrt": TensorrtSpec(version_compatible=True)})
    plan, found = engine_from_onnx(install_tensorrt(monkeypatch), graph, compatible)
    assert (found["read_from"], found["compute_layers"]) == ("engine", {"fp32": 3})
    (tmp_path / "model.plan").write_bytes(plan)
    row = {"pixels": np.ones((2, 3, 32, 32), np.float32)}
    expected = onnx_predictor(spec, graph, "onnxruntime")(row)["scores"]
    scores = tensorrt_predictor(compatible, tmp_path / "model.plan")(row)["scores"]
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    with pytest.raises(GateFailed, match=r"11\.4\.0\.106 cannot load it"):
        tensorrt_predictor(spec, tmp_path / "model.plan")


@pytest.mark.parametrize("before", [b"stand-in timings", b"those of another TensorRT", b""])
def test_timings_that_tensorrt_cannot_read_are_replaced(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    spec, graph = DeploymentSpec.load("tests/models/image"), built / "build" / "image" / "fp32" / "model.onnx"
    (timings := tmp_path / "tensorrt.timing").write_bytes(before)
    engine_from_onnx(install_tensorrt(monkeypatch), graph, spec, timing_cache=timings)
    assert timings.read_bytes() == b"stand-in timings"


def test_operators_that_tensorrt_runs_by_plugins_are_built_and_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = DeploymentSpec.load("tests/models/image")
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 20]>
      g (float[batch, 3, 32, 32] pixels) => (float[batch, 3] scores) <int64[2] axes = {2, 3}, int64[1, 1] place = {0},
        float[1, 1] one = {1}> {
        mean = ReduceMean <keepdims = 0> (pixels, axes)
        scores = ScatterElements <axis = 1, reduction = "add"> (mean, place, one)
      }""")
    onnx.save(model, tmp_path / "model.onnx")
    stand_in = install_tensorrt(monkeypatch)
    stand_in.plugins_of.clear()
    with pytest.raises(GateFailed, match="ScatterElements plugin was not found"):
        engine_from_onnx(stand_in, tmp_path / "model.onnx", spec)
    plan, _ = engine_from_onnx(tensorrt_module("tensorrt"), tmp_path / "model.onnx", spec)
    (tmp_path / "model.plan").write_bytes(plan)
    stand_in.plugins_of.clear()
    tensorrt_predictor(spec, tmp_path / "model.plan")
    assert stand_in.plugins_of == [""]


def test_the_error_for_a_missing_tensorrt_says_what_to_install() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be installed on a machine with a GPU")
    with pytest.raises(InputError, match="pip install tensorrt"):
        tensorrt_module("tensorrt")


def layer(kind: str, first: str, key: str = "Format/Datatype", **more: Any) -> dict[str, Any]:
    """One layer of the inspector's JSON with ProfilingVerbosity.DETAILED, as TensorRT 10 writes it."""
    return {"Name": "a", "LayerType": kind, "Inputs": [{"Name": "x", key: first}], **more}


ATTENTION = [
    layer("Reformat", "Row major linear FP16 format"),
    layer("CaskConvolution", "Thirty-two wide channel vectorized row major Int8 format"),
    layer("gemm", "Int8"),
    layer("gemm", "Half", Weights={"Type": "Int8", "Count": 9}),
    layer("kgen", "Float"),
    layer("_gemm_mha_v2", "Half"),
    layer("MatrixMultiply", "BFloat16"),
]


# TensorRT 11 has the type and the format of a tensor apart, and constants apart from the inputs.
ATTENTION_11 = [
    layer("CaskConvolution", "Int8", "Datatype"),
    layer("gemm", "Float8", "Datatype", Constants=[{"Name": "w", "Datatype": "Float8"}]),
    layer("gemm", "Half", "Datatype", Constants=[{"Name": "b", "Datatype": "Half"}, {"Name": "w", "Datatype": "Int8"}]),
    layer("kgen", "Float", "Datatype"),
    {**layer("kgen", "BFloat16", "Datatype"), "Name": "_gemm_mha_v2_myl0_4"},
    layer("kgen", "BFloat16", "Datatype", TacticName="fmha_v2_flash_attention_bf16"),
    {**layer("kgen", "Half", "Datatype"), "Name": "__myl_Add_mha_output_myl0_7"},
    {**layer("shuffle", "Half", "Datatype"), "Name": "mha_0/Reshape"},
    layer("gemm", "Float", "Datatype", Constants=None),
]


# A block of BERT in fp16 by TensorRT 10: eight products in five layers (NVIDIA/TensorRT#4397, and for the last, other
# public reports).
BERT_10 = [
    {**layer("gemm", "Half"), "Name": "/mha/key/MatMul+/mha/query/MatMul+/mha/value/MatMul_myl0_16"},
    {**layer("kgen", "Half", TacticName="_gemm_mha_v2_0x957a2fe2"), "Name": "_gemm_mha_v2_myl0_17"},
    {**layer("gemm", "Half"), "Name": "/encoder/layers_2/mha/output/MatMul_myl0_18"},
    {**layer("kgen", "Half", TacticName="__myl_AddCastMeanSub_0xf254"), "Name": "__myl_AddCastMeanSub_myl0_19"},
    {**layer("fusion", "Half", TacticName="sm80_xmma_gemm_f16f16_nn_n_by_fusion_tactic"), "Name": "__myl_Fc_myl0_20"},
    {**layer("fusion", "Half", TacticName="tensorop256x128"), "Name": "__myl_FcAddCastMean_myl0_21"},
]


def test_a_product_that_is_fused_with_what_follows_it_counts() -> None:
    assert compute_layers(BERT_10) == {"fp16": 8}
    assert compute_layers([layer("fusion", "Int8", TacticName="sm80_xmma_gemm_i8i8_i8i32_f32_tn")]) == {"int8": 1}
    assert compute_layers([{**layer("fusion", "Half", TacticName="pointwise"), "Name": "__myl_AddFchs_myl0_1"}]) == {}
    assert compute_layers([{**layer("kgen", "Half", TacticName="__myl_Add_0x1"), "Name": "conv1/Relu_myl0_1"}]) == {}


def test_products_that_one_kernel_runs_together_count_each() -> None:
    # NVIDIA/TensorRT#4397: key, query and value. Convolutions: a public list of the layers of a detector's engine.
    merged = {**layer("gemm", "Int8"), "Name": BERT_10[0]["Name"]}
    convolutions = {**layer("CaskGemmConvolution", "Half"), "Name": "/m.0/cv1/conv/Conv || /m.0/cv2/conv/Conv"}
    followed = {**layer("CaskConvolution", "Half"), "Name": "W + /Q_w + /conv/Conv + PWN(PWN(/Sigmoid), PWN(/Mul))"}
    assert compute_layers([merged, convolutions, followed]) == {"int8": 3, "fp16": 3}


def test_names_of_convolutions_and_attention_in_fused_regions_count() -> None:
    assert compute_layers([layer("correlation", "Int8")]) == {"int8": 1}
    assert compute_layers([layer("kgen", "Half", TacticName="_gemv_mha_v1_0x1")]) == {"fp16": 2}
    assert compute_layers([layer("kgen", "Half", TacticName="__mye8037_gemm_mha_v2")]) == {"fp16": 2}


@pytest.mark.parametrize("answer", ["", '{"Layers": [', "{}"])
def test_an_inspector_that_answers_with_something_else_does_not_end_the_build(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = install_tensorrt(monkeypatch)
    inspector = SimpleNamespace(get_engine_information=lambda _: answer)
    engine = SimpleNamespace(create_execution_context=SimpleNamespace, create_engine_inspector=lambda: inspector)
    monkeypatch.setattr(trt, "Runtime", lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine))
    assert engine_layers._inspected(trt, b"plan", {}) == (
        [],
        "TensorRT's inspector does not answer with a list of layers",
    )


def test_the_inspectors_layers_are_counted_by_type() -> None:
    assert compute_layers(ATTENTION) == {"int8": 2, "int8_weights": 1, "fp16": 2, "bf16": 1}
    assert compute_layers(ATTENTION_11) == {"int8": 1, "fp8": 1, "int8_weights": 1, "bf16": 4, "fp32": 1}


@pytest.mark.parametrize(
    ("layers", "note", "why"),
    [
        ([], "the engine cannot be loaded here", "the engine cannot be loaded here"),
        ([], "", "the engine shows the types of 0 of 5 compute layers"),
        ([layer("Myelin", "Half"), "a layer by name only"], "", "the engine shows the types of 0 of 5 compute layers"),
        (ATTENTION[:3], "", "the engine shows the types of 2 of 5 compute layers"),
        (
            [layer("gemm", "Half", "Type of a later TensorRT")] * 5,
            "",
            "the engine shows the types of 0 of 5 compute layers",
        ),
    ],
)
def test_if_the_engine_shows_too_little_the_network_is_read_and_the_report_says_why(
    layers: list[Any], note: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = {"compute_layers": {"int8": 5}, "layers": 9}
    monkeypatch.setattr(engine_layers, "network_layers", lambda *_: network)
    monkeypatch.setattr(engine_layers, "_inspected", lambda *_: (layers, note))
    found = found_layers(None, None, b"plan", {})
    assert found == {**network, "read_from": "network", "note": why}
    assert described(found, "int8") == f"5 in int8, read from the network ({why})"


def test_an_engine_that_loads_but_cannot_run_is_not_inspected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trt = install_tensorrt(monkeypatch)
    engine = SimpleNamespace(create_execution_context=lambda: None)
    monkeypatch.setattr(trt, "Runtime", lambda _: SimpleNamespace(deserialize_cuda_engine=lambda _: engine))
    assert engine_layers._inspected(trt, b"plan", {}) == ([], "the engine cannot run here")
    (plan := tmp_path / "model.plan").write_bytes(b"plan")
    with pytest.raises(GateFailed, match=r"model.plan: TensorRT .* cannot run it; see nvidia-smi"):
        tensorrt_predictor(DeploymentSpec.load("tests/models/image"), plan)


@pytest.mark.parametrize(("tf32", "said"), [(True, "TF32 on"), (False, "TF32 off")])
def test_an_fp32_engine_says_whether_tf32_was_on(tf32: bool, said: str) -> None:
    found = {"compute_layers": {"fp32": 3}, "read_from": "engine", "tf32": tf32}
    assert described(found, "fp32") == f"3 in fp32, {said}, read from the engine"

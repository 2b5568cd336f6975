"""ONNX Runtime: the execution provider asked for or a line that says why not, and graphs that its optimizers break."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from deepseek.onnxruntime_session import PROVIDERS, ProviderError, ProviderFacts, choose_provider, cores, open_session
from deepseek.spec import DeploymentSpec, InputError
from export.runtimes.onnxruntime_predictor import onnx_predictor, optimizers_left_out

IMAGE = DeploymentSpec.load("tests/models/image")


@pytest.fixture
def graph(built: Path) -> Path:
    """A small convolutional network."""
    return built / "build" / "image" / "fp32" / "model.onnx"


def test_auto_takes_what_package_and_machine_both_have_and_says_where_the_nodes_run(graph: Path) -> None:
    opened = open_session(graph, onnxruntime.SessionOptions())
    expected = {
        name for name in ("cuda", "migraphx", "cann") if PROVIDERS[name].name in onnxruntime.get_available_providers()
    }
    assert opened.provider in expected | {"cpu"}
    assert sum(opened.nodes.values()) >= 4  # two convolutions, the mean, the head
    assert opened.nodes.get(PROVIDERS[opened.provider].name, 0) > 0
    assert f"provider {opened.provider}, nodes: " in str(opened)
    scores, _ = opened.session.run(None, {"pixels": np.zeros((2, 3, 32, 32), np.float32)})
    assert scores.shape == (2, 10)


SECOND, FIRST = "pod/triton/cpu.max", "cpu/cpu.cfs_quota_us"  # files of both versions of control groups


@pytest.mark.parametrize(
    ("file", "quota", "wanted"),
    [
        *[(SECOND, "max 100000", 64), (SECOND, "200000 100000", 2), (SECOND, "150000 100000", 2)],
        *[(SECOND, "20000 100000", 1), (FIRST, "-1", 64), (FIRST, "400000", 4)],
    ],
)
def test_threads_are_as_many_as_the_quota_of_cores_is_worth(
    file: str, quota: str, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(64))
    (tmp_path / "own").write_text("0::/pod/triton\n")
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{quota}\n")
    (tmp_path / file).with_name("cpu.cfs_period_us").write_text("100000\n")
    assert cores(tmp_path, tmp_path / "own") == wanted


def test_no_fusion_is_made_whose_kernel_is_slow_on_the_cpu(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "skip"], ["sum"]),
        helper.make_node("LayerNormalization", ["sum", "scale"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 8]) for name in ("x", "skip", "y")]
    scale = numpy_helper.from_array(np.ones(8, np.float32), "scale")
    graph = helper.make_graph(nodes, "block", ends[:2], ends[2:], [scale])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "model.onnx")

    def operators(provider: str) -> set[str]:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        if provider == "raw":
            onnxruntime.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
        else:
            open_session(tmp_path / "model.onnx", options, provider)
        return {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}

    assert operators("raw") == {"SkipLayerNormalization"}
    assert operators("cpu") == {"Add", "LayerNormalization"}


def test_auto_leaves_a_provider_whose_device_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [facts.name for facts in PROVIDERS.values()])
    for found in ("cann", "cpu"):
        for key, facts in PROVIDERS.items():
            if facts.is_there is not None:
                monkeypatch.setitem(PROVIDERS, key, facts._replace(is_there=partial(bool, key == found)))
        assert choose_provider("auto") == found


@pytest.mark.parametrize("provider", ["cuda", "tensorrt", "migraphx", "cann"])
def test_a_missing_provider_says_what_there_is_and_which_package_has_it(provider: str, graph: Path) -> None:
    facts = PROVIDERS[provider]
    if facts.name in onnxruntime.get_available_providers():
        pytest.skip(f"this machine's ONNX Runtime has {facts.name}")
    spec = IMAGE.model_copy(update={"onnxruntime": IMAGE.onnxruntime.model_copy(update={"provider": provider})})
    with pytest.raises(
        InputError, match=f"{provider!r} is not in .* has .*CPUExecutionProvider; install {facts.package}"
    ):
        onnx_predictor(spec, graph, "onnxruntime")


def test_a_provider_that_takes_no_node_is_no_silent_cpu(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "AzureExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this build of ONNX Runtime has no second provider")
    # It is there and starts, but has no operator of its own: all nodes fall to the CPU.
    monkeypatch.setitem(PROVIDERS, "azure", ProviderFacts("AzureExecutionProvider", "onnxruntime"))
    with pytest.raises(ProviderError, match=r"'azure' supports no node of .*; CPUExecutionProvider would run it"):
        open_session(graph, onnxruntime.SessionOptions(), "azure")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_no_silent_cpu(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available = onnxruntime.get_available_providers()
    if "CANNExecutionProvider" in available:
        pytest.skip("this build of ONNX Runtime has CANN")
    # As a package that lists a provider whose libraries are not there.
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CANNExecutionProvider", *available])
    with pytest.raises(ProviderError, match=r"'cann' did not start, ONNX Runtime uses CPU.*onnxruntime-cann"):
        open_session(graph, onnxruntime.SessionOptions(), "cann")


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
    fp8 = ["ReluQuantRewrite", "QDQPropagationTransformer", "QDQSelectorActionTransformer"]
    assert optimizers_left_out(rectified) == fp8

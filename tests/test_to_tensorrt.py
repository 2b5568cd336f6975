"""The graphs through a real TensorRT parser and builder (TensorRT for RTX: ahead of time, no GPU)."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import onnx
import pytest
from onnx import TensorProto, helper

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Precision, TensorrtSpec
from export.runtimes.tensorrt_engine import _builder_config, applied, engine_from_onnx, prove, tensorrt_module
from export.runtimes.tensorrt_predictor import tensorrt_predictor
from export.stages import to_tensorrt
from export.stages.to_tensorrt import build_engine
from tests.conftest import run_module
from tests.test_tensorrt_container import program

trt = pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("model", ["image", "text"])
def test_a_graph_builds_and_runs_in_the_precision_asked_for(
    typed: Path, tmp_path: Path, model: str, precision: str
) -> None:
    shutil.copytree(typed / model, tmp_path / model)
    flags = ("--models", "tests/models", "--model", model, "--precision", precision, "--target", "tensorrt_rtx")
    run = run_module("cli", "to-tensorrt", *flags, "--json", DEEPSEEK_BUILD=str(tmp_path))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["found"]["compute_layers"].get(precision, 0) >= 2
    manifest = json.loads((tmp_path / model / precision / "tensorrt_rtx" / "manifest.json").read_text())
    assert manifest["target"] == "tensorrt_rtx"
    assert manifest["size_bytes"] == (tmp_path / model / precision / "tensorrt_rtx" / "model.plan").stat().st_size
    assert manifest["settings"]["optimization_level"] == 3
    assert manifest["build_s"] > 0
    assert manifest["found"]["weight_bytes"] > 0


def test_the_cache_returns_no_engine_of_another_model(
    typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    spec = DeploymentSpec.load("tests/models/text")
    for name in ("text", "twin"):
        shutil.copytree(typed / "text" / "fp32", tmp_path / name / "fp32")
        build_engine(spec.model_copy(update={"name": name}), "fp32", "tensorrt_rtx")
        engine = tmp_path / name / "fp32" / "tensorrt_rtx"
        assert json.loads((engine / "manifest.json").read_text())["model"] == name


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_fp32_graph_named_as_another_precision_fails_and_leaves_no_engine(
    typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    shutil.copytree(typed / "text", tmp_path / "text")
    shutil.copy(tmp_path / "text" / "fp32" / "model.onnx", tmp_path / "text" / precision / "model.onnx")
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    with pytest.raises(GateFailed, match=f"{precision} was asked for, but 0 compute layers of the network run in it"):
        build_engine(DeploymentSpec.load("tests/models/text"), precision, "tensorrt_rtx")
    assert not list((tmp_path / "text" / precision / "tensorrt_rtx").iterdir())


def graph_of(weights: int, counts: dict[str, int] | None = None) -> Any:
    """The facts of a typed graph's manifest."""
    return SimpleNamespace(found={"bytes_by_reader": weights, "compute_operators": counts or {}}, size_bytes=weights)


def layers(**counts: int) -> dict[str, Any]:
    """Layers as they are found in a built engine."""
    return {"compute_layers": counts, "read_from": "engine"}


def test_a_plan_with_the_size_of_fp32_weights_fails() -> None:
    found, weights = layers(fp16=36), 200 << 20
    prove("fp16", found, weights + (10 << 20), graph_of(weights), TensorrtSpec())
    with pytest.raises(GateFailed, match="the size of a wider precision"):
        prove("fp16", found, 2 * weights, graph_of(weights), TensorrtSpec())


def test_a_version_compatible_plan_may_also_hold_the_lean_runtime() -> None:
    found, weights, plan = layers(fp16=36), 1 << 20, 60 << 20
    prove("fp16", found, plan, graph_of(weights), TensorrtSpec(version_compatible=True))
    with pytest.raises(GateFailed, match="the size of a wider precision"):
        prove("fp16", found, plan, graph_of(weights), TensorrtSpec())


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


def test_a_truncated_graph_is_one_line(built: Path, tmp_path: Path) -> None:
    whole = (built / "build" / "image" / "fp32" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GateFailed, match="cannot parse it") as caught:
        engine_from_onnx(trt, tmp_path / "model.onnx", DeploymentSpec.load("tests/models/image"))
    assert "\n" not in str(caught.value)


def write_unsupported(path: Path) -> None:
    """Writes a graph of the model `image` with an operator that TensorRT does not support."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 32, 32])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Det", ["pixels"], ["scores"], "last")], "g", [pixels], [scores])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)


def test_an_operator_that_tensorrt_does_not_support_is_named(tmp_path: Path) -> None:
    write_unsupported(tmp_path / "model.onnx")
    with pytest.raises(GateFailed, match=r"node 'last' \(Det\): UNSUPPORTED_NODE"):
        engine_from_onnx(trt, tmp_path / "model.onnx", DeploymentSpec.load("tests/models/image"))


def test_a_candidate_that_cannot_be_built_is_recorded_and_the_build_continues(typed: Path, tmp_path: Path) -> None:
    shutil.copytree(typed / "image", tmp_path / "image")
    write_unsupported(tmp_path / "image" / "fp16" / "model.onnx")
    flags = ("--models", "tests/models", "--model", "image", "--precision", "fp16", "--target", "tensorrt_rtx")
    run = run_module("cli", "to-tensorrt", *flags, DEEPSEEK_BUILD=str(tmp_path))
    assert (run.returncode, "UNSUPPORTED_NODE" in run.stderr) == (1, True)
    run = run_module("cli", "to-tensorrt", *flags, "--candidate", DEEPSEEK_BUILD=str(tmp_path))
    assert (run.returncode, "fp16 cannot be made; the build continues without it" in run.stdout) == (0, True)
    assert "UNSUPPORTED_NODE" in (tmp_path / "image" / "fp16" / "tensorrt_rtx" / "refused.txt").read_text()


def test_axes_that_tensorrt_refuses_as_a_profile_are_one_line(built: Path) -> None:
    spec = DeploymentSpec.load("tests/models/image")
    upside_down = spec.axes["batch"].model_copy(update={"min": 8, "max": 1})  # deploy.toml refuses it
    source = built / "build" / "image" / "fp32" / "model.onnx"
    with pytest.raises(InputError, match=r"refuses the axes as its profile: .*MIN<=OPT<=MAX") as caught:
        engine_from_onnx(trt, source, spec.model_copy(update={"axes": {"batch": upside_down}}))
    assert "\n" not in str(caught.value)


def test_the_builder_is_asked_for_what_the_inspector_has_to_tell() -> None:
    config = _builder_config(trt, trt.Builder(trt.Logger(trt.Logger.INTERNAL_ERROR)), TensorrtSpec())
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


def test_if_torch_sees_no_gpu_nvidia_smi_tells_the_compute_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA L4, 8.9, 580.95.05, 23034'")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert to_tensorrt._compute_capability() == "8.9"


class StandInRuntime:
    """TensorRT's rule: a version-compatible plan contains code, and loads only if that is allowed."""

    engine_host_code_allowed = False

    def __init__(self, _: Any) -> None:
        pass

    def deserialize_cuda_engine(self, _: bytes) -> Any:
        """An engine, or None as TensorRT returns it."""
        return MagicMock() if self.engine_host_code_allowed else None


def test_a_version_compatible_engine_loads_in_a_stand_in_of_tensorrt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", MagicMock(Runtime=StandInRuntime, __version__="11.4.0"))
    monkeypatch.setattr("torch.cuda.Stream", MagicMock())
    (tmp_path / "model.plan").write_bytes(b"ptrt")
    spec = DeploymentSpec.load("tests/models/image")
    compatible = spec.model_copy(update={"tensorrt": TensorrtSpec(version_compatible=True)})
    assert callable(tensorrt_predictor(compatible, tmp_path / "model.plan"))
    with pytest.raises(GateFailed, match=r"11\.4\.0 cannot load it"):  # code only where deploy.toml allows it
        tensorrt_predictor(spec, tmp_path / "model.plan")


def test_the_error_for_a_missing_tensorrt_says_what_to_install() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be installed on a machine with a GPU")
    with pytest.raises(InputError, match="pip install tensorrt"):
        tensorrt_module("tensorrt")


def test_an_int8_graph_for_the_cpu_is_refused_in_one_line(build: Path) -> None:
    flags = ("--models", "tests/models", "--model", "text", "--precision", "int8", "--target", "tensorrt_rtx")
    run = run_module("cli", "to-tensorrt", *flags)
    assert run.returncode == 2
    assert "made for ONNX Runtime on a CPU" in run.stderr
    assert "--high-precision fp16" in run.stderr


def test_the_options_of_deploy_toml_go_into_the_manifest(built: Path, tmp_path: Path) -> None:
    shutil.copytree("tests/models/image", tmp_path / "models" / "image")
    with (tmp_path / "models" / "image" / "deploy.toml").open("a") as file:
        file.write("[tensorrt]\noptimization_level = 1\nworkspace_mib = 64\n")
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    model = ("--models", str(tmp_path / "models"), "--model", "image", "--precision", "fp32")
    flags = ("--target", "tensorrt_rtx", "--json")
    run = run_module("cli", "to-tensorrt", *model, *flags, DEEPSEEK_BUILD=str(tmp_path))
    assert run.returncode == 0, run.stderr
    settings = json.loads(run.stdout)["settings"]
    assert (settings["optimization_level"], settings["workspace_mib"]) == (1, 64)


def test_options_only_for_ordinary_tensorrt_are_recorded_only_for_it() -> None:
    options = TensorrtSpec(hardware_compatibility="ampere_plus")
    assert applied("tensorrt", options)["hardware_compatibility"] == "ampere_plus"
    assert "hardware_compatibility" not in applied("tensorrt_rtx", options)

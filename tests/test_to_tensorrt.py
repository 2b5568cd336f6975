"""The graphs through a real TensorRT parser and builder (TensorRT for RTX: ahead of time, no GPU)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Precision, TensorrtSpec
from export.engine import applied, engine_from_onnx, prove, tensorrt_module
from export.to_tensorrt import build_engine
from tests.conftest import run_module

trt = pytest.importorskip("tensorrt_rtx")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("model", ["image", "text"])
def test_a_graph_builds_and_runs_in_the_precision_asked(
    typed: Path, tmp_path: Path, model: str, precision: str
) -> None:
    shutil.copytree(typed / model, tmp_path / model)
    flags = (
        "--models",
        "tests/models",
        "--model",
        model,
        "--precision",
        precision,
        "--target",
        "tensorrt_rtx",
        "--json",
    )
    run = run_module("export.to_tensorrt", *flags, BUILD=str(tmp_path))
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["found"]["compute_layers"].get(precision, 0) >= 2
    manifest = json.loads((tmp_path / model / precision / "tensorrt_rtx" / "manifest.json").read_text())
    assert manifest["target"] == "tensorrt_rtx"
    assert manifest["size_bytes"] == (tmp_path / model / precision / "tensorrt_rtx" / "model.plan").stat().st_size
    assert manifest["settings"]["optimization_level"] == 3
    assert manifest["build_s"] > 0
    assert manifest["found"]["weight_bytes"] > 0


def test_the_cache_gives_no_engine_that_names_another_model(
    typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    monkeypatch.setenv("CACHE", str(tmp_path / "cache"))
    spec = DeploymentSpec.load("tests/models/text")
    for name in ("text", "twin"):
        shutil.copytree(typed / "text" / "fp32", tmp_path / name / "fp32")
        build_engine(spec.model_copy(update={"name": name}), "fp32", "tensorrt_rtx", TensorrtSpec())
        engine = tmp_path / name / "fp32" / "tensorrt_rtx"
        assert json.loads((engine / "manifest.json").read_text())["model"] == name


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_an_fp32_graph_under_another_name_fails_and_leaves_no_engine(
    typed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    shutil.copytree(typed / "text", tmp_path / "text")
    shutil.copy(tmp_path / "text" / "fp32" / "model.onnx", tmp_path / "text" / precision / "model.onnx")
    monkeypatch.setenv("BUILD", str(tmp_path))
    with pytest.raises(GateFailed, match=f"{precision} was asked for, but no compute layer of the network runs in it"):
        build_engine(DeploymentSpec.load("tests/models/text"), precision, "tensorrt_rtx", TensorrtSpec())
    assert not list((tmp_path / "text" / precision / "tensorrt_rtx").iterdir())


def test_a_plan_of_the_size_of_fp32_weights_fails() -> None:
    found, weights = {"compute_layers": {"fp16": 36}}, 200 << 20
    prove("fp16", found, weights + (10 << 20), weights, TensorrtSpec())
    with pytest.raises(GateFailed, match="the size of a wider precision"):
        prove("fp16", found, 2 * weights, weights, TensorrtSpec())


def test_a_version_compatible_plan_may_hold_the_lean_runtime_too() -> None:
    found, weights, plan = {"compute_layers": {"fp16": 36}}, 1 << 20, 60 << 20
    prove("fp16", found, plan, weights, TensorrtSpec(version_compatible=True))
    with pytest.raises(GateFailed, match="the size of a wider precision"):
        prove("fp16", found, plan, weights, TensorrtSpec())


def test_a_truncated_graph_is_one_line(built: Path, tmp_path: Path) -> None:
    whole = (built / "build" / "image" / "fp32" / "model.onnx").read_bytes()
    (tmp_path / "model.onnx").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot parse it") as caught:
        engine_from_onnx(trt, tmp_path / "model.onnx", DeploymentSpec.load("tests/models/image"), TensorrtSpec())
    assert "\n" not in str(caught.value)


def test_an_operator_that_tensorrt_lacks_is_named(tmp_path: Path) -> None:
    spec = DeploymentSpec.load("tests/models/image")
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 3, 32, 32])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Det", ["pixels"], ["scores"], "last")], "g", [pixels], [scores])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "model.onnx")
    with pytest.raises(InputError, match=r"node 'last' \(Det\): UNSUPPORTED_NODE"):
        engine_from_onnx(trt, tmp_path / "model.onnx", spec, TensorrtSpec())


def test_a_missing_tensorrt_says_what_to_install() -> None:
    if shutil.which("nvidia-smi"):
        pytest.skip("TensorRT may be installed on a machine with a GPU")
    with pytest.raises(InputError, match="pip install tensorrt"):
        tensorrt_module("tensorrt")


def test_an_int8_graph_for_the_cpu_is_refused_in_one_line(build: Path) -> None:
    run = run_module(
        "export.to_tensorrt",
        "--models",
        "tests/models",
        "--model",
        "text",
        "--precision",
        "int8",
        "--target",
        "tensorrt_rtx",
    )
    assert run.returncode == 2
    assert "made for ONNX Runtime on a CPU" in run.stderr
    assert "--high-precision fp16" in run.stderr


def test_an_engine_of_rtx_is_never_published(build: Path) -> None:
    flags = ("--models", "tests/models", "--model", "image", "--target", "tensorrt_rtx")
    run = run_module("export.to_triton", *flags)
    assert run.returncode == 2
    assert "invalid choice" in run.stderr


def test_flags_go_over_the_options_of_deploy_toml_and_into_the_manifest(built: Path, tmp_path: Path) -> None:
    shutil.copytree("tests/models/image", tmp_path / "models" / "image")
    with (tmp_path / "models" / "image" / "deploy.toml").open("a") as file:
        file.write("[tensorrt]\noptimization_level = 1\nworkspace_mib = 64\n")
    shutil.copytree(built / "build" / "image", tmp_path / "image")
    model = ("--models", str(tmp_path / "models"), "--model", "image", "--precision", "fp32")
    flags = ("--target", "tensorrt_rtx", "--optimization-level", "0", "--json")
    run = run_module("export.to_tensorrt", *model, *flags, BUILD=str(tmp_path))
    assert run.returncode == 0, run.stderr
    settings = json.loads(run.stdout)["settings"]
    assert (settings["optimization_level"], settings["workspace_mib"]) == (0, 64)


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [("--optimization-level", "6", "less than or equal to 5"), ("--workspace-mib", "0", "greater than or equal to 1")],
)
def test_an_option_out_of_range_is_one_line(flag: str, value: str, allowed: str) -> None:
    model = ("--models", "tests/models", "--model", "image", "--precision", "fp32", "--target", "tensorrt_rtx")
    run = run_module("export.to_tensorrt", *model, flag, value)
    assert run.returncode == 2
    assert run.stderr == f"error: {flag}: seen {value}; it has to be {allowed}\n"


def test_what_only_an_ordinary_tensorrt_takes_is_recorded_for_it_alone() -> None:
    options = TensorrtSpec(hardware_compatibility="ampere_plus")
    assert applied("tensorrt", options)["hardware_compatibility"] == "ampere_plus"
    assert "hardware_compatibility" not in applied("tensorrt_rtx", options)

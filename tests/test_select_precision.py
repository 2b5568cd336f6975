"""The stage that compares every variant with PyTorch: what it measures, refuses, prints and records."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from deepseek.precisions import Precision
from deepseek.spec import DeploymentSpec, GateFailed, Target
from deepseek.spec.paired_drop import DropJudgement, values_of
from export.artifact import engine_path, onnx_path
from export.model_folder import ModelFolder, Predict
from export.precision import accuracy_budget
from export.precision.choice_table import show
from export.rows import load_rows, save_rows
from export.runtimes import timing, variants
from export.runtimes.onnxruntime_predictor import onnx_predictor
from export.runtimes.timing import Timer
from export.stages import quantize, select_precision
from tests.add_one import replace_in
from tests.conftest import RunHere
from tests.test_accuracy import scaled
from tests.test_precision_choice import by_rows, judged_by_number

IMAGE = DeploymentSpec.load("tests/models/image")


def no_kernel(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    raise RuntimeError("no kernel\n  for it")


def crash(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def test_a_model_folder_may_ask_for_a_gpu_before_the_trial_in_a_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "0")
    monkeypatch.setattr(select_precision, "ModelFolder", lambda *_: pytest.fail(str(torch.cuda._nvml_based_avail())))
    options = argparse.Namespace(json=False, model="image", models=Path("tests/models"))
    with pytest.raises(pytest.fail.Exception, match="True"):  # else CUDA would be initialized, and unusable in a fork
        select_precision.main(options)


@pytest.mark.parametrize(
    ("predict", "target", "why"),
    [
        (no_kernel, "onnxruntime", "its graph does not run: no kernel for it"),
        (no_kernel, "tensorrt", "its engine does not run: no kernel for it"),
        (crash, "tensorrt", "TensorRT crashed (SIGSEGV) on its engine"),
        (scaled(1), "onnxruntime", None),
    ],
)
def test_a_candidate_that_does_not_run_is_refused_with_its_reason(
    predict: Predict, target: Target, why: str | None, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_precision, "variant_predictor", lambda *_: predict)
    assert select_precision._failure(IMAGE, "fp16", target) == why


def test_a_graph_that_fails_is_one_line_which_names_its_precision(
    text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = ModelFolder("text", "tests/models")
    predict = onnx_predictor(source.spec, onnx_path("text", "fp32"), "onnxruntime")
    wrong = {name: np.full((1, 5), 10_000) for name in source.spec.inputs}
    monkeypatch.setattr(select_precision, "variant_predictor", lambda *_: lambda _: predict(wrong))
    comparison = select_precision._Comparison(source=source, target="onnxruntime", only="fp32")
    with pytest.raises(GateFailed, match=r"^fp32 could not be made: its graph does not run: .*out of data bounds"):
        comparison.accuracies(["fp32"])
    assert capfd.readouterr().err == ""


def test_a_candidate_that_could_not_be_made_is_refused_with_its_recorded_reason(own_build: Path) -> None:
    found = []
    for artifact in (engine_path("image", "fp16", "tensorrt"), onnx_path("image", "fp16")):
        artifact.parent.mkdir(parents=True, exist_ok=True)
        artifact.touch()
        (artifact.parent / "refused.txt").write_text(artifact.name)
        found.append(select_precision._refusal(IMAGE, "fp16", "tensorrt"))
    assert found == ["model.plan", "model.onnx"]  # a graph that is refused comes before its engine
    assert select_precision._refusal(IMAGE, "int8", "tensorrt") is None


def test_only_8_bits_have_a_sensitivity_report_and_only_if_needed(text: Path) -> None:
    spec = DeploymentSpec.load("tests/models/text")
    expected: dict[Precision, object] = {"fp16": None, "int8": {"layers": [], "high": "fp32"}}
    for name, found in expected.items():
        report = onnx_path("text", name).with_name("sensitivity.json")
        report.unlink(missing_ok=True)
        assert accuracy_budget.sensitivity_of(spec, name) is None
        report.write_text('{"layers": []}')
        assert accuracy_budget.sensitivity_of(spec, name) == found


def table(capsys: pytest.CaptureFixture[str], own: dict[str, Any], **changed: Any) -> list[str]:
    """The printed lines of a choice between fp32 and int8, which have the same numbers."""
    numbers = {"worst_error": 0.25, "cosine": 0.5, "top_agreement": 0.75}
    own = {
        "metrics": {"ndcg": 0.4},
        "parity": {"y": numbers},
        "speedup": 2,
        "rows_per_s": 50,
        "size_bytes": 2048,
        **own,
    }
    fixed = {"model": "m", "target": "onnxruntime", "rows": 64, "max_drop": 0.02, "chosen": "int8", "metric": "ndcg"}
    rest = {"warning": "", "refused": {}, "sensitivity": {}, "int8_dot_products": True, "provider": "cpu"}
    pytorch = {"metrics": {"ndcg": 0.5}, "rows_per_s": 100}
    variants = {name: {**own, "reason": f"{name} it is"} for name in ("fp32", "int8")}
    show({**fixed, **rest, "pytorch": pytorch, "variants": variants, **changed})
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_the_table_has_a_row_per_precision_with_the_reason(capsys: pytest.CaptureFixture[str]) -> None:
    judgement = dataclasses.asdict(judged_by_number({"x": 0.01})["x"])
    own = {"judgement": judgement, "rows": {"drop": None, "metric": None, "parity": 64}, "drop": 0.01}
    layer = {"name": "fc1", "operator": "Gemm", "share": 0.9, "high": True}
    report = {"max_drop": 0.02, "drop": 0.01, "held": True, "high": "fp16", "layers": [layer]}
    slow = "int8 gains less on this CPU (2.00 times fp32): it has no 8-bit dot products (VNNI, AMX)"
    found = {"warning": "too few", "refused": {"fp8": "no"}, "sensitivity": {"int8": report}}
    said = table(capsys, own, **found, int8_dot_products=False)
    assert said[0] == "m on onnxruntime: 64 evaluation rows, budget 2.00%"
    for line in (slow, "warning: too few", "int8 int8 it is", "fp8 could not be made: no"):
        assert line in said
    assert "int8 sensitivity: 1 of 1 layers stay fp16; drop 1.00%, inside the 2.00% allowed" in said
    assert not [line for line in said if "fc1" in line]  # the stage that quantizes has printed the layers
    assert {"PyTorch fp32 0.5000 2.00x", "int8 0.4000 +1.00% 0.25 0.50000 75.0% 2.00x 2.0 KiB"} <= {*said}
    on_cuda = "int8: ONNX Runtime multiplies in fp32 on CUDA, which gains no speed; TARGET=tensorrt does"
    assert on_cuda not in said
    assert on_cuda in table(capsys, own, provider="cuda", int8_dot_products=None)
    said = table(capsys, own, metric="similarity")
    assert {"PyTorch fp32 1 2.00x", "int8 0.9900 +1.00% 0.25 0.50000 75.0% 2.00x 2.0 KiB"} <= {*said}
    assert not [line for line in said if "warning" in line or "one number" in line or line == slow]


def test_each_number_of_the_table_says_its_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Layers of int8 were chosen on some rows, so its drop is of the others."""
    judged = by_rows(40, 0)
    rows = {"drop": 40, "chosen_on": 50, "metric": 90, "parity": 90}
    own = {"judgement": dataclasses.asdict(judged), "rows": rows, "drop": 0.0}
    said = table(capsys, own, int8_dot_products=None)  # None: of a GPU, for example
    assert f"int8 0.4000 +0.00% {judged.low:+.2%} to {judged.high:+.2%} 40 0.25 0.50000 75.0% 2.00x 2.0 KiB" in said
    assert "interval: bounds of the drop, each at 95.00%; rows: those of drop and interval" in said
    chosen = "int8: layers were chosen on other rows; drop from 40 rows"
    assert f"{chosen}, ndcg from all 90" in said
    one_number = {**own, "rows": {**rows, "metric": None}}
    assert f"{chosen}, ndcg from all rows" in table(capsys, one_number)
    assert chosen in table(capsys, own, metric="similarity")  # which is the drop in another form


@pytest.fixture
def text(built: Path, tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch, no_children: None) -> Path:
    """A folder with `models/` and `build/` of the model `text` that the test may change; all variants are as fast."""
    shutil.copytree(built / "build" / "text", tmp_path / "build" / "text")
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")
    monkeypatch.setattr(select_precision, "time_interleaved", lambda timers: {name: [1.0] * 4 for name in timers})
    return tmp_path


@pytest.fixture
def stage(text: Path, run_here: RunHere) -> RunHere:
    """Runs a stage of the build for the model in that folder."""

    def run(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
        return run_here(name, "--models", str(text / "models"), "--model", "text", *flags)

    return run


def test_if_the_metric_of_fp32_is_0_outputs_are_compared_and_a_warning_says_so(text: Path, stage: RunHere) -> None:
    replace_in(text / "models" / "text" / "model.py", '{"self_retrieval": float(', '{"self_retrieval": 0 * float(')
    said = "warning: self_retrieval of fp32 PyTorch is 0: evaluate() has too little data to judge by, or a mistake"
    compared = stage("select-precision")
    assert (compared.returncode, said in compared.stdout) == (0, True), compared.stderr
    choice = json.loads((text / "build" / "text" / "choice-onnxruntime.json").read_text())
    metric, int8 = choice["metric"], choice["variants"]["int8"]
    expected = pytest.approx(1 - int8["parity"]["embedding"]["cosine"], abs=1e-9)
    assert (metric, int8["drop"]) == ("similarity", expected)


def test_a_graph_made_from_another_fp32_graph_is_no_candidate(text: Path, stage: RunHere) -> None:
    """As after a build of fp32 alone that trained again, or without PRUNE."""
    manifest = text / "build" / "text" / "int8" / "manifest.json"
    told = json.loads(manifest.read_text())
    told["sources"]["onnx"] = "of an earlier build"
    manifest.write_text(json.dumps(told))
    run = stage("select-precision")
    assert run.returncode == 0, run.stderr
    assert "int8      could not be made: its graph was made from another fp32 graph: make engine " in run.stdout
    assert stage("select-precision", "--precision", "int8").returncode == 1


BY_ROW = (
    '{"self_retrieval": float(np.mean(nearest == np.arange(len(originals))))}',
    '{"self_retrieval": nearest == np.arange(len(originals))}',
)


def test_a_metric_row_by_row_has_an_interval_in_the_table_the_choice_and_the_manifest(
    text: Path, stage: RunHere
) -> None:
    replace_in(text / "models" / "text" / "model.py", *BY_ROW)
    run = stage("select-precision")
    assert run.returncode == 0, run.stderr
    assert "interval: bounds of the drop, each at " in run.stdout
    choice = json.loads((text / "build" / "text" / "choice-onnxruntime.json").read_text())
    found = choice["variants"]["int8"]
    judged = DropJudgement(**found["judgement"])
    assert (judged.rows, found["rows"]) == (32, {"drop": 32, "metric": 32, "parity": 32})
    assert judged.low is not None
    assert "values" not in found
    told = json.loads((text / "build" / "text" / "int8" / "manifest.json").read_text())["accuracy"]
    assert (told["judgement"], told["rows"], told["against"]) == (found["judgement"], found["rows"], "fp32 PyTorch")
    assert np.mean(values_of(told["values"])) == pytest.approx(found["metrics"]["self_retrieval"])


def test_with_a_fake_of_a_gpu_the_speed_is_that_of_the_runs_and_copies_and_clocks_are_apart(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(select_precision, "time_interleaved", timing.time_interleaved)
    seconds = {"fp32": 0.004, "fp16": 0.001, "int8": 0.002}
    for name in seconds:
        folder = text / "build" / "text" / name
        (folder / "tensorrt").mkdir()
        (folder / "tensorrt" / "model.plan").write_bytes(b"ftrt")
        shutil.copy(folder / "manifest.json", folder / "tensorrt")
    graphs = variants.variant_predictor
    monkeypatch.setattr(select_precision, "variant_predictor", lambda spec, name, _: graphs(spec, name, "onnxruntime"))
    timers = {name: (lambda each_s=each_s: each_s, lambda: 0.003) for name, each_s in seconds.items()}
    monkeypatch.setattr(select_precision, "variant_timers", lambda spec, name, *_: timers[name])
    monkeypatch.setattr(select_precision, "clocks", lambda: "SM 1410 MHz of 1980 MHz")
    result = select_precision.compare(ModelFolder("text", text / "models"), "tensorrt", None)
    assert (result["chosen"], result["int8_dot_products"]) == ("fp16", None)
    assert {name: each["speedup"] for name, each in result["variants"].items()} == {"fp32": 1, "fp16": 4, "int8": 2}
    show(result)
    printed = capsys.readouterr().out
    copies = ", ".join(f"{name} 3.000 ms" for name in result["variants"])
    assert f"copies to and from the GPU, not part of the speed: {copies}" in printed
    assert "GPU clocks: SM 1410 MHz of 1980 MHz; after timing: SM 1410 MHz of 1980 MHz" in printed


def test_pytorch_runs_in_no_round_of_the_graphs_whose_caches_it_would_evict(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[set[str]] = []

    def timed(timers: dict[str, Timer]) -> dict[str, list[float]]:
        rounds.append(set(timers))
        return {name: [1.0] * 4 for name in timers}

    monkeypatch.setattr(select_precision, "time_interleaved", timed)
    select_precision.compare(ModelFolder("text", text / "models"), "onnxruntime", "int8")
    assert [each for each in rounds if each] == [{"fp32", "int8"}, {"pytorch"}]


def test_a_missing_execution_provider_is_an_error_only_if_it_would_serve(
    text: Path, monkeypatch: pytest.MonkeyPatch, stage: RunHere
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine's ONNX Runtime has it")
    toml = text / "models" / "text" / "deploy.toml"
    toml.write_text(toml.read_text() + '[onnxruntime]\nprovider = "cuda"\n')
    monkeypatch.setattr(quantize, "quantize_model", opening_a_trial_graph)
    int8 = ("quantize", "--precision", "int8", "--candidate", "--json")
    for run in (stage(*int8), stage("select-precision")):
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert "execution provider 'cuda' is not in ONNX Runtime" in run.stderr
    assert (text / "build" / "text" / "int8" / "model.onnx").stat().st_size > 0
    other = stage(*int8, "--target", "tensorrt")
    assert other.returncode == 0, other.stderr  # if TensorRT serves, the trials run on the CPU


def opening_a_trial_graph(spec: DeploymentSpec, *_: object) -> dict[str, Any]:
    """The first step of quantization that needs the execution provider."""
    onnx_predictor(spec, onnx_path("text", "fp32"), "onnxruntime")
    return {}


def test_a_graph_that_cannot_be_loaded_is_refused_and_the_others_are_compared(text: Path, stage: RunHere) -> None:
    path = text / "build" / "text" / "fp16" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    run = stage("select-precision", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert (result["refused"].keys(), result["metric"]) == ({"fp16"}, "self_retrieval")
    assert stage("select-precision", "--precision", "fp16").returncode == 1


def test_a_candidate_at_whose_outputs_evaluate_fails_is_refused_and_the_others_are_compared(
    text: Path, stage: RunHere
) -> None:
    with (text / "models" / "text" / "model.py").open("a") as file:
        file.write(
            "\n_evaluate = evaluate\ndef evaluate(predict):\n    row = next(iter(samples('evaluation')))\n"
            "    right = load()(*map(torch.from_numpy, row.values())).numpy(force=True)\n"
            "    assert np.allclose(predict(row)['embedding'], right, atol=1e-5), 'other outputs'\n"
            "    return _evaluate(predict)\n"
        )
    manifests = [text / "build" / "text" / name / "manifest.json" for name in ("fp32", "fp16", "int8")]
    assert all(json.loads(path.read_text())["accuracy"] for path in manifests)
    run = stage("select-precision", "--json")
    assert run.returncode == 0, run.stderr
    refused = json.loads(run.stdout)["refused"]
    assert refused.keys() == {"fp16", "int8"}
    kept = [json.loads(path.read_text())["accuracy"] is not None for path in manifests]
    assert kept == [True, False, False]  # no older accuracy beside a refusal
    assert all("evaluate(): AssertionError: other outputs" in reason for reason in refused.values())
    assert stage("select-precision", "--precision", "int8").returncode == 1


def test_speed_is_measured_at_opt_even_if_no_two_rows_share_a_shape(text: Path, stage: RunHere) -> None:
    path = text / "build" / "text" / "evaluation.npz"
    rows = {row["input_ids"].shape: row for row in load_rows(path)}
    save_rows(path, rows.values())
    run = stage("select-precision", "--precision", "fp32", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["rows"] == len(rows)
    assert result["timed_shapes"] == {"input_ids": [4, 16], "attention_mask": [4, 16]}


def test_an_fp32_graph_of_another_model_fails_even_with_a_good_metric(text: Path, stage: RunHere) -> None:
    replace_in(text / "models" / "text" / "model.py", "manual_seed(0)", "manual_seed(1)")
    run = stage("select-precision", "--precision", "fp32")
    assert run.returncode == 1
    assert "fp32 on onnxruntime: output 'embedding' is off by" in run.stderr


def test_a_variant_past_the_budget_exits_1_and_changes_no_choice(text: Path, stage: RunHere) -> None:
    replace_in(text / "models" / "text" / "deploy.toml", 'metric = "self_retrieval"\nmax_drop = 0.1', "max_drop = 0.0")
    choice = text / "build" / "text" / "choice-onnxruntime.json"
    before = choice.read_bytes()
    run = stage("select-precision", "--precision", "int8")
    assert run.returncode == 1
    assert "no candidate is inside max_drop 0.00%" in run.stderr
    assert choice.read_bytes() == before

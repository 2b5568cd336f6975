"""Parity, the accuracy budget and the choice."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from deepseek.spec import Axis, DeploymentSpec, GateFailed, Target
from export.accuracy import metric_drop, parity, similarity
from export.artifact import load_rows, save_rows
from export.compare import add_speed, choose, time_interleaved
from export.runners import within_batch
from tests.conftest import run_module

IMAGE = DeploymentSpec.load("tests/models/image")


def variant(drop: float, speedup: float) -> dict[str, Any]:
    return {"drop": drop, "speedup": speedup, "faster": speedup > 1, "rival": "fp32", "over_rival": speedup}


def test_the_fastest_inside_the_budget_is_chosen() -> None:
    variants = {"fp32": variant(0, 1), "fp16": variant(0.001, 1.5), "int8": variant(0.009, 2)}
    assert choose(variants, ["fp16", "int8"], 0.01)[0] == "int8"
    chosen, reasons = choose(variants, ["fp16", "int8"], 0.005)
    assert chosen == "fp16"
    assert reasons["int8"] == "outside the budget: drop 0.90% > 0.50%"


def test_a_candidate_that_is_not_faster_is_not_worth_its_loss() -> None:
    variants = {"fp32": variant(0, 1), "fp16": variant(0, 0.5), "int8": variant(0.2, 3)}
    chosen, reasons = choose(variants, ["fp16", "int8"], 0.01)
    assert chosen == "fp32"
    assert reasons["fp16"] == "inside, but not faster than fp32 (0.50x)"


def test_one_asked_for_by_name_needs_only_the_budget() -> None:
    variants = {"fp32": variant(0, 1), "int8": variant(0, 0.5)}
    assert choose(variants, ["int8"], 0.01, asked=True)[0] == "int8"
    chosen, reasons = choose(variants, ["int8"], 0.01)
    assert (chosen, reasons["fp32"]) == ("fp32", "chosen: no candidate is faster inside the budget")


@pytest.mark.parametrize(
    ("target", "fp16_drop", "rival"),
    [("tensorrt", 0.001, "fp16"), ("tensorrt", 0.1, "fp32"), ("onnxruntime", 0.001, "fp32")],
    ids=["on a GPU", "fp16 is outside the budget", "on a CPU"],
)
def test_8_bits_have_to_beat_fp16_on_a_gpu(target: Target, fp16_drop: float, rival: str) -> None:
    variants: dict[str, Any] = {"fp32": {"drop": 0.0}, "fp16": {"drop": fp16_drop}, "int8": {"drop": 0.002}}
    seconds = {"fp32": [4.0] * 9, "fp16": [1.0] * 9, "int8": [2.0] * 9}
    add_speed(variants, seconds, 8, target, 0.01)
    assert (variants["int8"]["rival"], variants["int8"]["speedup"]) == (rival, 2.0)
    chosen, reasons = choose(variants, ["fp16", "int8"], 0.01)
    assert chosen == ("fp16" if fp16_drop < 0.01 else "int8")
    assert reasons["int8"].startswith("inside, but not faster than fp16 (0.50x)") == (rival == "fp16")


def test_8_bits_that_beat_only_a_slow_fp16_are_not_chosen() -> None:
    variants: dict[str, Any] = {name: {"drop": 0.001} for name in ("fp32", "int8", "fp16")}
    seconds = {"fp32": [1.0] * 20, "fp16": [1.3] * 20, "int8": [0.98] * 11 + [1.15] * 9}
    add_speed(variants, seconds, 8, "tensorrt", 0.01)
    assert choose(variants, ["int8", "fp16"], 0.01)[0] == "fp32"
    assert (variants["int8"]["rival"], variants["int8"]["faster"]) == ("fp32", False)


def test_a_hopeless_candidate_leaves_fp32() -> None:
    variants = {"fp32": variant(0, 1), "int8": variant(math.inf, 2)}
    assert choose(variants, ["int8"], 0.01)[0] == "fp32"


@pytest.mark.parametrize("drop", [0.02, math.inf, math.nan])
def test_no_candidate_inside_is_a_failed_gate(drop: float) -> None:
    with pytest.raises(GateFailed, match=r"no candidate is inside max_drop 1.00%"):
        choose({"fp32": variant(0, 1), "int8": variant(drop, 2)}, ["int8"], 0.01, asked=True)


def test_rounding_is_no_drop() -> None:
    assert metric_drop("similarity", 1 - 1e-13, 1.0) == 0
    assert metric_drop("similarity", 1 - 1e-7, 1.0) > 0


def outputs(scores: list[float], features: list[float]) -> dict[str, np.ndarray]:
    return {"scores": np.array(scores, np.float32), "features": np.array(features, np.float32)}


def test_parity_tells_errors_cosine_and_top_of_each_output() -> None:
    reference = [outputs([1, 2], [4, 0]), outputs([2, 1], [0, 4])]
    report = parity(IMAGE, [outputs([1, 2], [4, 0]), outputs([1, 2], [0, 3])], reference)
    assert report["scores"]["worst_error"] == pytest.approx(0.5)
    assert report["scores"]["top_agreement"] == 0.5
    assert report["features"]["worst_error"] == pytest.approx(0.25)
    assert report["features"]["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_none_is_an_infinite_error(bad: float) -> None:
    report = parity(IMAGE, [outputs([1, bad], [1, 1])], [outputs([1, 2], [1, 1])])
    assert report["scores"]["worst_error"] == math.inf
    assert similarity(report) == -1


def test_integer_outputs_are_compared_as_lists_of_items() -> None:
    spec = DeploymentSpec.load("models/recommender")
    reference = [{"items": np.array([1, 2, 3, 4]), "scores": np.ones(4, np.float32)}]
    report = parity(spec, [{"items": np.array([2, 1, 3, 9]), "scores": np.ones(4, np.float32)}], reference)
    assert report["items"] == {"common": 0.75, "top_agreement": 0.0}


@pytest.mark.parametrize(("least", "seen"), [(1, [4, 4, 2]), (4, [4, 4, 4])], ids=["any batch", "a fixed one"])
def test_a_batch_past_the_profile_is_taken_apart(least: int, seen: list[int]) -> None:
    sizes = []

    def predict(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2}

    result = within_batch(predict, Axis(min=least, opt=4, max=4))({"x": np.arange(10)})
    assert sizes == seen
    assert result["y"].tolist() == list(range(0, 20, 2))


def test_timing_takes_each_in_turn() -> None:
    calls: list[str] = []
    seconds = time_interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")})
    assert calls[2:8] == ["a", "b"] * 3
    assert len(seconds["a"]) == len(seconds["b"]) > 8


def test_the_choice_and_each_manifest_hold_the_accuracy(built: Path) -> None:
    choice = json.loads((built / "build" / "text" / "choice-onnxruntime.json").read_text())
    assert choice["chosen"] in choice["variants"]
    assert choice["metric"] == "self_retrieval"
    for precision in ("fp32", "fp16", "int8"):
        manifest = json.loads((built / "build" / "text" / precision / "manifest.json").read_text())
        assert manifest["accuracy"]["metrics"] == choice["variants"][precision]["metrics"]


@pytest.fixture
def text(built: Path, tmp_path: Path) -> Path:
    """A folder with `models/` and `build/` of the model `text`, which may be changed."""
    shutil.copytree(built / "build" / "text", tmp_path / "build" / "text")
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")
    return tmp_path


def stage(folder: Path, name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A stage of the export for the model in that folder."""
    which = ("--models", str(folder / "models"), "--model", "text")
    return run_module(f"export.{name}", *which, *flags, BUILD=str(folder / "build"))


def test_where_fp32_has_none_of_the_metric_outputs_are_judged_and_it_is_said(text: Path) -> None:
    model = text / "models" / "text" / "model.py"
    model.write_text(model.read_text().replace('{"self_retrieval": float(', '{"self_retrieval": 0 * float('))
    said = "warning: self_retrieval of fp32 PyTorch is 0: evaluate() has too little data to judge by, or a mistake"
    made = stage(text, "quantize", "--precision", "int8", "--high-precision", "fp32")
    assert (made.returncode, said in " ".join(made.stderr.split())) == (0, True), made.stderr
    compared = stage(text, "compare")
    assert (compared.returncode, said in compared.stdout) == (0, True), compared.stderr
    choice = json.loads((text / "build" / "text" / "choice-onnxruntime.json").read_text())
    assert choice["metric"] == "similarity"
    int8 = choice["variants"]["int8"]
    assert int8["drop"] == pytest.approx(1 - int8["parity"]["embedding"]["cosine"], abs=1e-9)


def test_a_precision_that_was_never_built_says_how_and_is_no_verdict(text: Path) -> None:
    shutil.rmtree(text / "build" / "text" / "int8")
    for flags in (("--precision", "int8"), ()):
        run = stage(text, "compare", *flags)
        assert run.returncode == 2
        assert "int8/model.onnx: no such file; make it with: make engine " in run.stderr


def test_a_missing_execution_provider_is_no_fault_of_a_precision(text: Path) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this machine's ONNX Runtime has it")
    toml = text / "models" / "text" / "deploy.toml"
    toml.write_text(toml.read_text() + '[onnxruntime]\nprovider = "cuda"\n')
    made = stage(text, "quantize", "--precision", "fp16", "--candidate")
    compared = stage(text, "compare")
    for run in (made, compared):
        assert (run.returncode, run.stderr.count("\n")) == (2, 1), run.stderr
        assert "execution provider 'cuda' is not in ONNX Runtime" in run.stderr
    assert (text / "build" / "text" / "fp16" / "model.onnx").stat().st_size > 0


def test_a_graph_that_cannot_be_loaded_is_refused_and_the_others_go_on(text: Path) -> None:
    path = text / "build" / "text" / "fp16" / "model.onnx"
    path.write_bytes(path.read_bytes()[:1000])
    run = stage(text, "compare", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["refused"].keys() == {"fp16"}
    assert stage(text, "compare", "--precision", "fp16").returncode == 1


def test_a_profile_of_one_batch_is_compared(text: Path) -> None:
    toml = text / "models" / "text" / "deploy.toml"
    toml.write_text(toml.read_text().replace("min = 1\nopt = 4\nmax = 8", "min = 4\nopt = 4\nmax = 4"))
    assert stage(text, "to_onnx").returncode == 0
    run = stage(text, "compare", "--precision", "fp32", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["variants"]["fp32"]["metrics"] == result["pytorch"]["metrics"]
    assert result["timed_shapes"]["input_ids"][0] == 4


def test_speed_is_measured_at_the_usual_sizes_though_no_two_rows_share_a_shape(text: Path) -> None:
    path = text / "build" / "text" / "evaluation.npz"
    rows = {row["input_ids"].shape: row for row in load_rows(path)}
    save_rows(path, rows.values())
    run = stage(text, "compare", "--precision", "fp32", "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["rows"] == len(rows)
    assert result["timed_shapes"] == {"input_ids": [4, 16], "attention_mask": [4, 16]}


def test_a_number_that_is_none_is_null_in_json(text: Path) -> None:
    path = text / "build" / "text" / "int8" / "model.onnx"
    graph = onnx.load(path)
    graph.graph.node[-1].output[0] = "finite"
    graph.graph.node.append(onnx.helper.make_node("Div", ["finite", "nothing"], ["embedding"]))
    graph.graph.initializer.append(onnx.helper.make_tensor("nothing", onnx.TensorProto.FLOAT, [], [0.0]))
    onnx.save(graph, path)
    run = stage(text, "compare", "--json")
    for written in (run.stdout, (text / "build" / "text" / "choice-onnxruntime.json").read_text()):
        int8 = json.loads(written, parse_constant=pytest.fail)["variants"]["int8"]
        assert (int8["drop"], int8["parity"]["embedding"]["worst_error"]) == (None, None)


def test_a_graph_of_another_model_is_no_fp32_however_good_its_metric(text: Path) -> None:
    model = text / "models" / "text" / "model.py"
    model.write_text(model.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    run = stage(text, "compare", "--precision", "fp32")
    assert run.returncode == 1
    assert "fp32 on onnxruntime: output 'embedding' is off by" in run.stderr


def test_a_variant_past_the_budget_exits_1_and_changes_no_choice(built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "build" / "image", tmp_path / "build" / "image")
    shutil.copytree("tests/models/image", tmp_path / "models" / "image")
    toml = tmp_path / "models" / "image" / "deploy.toml"
    toml.write_text(toml.read_text().replace("max_drop = 0.05", "max_drop = 0.0"))
    before = (tmp_path / "build" / "image" / "choice-onnxruntime.json").read_bytes()
    flags = ("--models", str(tmp_path / "models"), "--model", "image", "--precision", "int8")
    run = run_module("export.compare", *flags, BUILD=str(tmp_path / "build"))
    assert run.returncode == 1
    assert "no candidate is inside max_drop 0.00%" in run.stderr
    assert (tmp_path / "build" / "image" / "choice-onnxruntime.json").read_bytes() == before

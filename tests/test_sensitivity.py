"""The sensitivity pass: which layers stay high if 8 bits break the budget, and when none helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.quantization import HighPrecision, QuantConfig
from deepseek.spec import build_dir
from deepseek.spec.paired_drop import DropJudgement, judge_drop
from export.artifact import json_text
from export.model_folder import ModelFolder
from export.precision import sensitivity
from export.precision.sensitivity import fewest_high, sensitivity_pass, squared_errors, verdict
from export.stages.quantize import quantize_model, show
from export.stages.select_precision import compare
from export.stages.select_precision import show as show_choice
from export.stages.to_onnx import export_model

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_build")]

TOML = """
name = "small"
[inputs.x]
dtype = "float32"
shape = ["batch", 64]
[outputs.y]
dtype = "float32"
shape = ["batch", 64]
[axes.batch]
min = {least}
opt = {most}
max = {most}
[precision]
candidates = ["int8"]
max_drop = 0.001
calibration_samples = 48
"""
MODEL = """
import numpy as np
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        # A few channels ten million times larger than the rest, which alone say anything.
        self.spread = nn.Buffer(torch.where(torch.arange(64) < 4, 1e4, 1e-3))
        self.told = nn.Buffer((torch.arange(64) >= 4).float()[:, None] * torch.randn(64, 64) * 1e2)

    def forward(self, x):
        {body}

def load():
    torch.manual_seed(0)
    return Small()

def samples(split):
    random = np.random.default_rng(len(split))
    for _ in range(48):
        yield {{"x": random.standard_normal((1, 64)).astype(np.float32)}}
"""
OUTLIERS = "((self.first(x) * self.spread) @ self.told)"


def small(folder: Path, body: str, *, batch: tuple[int, int] = (1, 4)) -> ModelFolder:
    """A model folder `small` with three layers of width 64, whose forward is `body`."""
    (folder / "small").mkdir()
    (folder / "small" / "deploy.toml").write_text(TOML.format(least=batch[0], most=batch[1]))
    (folder / "small" / "model.py").write_text(MODEL.format(body=body))
    return ModelFolder("small", folder)


def in_int8(source: ModelFolder, high: HighPrecision = "fp32") -> dict[str, Any]:
    """Exports and quantizes `small`."""
    export_model(source)
    data = build_dir("small") / "calibration.npz"
    return quantize_model(source.spec, QuantConfig(calibration_data=data, high_precision=high), source)


@pytest.mark.parametrize("high", ["fp32", "fp16"])
def test_the_layer_that_breaks_the_budget_is_found_and_stays_high(
    tmp_path: Path, high: HighPrecision, capsys: pytest.CaptureFixture[str]
) -> None:
    result = in_int8(small(tmp_path, f"return self.third(self.second(x).relu()) + {OUTLIERS}"), high)
    report = result["sensitivity"]
    assert [layer["high"] for layer in report["layers"]] == [True, False, False, False]
    assert sum(layer["share"] for layer in report["layers"]) == pytest.approx(1)
    assert report["layers"][0]["share"] > 0.9
    assert report["drop"] <= 0.001
    assert result["found"]["compute_operators"] == {"int8": 3, high: 1}
    assert result["settings"]["keep_high"] == [f"^{report['layers'][0]['name']}$"]
    assert json.loads((build_dir("small") / "int8" / "sensitivity.json").read_text()) == report
    show(result, high)
    said, rows = capsys.readouterr().out, report["rows"]
    assert f"1 of 4 layers stay {high}" in said
    assert f"layers chosen on {rows['chosen_on']} rows, judged on {rows['judged_on']} others" in said
    assert (rows["chosen_on"] + rows["judged_on"], min(rows.values()) > 0) == (48, True)


def test_a_choice_that_keeps_the_budget_only_on_its_own_rows_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "quantized_layers", lambda model: {"a": "MatMul", "b": "MatMul"})
    monkeypatch.setattr(sensitivity, "layer_shares", lambda model, run: {"a": 0.9, "b": 0.1})
    monkeypatch.setattr(sensitivity, "with_high", lambda model, names: model)
    graph: Any = "graph"
    drops = {True: 0.001, False: 0.03}

    def judged(drop: float) -> DropJudgement:
        return judge_drop(drop, None, max_drop=0.01, candidates=1)

    _, report = sensitivity_pass(
        graph, lambda model: [], lambda model: judged(0.5), lambda model, own: judged(drops[own])
    )
    assert (report["held"], report["drop"]) == (False, 0.03)
    assert report["tried"] == [{"high": 1, "drop": 0.001}]
    told = "int8 misses the budget on the rows that judge: drop 3.00%, 1.00% allowed"
    assert verdict(report, "int8", "fp16") == told


def test_a_model_that_cannot_meet_the_budget_is_reported_and_fp32_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small(tmp_path, "return (x * self.spread) @ self.told + (x.relu() * self.spread) @ self.told.flip(1)")
    result = in_int8(source)
    assert result["found"]["compute_operators"] == {"int8": 2}
    choice = compare(source, "onnxruntime", None)
    assert choice["chosen"] == "fp32"
    assert choice["variants"]["int8"]["reason"].startswith("outside the budget: drop ")
    show_choice(choice)
    shown = capsys.readouterr().out
    assert "int8 cannot meet the budget: drop " in shown
    assert "share of the error" in shown


def test_a_nan_drop_is_null_in_json_and_infinite_in_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = in_int8(small(tmp_path, "return 1 / ((x * self.spread) @ self.told)"))  # at 8 bits one over nothing
    written = (build_dir("small") / "int8" / "sensitivity.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["drop"] is None
    json.loads(json_text(result), parse_constant=pytest.fail)
    show(result, "fp32")
    assert "int8 cannot meet the budget: drop infinite, 0.10% allowed" in capsys.readouterr().out


def test_inside_the_budget_nothing_is_tried(tmp_path: Path) -> None:
    report = in_int8(small(tmp_path, "return self.second(self.first(x).relu())"))["sensitivity"]
    assert (report["held"], report["layers"], report["tried"]) == (True, [], [])


@pytest.mark.parametrize(("needed", "tries"), [(1, 1), (2, 2), (5, 6), (9, 5)])
def test_only_as_many_layers_stay_high_as_the_budget_needs(needed: int, tries: int) -> None:
    names = [f"layer{index}" for index in range(10)]
    kept, tried = fewest_high(names, lambda high: 0.0 if len(high) >= needed else 0.5, 0.01)
    assert kept == names[:needed]
    assert len(tried) == tries


@pytest.mark.parametrize("count", [1, 2, 7])
def test_at_least_one_layer_has_to_stay_at_8_bits(count: int) -> None:
    names = [f"layer{index}" for index in range(count)]
    kept, tried = fewest_high(names, lambda _: float("nan"), 0.01)
    assert kept is None
    assert max((each["high"] for each in tried), default=0) == count - 1


def test_errors_are_relative_squares_and_shares_of_entries() -> None:
    reference = [{"y": np.array([3.0, 4.0], np.float32), "items": np.array([1, 2, 3, 4])}]
    outputs = [{"y": np.array([3.0, 5.0], np.float32), "items": np.array([2, 1, 3, 9])}]
    assert squared_errors(outputs, reference) == [pytest.approx(1 / 25), pytest.approx(0.25)]
    outputs[0]["y"][0] = np.nan
    assert squared_errors(outputs, reference)[0] == 1e9

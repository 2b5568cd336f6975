"""The sensitivity pass: which layers stay high where 8 bits break the budget, and what is hopeless."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.quantization import HighPrecision, QuantConfig
from deepseek.spec import build_dir
from export.artifact import json_text
from export.compare import compare
from export.compare import show as show_choice
from export.quantize import quantize_model, show
from export.sensitivity import fewest_high, squared_errors
from export.source import Source
from export.to_onnx import export_model

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


def small(folder: Path, body: str, *, batch: tuple[int, int] = (1, 4)) -> Source:
    """A model folder `small` of three layers of 64, whose forward is `body`."""
    (folder / "small").mkdir()
    (folder / "small" / "deploy.toml").write_text(TOML.format(least=batch[0], most=batch[1]))
    (folder / "small" / "model.py").write_text(MODEL.format(body=body))
    return Source("small", folder)


def in_int8(source: Source, high: HighPrecision = "fp32") -> dict[str, Any]:
    """Takes `small` through export and quantization."""
    export_model(source)
    data = build_dir("small") / "calibration.npz"
    return quantize_model(source.spec, QuantConfig(calibration_data=data, high_precision=high), source)


@pytest.fixture(autouse=True)
def _own_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))


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
    assert f"1 of 4 layers stay {high}" in capsys.readouterr().out


def test_a_hopeless_model_is_said_to_be_and_fp32_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = small(tmp_path, "return (x * self.spread) @ self.told + (x.relu() * self.spread) @ self.told.flip(1)")
    result = in_int8(source)
    assert result["found"]["compute_operators"] == {"int8": 2}
    choice = compare(source, "onnxruntime", None)
    assert choice["chosen"] == "fp32"
    assert choice["variants"]["int8"]["reason"].startswith("outside the budget: drop ")
    show_choice(choice)
    shown = capsys.readouterr().out
    assert "hopeless in int8: drop " in shown
    assert "share of the error" in shown


def test_a_drop_without_a_number_is_null_in_json_and_infinite_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = in_int8(small(tmp_path, "return 1 / ((x * self.spread) @ self.told)"))  # at 8 bits one over nothing
    written = (build_dir("small") / "int8" / "sensitivity.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["drop"] is None
    json.loads(json_text(result), parse_constant=pytest.fail)
    show(result, "fp32")
    assert "hopeless in int8: drop infinite, 0.10% allowed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["[/x]", "[batch]"])
def test_a_layer_in_brackets_is_shown_as_it_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    layers = [{"name": name, "operator": "MatMul", "share": 1.0, "high": True}]
    report = {"held": True, "drop": 0.0, "max_drop": 0.001, "layers": layers, "tried": []}
    found = {"compute_operators": {"fp32": 1}}
    show({"path": "a", "size_bytes": 1, "precision": "int8", "found": found, "sensitivity": report}, "fp32")
    assert name in capsys.readouterr().out


def test_inside_the_budget_nothing_is_tried(tmp_path: Path) -> None:
    report = in_int8(small(tmp_path, "return self.second(self.first(x).relu())"))["sensitivity"]
    assert (report["held"], report["layers"], report["tried"]) == (True, [], [])


@pytest.mark.parametrize(("needed", "tries"), [(1, 1), (2, 2), (5, 6), (9, 5)])
def test_as_few_layers_stay_high_as_the_budget_needs(needed: int, tries: int) -> None:
    names = [f"layer{index}" for index in range(10)]
    kept, tried = fewest_high(names, lambda high: 0.0 if len(high) >= needed else 0.5, 0.01)
    assert kept == names[:needed]
    assert len(tried) == tries


@pytest.mark.parametrize("count", [1, 2, 7])
def test_one_layer_at_least_has_to_stay_at_8_bits(count: int) -> None:
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


def test_errors_of_labels_count_place_by_place() -> None:
    reference, outputs = [{"labels": np.array([0, 1, 0, 1])}], [{"labels": np.array([0, 0, 0, 1])}]
    assert squared_errors(outputs, reference) == [pytest.approx(0.25)]

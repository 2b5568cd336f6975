"""The sensitivity pass: which layers stay high if 8 bits break the budget, and when none helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.quantization import QuantConfig
from deepseek.spec import build_dir
from deepseek.spec.paired_drop import DropJudgement, judge_drop
from export.artifact import json_text
from export.model_folder import ModelFolder
from export.precision import sensitivity
from export.precision.sensitivity import fewest_high, sensitivity_pass, squared_errors, verdict
from export.stages.quantize import quantize_model, show
from export.stages.to_onnx import export_model
from tests.tiny_model import SIZES, TOML, tiny

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_build")]

LAYERS = """
def load():
    torch.manual_seed(0)
    model = Tiny()
    model.first, model.second, model.third = (torch.nn.Linear(64, 64) for _ in range(3))
    # A few channels ten million times larger than the rest, which alone say anything.
    model.spread = torch.nn.Buffer(torch.where(torch.arange(64) < 4, 1e4, 1e-3))
    model.told = torch.nn.Buffer((torch.arange(64) >= 4).float()[:, None] * torch.randn(64, 64) * 1e2)
    return model

def samples(split):
    random = np.random.default_rng(len(split))
    for _ in range(48):
        yield {"x": random.standard_normal((1, 64)).astype(np.float32)}
"""
OUTLIERS = "((self.first(x) * self.spread) @ self.told)"


def small(folder: Path, body: str, *, batch: tuple[int, int] = (1, 4)) -> ModelFolder:
    """A model folder `small` with three layers of width 64, whose forward is `body`."""
    least, most = batch
    toml = TOML.replace("8]", "64]").replace(SIZES, f"min = {least}\nopt = {most}\nmax = {most}")
    budget = '[precision]\ncandidates = ["int8"]\nmax_drop = 0.001\ncalibration_samples = 48\n'
    return tiny(folder, toml=toml + budget, body=body, code=LAYERS, name="small")


def test_the_layer_that_breaks_the_budget_is_found_and_stays_high(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = small(tmp_path, f"return self.third(self.second(x).relu()) + {OUTLIERS}")
    export_model(source)
    data = build_dir("small") / "calibration.npz"
    result = quantize_model(source.spec, QuantConfig(calibration_data=data, calibration_method="max"), source)
    report = result["sensitivity"]
    assert [layer["high"] for layer in report["layers"]] == [True, False, False, False]
    assert sum(layer["share"] for layer in report["layers"]) == pytest.approx(1)
    assert report["layers"][0]["share"] > 0.9
    assert report["drop"] <= 0.001
    assert result["found"]["compute_operators"] == {"int8": 3, "fp16": 1}
    assert result["settings"]["keep_high"] == [f"^{report['layers'][0]['name']}$"]
    assert json.loads((build_dir("small") / "int8" / "sensitivity.json").read_text()) == report
    show(result, "fp16")
    said, rows = capsys.readouterr().out, report["rows"]
    assert "1 of 4 layers stay fp16" in said
    assert "share of the error" in said
    assert f"layers chosen on {rows['chosen_on']} rows, judged on {rows['judged_on']} others" in said
    assert (rows["chosen_on"] + rows["judged_on"], min(rows.values()) > 0) == (48, True)


INFINITE = float("inf")


@pytest.mark.parametrize(
    ("whole", "choosing", "judging", "tried", "told"),
    [
        (0.001, 1, 1, [], "drop 0.10%, inside the 1.00% allowed"),
        (0.5, 0.001, 0.002, [0.001], "1 of 2 layers stay fp16; drop 0.20%, inside the 1.00% allowed"),
        (0.5, 0.001, 0.03, [0.001], "int8 misses the budget on the rows that judge: drop 3.00%, 1.00% allowed"),
        (0.5, 0.4, 1, [0.4], "int8 cannot meet the budget: drop 50.00%, 1.00% allowed; at best 40.00%, with 1 of 2 layers kept fp16"),
        (INFINITE, INFINITE, 1, [None], "int8 cannot meet the budget: drop infinite, 1.00% allowed; at best infinite, with 1 of 2 layers kept fp16"),
    ],
    ids=["inside: nothing is tried", "one layer", "only on its own rows", "hopeless", "NaN outputs"],
)  # fmt: skip
def test_the_drop_on_the_rows_that_judge_decides(
    whole: float, choosing: float, judging: float, tried: list[Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity, "quantized_layers", lambda model: {"a": "MatMul", "b": "MatMul"})
    monkeypatch.setattr(sensitivity, "layer_shares", lambda model, run: {"a": 0.9, "b": 0.1})
    monkeypatch.setattr(sensitivity, "with_high", lambda model, names: model)

    def judged(drop: float) -> DropJudgement:
        return judge_drop(drop, None, max_drop=0.01, candidates=1)

    def on_half(model: object, own: bool) -> DropJudgement:
        return judged(choosing if own else judging)

    graph: Any = "graph"
    _, report = sensitivity_pass(graph, lambda model: [], lambda model: judged(whole), on_half)
    read = json.loads(json_text(report), parse_constant=pytest.fail)
    assert ([each["drop"] for each in read["tried"]], verdict(read, "int8", "fp16")) == (tried, told)
    assert read["held"] == ("inside" in told)


def test_a_hopeless_precision_is_reported_with_the_rows_of_each_drop() -> None:
    tried = [{"drop": 0.04, "high": 1}]
    report = {"drop": 0.02, "max_drop": 0.01, "held": False, "tried": tried, "layers": [{}, {}]}
    rows = {"rows": {"chosen_on": 24, "judged_on": 24}}
    assert verdict(report | rows, "int8", "fp32").endswith(
        "; at best 4.00% on 24 rows to choose by, with 1 of 2 layers kept fp32"
    )


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
    reference.append({"y": np.array([-np.inf, np.nan, 5.0], np.float32), "items": np.array([1])})
    outputs.append({"y": np.array([-np.inf, np.nan, 5.0], np.float32), "items": np.array([1])})
    assert squared_errors(outputs, reference)[0] == pytest.approx(1 / 50)
    outputs[1]["y"][0] = 3
    assert squared_errors(outputs, reference)[0] == 1e9
    outputs[0]["y"][0] = np.nan
    assert squared_errors(outputs, reference)[0] == 1e9

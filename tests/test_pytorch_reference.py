"""Checks of a model's samples and metric before anything is exported or quantized."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export.model_folder import ModelFolder
from export.precision.accuracy import check_metric, metric_drop
from export.rows import load_rows
from export.runtimes import pytorch_reference as reference
from export.runtimes.pytorch_reference import module_predictor
from export.stages.to_onnx import export_model
from tests.conftest import RunHere
from tests.tiny_model import TOML, tiny

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("own_build")]


FEW_IDS = """
def samples(split):
    for each in range({evaluation} if split == "evaluation" else 12):
        yield {{"x": np.full((1, 8), each, np.float32)}}
"""


def test_samples_in_both_splits_are_left_out_of_the_calibration(tmp_path: Path, run_here: RunHere) -> None:
    tiny(tmp_path, code=FEW_IDS.format(evaluation=5))
    run = run_here("to-onnx", "--models", str(tmp_path), "--model", "tiny")
    assert "calibration: 5 samples are also evaluation samples and were left out; only 7 are left" in run.stdout, (
        run.stderr
    )
    left = load_rows(tmp_path / "build" / "tiny" / "calibration.npz")
    assert sorted(float(row["x"][0, 0]) for row in left) == [5, 6, 7, 8, 9, 10, 11]


def test_without_calibration_samples_only_fp32_is_built(tmp_path: Path) -> None:
    code, toml = FEW_IDS.format(evaluation=12), TOML + '[precision]\ncandidates = ["fp32"]\n'
    result = export_model(tiny(tmp_path, toml=toml, code=code))
    assert (result["rows"]["calibration"], result["shared_rows"]) == (0, 12)
    (tmp_path / "tiny" / "deploy.toml").write_text(TOML)
    with pytest.raises(InputError, match="12 of 12 calibration rows are also evaluation rows"):
        export_model(ModelFolder("tiny", tmp_path))


def test_outputs_that_do_not_fit_in_memory_are_one_error_line_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny(tmp_path, body="raise RuntimeError('run')")
    monkeypatch.setattr(reference, "memory_bytes", lambda: 3000)  # four times 9 rows, and 2 x 12 rows of 32 bytes
    with pytest.raises(
        InputError,
        match=r"of a variant, take 768 B, running the largest sizes of deploy.toml 2.2 KiB, this machine has",
    ):
        export_model(source)
    monkeypatch.setattr(reference, "memory_bytes", lambda: 3100)
    with pytest.raises(InputError, match="RuntimeError: run"):
        export_model(source)


def judged(folder: Path, returned: str, noise: float = 0.2) -> ModelFolder:
    """A model whose targets are its own outputs plus an error, and whose metric is `returned`."""
    code = """
def evaluate(predict):
    model = load()
    true, seen = [], []
    for sample in samples("evaluation"):
        with torch.inference_mode():
            true.append(model(torch.tensor(sample["x"]))[0, 0].item() + {noise} * (len(true) % 2 - 0.5))
        seen.append(predict(sample)["y"][0, 0].item())
    true, seen = np.array(true), np.array(seen)
    return {{"score": {returned}}}
"""
    return tiny(folder, toml=TOML + '[precision]\nmetric = "score"\n', code=code.format(returned=returned, noise=noise))


@pytest.mark.parametrize(
    ("returned", "noise", "message"),
    [
        ("np.sqrt(((true - seen) ** 2).mean())", 0.2, r"deploy.toml: precision.metric: score of fp32 PyTorch is 0.1, and \S+ or more if rows get the outputs of other rows"),
        ("np.sqrt(((true - seen) ** 2).mean())", 1.0, r"score of fp32 PyTorch is 0.5, and \S+ or more if rows get the outputs"),
        ("-np.abs(true - seen).mean()", 0.2, r"score of fp32 PyTorch is -0.1; a relative drop needs a positive number"),
    ],
    ids=["an error", "an error that explains half of the variance", "a negated error"],
)  # fmt: skip
def test_a_metric_where_smaller_is_better_is_refused_before_anything_is_built(
    tmp_path: Path, returned: str, noise: float, message: str
) -> None:
    with pytest.raises(
        InputError, match=f"{message}.* larger must be better: .* return for example 1 / \\(1 \\+ score\\)"
    ):
        export_model(judged(tmp_path, returned, noise))
    assert not (tmp_path / "build" / "tiny" / "fp32" / "model.onnx").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_metric_that_is_no_number_is_refused_without_advice_about_errors(value: float) -> None:
    with pytest.raises(
        InputError, match=rf"score of fp32 PyTorch is {value}; a relative drop needs a positive number$"
    ):
        metric_drop("score", value, value)


@pytest.mark.parametrize(
    "returned",
    [
        "1 / (1 + np.sqrt(((true - seen) ** 2).mean()))", "1.0", "np.mean(seen > 0) + 0.5", "1 // int((np.abs(true - seen) < 0.11).all())",
        *(f"next(globals().setdefault('own_then_dealt', iter({values})))" for values in ((1, 1, 1.2), (1, 1, 2.5, 9, 2.5, 2.5, 2.5))),
    ],
    ids=["error turned around", "constant", "independent of the order", "fails on other outputs", "near chance", "near chance, as far as they differ"],
)  # fmt: skip
def test_a_metric_where_larger_is_better_or_that_is_undecided_is_accepted(tmp_path: Path, returned: str) -> None:
    source = judged(tmp_path, returned)
    check_metric(source, module_predictor(source.spec, source.load()))


def test_a_metric_that_no_output_enters_is_refused(tmp_path: Path) -> None:
    code = "\ndef evaluate(predict):\n    return {'score': 1.0}\n"
    source = tiny(tmp_path, toml=TOML + '[precision]\nmetric = "score"\n', code=code)
    with pytest.raises(InputError, match=r"evaluate\(\) never calls predict, so 'score' is not of the served model"):
        check_metric(source, module_predictor(source.spec, source.load()))


@pytest.mark.parametrize("returned", ["0.5 + np.random.random()", "0.5 + np.random.random(3)"], ids=["number", "rows"])
def test_a_metric_that_differs_from_call_to_call_is_refused(tmp_path: Path, returned: str) -> None:
    source = judged(tmp_path, returned)
    with pytest.raises(InputError, match=r"evaluate\(\) called twice with the same predict gives another 'score' \("):
        check_metric(source, module_predictor(source.spec, source.load()))

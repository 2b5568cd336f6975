"""The accuracy of a candidate: parity and its tolerances, the drop of its metric, and the rows that judge it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest

from deepseek.spec import Axis, DeploymentSpec, GateFailed, InputError, ParitySpec, Precision
from deepseek.spec.paired_drop import judge_drop
from export.checks.parity_cases import beyond, failures
from export.model_folder import Predict
from export.precision import accuracy_budget
from export.precision.accuracy import Evaluated, evaluated, metric_drop, paired_drop, parity, similarity
from export.precision.accuracy_budget import Baseline, measured
from export.runtimes.batching import within_batch
from export.stages import select_precision

IMAGE = DeploymentSpec.load("tests/models/image")


def test_rounding_is_no_drop() -> None:
    assert metric_drop("similarity", 1 - 1e-13, 1.0) == 0
    assert metric_drop("similarity", 1 - 1e-7, 1.0) > 0


def outputs(scores: list[float], features: list[float]) -> dict[str, np.ndarray]:
    return {"scores": np.array(scores, np.float32), "features": np.array(features, np.float32)}


def test_parity_has_errors_cosine_and_top_agreement_of_each_output() -> None:
    reference = [outputs([1, 2], [4, 0]), outputs([2, 1], [0, 4])]
    report = parity(IMAGE, [outputs([1, 2], [4, 0]), outputs([1, 2], [0, 3])], reference)
    assert report["scores"]["worst_error"] == pytest.approx(0.5)
    assert report["scores"]["top_agreement"] == 0.5
    assert report["features"]["worst_error"] == pytest.approx(0.25)
    assert report["features"]["cosine"] == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_counts_as_an_infinite_error_in_parity(bad: float) -> None:
    report = parity(IMAGE, [outputs([1, bad], [1, 1])], [outputs([1, 2], [1, 1])])
    assert report["scores"]["worst_error"] == math.inf
    assert similarity(report) == -1


@pytest.mark.parametrize(("least", "seen"), [(1, [4, 4, 2]), (4, [4, 4, 4])], ids=["any batch", "a fixed one"])
def test_a_batch_past_the_profile_is_split(least: int, seen: list[int]) -> None:
    sizes = []

    def predict(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"] * 2}

    result = within_batch(predict, Axis(min=least, opt=4, max=4))({"x": np.arange(10)})
    assert sizes == seen
    assert result["y"].tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize(
    ("tf32", "error", "passes"),
    [(False, 0.001, True), (False, 0.0011, False), (True, 0.01, True), (True, 0.011, False)],
)
def test_fp32_has_to_match_pytorch(tf32: bool, error: float, passes: bool) -> None:
    report = {"items": {"common": 1.0}, "scores": {"worst_error": error}}
    with nullcontext() if passes else pytest.raises(GateFailed, match=r"output 'scores' is off by 0\.0+11 from"):
        select_precision._check_fp32(IMAGE, "tensorrt", report, tf32=tf32)


ROWS = [{"pixels": np.full((3, 32, 32), value, np.float32)} for value in (1, 2)]
SCORES = [outputs([1, 2], [4, 0]), outputs([2, 1], [0, 4])]


def scaled(scale: float, answers: list[dict[str, np.ndarray]] = SCORES) -> Predict:
    """A predictor that returns these outputs, with the features times `scale`."""
    rows = {"scores": [row["scores"] for row in answers], "features": [row["features"] * scale for row in answers]}
    return lambda inputs: {name: np.stack(arrays)[: len(inputs["pixels"])] for name, arrays in rows.items()}


def baseline(metric: str | None = None, reference: float = 0.8, **changes: Any) -> Baseline:
    """A baseline with outputs SCORES over ROWS; evaluate() returns 0.6 for every variant."""
    precision = IMAGE.precision.model_copy(update={"metric": metric})
    source: Any = SimpleNamespace(
        spec=IMAGE.model_copy(update={"precision": precision}), folder=Path("m"), evaluate=lambda _: {"accuracy": 0.6}
    )
    facts: dict[str, Any] = {"rows": ROWS, "outputs": SCORES, "unpruned_outputs": SCORES}
    facts["evaluated"] = Evaluated(metrics={"accuracy": reference})
    return Baseline(source=source, predict=scaled(1), **facts | changes)


def test_the_drop_is_that_of_the_metric_or_without_one_of_the_outputs() -> None:
    assert baseline("accuracy").measure(scaled(1))["drop"] == pytest.approx(0.25)
    assert baseline("accuracy", reference=0.0).measure(scaled(1))["drop"] == 0  # a metric of 0 cannot drop
    plain = baseline().measure(scaled(0.5))
    assert (plain["drop"], plain["metrics"]) == (0, {})  # the direction is the same
    assert plain["parity"]["features"]["worst_error"] == pytest.approx(0.5)
    pruned = baseline(unpruned_outputs=[outputs([1, 2], [0, 1]), outputs([2, 1], [0, 4])]).measure(scaled(1))
    assert (pruned["drop"], pruned["parity"]["features"]["cosine"]) == (pytest.approx(0.5), pytest.approx(1))


@pytest.mark.parametrize("by_row", [False, True])
def test_each_half_of_the_rows_has_its_own_drop_also_with_a_metric(by_row: bool) -> None:
    rows = [{"x": np.full((1, 3), place, np.float32)} for place in range(40)]
    answers = [{"scores": row["x"][0], "features": row["x"][0]} for row in rows]
    known = {"outputs": answers, "unpruned_outputs": answers}

    def reference(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"scores": inputs["x"], "features": inputs["x"]}

    def wrong(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every fourth row is wrong."""
        return {name: np.where(inputs["x"] % 4 == 0, -1, array) for name, array in reference(inputs).items()}

    def evaluate(predict: Predict) -> dict[str, Any]:
        inputs = np.concatenate([row["x"] for row in rows])
        right = (predict({"x": inputs})["scores"] == inputs).all(1)
        return {"accuracy": right if by_row else float(right.mean())}

    found = dataclasses.replace(baseline("accuracy", 1.0, rows=rows, **known), predict=reference)
    source: Any = SimpleNamespace(**{**vars(found.source), "evaluate": evaluate})
    spec = source.spec.model_copy(
        update={"inputs": {"x": source.spec.inputs["pixels"].model_copy(update={"shape": ("batch", 3)})}}
    )
    source.spec = spec
    found = dataclasses.replace(found, source=source, evaluated=evaluated(source, reference))
    halves = [
        [row["x"][0, 0] % 4 == 0 for row in rows if accuracy_budget._chooses(row) == own] for own in (True, False)
    ]
    assert found.half_sizes() == {"chosen_on": len(halves[0]), "judged_on": len(halves[1])}
    measured_on = [found.drop_on_half(wrong, choosing=own) for own in (True, False)]
    assert [drop for drop, _ in measured_on] == pytest.approx([sum(half) / len(half) for half in halves])
    sizes = [None if paired is None else paired.rows for _, paired in measured_on]
    assert sizes == ([len(half) for half in halves] if by_row else [None, None])


@pytest.mark.parametrize(
    ("sensitivity", "drop", "rows"),
    [
        (None, 0.0, {"drop": 40}),
        ({"layers": [], "held": True}, 0.0, {"drop": 40}),
        ({"judged": True}, 0.5, {"drop": 22, "chosen_on": 18}),
    ],
)
def test_rows_on_which_layers_were_chosen_do_not_judge_the_drop(
    sensitivity: Any, drop: float, rows: dict[str, int]
) -> None:
    reference: Any = SimpleNamespace(
        measure=lambda _: {"drop": 0.0, "paired": None, "rows": {"drop": 40}},
        drop_on_half=lambda _, choosing: (0.0 if choosing else 0.5, None),
        half_sizes=lambda: {"chosen_on": 18, "judged_on": 22},
    )
    found = select_precision._measured(reference, scaled(1), sensitivity)
    assert (found["drop"], found["rows"]) == (drop, rows)


def returning(*metrics: Any) -> Any:
    """A source whose evaluate() returns these, one a call."""
    answers = iter(metrics)
    source = baseline("accuracy").source
    return SimpleNamespace(**{**vars(source), "evaluate": lambda _: {"accuracy": next(answers), "other": 3}})


def test_a_metric_row_by_row_is_the_mean_of_the_rows_that_have_a_value() -> None:
    found = evaluated(returning([True, False, True, np.nan]), scaled(1))
    assert found.metrics == {"accuracy": pytest.approx(2 / 3), "other": 3}
    assert np.array_equal(found.values or [], [1, 0, 1, np.nan], equal_nan=True)
    assert evaluated(returning(0.5), scaled(1)) == Evaluated(metrics={"accuracy": 0.5, "other": 3})


@pytest.mark.parametrize(
    ("base", "own", "seen"),
    [
        ([1, 0, 1], [1, 0], "2 rows, 0 of them without a value for one predict, 3 rows, 0 of them without"),
        ([1, 0, 1], 0.5, "one number for one predict, 3 rows"),
        (0.5, [1, 0, 1], "3 rows, 0 of them without a value for one predict, one number for fp32 PyTorch"),
        ([1, 0, np.nan], [1, 0, 1], "3 rows, 0 of them without a value for one predict, 3 rows, 1 of them"),
    ],
)
def test_rows_that_cannot_be_paired_are_an_input_error(base: Any, own: Any, seen: str) -> None:
    source = returning(base, own)
    reference, found = evaluated(source, scaled(1)), evaluated(source, scaled(1))
    with pytest.raises(InputError, match=rf"m/model.py: evaluate\(\): 'accuracy': {seen}.* must not depend on predict"):
        paired_drop(source, found, reference)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_loses_its_value_is_an_infinite_drop(bad: float) -> None:
    source = returning([1, 1, np.nan], [1, bad, np.nan])
    reference, found = evaluated(source, scaled(1)), evaluated(source, scaled(1))
    assert paired_drop(source, found, reference) == (math.inf, None)


def test_the_drop_of_paired_rows_is_of_the_rows_with_a_value() -> None:
    source = returning([1, 1, np.nan, 0, 1], [1, 0, np.nan, 0, 1])
    reference, found = evaluated(source, scaled(1)), evaluated(source, scaled(1))
    drop, paired = paired_drop(source, found, reference)
    assert (drop, paired and paired.rows, paired and paired.drop) == (pytest.approx(1 / 3), 4, pytest.approx(1 / 3))


@pytest.mark.parametrize("metric", [None, "accuracy"])
def test_rows_that_are_all_in_one_half_judge_no_layers(metric: str | None) -> None:
    row = {"x": np.zeros((1, 3), np.float32)}
    found = baseline(metric, 1.0, rows=[row, row])
    for own in (True, False):
        with pytest.raises(GateFailed, match="too few different evaluation rows to choose layers on one half"):
            found.drop_on_half(scaled(1), choosing=own)


def test_a_metric_of_rows_that_are_all_in_one_half_judges_no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_budget, "_chooses", lambda row: row["pixels"].flat[0] == 1)
    found, row = baseline("accuracy", 1.0), {"pixels": np.ones((1, 3, 32, 32), np.float32)}
    found.source.evaluate = lambda predict: {"accuracy": float(predict(row)["scores"][0, 0])}
    for own in (True, False):
        with pytest.raises(GateFailed, match="too few different evaluation rows to choose layers on one half"):
            found.drop_on_half(scaled(1), choosing=own)


def test_outputs_at_which_evaluate_fails_are_an_infinite_drop_so_that_layers_are_kept_high(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def evaluate(predict: Predict) -> dict[str, float]:
        raise InputError("m/model.py:9: evaluate(): far off")

    found = baseline("accuracy", 1.0)
    source: Any = SimpleNamespace(**{**vars(found.source), "evaluate": evaluate})
    found = dataclasses.replace(found, source=source)
    assert found.judge(scaled(1)).drop == math.inf
    monkeypatch.setattr(accuracy_budget, "_chooses", lambda row: row["pixels"].flat[0] == 1)
    assert found.drop_on_half(scaled(1), choosing=True) == (math.inf, None)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_outputs_are_an_infinite_drop_with_any_metric(bad: float) -> None:
    answers = [outputs([1, 2], [bad, 0]), SCORES[1]]
    assert baseline("accuracy").measure(scaled(1, answers))["drop"] == math.inf


@pytest.mark.parametrize(("pruning", "drop"), [(None, 0.0), ({"ratio": 0.5}, 0.5)])
def test_the_loss_of_pruning_counts_toward_the_budget(
    pruning: Any, drop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpruned = scaled(1, [outputs([1, 2], [0, 1]), outputs([2, 1], [0, 4])])
    monkeypatch.setattr(accuracy_budget, "load_rows", lambda _: ROWS)
    monkeypatch.setattr(accuracy_budget, "pruning_of", lambda _: pruning)
    monkeypatch.setattr(accuracy_budget, "module_predictor", lambda *_: unpruned)
    source: Any = SimpleNamespace(spec=IMAGE, unpruned=object, evaluate=None)
    assert Baseline.of(source, scaled(1)).measure(scaled(1))["drop"] == pytest.approx(drop)


@pytest.mark.parametrize("drop", [0.011, np.inf, np.nan])
def test_a_metric_that_drops_too_far_fails_for_that_protocol(drop: float) -> None:
    judged = [asdict(judge_drop(each, None, max_drop=0.01, candidates=2)) for each in (0.01, drop)]
    served = {"http": {"judgement": judged[0]}, "grpc": {"judgement": judged[1]}}
    metric = {"name": "accuracy", "max_drop": 0.01, "served": served}
    assert len(failures([], metric)) == 1
    assert failures([], metric)[0].startswith("accuracy over grpc: drop ")


@pytest.mark.parametrize(
    ("numbers", "entries", "problem"),
    [
        ({"worst_error": 1e-3, "cosine": 0.9999}, 8, ""),
        ({"worst_error": 2e-3, "cosine": 1.0}, 8, "worst error 0.002 > 0.001"),
        ({"worst_error": 1e-4, "cosine": 0.99}, 8, "cosine 0.99000 < 0.9999"),
        ({"worst_error": np.inf, "cosine": -1.0}, 8, "NaN, Inf or shape differs"),
        ({"worst_error": np.nan, "cosine": 1.0}, 8, "NaN, Inf or shape differs"),
        ({"common": 0.95}, 20, ""),  # a tie may fall either way
        ({"common": 0.9}, 20, "2 of 20 entries differ, 1 allowed"),
        ({"common": 0.98}, 1000, "20 of 1000 entries differ, 10 allowed"),
    ],
)
def test_an_exceeded_tolerance_is_described(numbers: dict[str, float], entries: int, problem: str) -> None:
    assert beyond(ParitySpec().of("fp32"), numbers, entries) == problem


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_parity_page_lists_the_tolerances(precision: Precision) -> None:
    line = re.search(
        rf"^\| {precision} \| (.*?) \| (.*?) \| (.*?) \|", Path("docs/parity.md").read_text(), re.MULTILINE
    )
    tolerance = ParitySpec().of(precision)
    assert line
    assert [float(cell) for cell in line.groups()] == [tolerance.worst_error, tolerance.cosine, tolerance.common]


def of_one_output(dtype: str, value: list[Any], reference: list[Any]) -> dict[str, float]:
    """Parity of one output `a`; each entry of the lists is a row."""
    data = IMAGE.model_dump(mode="json") | {"outputs": {"a": {"dtype": dtype, "shape": ["batch", 4]}}}
    spec = DeploymentSpec.model_validate_json(json.dumps(data))
    rows = [[{"a": np.array(row, dtype)} for row in side] for side in (value, reference)]
    return parity(spec, *rows)["a"]


def test_single_numbers_are_compared_as_one_vector() -> None:
    found = of_one_output("float32", [0.9, -1e-6, 2.0], [0.9, 1e-6, 2.0])
    assert found["cosine"] == pytest.approx(1)
    assert of_one_output("float32", [0.9, -0.9], [0.9, 0.9])["cosine"] == pytest.approx(0)


@pytest.mark.parametrize("dead", [288.0, 250.0, 0.0], ids=["mean", "another", "nothing"])
def test_a_graph_with_constant_output_has_lost_everything(dead: float) -> None:
    kelvin = np.random.default_rng(0).normal(288, 10, 200).tolist()
    found = of_one_output("float32", [dead] * 200, kelvin)
    assert found["cosine"] < 0.5
    assert beyond(ParitySpec().of("int8"), {**found, "worst_error": 0.1}, 200).startswith("cosine")
    near = of_one_output("float32", (np.array(kelvin) + np.linspace(-0.3, 0.3, 200)).tolist(), kelvin)
    assert 1 - near["cosine"] < 1e-3


def test_numbers_that_hardly_vary_are_compared_without_centring() -> None:
    constant = [288 + 1e-4 * place for place in range(8)]
    assert of_one_output("float32", constant[::-1], constant)["cosine"] == pytest.approx(1)


def test_a_rare_flag_weighs_as_much_as_all_others() -> None:
    flags = [[place % 100 == 0] for place in range(1000)]
    none, two_fewer = [[False]] * 1000, [[place % 100 == 0 and place > 100] for place in range(1000)]
    assert of_one_output("bool", none, flags)["common"] == 0.5
    assert of_one_output("bool", [[True]] * 1000, flags)["common"] == 0.5
    assert of_one_output("bool", two_fewer, flags)["common"] == pytest.approx(0.9)
    assert of_one_output("bool", none, none)["common"] == 1


@pytest.mark.parametrize(
    ("flags", "seen", "problem"),
    [
        ([[True]] + [[False]] * 7, [[False]] * 8, ""),  # a tie may fall either way
        ([[True]] + [[False]] * 7, [[True]] * 8, "7 of 7 False entries differ, 2 allowed"),
        ([[True]] * 20 + [[False]] * 980, [[False]] * 1000, "20 of 20 True entries differ, 4 allowed"),
        ([[True]] * 20 + [[False]] * 980, [[False]] * 4 + [[True]] * 16 + [[False]] * 980, ""),
        ([[False]] * 8, [[False]] * 8, ""),
    ],
    ids=["one of one", "all of the others", "all of the rare ones", "some of them", "none there"],
)
def test_each_flag_has_to_meet_the_tolerance(flags: list[list[bool]], seen: list[list[bool]], problem: str) -> None:
    found = of_one_output("bool", seen, flags)
    assert beyond(ParitySpec().of("int8"), found, len(flags), sum(row[0] for row in flags)) == problem


def test_a_row_of_zeros_is_judged_by_its_error() -> None:
    reference = [[0, 0], [1, 2]]
    assert of_one_output("float32", [[1e-6, 0], [1, 2]], reference)["worst_cosine"] == pytest.approx(1)
    assert of_one_output("float32", [[0.5, 0], [1, 2]], reference)["worst_cosine"] == 0


def test_rankings_count_in_any_order_and_labels_by_position() -> None:
    assert of_one_output("int64", [[3, 1, 2, 4]], [[1, 2, 3, 4]])["common"] == 1
    assert of_one_output("int64", [[0, 1, 0, 1]], [[1, 0, 1, 0]])["common"] == 0
    assert of_one_output("bool", [[True, False]], [[False, True]])["common"] == 0


def test_another_shape_is_the_largest_error() -> None:
    assert of_one_output("float32", [[1, 2, 3]], [[1, 2]])["worst_error"] == np.inf
    assert of_one_output("int64", [[1, 2, 3]], [[1, 2]])["common"] == 0


def test_accuracy_is_measured_once_per_key_and_always_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    monkeypatch.setenv("DEEPSEEK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m").mkdir()
    numbers = iter(range(9))
    found = [measured(key, "m", lambda: {"drop": next(numbers)})["drop"] for key in ("a", "a", "b", "a", None, None)]
    assert found == [0, 0, 1, 0, 2, 3]

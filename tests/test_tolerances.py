"""Tolerances of parity: in deploy.toml, on the documentation page, and applied to known cases."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from deepseek.spec import DeploymentSpec, InputError, ParitySpec, Precision
from deepseek.spec.paired_drop import judge_drop
from export.checks.parity_cases import beyond, failures
from export.precision.accuracy import parity
from tests.test_parity import TEXT, TOML


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


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("[parity.int8]\ncosin = 0.9", "parity.int8.cosin: unknown key (seen 0.9); allowed: common, cosine, worst_error"),
        ("[parity.fp32]\nworst_error = -1", "parity.fp32.worst_error: seen -1"),
        ("[parity.fp8]\ncommon = nan", "parity.fp8.common: seen nan; it must be a finite number"),
        ('[parity]\nnonfinite_inputs = "no"', "parity.nonfinite_inputs: seen 'no'; it must be 'gate' or 'report'"),
    ],
)  # fmt: skip
def test_a_mistake_in_the_tolerances_is_one_line(tmp_path: Path, table: str, message: str) -> None:
    (tmp_path / "deploy.toml").write_text(TOML.format(name="x") + table)
    with pytest.raises(InputError) as caught:
        DeploymentSpec.load(tmp_path)
    assert message in str(caught.value)


def of_one_output(dtype: str, value: list[Any], reference: list[Any]) -> dict[str, float]:
    """Parity of one output `a`; each entry of the lists is a row."""
    data = {"name": "x", "inputs": {"x": {"dtype": "int64", "shape": ["batch", 1]}}, "axes": TEXT.model_dump()["axes"]}
    del data["axes"]["length"]
    data["outputs"] = {"a": {"dtype": dtype, "shape": ["batch", 4]}}
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

"""Choosing a precision by the accuracy budget and speed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deepseek.spec import GateFailed
from deepseek.spec.paired_drop import DropJudgement, PairedRows, judge_drop
from export.precision.precision_choice import add_speed, choose


def judged_by_number(drops: dict[str, float], max_drop: float = 0.01) -> dict[str, DropJudgement]:
    return {name: judge_drop(drop, None, max_drop=max_drop, candidates=2) for name, drop in drops.items()}


def at(drop: float, *seconds: float) -> tuple[float, list[float]]:
    """A drop, and the seconds of 20 rounds."""
    return drop, list(seconds) * (20 // len(seconds))


THREE = {"fp32": at(0, 1), "fp16": at(0.001, 0.7), "int8": at(0.009, 0.5)}
NOISY = (*[0.98] * 11, *[1.15] * 9)  # faster in 11 of 20 rounds
FASTEST = "chosen: the fastest inside the budget"
NOT_FINITE = "outside the budget: drop infinite (NaN or Inf at other places than in fp32 PyTorch) > 1.00%"


@pytest.mark.parametrize(
    ("measured_as", "candidates", "max_drop", "chosen", "why"),
    [
        (THREE, ["fp16", "int8"], 0.01, "int8", {"fp32": "inside", "int8": FASTEST}),
        (THREE, ["fp16", "int8"], 0.005, "fp16", {"int8": "outside the budget: drop 0.90% > 0.50%"}),
        (THREE, ["fp16"], 0.001, "fp16", {"int8": "outside the budget: drop 0.90% > 0.10%"}),
        (THREE, ["fp16"], 0.01, "fp16", {"int8": "not a candidate"}),
        (
            {"fp32": at(0, 1), "fp16": at(0, 2), "int8": at(0.2, 0.3)},
            ["fp16", "int8"],
            0.01,
            "fp32",
            {
                "fp16": "inside, but not faster than fp32 (0.50x)",
                "fp32": "chosen: no candidate is faster inside the budget",
            },
        ),
        ({"fp32": at(0, 1), "int8": at(math.inf, 0.5)}, ["int8"], 0.01, "fp32", {"int8": NOT_FINITE}),
        (
            {"int8": at(-0.001, *NOISY), "fp32": at(0, 1.6), "fp16": at(0.001, 1)},
            ["int8", "fp16"],
            0.01,
            "fp16",
            {"int8": "inside, but not distinguishable in speed from fp16 (1.02x)"},
        ),
        (
            {"int8": at(-0.001, *NOISY), "fp32": at(0, 1), "fp16": at(0.001, 1.3)},
            ["int8", "fp16"],
            0.01,
            "fp32",
            {"int8": "inside, but not distinguishable in speed from fp32 (1.02x)"},
        ),
        (THREE | {"int8": at(-0.001, 0.5)}, ["int8", "fp16"], 0.01, "int8", {"int8": FASTEST}),
    ],
    ids=["fastest", "inside", "at the budget", "candidates", "not faster", "infinite", "noise", "slow fp16", "faster"],
)
def test_the_fastest_candidate_inside_the_budget_is_chosen_if_it_beats_the_more_accurate_ones(
    measured_as: dict[str, tuple[float, list[float]]],
    candidates: list[str],
    max_drop: float,
    chosen: str,
    why: dict[str, str],
) -> None:
    judged = judged_by_number({name: drop for name, (drop, _) in measured_as.items()}, max_drop)
    found, reasons = choose(judged, candidates, {name: seconds for name, (_, seconds) in measured_as.items()})
    assert (found, {name: reasons[name] for name in why}) == (chosen, why)


def test_a_precision_asked_for_by_name_needs_only_the_budget() -> None:
    chosen, reasons = choose(judged_by_number({"fp32": 0, "int8": 0.01}), ["int8"], {}, asked=True)
    assert (chosen, reasons["int8"]) == ("int8", "chosen: asked for, inside the budget")


def by_rows(rows: int, lost: int) -> DropJudgement:
    """The judgement of a candidate that answers `lost` of `rows` rows wrongly, all right before; budget 1 %."""
    paired = PairedRows.of([1.0] * rows, [0.0] * lost + [1.0] * (rows - lost))
    return judge_drop(paired.drop, paired, max_drop=0.01, candidates=1)


def test_a_candidate_that_may_have_lost_nothing_is_accepted_and_one_that_has_lost_is_not_without_proof() -> None:
    seconds = {"fp32": [2.0] * 8, "fp16": [1.5] * 8, "int8": [1.0] * 8}
    judged = {"fp32": by_rows(200, 0), "fp16": by_rows(200, 1), "int8": by_rows(1500, 13)}
    chosen, reasons = choose(judged, ["fp16", "int8"], seconds)
    assert chosen == "fp16"
    assert reasons["fp16"].startswith("chosen: the fastest accepted: not distinguishable from no loss on 200 rows;")
    assert reasons["int8"].startswith("undecided on 1,500 rows; about ")
    with pytest.raises(GateFailed, match=r"\(drops: int8 0\.87% \(undecided on 1,500 rows; about .* would decide\)\)"):
        choose(judged, ["int8"], seconds, asked=True)


def test_three_of_four_rounds_must_be_faster_and_speed_is_the_median() -> None:
    variants: dict[str, Any] = {name: {"drop": 0.0} for name in ("fp32", "fp16", "int8")}
    base = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0]
    seconds = {
        "fp32": base,
        "fp16": [*(second / 2 for second in base[:5]), *base[5:]],  # in five of eight
        "int8": [*(second / 2 for second in base[:6]), *base[6:]],  # in six
    }
    add_speed(variants, seconds, 24)
    assert [variant["speedup"] for variant in variants.values()] == [1, 2, 2]
    assert [variant["rows_per_s"] for variant in variants.values()] == [2, 4, 4]
    chosen, reasons = choose(judged_by_number(dict.fromkeys(variants, 0.0)), ["fp16", "int8"], seconds)
    assert (chosen, reasons["int8"]) == ("int8", "chosen: the fastest inside the budget")
    assert reasons["fp16"] == "inside, but not distinguishable in speed from fp32 (2.00x)"


@pytest.mark.parametrize(
    ("drops", "asked", "message"),
    [
        ((0.03, 0.02), True, r"\(drops: int8 2.00%\); raise it, or choose with PRECISION=auto"),
        ((0.03, 0.02), False, r"\(drops: fp32 3.00%, int8 2.00%\); not even fp32 is"),
        ((0, math.inf), True, "no candidate is inside max_drop 1.00%"),
        ((0, math.nan), True, "no candidate is inside max_drop 1.00%"),
    ],
)
def test_if_nothing_is_inside_the_budget_the_error_has_the_drops_and_a_fix(
    drops: tuple[float, float], asked: bool, message: str
) -> None:
    with pytest.raises(GateFailed, match=message):
        choose(judged_by_number({"fp32": drops[0], "int8": drops[1]}), ["int8"], {}, asked=asked)

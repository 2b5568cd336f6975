"""The accuracy budget judged from paired rows: verdicts, intervals, and how often they are wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from deepseek.spec.paired_drop import (
    LEAST_ROWS,
    DropJudgement,
    PairedRows,
    drop_interval,
    judge_drop,
    pair_values,
    values_of,
    values_text,
)

Rows = tuple[np.ndarray, np.ndarray]


def accuracy(rows: int, *, lost: int, gained: int = 0, wrong: int = 0) -> Rows:
    """Right and wrong answers: of `rows`, the baseline has `wrong` wrong; the candidate loses and gains some."""
    baseline, candidate = np.ones(rows), np.ones(rows)
    baseline[:wrong] = candidate[:wrong] = 0
    candidate[:gained] = 1
    candidate[wrong : wrong + lost] = 0
    return baseline, candidate


def judged(rows: Rows, max_drop: float = 0.01, candidates: int = 1) -> DropJudgement:
    paired = PairedRows.of(*(each.tolist() for each in rows))
    return judge_drop(paired.drop, paired, max_drop=max_drop, candidates=candidates)


@pytest.mark.parametrize(
    ("rows", "verdict", "accepted"),
    [
        (accuracy(1000, lost=0), "inside", True),
        (accuracy(5000, lost=25), "inside", True),
        (accuracy(5000, lost=100), "outside", False),
        (accuracy(100, lost=0), "not distinguishable from no loss", True),
        (accuracy(943, lost=8, gained=6, wrong=400), "not distinguishable from no loss", True),
        (accuracy(943, lost=20, gained=6, wrong=400), "undecided", False),  # 2.6 %, but no loss is possible
        (accuracy(1500, lost=13), "undecided", False),  # 0.87 %: a loss for certain, and perhaps more than 1 %
        (accuracy(LEAST_ROWS - 1, lost=0), "not distinguishable from no loss", True),
        (accuracy(1, lost=1), "undecided", False),
    ],
)
def test_a_drop_is_judged_by_its_interval(rows: Rows, verdict: str, accepted: bool) -> None:
    found = judged(rows)
    assert (found.verdict, found.accepted, found.rows) == (verdict, accepted, len(rows[0]))
    assert (found.rows_to_decide is None) == (verdict in ("inside", "outside"))


@pytest.mark.parametrize("drop", [0.01, 0.0100001, math.inf, math.nan])
def test_one_number_is_judged_by_itself(drop: float) -> None:
    found = judge_drop(drop, None, max_drop=0.01, candidates=2)
    assert (found.accepted, found.rows, found.low, found.more) == (drop == 0.01, None, None, "")
    if not math.isfinite(drop):  # whatever the rows say
        paired = PairedRows.of([1.0] * 5000, [1.0] * 5000)
        assert not judge_drop(drop, paired, max_drop=1.0, candidates=1).accepted


@pytest.mark.parametrize(
    "rows", [accuracy(100, lost=0), accuracy(943, lost=8, gained=6, wrong=400), accuracy(1500, lost=13)]
)
def test_the_rows_to_decide_decide_and_hardly_fewer_do(rows: Rows) -> None:
    needed = judged(rows).rows_to_decide
    assert needed is not None
    paired = PairedRows.of(*(each.tolist() for each in rows))

    def decides(count: float) -> bool:
        low, high = drop_interval(paired, 0.95, count)
        return high <= 0.01 or low > 0.01

    assert (decides(needed), decides(0.8 * needed)) == (True, False)


def test_a_drop_at_the_budget_is_decided_by_no_number_of_rows() -> None:
    found = judged(accuracy(1000, lost=10))
    assert (found.verdict, found.rows_to_decide) == ("undecided", None)
    assert "too close to the budget for any number of rows" in found.reason


def test_more_candidates_widen_the_interval() -> None:
    rows = accuracy(943, lost=8, gained=6, wrong=400)
    one, two = (judged(rows, candidates=count) for count in (1, 2))
    assert (one.confidence, two.confidence) == (0.95, 0.975)
    bounds = [two.low, one.low, one.drop, one.high, two.high]
    assert bounds == sorted(set(bounds))  # type: ignore[type-var]


def test_rows_without_a_pattern_agree_with_a_bootstrap() -> None:
    """With many rows, the added ones hardly matter."""
    random = np.random.default_rng(0)
    baseline = random.beta(2, 2, 20_000)
    candidate = baseline - 0.01 + random.normal(0, 0.3, 20_000)
    drawn = random.integers(0, 20_000, (1000, 20_000))
    drops = 1 - candidate[drawn].mean(1) / baseline[drawn].mean(1)
    low, high = drop_interval(PairedRows.of(baseline.tolist(), candidate.tolist()), 0.95)
    assert (low, high) == pytest.approx(tuple(np.quantile(drops, [0.05, 0.95])), abs=1e-3)


def test_if_the_baseline_is_hardly_above_0_the_interval_is_unbounded() -> None:
    rows = [-5.0, 5.1, 1.0, *[0.0] * 29]
    paired = PairedRows.of(rows, rows)
    assert drop_interval(paired, 0.95) == (-math.inf, math.inf)
    assert "(unbounded)" in judge_drop(0.0, paired, max_drop=0.01, candidates=1).reason


def test_half_of_the_rows_say_half_as_much() -> None:
    """The candidate answered every second row: as if those rows alone had been given."""
    baseline, candidate = accuracy(4000, lost=40)
    random = np.random.default_rng(0)
    candidate = random.permutation(candidate)
    answered = np.arange(4000) % 2 == 0
    doubled = np.where(answered, baseline - 2 * (baseline - candidate), baseline)
    half = PairedRows.of(baseline.tolist(), doubled.tolist(), share=0.5)
    alone = PairedRows.of(baseline[answered].tolist(), candidate[answered].tolist())
    assert (half.rows, half.drop) == (2000, pytest.approx(alone.drop))
    assert drop_interval(half, 0.95) == pytest.approx(drop_interval(alone, 0.95), abs=2e-4)


def test_values_survive_as_a_line_and_pair_only_with_the_same_rows() -> None:
    line = values_text([1.0, 0.0, math.nan, 1 / 3])
    assert values_of(line) == pytest.approx([1, 0, math.nan, 1 / 3], abs=1e-6, nan_ok=True)
    assert (paired := pair_values(line, line)) is not None
    assert (paired.rows, paired.drop) == (3, 0.0)
    for other in (None, "", "1 0 nan", "1 0 0.5 1", "nan nan nan nan"):
        assert pair_values(line, other) is None
        assert pair_values(other, line) is None
    assert pair_values("nan nan", "nan nan") is None


def test_the_reason_has_drop_interval_budget_and_rows() -> None:
    assert judge_drop(0.02, None, max_drop=0.01, candidates=1).reason == "drop 2.00%, outside the budget of 1.00%"
    found = judged(accuracy(100, lost=0))
    assert found.reason == (
        f"drop 0.00% ({found.low:+.2%} to {found.high:+.2%}), budget 1.00%: not distinguishable from no loss on 100 "
        f"rows; about {found.rows_to_decide} would decide"
    )


GAINS = 1 / np.log2(np.arange(10) + 2)


Draw = Callable[[np.random.Generator, int], Rows]


def right_or_wrong(share: float, lost: float, gained: float) -> tuple[Draw, float]:
    """Answers right with `share`; of all rows, the candidate loses and gains these shares. And the true drop."""

    def draw(random: np.random.Generator, rows: int) -> Rows:
        baseline, chance = random.random(rows) < share, random.random(rows)
        candidate = np.where(baseline, chance >= lost / share, chance < gained / max(1e-9, 1 - share))
        return baseline.astype(float), candidate.astype(float)

    return draw, (lost - gained) / share


def ranking(hits: float, lost: float, moved: float) -> tuple[Draw, float]:
    """NDCG@10 with one target a row; of the hits, the candidate loses some and moves others."""

    def draw(random: np.random.Generator, rows: int) -> Rows:
        baseline = np.where(random.random(rows) < hits, random.choice(GAINS, rows), 0.0)
        chance = random.random(rows)
        candidate = np.where((chance > 1 - moved) & (baseline > 0), random.choice(GAINS, rows), baseline)
        return baseline, np.where(chance < lost, 0.0, candidate)

    return draw, lost


@pytest.mark.parametrize("rows", [30, 943])
@pytest.mark.parametrize(
    ("draw", "drop"),
    [
        right_or_wrong(1.0, 0.01, 0.0),
        right_or_wrong(0.9, 0.02, 0.011),
        right_or_wrong(0.5, 0.03, 0.005),
        ranking(0.2, 0.01, 0.0),
        ranking(0.2, 0.05, 0.2),
    ],
    ids=["all right", "lost and gained", "half right", "rare ranks", "moved ranks"],
)
def test_a_candidate_beyond_the_budget_is_called_inside_in_at_most_one_case_of_twenty(
    draw: Draw, drop: float, rows: int
) -> None:
    """The budget is the true drop, the worst case; the same holds for a candidate that is called outside."""
    random, trials = np.random.default_rng(rows), 400
    found = [judged(draw(random, rows), max_drop=drop).verdict for _ in range(trials)]
    chance = 0.05 + 2 * math.sqrt(0.05 * 0.95 / trials)  # of a count of 400 draws
    assert found.count("inside") <= chance * trials
    assert found.count("outside") <= chance * trials


def test_a_good_candidate_is_called_inside_with_enough_rows() -> None:
    draw, _ = right_or_wrong(0.9, 0.004, 0.002)
    random = np.random.default_rng(0)
    found = [judged(draw(random, 6000)).verdict for _ in range(50)]
    assert found.count("inside") >= 45

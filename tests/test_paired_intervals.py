"""Confidence intervals: percentiles of draws, and how often an interval contains the truth."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from loadtests.slo.paired_intervals import (
    PooledStretches,
    draws_of,
    error_rates,
    expanded_tail,
    least_pairs,
    paired_ratio,
    percentiles,
    ratio_interval,
)
from tests.saved_runs import saved_run, steady

LOST = [(9.5, 9.5, 0.0, "dropped")]


def test_percentiles_of_draws_are_those_of_the_merged_runs(tmp_path: Path) -> None:
    fast, slow = saved_run(tmp_path / "a", steady(0.01, lag_s=0)), saved_run(tmp_path / "b", steady(0.1, lag_s=0))
    pooled, draws = PooledStretches.of([fast.window, slow.window]), np.array([[1, 1], [2, 0], [0, 2]])
    assert percentiles(pooled, draws, 50) == pytest.approx([10, 10, 100], rel=2e-3)
    assert percentiles(pooled, draws, 51) == pytest.approx([100, 10, 100], rel=2e-3)


def test_failed_requests_are_slower_than_any_limit(tmp_path: Path) -> None:
    some = PooledStretches.of([saved_run(tmp_path / "a", [*steady(count=90), *LOST * 10]).window])
    once = np.array([[1]])
    assert percentiles(some, once, 90)[0] == pytest.approx(10.1, rel=2e-3)
    assert percentiles(some, once, 91)[0] == math.inf
    assert (error_rates(some, once)[0], some.total) == (0.1, 100)
    all_failed = PooledStretches.of([saved_run(tmp_path / "b", LOST * 10).window])
    assert percentiles(all_failed, once, 1)[0] == math.inf


def test_the_interval_contains_the_true_ratio_as_often_as_it_claims() -> None:
    generator, draws, held = np.random.default_rng(0), draws_of(6), 0
    for _ in range(300):
        values = generator.lognormal(0, 0.1, (2, 6))
        interval = ratio_interval(draws @ values[0], draws @ values[1], pairs=6, confidence=0.95)
        held += interval.low <= 1 <= interval.high
    assert held / 300 == pytest.approx(0.95, abs=0.035)
    assert expanded_tail(6, 0.95) < 0.025 < expanded_tail(6, 0.80)


@pytest.mark.parametrize("count", [3, 6])
def test_the_interval_of_paired_ratios_contains_the_true_ratio_as_often_as_it_claims(count: int) -> None:
    generator, held = np.random.default_rng(1), 0
    for _ in range(400):
        interval = paired_ratio(list(1.1 * np.exp(0.05 * generator.standard_normal(count))), 0.95)
        held += interval.low <= 1.1 <= interval.high
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert paired_ratio([0.5, 2.0], 0.95).ratio == pytest.approx(1)  # a geometric mean


@pytest.mark.parametrize(("rows", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8)])
def test_the_number_of_pairs_limits_the_confidence_of_an_interval(rows: int, needed: int) -> None:
    each = 1 - 0.05 / rows
    assert least_pairs(each) == needed
    found = {}
    for pairs in (needed - 1, needed):
        draws, values = draws_of(pairs), np.random.default_rng(0).lognormal(0, 0.1, (2, pairs))
        found[pairs] = ratio_interval(draws @ values[0], draws @ values[1], pairs=pairs, confidence=each)
    assert math.isnan(found[needed - 1].low)
    assert found[needed].low < found[needed].ratio < found[needed].high

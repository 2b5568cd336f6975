"""What charts are drawn with."""

from __future__ import annotations

import re

import pytest

from deepseek.svg_chart import Chart, Scale


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0, 103), [0, 50, 100]),
        (Scale(-4, 20), [0, 5, 10, 15, 20]),
        (Scale(0.9, 11000, log=True), [1, 10, 100, 1000, 10000]),
        (Scale(4, 60, log=True), [5, 10, 20, 50]),
    ],
    ids=["linear", "from below zero", "four decades", "one decade"],
)
def test_axes_have_round_figures(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks(5) == ticks


@pytest.mark.parametrize(("limit", "below"), [(95, True), (50, False)])
def test_the_label_of_a_limit_stays_clear_of_marks_at_the_top(limit: float, below: bool) -> None:
    chart = Chart(x=Scale(0, 20), y=Scale(0, 100), label="Latency")
    chart.limit(limit, "SLO")
    drawn = chart.figure()
    (line,) = re.findall(r'class="line limit" d="M[\d.]+ ([\d.]+)H', drawn)
    (label,) = re.findall(r'limit-text"[^>]* y="([\d.]+)"', drawn)
    assert (float(label) > float(line)) == below

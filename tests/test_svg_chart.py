"""What charts are drawn with."""

from __future__ import annotations

import pytest

from deepseek.svg_chart import Scale


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

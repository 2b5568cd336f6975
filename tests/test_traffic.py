"""A day of traffic: named shapes, and rates from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deepseek.spec import InputError
from loadtests.scale.traffic import TICK_S, read_traffic, shape_of_day


def test_a_shape_is_one_day_and_the_same_for_the_same_seed() -> None:
    day = shape_of_day("day", 1000, seed=3)
    assert len(day) * TICK_S == 86400
    assert 800 < day.max() < 1200
    assert day.min() < 0.25 * day.max()
    assert np.array_equal(day, shape_of_day("day", 1000, seed=3))
    assert not np.array_equal(day, shape_of_day("day", 1000, seed=4))
    assert shape_of_day("spike", 1000).max() > 1.8 * 1000


def test_each_rate_of_a_file_holds_until_the_next(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text("seconds,rate_rps\n0,10\n20,30\n30,5\n")
    assert read_traffic(path).tolist() == [10, 10, 10, 10, 30, 30, 5, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: seen ''"),
        ("time,rate\n0,1\n", "line 1: seen 'time,rate'"),
        ("seconds,rate_rps\n0,1\n\n", "1 rates; at least two are needed"),
        ("seconds,rate_rps\n0,1\n5,x\n", "could not convert string 'x'"),
        ("seconds,rate_rps\n0,1\n5,-2\n", "rates must be 0 or more"),
        ("seconds,rate_rps\n0,1\n\n5,2\n5,3\n", "seconds must increase: 5 follows 5"),
        ("seconds,rate_rps\n0,1\n9e9,2\n", "days; at most 31"),
    ],
    ids=["empty", "header", "one", "word", "negative", "order", "years"],
)
def test_an_invalid_file_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_traffic(tmp_path / "t.csv")
    assert message in str(error.value)


def test_load_between_two_ticks_counts(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text("seconds,rate_rps\n0,100\n1,1000\n5,100\n6,1000\n10,0\n15,0\n")
    assert read_traffic(path).tolist() == [820, 820, 0, 0]

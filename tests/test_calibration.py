"""Calibration rows: file formats, coverage of all lengths, and whether more samples would help."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from deepseek.spec import Axis, DeploymentSpec, GateFailed, InputError
from export.precision.activation_ranges import MOST_GROWTH, ActivationRanges, ranges_by_samples, would_more_help
from export.precision.calibration import (
    Calibration,
    calibration_of,
    length_of,
    pool_size,
    read_rows,
    stratified,
)

IMAGE, TEXT = (DeploymentSpec.load(f"tests/models/{name}") for name in ("image", "text"))
BATCH = Axis(min=1, opt=4, max=8)


def row(length: int, width: int = 0) -> dict[str, np.ndarray]:
    """`length` ids, padded with 0 to a width."""
    return {"ids": np.pad(np.ones((1, length), np.int64), ((0, 0), (0, max(width - length, 0))))}


@pytest.mark.parametrize("width", [0, 64], ids=["of any length", "padded"])
def test_a_few_long_rows_among_many_short_ones_are_all_taken(width: int) -> None:
    rows = [row(1 + index % 3, width) for index in range(200)] + [row(40, width), row(64, width)]
    assert [length_of(each) for each in (rows[0], rows[-1])] == [1, 64]
    for limit in (8, 16, 32):
        lengths = [length_of(each) for each in stratified(rows, limit)]
        assert len(lengths) == limit
        assert {40, 64} < set(lengths)


def test_rows_of_one_length_are_taken_evenly_from_the_file() -> None:
    rows = [{"x": np.full((1, 2), index, np.float32)} for index in range(100)]
    places = sorted(int(each["x"][0, 0]) for each in stratified(rows, 10))
    assert max(np.diff([0, *places, 99])) <= 20
    assert len(stratified(rows, 1000)) == len({float(each["x"][0, 0]) for each in stratified(rows, 1000)}) == 100


def test_more_rows_are_read_than_used_only_if_lengths_can_differ() -> None:
    assert (pool_size(IMAGE), pool_size(TEXT)) == (32, 128)


@pytest.mark.parametrize("suffix", ["npz", "npy", "bin"])
def test_a_calibration_file_may_be_npz_npy_or_raw_records(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    path = tmp_path / f"val_dataset.{suffix}"
    if suffix == "npz":
        np.savez(path, pixels=pixels)
    elif suffix == "npy":
        np.save(path, pixels)
    else:
        pixels.tofile(path)
    np.testing.assert_array_equal(np.concatenate([each["pixels"] for each in read_rows(IMAGE, path)]), pixels)


@pytest.mark.parametrize("save", [np.save, np.savez, np.savez_compressed], ids=lambda save: save.__name__)
@pytest.mark.parametrize("what", ["truncated", "overwritten", "objects"])
def test_a_broken_calibration_file_is_one_line(tmp_path: Path, save: Callable[..., None], what: str) -> None:
    path = tmp_path / ("c.npy" if save is np.save else "c.npz")
    pixels = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    save(path, np.array([{}, {}]) if what == "objects" else pixels)
    data = path.read_bytes()
    if what == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif what == "overwritten":
        path.write_bytes(bytes(100) if save is np.save else data[:2000] + bytes(1000) + data[3000:])
    with pytest.raises(
        InputError, match=r"cannot be read \(.*\); a complete \.npz|100 bytes; raw records of this signature"
    ):
        read_rows(IMAGE, path)


def test_one_array_for_several_inputs_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.ones((4, 8), np.int64))
    with pytest.raises(InputError, match=r"one array, for inputs input_ids, attention_mask; use an \.npz file"):
        read_rows(TEXT, tmp_path / "ids.npy")


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((4, 3, 32, 32)), r"row 0\['pixels'\]: seen float64; deploy.toml says a numpy array of float32"),
        (np.zeros((4, 3, 32, 31), np.float32), r"shape \(1, 3, 32, 31\); deploy.toml says \['batch', 3, 32, 32\]"),
        (np.float32(1), "holds no samples"),
    ],
    ids=["dtype", "size", "number"],
)
def test_calibration_rows_that_do_not_fit_are_refused(tmp_path: Path, pixels: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "c.npz", pixels=pixels)
    with pytest.raises(InputError, match=message):
        read_rows(IMAGE, tmp_path / "c.npz")


def test_evaluation_rows_in_a_file_are_left_out_and_too_few_other_rows_are_refused(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).standard_normal((6, 3, 32, 32)).astype(np.float32)
    path = tmp_path / "val_dataset.npy"
    np.save(path, pixels)
    evaluation = [{"pixels": each[None]} for each in pixels]
    found = calibration_of(IMAGE, path, 8, evaluation[:4])
    assert (len(found.rows), found.note.split(" samples")[0]) == (2, "calibration: 4")
    assert "only 2 are left, which is few" in found.note
    with pytest.raises(
        InputError, match=r"5 of 6 calibration rows are also evaluation rows; .* add at least 2 other rows"
    ):
        calibration_of(IMAGE, path, 8, evaluation[:5])
    np.save(path, pixels[5:])
    assert len(calibration_of(IMAGE, path, 8, evaluation[:5]).rows) == 1


def test_modelopt_sees_the_longest_row_first_and_every_row_once() -> None:
    calibration = Calibration([row(length) for length in (3, 5, 5, 7)], BATCH)
    assert calibration.get_first()["ids"].shape == (2, 7)
    seen = []
    while (batch := calibration.get_next()) is not None:
        seen += [batch["ids"].shape[1]] * len(batch["ids"])
    assert sorted(seen) == [3, 5, 5, 7]


def test_max_replaces_entropy_for_ranges_that_entropy_cannot_count(tmp_path: Path) -> None:
    """Bins are as wide as in the first batch: a millionfold range would need millions."""
    graph = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 20]> g (float[n, 4] x) => (float[n, 4] y) '
        "<float[4, 4] w = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> { y = MatMul(x, w) }"
    )
    onnx.save(graph, tmp_path / "model.onnx")
    steady = [{"x": np.full((8, 4), scale, np.float32)} for scale in (1.0, 2.0, 3.0)]
    points, growth = ranges_by_samples(tmp_path / "model.onnx", steady)
    assert growth == pytest.approx(3)
    assert points["max"] == {8: {"x": 1.0}, 16: {"x": 2.0}, 24: {"x": 3.0}}
    assert points.keys() == {"max", "entropy"}
    points, growth = ranges_by_samples(tmp_path / "model.onnx", [*steady, {"x": np.full((8, 4), 1e6, np.float32)}])
    assert growth > MOST_GROWTH
    assert points.keys() == {"max"}


def test_growth_is_counted_from_the_first_batch_with_a_range() -> None:
    ranges = ActivationRanges()
    for scale in (0.0, 1e-43, 1.0, 100.0):
        ranges.add({"x": np.full((8, 4), scale, np.float32)})
    assert ranges.growth == pytest.approx(100)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_an_activation_without_a_range_fails_the_gate_of_its_precision(value: float) -> None:
    with pytest.raises(GateFailed, match="activation 'x' is NaN or Inf on a calibration sample"):
        ActivationRanges().add({"x": np.array([1.0, value, 2.0], np.float32)})


def test_entropy_clips_a_rare_value_and_max_does_not() -> None:
    ranges = ActivationRanges()
    values = np.random.default_rng(0).standard_normal((4000, 1)).astype(np.float32)
    ranges.add({"x": values})
    ranges.add({"x": np.concatenate([values, [[40.0]]]).astype(np.float32)})
    assert ranges.of("max")["x"] == 40
    assert ranges.of("entropy")["x"] < 20


@pytest.mark.parametrize(
    ("errors", "message"),
    [
        ([0.5, 0.21, 0.2, 0.2], "flat from 16 samples on: more will not help"),
        ([0.8, 0.4, 0.2, 0.1], r"still falling \(-50% from 32 to 64\): add samples"),
        ([0.1, 0.1, 0.1, 0.2], r"not settled \(\+100% from 32 to 64\)"),
        ([0.2, 0.2], "16 samples are too few to see a trend"),
        ([0.0, 0.0, 0.0], "flat from 8 samples on"),
        ([2e4, 2e4, 2e4], "NaN or Inf at other places than in fp32: more samples will not help"),
    ],
    ids=["flat", "falling", "rising", "short", "no error", "NaN"],
)
def test_the_conclusion_says_whether_more_samples_would_help(errors: list[float], message: str) -> None:
    curve: list[dict[str, Any]] = [{"samples": 8 << index, "error": error} for index, error in enumerate(errors)]
    assert re.match(message, would_more_help(curve))

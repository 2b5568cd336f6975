"""Reads the real inputs of a model that the build wrote.

Contract: an .npz file with keys `<row, five digits>/<input name>`, each array with batch size 1; lengths of axes
may differ between rows. A request is one row, repeated if the profile's smallest batch is larger than 1. Rows are sent
shuffled, so that lengths mix in their true proportions.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from deepseek.spec import BATCH, InputError, TensorSpec

MOST_ROWS = 1000  # enough variety; more would only fill memory with encoded requests
MOST_BYTES = 256 * 2**20  # of a worker's rows; large rows reduce their number
MOST_CLASSES = 8  # up to this many different lengths get a class each; more are grouped by powers of two

Row = dict[str, np.ndarray]
T = TypeVar("T")


def read_inputs(path: Path, least: int = 1) -> list[Row]:
    """The rows of `read_rows`."""
    return list(read_rows(path, least).values())


def count_rows(path: Path) -> int:
    """The number of rows of a file; InputError if there are none."""
    return len(_read(path, lambda arrays: _names(path, arrays)))


def read_rows(path: Path, least: int = 1, only: Sequence[int] | None = None) -> dict[int, Row]:
    """Rows by number (from 0), in order; InputError if there are none.

    If there are too many, they are a random subset with a fixed seed, or exactly the rows `only`; InputError if those
    are too many. Each row is repeated until it is a batch of `least`, the smallest that the profile allows.
    """

    def read(arrays: Any) -> dict[int, Row]:
        names = _names(path, arrays)
        mean_bytes = least * sum(member.file_size for member in arrays.zip.infolist()) // len(names)
        most = max(1, min(len(names), MOST_ROWS, MOST_BYTES // max(1, mean_bytes)))
        if only is not None and len(only) > most:
            raise InputError(f"{path}: {len(only)} different rows are to be sent; allowed: {most} of this size")
        # Random, since every n-th of alternating rows (query, passage, query ...) could be of one kind.
        drawn = np.sort(np.random.default_rng(0).permutation(len(names))[:most]).tolist() if only is None else only
        rows = list(names)
        return {
            place: {name: _repeated(arrays[f"{rows[place]}/{name}"], least) for name in names[rows[place]]}
            for place in drawn
        }

    return _read(path, read)


def _names(path: Path, arrays: Any) -> dict[str, list[str]]:
    """The inputs of each row."""
    names: dict[str, list[str]] = {}
    for key in sorted(arrays.files):
        row, separator, name = key.partition("/")
        if not separator or not row.isdecimal():
            raise InputError(f"{path}: key {key!r}; keys are <row>/<input name>, such as 00000/item_ids")
        names.setdefault(row, []).append(name)
    if not names:
        raise InputError(f"{path}: contains no inputs; make it again with: make engine")
    return names


def _read(path: Path, read: Callable[[Any], T]) -> T:
    try:
        with np.load(path) as arrays:  # an .npy file gives an array here: a TypeError
            return read(arrays)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it has the real inputs to send, make it with: make engine") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not an .npz file of inputs ({error})") from None


def _repeated(array: np.ndarray, least: int) -> np.ndarray:
    return np.concatenate([array, *[array[-1:]] * (least - len(array))])


def shuffled(rows: Sequence[T], seed: int) -> list[T]:
    """The rows in sending order, which repeats: the same for every worker."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def length_classes(rows: Sequence[Row], inputs: Mapping[str, TensorSpec]) -> list[str]:
    """The length class of each row, from the axes whose sizes differ between rows; "" if none differ."""
    axes, lengths = _lengths(rows, inputs)
    if not axes:
        return [""] * len(rows)
    title = " x ".join(axes)
    if len(set(lengths)) <= MOST_CLASSES:
        return [f"{title} {' x '.join(map(str, length))}" for length in lengths]
    return [f"{title} {_power_range(math.prod(length))}" for length in lengths]


def lengths_of(rows: Sequence[Row], inputs: Mapping[str, TensorSpec]) -> list[int]:
    """The length of each row: the product of the axes whose sizes differ between rows."""
    return [math.prod(length) for length in _lengths(rows, inputs)[1]]


def _lengths(rows: Sequence[Row], inputs: Mapping[str, TensorSpec]) -> tuple[list[str], list[tuple[int, ...]]]:
    """The axes whose sizes differ between rows, and their sizes for each row."""
    sizes = [_sizes(row, inputs) for row in rows]
    axes = [axis for axis in sizes[0] if len({size.get(axis) for size in sizes}) > 1]
    return axes, [tuple(size[axis] for axis in axes) for size in sizes]


def _sizes(row: Row, inputs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Named axis -> size, without the batch axis."""
    return {
        dim: size
        for name, array in row.items()
        for dim, size in zip(inputs[name].shape, array.shape, strict=False)
        if isinstance(dim, str) and dim != BATCH
    }


def _power_range(length: int) -> str:
    upper = 1 << max(0, length - 1).bit_length()
    return f"{upper // 2 + 1} to {upper}"

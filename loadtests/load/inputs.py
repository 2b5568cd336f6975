"""Reads the real inputs of a model that the build wrote.

Contract: an .npz file with keys `<row, five digits>/<input name>`, each array with batch size 1; lengths of axes
may differ between rows. A request is one row, repeated if the profile's smallest batch is larger than 1. Rows are sent
shuffled, so that lengths mix in their true proportions.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deepseek.spec import BATCH, InputError, TensorSpec

MOST_ROWS = 1000  # enough variety; more would only fill memory with encoded requests
MOST_BYTES = 256 * 2**20  # of a worker's rows; large rows reduce their number
MOST_CLASSES = 8  # up to this many different lengths get a class each; more are grouped by powers of two

Row = dict[str, np.ndarray]


def read_inputs(path: Path, least: int = 1) -> list[Row]:
    """The rows in order, or a random subset (with a fixed seed) if there are too many; InputError if there are none.

    Each row is repeated until it is a batch of `least`, the smallest that the profile allows.
    """
    try:
        with np.load(path) as arrays:  # an .npy file gives an array here: a TypeError
            names: dict[str, list[str]] = {}
            for key in sorted(arrays.files):
                row, separator, name = key.partition("/")
                if not separator or not row.isdecimal():
                    raise InputError(f"{path}: key {key!r}; keys are <row>/<input name>, such as 00000/item_ids")
                names.setdefault(row, []).append(name)
            if not names:
                raise InputError(f"{path}: contains no inputs; make it again with: make engine")
            mean_bytes = least * sum(member.file_size for member in arrays.zip.infolist()) // len(names)
            most = max(1, min(len(names), MOST_ROWS, MOST_BYTES // max(1, mean_bytes)))
            # Random, since every n-th of alternating rows (query, passage, query ...) could be of one kind.
            drawn = np.sort(np.random.default_rng(0).permutation(len(names))[:most])
            chosen = [list(names)[place] for place in drawn]
            return [{name: _repeated(arrays[f"{row}/{name}"], least) for name in names[row]} for row in chosen]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it has the real inputs to send, make it with: make engine") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not an .npz file of inputs ({error})") from None


def _repeated(array: np.ndarray, least: int) -> np.ndarray:
    return np.concatenate([array, *[array[-1:]] * (least - len(array))])


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in sending order, which repeats: the same for every worker."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def length_classes(rows: Sequence[Row], inputs: Mapping[str, TensorSpec]) -> list[str]:
    """The length class of each row, from the axes whose sizes differ between rows; "" if none differ."""
    sizes = [_sizes(row, inputs) for row in rows]
    axes = [axis for axis in sizes[0] if len({size.get(axis) for size in sizes}) > 1]
    if not axes:
        return [""] * len(rows)
    title = " x ".join(axes)
    lengths = [tuple(size[axis] for axis in axes) for size in sizes]
    if len(set(lengths)) <= MOST_CLASSES:
        return [f"{title} {' x '.join(map(str, length))}" for length in lengths]
    return [f"{title} {_power_range(math.prod(length))}" for length in lengths]


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

"""Real inputs of a model, as the export chain left them.

Contract: an .npz file with keys `<row, five digits>/<input name>`, each array with batch size 1;
lengths of dynamic axes may differ between rows. A request is one row, repeated where the profile has no batch of 1.
A file may have its rows in an order of its own (from short to long,
say), so a load test sends them shuffled; what is sent then has the lengths of the file in their true proportions.

Examples:
    rows = read_inputs(Path("build/minilm/evaluation.npz"))     # [{"input_ids": array, "attention_mask": array}, ...]
    length_classes(rows, spec.inputs)                           # ["sequence 16", "sequence 128", ...], one a row
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deepseek.spec import BATCH, InputError, TensorSpec

MOST_ROWS = 1000  # enough to be real; more would only fill memory with encoded requests
MOST_BYTES = 256 * 2**20  # of a worker's rows, where they are large
MOST_CLASSES = 8  # of lengths that are told apart one by one; more are told apart by powers of two

Row = dict[str, np.ndarray]


def read_inputs(path: Path, least: int = 1) -> list[Row]:
    """The rows in order, of too many some, drawn by a fixed seed; InputError in one line where there are none.

    Each is repeated until it is a batch of `least`, the smallest that the profile allows.
    """
    try:
        with np.load(path) as arrays:  # of an .npy file an array, which is no context
            names: dict[str, list[str]] = {}
            for key in sorted(arrays.files):
                row, separator, name = key.partition("/")
                if not separator or not row.isdecimal():
                    raise InputError(f"{path}: key {key!r}; keys are <row>/<input name>, such as 00000/item_ids")
                names.setdefault(row, []).append(name)
            if not names:
                raise InputError(f"{path}: holds no inputs; make it anew with: make engine")
            mean_bytes = least * sum(member.file_size for member in arrays.zip.infolist()) // len(names)
            most = max(1, min(len(names), MOST_ROWS, MOST_BYTES // max(1, mean_bytes)))
            # Drawn, since every n-th of rows that take turns (query, passage, query ...) may be all of one kind.
            drawn = np.sort(np.random.default_rng(0).permutation(len(names))[:most])
            chosen = [list(names)[place] for place in drawn]
            return [{name: _repeated(arrays[f"{row}/{name}"], least) for name in names[row]} for row in chosen]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it holds the real inputs to send, make it with: make engine") from None
    except InputError:
        raise
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not an .npz file of inputs ({error})") from None


def _repeated(array: np.ndarray, least: int) -> np.ndarray:
    return np.concatenate([array, *[array[-1:]] * (least - len(array))])


def shuffled(rows: Sequence[Row], seed: int) -> list[Row]:
    """The rows in the order in which they are sent, again and again: the same for every worker."""
    return [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]


def length_classes(rows: Sequence[Row], inputs: Mapping[str, TensorSpec]) -> list[str]:
    """For each row the class of its lengths, by the axes whose sizes differ between rows; "" where none do."""
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
    """Named axis -> size, the batch apart."""
    return {
        dim: size
        for name, array in row.items()
        for dim, size in zip(inputs[name].shape, array.shape, strict=False)
        if isinstance(dim, str) and dim != BATCH
    }


def _power_range(length: int) -> str:
    upper = 1 << max(0, length - 1).bit_length()
    return f"{upper // 2 + 1} to {upper}"

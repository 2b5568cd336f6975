"""Rows of real inputs and outputs: reads and writes them, and joins them into batches.

Contract: a row is a dict of arrays with a batch dimension of 1; `build/<name>/{calibration,evaluation}.npz` hold one
array per row and input, with keys `<row>/<input>`.
"""

import hashlib
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from deepseek.spec import flags_for
from export.artifact import need, staged

Row = dict[str, np.ndarray]
EVALUATION_ROWS = 2000  # at most


def save_rows(path: Path, rows: Iterable[Row]) -> int:
    """Writes rows as `<row>/<input>` arrays; returns the number of rows."""
    arrays = {f"{row:05d}/{name}": array for row, sample in enumerate(rows) for name, array in sample.items()}
    with staged(path) as file, file.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return len({key.split("/")[0] for key in arrays})


def save_arrays(path: Path, arrays: Row) -> None:
    """Writes an .npz of arrays by name; numpy.savez reserves the names `file` and `allow_pickle`."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, array, allow_pickle=False)


def load_rows(path: Path) -> list[Row]:
    """Reads a file of `save_rows`; raises InputError if it is missing."""
    rows: dict[str, Row] = {}
    with np.load(need(path, f"deepseek to-onnx {flags_for(path.parent.name)}")) as arrays:
        for key in arrays.files:
            row, name = key.split("/", 1)
            rows.setdefault(row, {})[name] = arrays[key]
    return list(rows.values())


def batches(rows: Iterable[Row], size: int) -> Iterator[tuple[list[int], Row]]:
    """Batches of rows with equal shapes, at most `size` rows each, with the rows' indices."""
    groups: dict[tuple, list[tuple[int, Row]]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(tuple(array.shape for array in row.values()), []).append((place, row))
    for group in groups.values():
        for start in range(0, len(group), size):
            part = group[start : start + size]
            yield [place for place, _ in part], join([row for _, row in part])


def join(rows: list[Row]) -> Row:
    """Concatenates rows of equal shapes into one batch."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def filled(inputs: Row, least: int) -> Row:
    """Pads a batch to `least` rows by repeating the last one: a profile may have a minimum."""
    missing = max(0, least - len(next(iter(inputs.values()))))
    return {name: np.concatenate([array, *[array[-1:]] * missing]) for name, array in inputs.items()}


def row_digest(row: Mapping[str, np.ndarray]) -> bytes:
    """sha256 of a row's names, types, shapes and values, to find rows that two sets share."""
    digest = hashlib.sha256()
    for name, array in sorted(row.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.digest()

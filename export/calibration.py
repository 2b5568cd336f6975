"""Real inputs for calibration: read from a file, chosen over all lengths, handed over in batches.

Contract: rows that cover short and long inputs, none of which is an evaluation row. Needs neither torch nor
model.py: `export.to_onnx` wrote the model's own samples to `build/<name>/calibration.npz`.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from deepseek.spec import BATCH, Axis, DeploymentSpec, InputError
from export.artifact import Row, batches, filled, load_rows, row_digest, row_digests

CALIBRATION_BATCH = 8
STRATA = 8  # bins of length
LEAST_ROWS = 2
FEW_ROWS = 8  # with fewer there is a note
POOL = 4  # rows to choose from for each one that is used
_GOLDEN = 0.618033988749895  # multiples of it, modulo 1, fall evenly: a spread order without a random seed


class NotFinite(InputError):
    """A sample holds NaN or Inf, which a model may take, and which has no range."""


class Calibration(CalibrationDataReader):
    """Batches of real inputs, as ONNX Runtime's calibrators read them; `note` tells what was left out."""

    def __init__(self, rows: list[Row], batch: Axis, note: str = "") -> None:
        self.rows, self._batch, self.note = rows, batch, note
        size = min(max(CALIBRATION_BATCH, batch.min), batch.max)
        self.batches = [filled(inputs, batch.min) for _, inputs in batches(rows, size)]
        self.rewind()

    @property
    def largest_batch(self) -> int:
        """Of the profile."""
        return self._batch.max

    def get_first(self) -> Row:
        """What ModelOpt tells shapes by: it leaves matrix products alone that have a side of 1 or under 16 here.

        So: the longest row, twice where the profile allows, whatever the order of the others.
        """
        longest = max(self.rows, key=length_of)
        return filled(longest, max(self._batch.min, min(2, self._batch.max)))

    def get_next(self) -> Row | None:
        """The next batch, None at the end."""
        return next(self._rest, None)

    def rewind(self) -> None:
        """Starts again."""
        self._rest: Iterator[Row] = iter(self.batches)


def length_of(row: Row) -> int:
    """How much a row holds in all its inputs together."""
    return sum(map(_elements, row.values()))


def _elements(array: np.ndarray) -> int:
    """Elements; of integers those that are not 0, as padding and masks are."""
    return array.size if array.dtype.kind == "f" else int(np.count_nonzero(array))


def lengths_of(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """The elements of the shortest and of the longest row, by input, for people to see what was covered."""
    counts = {name: [_elements(row[name]) for row in rows] for name in rows[0]}
    return {name: (min(found), max(found)) for name, found in counts.items()}


def pool_size(spec: DeploymentSpec) -> int:
    """How many rows to choose the calibration samples from: more than are used where lengths can differ."""
    varied = any(
        not tensor.dtype.startswith("float") or any(isinstance(dim, str) for dim in tensor.shape[1:])
        for tensor in spec.inputs.values()
    )
    return spec.precision.calibration_samples * (POOL if varied else 1)


def stratified(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows over all lengths, in an order of which every beginning covers them too.

    Strata of equal width between the shortest and the longest row take turns, so that few long rows among many
    short ones are all taken; within a stratum the rows are spread evenly over the file.
    """
    if not rows:
        return []
    lengths = np.array([length_of(row) for row in rows])
    strata = (lengths - lengths.min()) * STRATA // (lengths.max() - lengths.min() + 1)
    turns = np.empty(len(rows))
    for stratum in np.unique(strata):
        places = np.flatnonzero(strata == stratum)
        spread = np.argsort(np.arange(len(places)) * _GOLDEN % 1)
        turns[places[spread]] = np.arange(len(places))
    order = np.lexsort((strata, turns))
    return [rows[place] for place in order[:limit]]


def read_rows(spec: DeploymentSpec, path: Path) -> list[Row]:
    """All rows of a calibration file; raises InputError where it is broken or they do not fit the signature.

    Formats: our own `.npz` (one array a row and input); `.npz` of one array an input, samples first;
    `.npy` for a model of one input; anything else is raw records, each the inputs of one sample in the
    signature's order, native byte order, which needs a signature without further dynamic axes.
    """
    try:
        rows = _rows_in(spec, path)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read ({why}); a whole .npz or .npy file of numbers is needed") from None
    if not rows:
        raise InputError(f"{path}: holds no samples; calibration needs real inputs")
    for index, row in enumerate(rows):
        _check(spec, row, f"{path}: row {index}")
    return rows


def _rows_in(spec: DeploymentSpec, path: Path) -> list[Row]:
    """The rows as the file has them; raises what numpy raises for a broken one."""
    with path.open("rb") as file:  # np.load would leave one that it cannot read open
        head = file.read(6)
        file.seek(0)
        if head[:2] == b"PK":
            with np.load(file) as arrays:
                if all("/" in key for key in arrays.files):
                    return load_rows(path)
                return _unstacked(spec, {key: arrays[key] for key in arrays.files}, path)
        if head == b"\x93NUMPY":
            if len(spec.inputs) > 1:
                inputs = ", ".join(spec.inputs)
                raise InputError(f"{path}: one array, for inputs {inputs}; use an .npz file with an array for each")
            return _unstacked(spec, dict.fromkeys(spec.inputs, np.load(file)), path)
    return _raw_rows(spec, path)


def _check(spec: DeploymentSpec, row: Row, where: str) -> None:
    for name, tensor in spec.inputs.items():
        seen = row.get(name)
        if seen is None or seen.dtype != tensor.dtype or seen.ndim != len(tensor.shape):
            found = "none" if seen is None else f"{seen.dtype} {list(seen.shape)}"
            raise InputError(f"{where}: input {name!r}: seen {found}; deploy.toml says {_said(tensor)}")
        for dim, size in zip(tensor.shape[1:], seen.shape[1:], strict=True):
            least, most = (spec.axes[dim].min, spec.axes[dim].max) if isinstance(dim, str) else (dim, dim)
            if not least <= size <= most:
                raise InputError(f"{where}: input {name!r}: shape {list(seen.shape)}; {dim!r} takes {least} to {most}")
        if seen.dtype.kind == "f" and not np.isfinite(seen).all():
            raise NotFinite(f"{where}: input {name!r}: holds NaN or Inf; ranges cannot be found with it")


def _said(tensor: object) -> str:
    return f"{getattr(tensor, 'dtype')} {list(getattr(tensor, 'shape'))}"  # noqa: B009


def disjoint(rows: Iterable[Row], evaluation: Sequence[Row], limit: int | None = None) -> tuple[list[Row], int]:
    """Rows that are no evaluation rows too, `limit` at most, and how many were met that are."""
    judged, left, shared = set(row_digests(evaluation)), [], 0
    for row in rows:
        if row_digest(row) in judged:
            shared += 1
            continue
        left.append(row)
        if len(left) == limit:
            break
    return left, shared


def left_out(left: Sequence[Row], shared: int) -> str:
    """What there is to tell of rows that were left out, and of how few remain; "" where nothing is."""
    if not shared:
        return ""
    few = f"; {len(left)} are left, few to find ranges by" if len(left) < FEW_ROWS else ""
    return f"calibration: {shared} samples are evaluation samples too, and were left out{few}"


def check_disjoint(left: Sequence[Row], shared: int, where: str) -> None:
    """Raises InputError where beside `shared` ones too few rows are left that are no evaluation rows."""
    rows = len(left) + shared
    if len(left) < min(LEAST_ROWS, rows):
        raise InputError(
            f"{where}: {shared} of {rows} calibration rows are evaluation rows too; the two must "
            f"be disjoint, or the accuracy budget is judged on what was calibrated on: {LEAST_ROWS} others are needed, "
            'or candidates = ["fp32"]'
        )


def _unstacked(spec: DeploymentSpec, arrays: dict[str, np.ndarray], path: Path) -> list[Row]:
    if arrays.keys() != spec.inputs.keys():
        raise InputError(f"{path}: holds {', '.join(sorted(arrays))}; the inputs are {', '.join(spec.inputs)}")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"{path}: the inputs' sample counts differ: {lengths}")
    count = next(iter(lengths.values()))
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]


def _raw_rows(spec: DeploymentSpec, path: Path) -> list[Row]:
    for name, tensor in spec.inputs.items():
        if any(isinstance(dim, str) for dim in tensor.shape[1:]):
            raise InputError(f"{path}: raw records need fixed sizes; {name} is {list(tensor.shape)}: use an .npz file")
    record = np.dtype([(name, tensor.dtype, tensor.shape[1:]) for name, tensor in spec.inputs.items()])
    size = path.stat().st_size
    if size == 0 or size % record.itemsize:
        raise InputError(f"{path}: {size} bytes; raw records of this signature take {record.itemsize} bytes each")
    records = np.fromfile(path, record)
    return [{name: records[name][row : row + 1] for name in spec.inputs} for row in range(len(records))]


def calibration_of(spec: DeploymentSpec, path: Path, limit: int, evaluation: Sequence[Row]) -> Calibration:
    """At most `limit` rows of a file, over all lengths and none of `evaluation`, as calibrators read them."""
    left, shared = disjoint(read_rows(spec, path), evaluation)
    check_disjoint(left, shared, str(path))
    return Calibration(stratified(left, limit), spec.axes[BATCH], left_out(left, shared))

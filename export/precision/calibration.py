"""Calibration inputs: reads them from a file, chooses them over all lengths, and batches them.

Contract: the rows cover short and long inputs and exclude evaluation rows. Needs neither torch nor
model.py: `export.stages.to_onnx` wrote the model's own samples to `build/<name>/calibration.npz`.
"""

import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from deepseek.spec import BATCH, Axis, DeploymentSpec, InputError
from export.model_folder import check_inputs
from export.rows import Row, batches, filled, load_rows, row_digest

CALIBRATION_BATCH = 8
STRATA = 8  # bins of length
LEAST_ROWS = 2
FEW_ROWS = 8  # fewer give a note
POOL = 4  # candidate rows for each row that is used
MOST_READ = 16  # times the wanted rows: samples() may be endless and give only evaluation rows
_GOLDEN = 0.618033988749895  # its multiples modulo 1 are spread evenly: no random seed needed


class Calibration(CalibrationDataReader):
    """Batches of real inputs, as ONNX Runtime's calibrators read them; `note` reports rows left out."""

    def __init__(self, rows: list[Row], batch: Axis, note: str = "") -> None:
        self.rows, self._batch, self.note = rows, batch, note
        size = min(max(CALIBRATION_BATCH, batch.min), batch.max)
        self.batches = [filled(inputs, batch.min) for _, inputs in batches(rows, size)]
        self._rest: Iterator[Row] = iter(self.batches)

    @property
    def largest_batch(self) -> int:
        return self._batch.max

    def get_first(self) -> Row:
        """The batch from which ModelOpt infers shapes: it skips matrix products that have a side of 1 or under 16 here.

        So it is the longest row, twice if the profile allows, independent of the order of the rows.
        """
        longest = max(self.rows, key=length_of)
        return filled(longest, max(self._batch.min, min(2, self._batch.max)))

    def get_next(self) -> Row | None:
        return next(self._rest, None)


def length_of(row: Row) -> int:
    """Number of elements of a row, over all inputs."""
    return sum(map(_elements, row.values()))


def _elements(array: np.ndarray) -> int:
    """Number of elements; for integers without zeros, which are padding and masks."""
    return array.size if array.dtype.kind == "f" else int(np.count_nonzero(array))


def lengths_of(rows: Sequence[Row]) -> dict[str, tuple[int, int]]:
    """Elements of the shortest and of the longest row, by input, for the report."""
    counts = {name: [_elements(row[name]) for row in rows] for name in rows[0]}
    return {name: (min(found), max(found)) for name, found in counts.items()}


def pool_size(spec: DeploymentSpec) -> int:
    """Number of candidate rows for calibration: more than are used if lengths can differ."""
    varied = any(
        not tensor.dtype.startswith("float") or any(isinstance(dim, str) for dim in tensor.shape[1:])
        for tensor in spec.inputs.values()
    )
    return spec.precision.calibration_samples * (POOL if varied else 1)


def stratified(rows: Sequence[Row], limit: int) -> list[Row]:
    """At most `limit` rows over all lengths, ordered so that every prefix covers all lengths too.

    Strata of equal width between the shortest and the longest row take turns, so that a few long rows among many
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
    """All rows of a calibration file; raises InputError if it is broken or a row does not fit the signature.

    Formats: our own `.npz` (one array per row and input); `.npz` with one array per input, samples first; `.npy` for a
    model with one input; anything else is raw records, each the inputs of one sample in the signature's order and
    native byte order, for signatures whose only dynamic axis is the batch.
    """
    try:
        rows = _rows_in(spec, path)
    except InputError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read ({why}); a complete .npz or .npy file of numbers is needed") from None
    if not rows:
        raise InputError(f"{path}: holds no samples; calibration needs real inputs")
    for index, row in enumerate(rows):
        check_inputs(spec, row, f"{path}: row {index}")
    return rows


def _rows_in(spec: DeploymentSpec, path: Path) -> list[Row]:
    """The rows of the file, unchecked; raises numpy's errors if it is broken."""
    with path.open("rb") as file:  # np.load does not close a file that it cannot read
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


def disjoint(rows: Iterable[Row], evaluation: Sequence[Row], limit: int | None = None) -> tuple[list[Row], int]:
    """At most `limit` rows that are not evaluation rows, and the number of rows skipped because they are."""
    judged, left, shared = set(map(row_digest, evaluation)), [], 0
    for row in rows:
        if row_digest(row) in judged:
            shared += 1
            continue
        left.append(row)
        if len(left) == limit:
            break
    return left, shared


def left_out(left: Sequence[Row], shared: int) -> str:
    """A note on how many rows were left out, and whether few remain; "" if none were."""
    if not shared:
        return ""
    few = f"; only {len(left)} are left, which is few to find ranges" if len(left) < FEW_ROWS else ""
    return f"calibration: {shared} samples are also evaluation samples and were left out{few}"


def check_disjoint(left: Sequence[Row], shared: int, where: str, instead: str = 'set candidates = ["fp32"]') -> None:
    """Raises InputError if too few rows are left besides the `shared` ones, which are evaluation rows too."""
    rows = len(left) + shared
    if len(left) < min(LEAST_ROWS, rows):
        raise InputError(
            f"{where}: {shared} of {rows} calibration rows are also evaluation rows; the two must "
            f"be disjoint, or calibration data would decide the accuracy budget: add at least {LEAST_ROWS} other rows, "
            f"or {instead}"
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
    """At most `limit` rows of a file over all lengths, without rows of `evaluation`, for a calibrator."""
    left, shared = disjoint(read_rows(spec, path), evaluation)
    check_disjoint(left, shared, str(path))
    return Calibration(stratified(left, limit), spec.axes[BATCH], left_out(left, shared))

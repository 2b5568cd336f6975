"""Reads a request from a file: .npz or .json.

Contract: `read_inputs` returns arrays of the model's types, or raises InvalidInput in one line.
- .npz: arrays by input name; `row` picks one row, by default all are sent. Or a build's `evaluation.npz` with the keys
  "00000/item_ids", "00001/item_ids" and so on, each a batch of one; `row` picks one, by default the first.
- .json: {"item_ids": [[1, 2, 3]]}. Numbers are cast if nothing is lost (1.0 to an integer, 0.1 to the nearest float)
  and refused otherwise (1.5 to an integer, 300 to INT8, true to a number). If the server describes no inputs, they are
  sent as INT64, FP64, BOOL or BYTES.
"""

import json
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tritonclient.utils import np_to_triton_dtype

from deepseek_client.errors import InvalidInput
from deepseek_client.metadata import ModelMetadata, TensorMetadata
from deepseek_client.tensors import exact_array, restored


def read_inputs(path: Path, metadata: ModelMetadata, row: int | None = None) -> dict[str, np.ndarray]:
    """The file's arrays; with `row` only this row."""
    if path.suffix not in (".npz", ".json"):
        raise InvalidInput(f"{path}: unknown file type; it must end in .npz or .json")
    try:
        return _from_npz(path, row) if path.suffix == ".npz" else _from_json(path, metadata, row)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror or error}") from None


def filled(inputs: dict[str, np.ndarray], least: int) -> dict[str, np.ndarray]:
    """Repeats the last row of each array until there are `least` rows."""
    return {
        name: np.concatenate([array, *[array[-1:]] * (least - len(array))]) if array.ndim else array
        for name, array in inputs.items()
    }


def _from_npz(path: Path, row: int | None) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            rows: dict[int, dict[str, str]] = {}
            for key in file.files:
                if match := re.fullmatch(r"(\d{5,})/(.+)", key):
                    rows.setdefault(int(match[1]), {})[match[2]] = key
            if rows:
                _check_row(path, row or 0, len(rows))
                return {name: restored(file[key]) for name, key in rows[row or 0].items()}
            return _picked(path, {name: restored(array) for name, array in file.items()}, row)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:  # TypeError: an .npy
        advice = "save texts as .astype(str)" if "Object arrays" in str(error) else "write one with numpy.savez"
        raise InvalidInput(f"{path}: not an .npz file of plain arrays ({error}); {advice}") from None


def _from_json(path: Path, metadata: ModelMetadata, row: int | None) -> dict[str, np.ndarray]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{path}: not JSON ({error})") from None
    if not isinstance(values, dict):
        name = next((spec.name for spec in metadata.inputs), "name of an input")
        raise InvalidInput(f'{path}: a {type(values).__name__}; it must be an object: {{"{name}": [...]}}')
    return _picked(path, arrays_of(values, metadata, where=f"{path}: "), row)


def arrays_of(values: Mapping[str, Any], metadata: ModelMetadata, where: str = "") -> dict[str, np.ndarray]:
    """Nested lists by input name as arrays of the model's types; `where` begins an error."""
    specs = {spec.name: spec for spec in metadata.inputs}
    if not specs:  # the server does not describe its inputs
        specs = {name: _spec_of(f"{where}{name!r}", name, value) for name, value in values.items()}
    return {
        name: _exactly(f"{where}{name!r}", value, specs[name]) if name in specs else np.array(None)
        for name, value in values.items()
    }  # ModelMetadata.check refuses unknown names


def _spec_of(where: str, name: str, value: Any) -> TensorMetadata:
    """A tensor of the type that numpy gives the value: INT64, FP64, BOOL or BYTES."""
    try:
        array = np.array(value)
    except ValueError:
        raise InvalidInput(f"{where}: the lists in it differ in length") from None
    datatype = "BYTES" if array.dtype.kind in "OSU" else np_to_triton_dtype(array.dtype)
    return TensorMetadata(name=name, datatype=datatype, shape=array.shape)


def _picked(path: Path, arrays: dict[str, np.ndarray], row: int | None) -> dict[str, np.ndarray]:
    if row is None:
        return arrays
    _check_row(path, row, min((len(array) if array.ndim else 1 for array in arrays.values()), default=0))
    return {name: array[row : row + 1] if array.ndim else array for name, array in arrays.items()}


def _check_row(path: Path, row: int, count: int) -> None:
    if not 0 <= row < count:
        rows = f"rows 0 to {count - 1}" if count else "no rows"
        raise InvalidInput(f"{path}: no row {row}; it has {rows}")


def _exactly(where: str, value: Any, spec: TensorMetadata) -> np.ndarray:
    """`value` as an array of the tensor's type."""
    try:
        return np.array(value, dtype=object) if spec.datatype == "BYTES" else exact_array(value, spec.datatype)
    except ValueError as error:
        raise InvalidInput(f"{where}: {error}; the model takes {spec.dtype.name} {list(spec.shape)}") from None

"""Tables on the terminal: a model's signature, a request, an answer.

Contract: one column per tensor, for the first row of the batch. An input shows its last values (the latest of a
history), an output its first (the best of a ranking). Integers with labels show their label. A blank label marks
padding: it is left out at the end, and for an input also at the start. Tensors of several dimensions show their range.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table
from rich.text import Text

from deepseek_client.errors import InvalidInput
from deepseek_client.metadata import DTYPES, ModelMetadata

Labels = Mapping[str, Sequence[str]]


def read_labels(folder: Path) -> dict[str, list[str]]:
    """Labels by tensor name: line k of FOLDER/<tensor>.txt, counted from 0, is the label of id k."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise InvalidInput(f"{folder}: no labels in it; it must hold TENSOR.txt, where line k names the id k")
    try:
        return {path.stem: path.read_text(encoding="utf-8").split("\n") for path in files}
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{folder}: {error}") from None


def signature_line(metadata: ModelMetadata) -> str:
    size = metadata.max_batch_size
    batching = "batch size unknown" if size is None else f"batches up to {size}" if size else "no batching"
    return f"{metadata.name}, version {', '.join(metadata.versions) or '?'} ({metadata.platform}, {batching})"


def signature_table(metadata: ModelMetadata) -> Table:
    """Names, types and shapes."""
    table = Table()
    for heading in ("", "name", "type", "shape"):
        table.add_column(heading)
    for kind, specs in (("input", metadata.inputs), ("output", metadata.outputs)):
        for spec in specs:
            name = f"{spec.name} (optional)" if spec.optional and metadata.max_batch_size is not None else spec.name
            table.add_row(kind, Text(name), Text(spec.datatype), Text(str(list(spec.shape))))
    return table


def tensor_table(
    arrays: Mapping[str, np.ndarray], labels: Labels, top: int, *, batched: bool, last: bool = False
) -> Table:
    """The tensors of a request (`last`) or of an answer. Ids whose labels another column has are shown as numbers."""
    rows = {
        name: widened(np.asarray(array[0] if batched and array.ndim and len(array) else array))
        for name, array in arrays.items()
    }
    columns = {name: _cells(row, labels.get(name), top, last=last) for name, row in rows.items()}
    own = [column for name, column in columns.items() if name not in labels]
    repeated = [name for name, column in columns.items() if name in labels and column in own]
    columns |= {name: _cells(rows[name], None, top, last=last) for name in repeated}
    table = Table()
    for name, (counts, _) in columns.items():
        numeric = (name not in labels or name in repeated) and rows[name].dtype.kind in "fiu"
        justify: Literal["left", "right"] = "right" if numeric else "left"
        table.add_column(Text(f"{name}\n{counts}" if counts else name), justify=justify, no_wrap=numeric)
    cells = [cells for _, cells in columns.values()]
    for line in range(max(map(len, cells), default=0)):
        # One line per row: a narrow screen truncates names, not numbers.
        line_of = (column[line] if line < len(column) else "" for column in cells)
        table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in line_of))
    return table


def widened(array: np.ndarray) -> np.ndarray:
    """bfloat16 as float32, which has all of its values: neither numpy's files nor formats know it."""
    return array.astype(np.float32) if array.dtype == DTYPES["BF16"] else array


def _cells(row: np.ndarray, names: Sequence[str] | None, top: int, *, last: bool) -> tuple[str, list[str]]:
    """A caption such as "first 3 / of 8" in two lines, and the values to show."""
    if row.ndim > 1:
        shape = " x ".join(map(str, row.shape))
        if not row.size or row.dtype.kind not in "fiub":
            return shape, []
        return shape, [f"min {_value(row.min())}", f"mean {_value(row.mean())}", f"max {_value(row.max())}"]
    flat = row.reshape(-1)
    if names is None and row.dtype.kind in "fiub":  # no blanks: millions of numbers are not made texts
        return _captioned([_value(value) for value in (flat[-top:] if last else flat[:top])], len(flat), last=last)
    values = [_value(value) if names is None else _label(value, names) for value in flat]
    filled = [k for k, value in enumerate(values) if value] or [0]
    shown = values[filled[0] if last else 0 : filled[-1] + 1]  # blanks in between stay, so that columns stay aligned
    return _captioned(shown[-top:] if last else shown[:top], len(shown), last=last)


def _captioned(few: list[str], count: int, *, last: bool) -> tuple[str, list[str]]:
    return f"{'last' if last else 'first'} {len(few)}\nof {count}" if len(few) < count else "", few


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace") or '""'
    if isinstance(value, str | int | np.integer | np.bool_):
        return str(value)
    size = abs(float(value))
    return f"{value:.4f}" if size == 0 or 1e-3 <= size < 1e4 else f"{value:.3e}"


def _label(value: Any, names: Sequence[str]) -> str:
    if isinstance(value, np.integer) and 0 <= value < len(names):
        return names[int(value)]
    return str(value)

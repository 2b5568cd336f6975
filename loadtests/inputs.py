"""Real inputs of a model, as the export chain left them.

Contract: an .npz file with keys `<row, five digits>/<input name>`, each array with batch size 1;
lengths of dynamic axes may differ between rows.

Example:
    requests = read_inputs(Path("build/recommender/evaluation.npz"))     # [{"item_ids": array}, ...]
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np

from deepseek.spec import InputError

MOST_ROWS = 1000  # enough to be real; more would only fill memory with encoded requests


def read_inputs(path: Path) -> list[dict[str, np.ndarray]]:
    """The rows in order, at most MOST_ROWS; InputError in one line where the file is not such a file."""
    try:
        with np.load(path) as arrays:
            rows: dict[str, dict[str, np.ndarray]] = {}
            for key in sorted(arrays.files):
                row, separator, name = key.partition("/")
                if not separator or not row.isdecimal():
                    raise InputError(f"{path}: key {key!r}; keys are <row>/<input name>, such as 00000/item_ids")
                if row not in rows and len(rows) == MOST_ROWS:
                    break
                rows.setdefault(row, {})[name] = arrays[key]
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; it holds the real inputs to send, make it with: make engine") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: not an .npz file of inputs ({error})") from None
    if not rows:
        raise InputError(f"{path}: holds no inputs; make it anew with: make engine")
    return list(rows.values())

"""Reads the JSON files of a transformers checkpoint. Raises InputError, one line, for what cannot be read."""

import json
import zipfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from deepseek.spec import InputError


def read_object(path: Path, why: str) -> dict[str, Any]:
    """The object in a JSON file; raises InputError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; {why}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}); copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: seen {type(found).__name__}; a JSON object is needed; copy the checkpoint again")
    return found


def read_optional(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a checkpoint may lack."""
    return read_object(path, "") if path.is_file() else {}


def whole_number(path: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    """A whole number of a JSON object, 0 or more; raises InputError."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise InputError(f"{path}: {key}: seen {value!r}; a whole number, 0 or more, is needed")
    return value


def check_fetched(path: Path) -> None:
    """Raises InputError if a file of weights is only a pointer of Git LFS, or its copy was cut off."""
    with path.open("rb") as file:
        start = file.read(24)
    if start == b"version https://git-lfs.":
        raise InputError(f"{path}: only a Git LFS pointer; fetch the file: git -C {path.parent} lfs pull")
    why = ""
    if path.suffix == ".safetensors":
        try:
            safe_open(path, framework="numpy")
        except SafetensorError as error:
            why = f"safetensors ({error})"
    # torch.save writes a zip archive, whose table is at its end; before PyTorch 1.6 it wrote pickles.
    elif path.suffix == ".bin" and not (start[:1] == b"\x80" or zipfile.is_zipfile(path)):
        why = "torch.save"
    if why:
        size = path.stat().st_size
        raise InputError(
            f"{path}: {size} bytes, but not a whole file of {why}; the file is damaged: copy the checkpoint again"
        )

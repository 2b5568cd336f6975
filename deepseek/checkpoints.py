"""Training checkpoints: atomic, and tied to one run.

Contract: a checkpoint is a folder that gets its final name only when it is complete; only then is the previous one
deleted. Each records the run that it belongs to (`identity`); loading it into another run raises InputError.

Examples:
    checkpoints = Checkpoints("build/mine/checkpoints", {"learning_rate": 1e-3, "data": probe(dataset)})
    resumed = checkpoints.resume(accelerator)
    checkpoints.save(accelerator)
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from deepseek.spec import InputError

COMPLETE, UNFINISHED = "checkpoint-", "writing-"
PROBED_ROWS = 8
FULL_BYTES = 2**20  # a disk with less is full: a failed write leaves a little


class Checkpoints:
    """The checkpoints of one run, in its own folder; accelerate writes and reads their content."""

    def __init__(self, folder: str | Path, identity: Mapping[str, object]) -> None:
        self.folder = Path(folder)
        self.identity = json.loads(json.dumps(identity, default=str))  # in the form in which it is read back

    def save(self, accelerator: Accelerator) -> None:
        """Saves everything that the accelerator has prepared or registered, and the random states."""
        older = self._complete()
        number = int(older[-1].name.removeprefix(COMPLETE)) + 1 if older else 0
        unfinished = self.folder / f"{UNFINISHED}{number:06d}"
        try:
            accelerator.save_state(str(unfinished))
        except (RuntimeError, SafetensorError):  # their writers do not say that the disk is full
            full = shutil.disk_usage(self.folder).free < FULL_BYTES
            shutil.rmtree(unfinished, ignore_errors=True)
            if full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder)) from None
            raise
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (unfinished / "identity.json").write_text(json.dumps(self.identity, indent=2), encoding="utf-8")
            unfinished.rename(self.folder / f"{COMPLETE}{number:06d}")
            for folder in older:
                shutil.rmtree(folder)
        accelerator.wait_for_everyone()

    def resume(self, accelerator: Accelerator) -> bool:
        """Loads the last checkpoint; False if there is none. Raises InputError if it belongs to another run."""
        found = self._complete()
        if accelerator.is_main_process:
            for stale in (*self.folder.glob(f"{UNFINISHED}*"), *found[:-1]):  # left by a killed process
                shutil.rmtree(stale)
        accelerator.wait_for_everyone()  # before any process writes
        if not found:
            return False
        last = found[-1]
        try:
            theirs = json.loads((last / "identity.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{last}: not a valid checkpoint ({error}); delete {self.folder}") from None
        for key in sorted(self.identity.keys() | theirs.keys()):
            seen, ours = theirs.get(key), self.identity.get(key)
            if seen != ours:
                raise InputError(
                    f"{last} belongs to another run: {key} was {seen!r}, now it is {ours!r}; "
                    f"delete {self.folder} to start over, or use another folder"
                )
        accelerator.load_state(str(last))
        return True

    def recorded(self, key: str) -> Any:
        """A value of the last checkpoint's `identity`; None if there is no checkpoint or no such key."""
        found = self._complete()
        try:
            return json.loads((found[-1] / "identity.json").read_text(encoding="utf-8")).get(key) if found else None
        except (OSError, ValueError):
            return None  # `resume` reports what is wrong

    def _complete(self) -> list[Path]:
        return sorted(self.folder.glob(f"{COMPLETE}*"))


def probe(data: Any) -> str:
    """Length of a dataset and hash of a few of its rows: cheap, and detects most changes of the data."""
    rows = sorted({round(place) for place in np.linspace(0, len(data) - 1, PROBED_ROWS)})
    return f"{len(data)} rows, {digest([data[row] for row in rows])}"


def digest(value: Any) -> str:
    """Hash of nested lists, dicts, tensors, arrays and plain values."""
    found = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, torch.Tensor):
            found.update(f"{part.dtype}{[*part.shape]}".encode())
            found.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            found.update(f"{part.dtype}{part.shape}".encode() + part.tobytes())
        elif isinstance(part, Mapping):
            add(list(part.items()))
        elif isinstance(part, list | tuple):
            found.update(f"[{len(part)}".encode())
            for each in part:
                add(each)
        elif isinstance(part, str | bytes | int | float | None):
            found.update(repr(part).encode() + b"|")
        elif isinstance(part, np.generic):
            found.update(f"{part.dtype}".encode() + part.tobytes())
        else:  # its repr may contain an address
            found.update(type(part).__qualname__.encode() + b"|")

    add(value)
    return found.hexdigest()[:16]

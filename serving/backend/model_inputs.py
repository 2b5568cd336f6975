"""Requests with the model's own inputs, such as token ids: reads and checks them, and splits large batches.

Contract: the build copies this file beside the backend's model.py. It imports nothing of the project.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Run = Callable[[dict[str, np.ndarray]], list[np.ndarray]]
"""Runs a batch of the model's inputs; returns its outputs in order."""
NO_ROWS = "the batch has no rows; send one at least"
"""Why a tensor without its first axis is refused: over gRPC, Triton lets a batch of 0 pass that holds the data of 1."""


@dataclass(frozen=True)
class Feed:
    """A request; its length is the number of rows."""

    feed: dict[str, np.ndarray]
    """The model's inputs, (rows, ...) each."""

    def __len__(self) -> int:
        return len(next(iter(self.feed.values())))


class ModelInputs:
    def __init__(
        self, folder: str, run_rows: int, added: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None
    ) -> None:
        """`folder` is the version's. `added` gives the outputs that the model itself does not have."""
        self._run_rows, self._added = run_rows, added
        self._axes, self._shapes = _profile(os.path.join(folder, "manifest.json"))

    def read(self, tensors: Mapping[str, Any], _: object) -> Feed:
        """The inputs of a request. Raises ValueError if their sizes do not fit, as TensorRT does."""
        feed = {name: np.from_dlpack(tensor) for name, tensor in tensors.items()}
        seen: dict[str, tuple[int, str]] = {}
        for name, array in feed.items() if self._axes else ():
            if len(self._shapes[name]) != array.ndim:
                raise ValueError(NO_ROWS)
            for axis, size in zip(self._shapes[name], array.shape, strict=True):
                if axis not in self._axes:
                    continue
                least, most = self._axes[axis]
                if not least <= size <= most:
                    allowed = least if least == most else f"{least} to {most}"
                    raise ValueError(f"{name}: axis {axis} is {size}; allowed: {allowed}")
                other, other_name = seen.setdefault(axis, (size, name))
                if size != other:
                    raise ValueError(f"{name}: axis {axis} is {size}, but {other} in {other_name}: both must be equal")
        return Feed(feed)

    def parts(self, requests: Sequence[Feed], outputs: Sequence[str], run: Run) -> Iterator[tuple[range, dict]]:
        """As `in_parts`."""
        return in_parts([request.feed for request in requests], self._run_rows, outputs, run)

    def answer(self, request: Feed, results: dict[str, np.ndarray], _asked: object) -> dict[str, np.ndarray]:
        """What to send for a request."""
        return {**results, **self._added(request.feed)} if self._added else results


def in_parts(
    feeds: Sequence[Mapping[str, np.ndarray]], least: int, outputs: Sequence[str], run: Run
) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """Joins the rows of requests and runs them in order, in equal parts of at least `least` rows; 0: all in one part.

    A part has less than twice as many, but not fewer: a small part takes longer per row. Yields the rows of each part,
    and their outputs by name.
    """
    joined = feeds[0]
    if len(feeds) > 1:
        joined = {name: np.concatenate([feed[name] for feed in feeds]) for name in joined}
    count = len(next(iter(joined.values())))
    parts = max(1, count // least) if least else 1
    for part in range(parts):
        rows = range(part * count // parts, (part + 1) * count // parts)
        taken = {name: array[rows.start : rows.stop] for name, array in joined.items()} if parts > 1 else joined
        yield rows, dict(zip(outputs, run(dict(taken)), strict=True))


def _profile(path: str) -> tuple[dict[str, tuple[int, int]], dict[str, list]]:
    """The smallest and largest size of each named axis, and the inputs' shapes; both empty without a manifest."""
    if not os.path.isfile(path):
        return {}, {}
    with open(path, encoding="utf-8") as file:
        manifest = json.load(file)
    axes = {name: (axis["min"], axis["max"]) for name, axis in manifest.get("axes", {}).items()}
    return axes, {name: tensor["shape"] for name, tensor in manifest.get("inputs", {}).items()}

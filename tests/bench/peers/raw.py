"""The graph without a server: ONNX Runtime over all rows at once, in the fastest of several settings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.onnxruntime_session import SLOW_ON_CPU
from export.rows import Row
from tests.bench.setting import Bench, log

BATCHES = (4, 8, 16, 32)
SAMPLE = 64  # rows on which settings are compared


class Raw:
    """Rows to outputs without a server: the longest rows first, shared out among the sessions."""

    def __init__(
        self, bench: Bench, path: Path, items: Sequence[Any], encode: Callable[[Sequence[Any]], list[Row]], output: str
    ) -> None:
        """Finds the fastest setting for the cores of this thread. `encode` makes rows (1, ...) of items."""
        self._items, self._encode, self._output = items, encode, output
        speeds = {}
        for without in ((), SLOW_ON_CPU):
            for count in {1, len(os.sched_getaffinity(0))}:
                sessions = bench.raw_sessions(path, count, without)
                for batch in BATCHES:
                    self._sessions, self._batch = sessions, batch
                    self.outputs(items[:SAMPLE])
                    speeds[self._per_s(items[:SAMPLE]), count, batch, without] = sessions
        best = max(speeds)
        self._sessions, (_, count, self._batch, without) = speeds[best], best
        left_out = f", without {' and '.join(without)}" if without else ""
        log.print(f"raw: best of {len(speeds)} settings: {count} session(s), batches of {self._batch}{left_out}")

    def per_s(self, seconds: float) -> float:
        """Rows per second of whole passes, for at least `seconds`."""
        start_s, passes = time.perf_counter(), 0
        while time.perf_counter() < start_s + seconds or not passes:
            self.outputs(self._items)
            passes += 1
        return passes * len(self._items) / (time.perf_counter() - start_s)

    def outputs(self, items: Sequence[Any]) -> np.ndarray:
        """The output of each item (items, ...)."""
        rows = self._encode(items)
        order = sorted(range(len(rows)), key=lambda place: -_length(rows[place]))
        parts = iter([order[start : start + self._batch] for start in range(0, len(order), self._batch)])
        with ThreadPoolExecutor(len(self._sessions)) as pool:
            shares = pool.map(lambda session: list(self._run(session, parts, rows)), self._sessions)
            found = [part for share in shares for part in share]
        joined = np.empty((len(rows), *found[0][1].shape[1:]), found[0][1].dtype)
        for places, values in found:
            joined[places] = values
        return joined

    def _run(self, session: Any, parts: Iterator[list[int]], rows: list[Row]) -> Iterator[tuple[list[int], np.ndarray]]:
        for places in parts:
            yield places, session.run([self._output], padded([rows[place] for place in places]))[0]

    def _per_s(self, items: Sequence[Any]) -> float:
        start_s = time.perf_counter()
        self.outputs(items)
        return len(items) / (time.perf_counter() - start_s)


def padded(rows: Sequence[Row]) -> Row:
    """One batch of rows (1, length), each padded with zeros on the right to the longest."""
    batch = {}
    for name in rows[0]:
        batch[name] = np.zeros((len(rows), max(row[name].shape[1] for row in rows)), rows[0][name].dtype)
        for place, row in enumerate(rows):
            batch[name][place, : row[name].shape[1]] = row[name][0]
    return batch


def _length(row: Row) -> int:
    return max(array.shape[1] for array in row.values())

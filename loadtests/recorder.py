"""Takes note of every request of a load test while it runs.

Contract: latencies are whole microseconds in HDR histograms of 3 digits, one for each second, so that a reported
percentile is at most 0.1 % above the true one; they are put there some thousands at once, since one alone takes longer
than all the rest of a note. A second is handed on when it can no longer change much (what still
comes of it makes another row, and rows add up), so that memory grows with no length of a run. Times are seconds of the
measured window; a request belongs to the second it was *planned* in, whenever it was answered.

Example:
    recorder = Recorder(planned_s, open_loop=True)
    recorder.attempt(0.1); recorder.finish(0.1, 0.1002, 0.15, None)
    rows = [*recorder.take()]
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from hdrh.histogram import HdrHistogram

LONGEST_US = 3_600_000_000  # an hour; no request may take longer (see Settings.timeout_s)
FOLD_AT = 4096  # values, so that a long run by length takes no more memory than a short one
Latency = Literal["intended", "service", "lag"]
KINDS: tuple[Latency, ...] = ("intended", "service", "lag")
NO_FILE, NO_PORT = "NoFile", "NoPort"  # kinds of error: the generator's own machine had none left for a connection


def rows_file(folder: Path, model: str) -> Path:
    """Where the rows of a load are written while it runs."""
    return folder / f"{model}.seconds.jsonl"


def histogram() -> HdrHistogram:
    """An empty one, 1 us to 1 h with 3 significant digits."""
    return HdrHistogram(1, LONGEST_US, 3)


def _highest_values() -> np.ndarray:
    """For each count of a histogram, the largest value in microseconds that it stands for."""
    layout = histogram()
    index = np.arange(layout.counts_len)
    bucket = (index >> layout.sub_bucket_half_count_magnitude) - 1
    sub_bucket = (index & (layout.sub_bucket_half_count - 1)) + layout.sub_bucket_half_count
    sub_bucket = np.where(bucket < 0, sub_bucket - layout.sub_bucket_half_count, sub_bucket)
    bucket = np.maximum(bucket, 0)
    return ((sub_bucket + 1) << bucket) - 1


VALUES_US = _highest_values()


class Latencies:
    """A histogram, and values that are still to be put into it."""

    __slots__ = ("_folded", "_pending")

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._folded: HdrHistogram | None = None

    def add(self, seconds: float) -> None:
        """One latency; what is out of range counts as the end of it."""
        self._pending.append(min(max(round(seconds * 1e6), 0), LONGEST_US))
        if len(self._pending) >= FOLD_AT:
            self.folded()

    def folded(self) -> HdrHistogram:
        """All of them."""
        found = self._folded = self._folded or histogram()
        if self._pending:
            values = np.array(self._pending)
            self._pending.clear()
            counts = np.ctypeslib.as_array(found.counts)
            counts += np.bincount(np.searchsorted(VALUES_US, values), minlength=len(counts)).astype(counts.dtype)
            found.total_count += len(values)
            found.min_value = min(found.min_value, int(values.min()))
            found.max_value = max(found.max_value, int(values.max()))
        return found


class _Second:
    """What happened to the requests planned in one second (`attempted`, `completed`: what happened in it)."""

    __slots__ = ("attempted", "completed", "dropped", "errors", "latencies", "ok", "planned")

    def __init__(self) -> None:
        self.planned = self.attempted = self.ok = self.completed = self.dropped = 0
        self.errors: Counter[str] = Counter()
        self.latencies: dict[Latency, Latencies] = {}

    def row(self, second: int) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("planned", "attempted", "ok", "completed", "dropped")}
        encoded: dict[str, str] = {kind: found.folded().encode().decode() for kind, found in self.latencies.items()}
        return {"second": second, **counts, "errors": dict(self.errors), **encoded}


class Recorder:
    """Takes note of every request, in a few microseconds each. Times are seconds of the measured window."""

    def __init__(self, planned_s: np.ndarray | None = None, *, open_loop: bool, duration_s: float = math.inf) -> None:
        self.in_flight = 0
        self._open_loop = open_loop
        self._duration_s = duration_s
        self._seconds: dict[int, _Second] = {}
        self._lengths: dict[str, _Second] = {}
        if planned_s is not None:
            self.plan(planned_s)

    def plan(self, planned_s: np.ndarray) -> None:
        """So much is to be sent, and when."""
        for second, count in zip(*np.unique(np.floor(planned_s), return_counts=True), strict=True):
            self._at(second).planned += int(count)

    def _at(self, time_s: float) -> _Second:
        second = math.floor(time_s)
        found = self._seconds.get(second)
        if found is None:
            found = self._seconds[second] = _Second()
        return found

    def attempt(self, now_s: float) -> None:
        """The generator takes up a request that is due."""
        self._at(now_s).attempted += 1
        self.in_flight += 1

    def drop(self, planned_s: float, length: str = "") -> None:
        """It cannot be sent: too many are unanswered."""
        self.in_flight -= 1
        self._at(planned_s).dropped += 1
        if length and 0 <= planned_s < self._duration_s:
            self._of(length).dropped += 1

    def finish(self, planned_s: float, sent_s: float, finished_s: float, error: str | None, length: str = "") -> None:
        """It was answered, or failed with an error of this kind; `length` is its class, where there are several."""
        self.in_flight -= 1
        second = self._at(planned_s)
        if error is None:
            self._at(finished_s).completed += 1
        self._count(second, planned_s, sent_s, finished_s, error)
        if self._open_loop:
            _record(second, "lag", sent_s - planned_s)
        if length and 0 <= planned_s < self._duration_s:
            self._count(self._of(length), planned_s, sent_s, finished_s, error)

    def _count(self, counted: _Second, planned_s: float, sent_s: float, finished_s: float, error: str | None) -> None:
        if error is not None:
            counted.errors[error] += 1
            return
        counted.ok += 1
        _record(counted, "service", finished_s - sent_s)
        if self._open_loop:
            _record(counted, "intended", finished_s - planned_s)

    def _of(self, length: str) -> _Second:
        return self._lengths.setdefault(length, _Second())

    def take_lengths(self) -> Iterator[dict[str, Any]]:
        """Rows of the window's requests by the class of their lengths, which are then forgotten."""
        for length in sorted(self._lengths):
            counted = self._lengths.pop(length)
            counted.planned = counted.ok + counted.errors.total() + counted.dropped
            yield {"length": length, **counted.row(0)}

    def take(self, before_s: float = math.inf) -> Iterator[dict[str, Any]]:
        """Rows of the seconds before `before_s`, which are then forgotten."""
        for second in sorted(self._seconds):
            if second < before_s:
                yield self._seconds.pop(second).row(second)

    def totals(self, second: int) -> tuple[int, int]:
        """Answered and failed requests of a second so far, for a progress line."""
        found = self._seconds.get(second)
        return (found.completed, found.errors.total() + found.dropped) if found else (0, 0)


def _record(second: _Second, kind: Latency, seconds: float) -> None:
    found = second.latencies.get(kind)
    if found is None:
        found = second.latencies[kind] = Latencies()
    found.add(seconds)

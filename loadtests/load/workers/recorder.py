"""Records every request of a load test while it runs.

Contract: latencies go into histograms in batches of thousands, since adding a single one would cost more than the rest
of the record. A second is handed on when few of its requests are open; late ones make another row, and rows of a second
are summed. So memory does not grow with the length of a run.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from loadtests.load.inputs import NO_LENGTH, Length
from loadtests.results.histogram import LONGEST_US, VALUES_US, Latency, histogram

FOLD_AT = 4096  # pending values, which bounds the memory of a long run
MESSAGE = 300  # characters of an error's message


def rows_file(folder: Path, model: str) -> Path:
    return folder / f"{model}.seconds.jsonl"


class Latencies:
    __slots__ = ("_folded", "_pending")

    def __init__(self) -> None:
        self._pending: list[int] = []
        self._folded: HdrHistogram | None = None

    def add(self, seconds: float) -> None:
        """Adds one latency, clipped to the histogram's range."""
        self._pending.append(min(max(round(seconds * 1e6), 0), LONGEST_US))
        if len(self._pending) >= FOLD_AT:
            self.folded()

    def folded(self) -> HdrHistogram:
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
    """The requests planned in one second; `attempted` and `completed` count the events within it."""

    __slots__ = ("attempted", "completed", "dropped", "errors", "latencies", "messages", "ok", "planned", "tokens")

    def __init__(self) -> None:
        self.planned = self.attempted = self.ok = self.completed = self.dropped = self.tokens = 0
        self.errors: Counter[str] = Counter()
        self.messages: dict[str, str] = {}
        self.latencies: defaultdict[Latency, Latencies] = defaultdict(Latencies)

    def row(self, second: int) -> dict[str, Any]:
        counts = {name: getattr(self, name) for name in ("planned", "attempted", "ok", "completed", "dropped")}
        encoded: dict[str, str] = {kind: found.folded().encode().decode() for kind, found in self.latencies.items()}
        messages = {"messages": self.messages} if self.messages else {}
        return {"second": second, **counts, "errors": dict(self.errors), **messages, **encoded}


class Recorder:
    """Records requests, in a few microseconds each. Times are seconds of the measured window."""

    def __init__(self, *, open_loop: bool, duration_s: float = math.inf) -> None:
        self.in_flight = 0
        self._open_loop = open_loop
        self._duration_s = duration_s
        self._seconds: defaultdict[int, _Second] = defaultdict(_Second)
        self._lengths: defaultdict[str, _Second] = defaultdict(_Second)

    def plan(self, planned_s: np.ndarray) -> None:
        for second, count in zip(*np.unique(np.floor(planned_s), return_counts=True), strict=True):
            self._at(second).planned += int(count)

    def _at(self, time_s: float) -> _Second:
        return self._seconds[math.floor(time_s)]

    def attempt(self, now_s: float) -> None:
        """Records that the generator takes up a due request."""
        self._at(now_s).attempted += 1
        self.in_flight += 1

    def drop(self, planned_s: float, length: Length = NO_LENGTH) -> None:
        self.in_flight -= 1
        self._at(planned_s).dropped += 1
        if length.title and 0 <= planned_s < self._duration_s:
            self._lengths[length.title].dropped += 1

    def finish(
        self, planned_s: float, sent_s: float, finished_s: float, error: str | None, length: Length = NO_LENGTH
    ) -> None:
        """Records an answer, or a failure: `error` is its kind, or its kind and its message."""
        self.in_flight -= 1
        second = self._at(planned_s)
        if error is None:
            self._at(finished_s).completed += 1
        self._count(second, planned_s, sent_s, finished_s, error)
        if self._open_loop:
            second.latencies["lag"].add(sent_s - planned_s)
        if length.title and 0 <= planned_s < self._duration_s:
            counted = self._lengths[length.title]
            self._count(counted, planned_s, sent_s, finished_s, error)
            counted.tokens += length.tokens if error is None else 0

    def _count(self, counted: _Second, planned_s: float, sent_s: float, finished_s: float, error: str | None) -> None:
        if error is not None:
            kind, _, message = error.partition(": ")
            counted.errors[kind] += 1
            if message and kind not in counted.messages:
                counted.messages[kind] = " ".join(message.split())[:MESSAGE]
            return
        counted.ok += 1
        counted.latencies["service"].add(finished_s - sent_s)
        if self._open_loop:
            counted.latencies["intended"].add(finished_s - planned_s)

    def take_lengths(self) -> Iterator[dict[str, Any]]:
        """Removes and returns the rows of the window's requests by length class."""
        for length in sorted(self._lengths):
            counted = self._lengths.pop(length)
            counted.planned = counted.ok + counted.errors.total() + counted.dropped
            yield {"length": length, **counted.row(0), "tokens": counted.tokens}

    def take(self, before_s: float = math.inf) -> Iterator[dict[str, Any]]:
        """Removes and returns the rows of the seconds before `before_s`."""
        for second in sorted(self._seconds):
            if second < before_s:
                yield self._seconds.pop(second).row(second)

    def totals(self, second: int) -> tuple[int, int]:
        """Answered and failed requests of a second so far, for the progress line."""
        found = self._seconds.get(second)
        return (found.completed, found.errors.total() + found.dropped) if found else (0, 0)

"""Counts, rates and latencies over several seconds of a run."""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hdrh.histogram import HdrHistogram

from loadtests.percentiles import ms
from loadtests.results.histogram import KINDS, VALUES_US, Latency
from loadtests.results.settings import LoadSettings

NO_FILE, NO_PORT = "NoFile", "NoPort"  # kinds of error: the generator's machine had none left for a connection


@dataclass(frozen=True)
class Distribution:
    """Latencies of all requests of a stretch of time; the `failed` ones count as slower than any limit."""

    counts: np.ndarray
    failed: int = 0

    @property
    def total(self) -> int:
        """Number of requests, including failed ones."""
        return int(self.counts.sum()) + self.failed

    def percentile_ms(self, percent: float) -> float:
        """Nearest-rank percentile in ms; inf if it falls on a failed request, nan without requests."""
        if not self.total:
            return math.nan
        rank = max(1, math.ceil(percent / 100 * self.total - 1e-9))
        reached = np.searchsorted(np.cumsum(self.counts), rank)
        return math.inf if reached == len(self.counts) else float(VALUES_US[reached]) / 1000

    @property
    def max_ms(self) -> float:
        answered = np.flatnonzero(self.counts)
        return float(VALUES_US[answered[-1]]) / 1000 if len(answered) else math.nan

    @property
    def mean_ms(self) -> float:
        answered = self.counts.sum()
        return float(self.counts @ VALUES_US / answered) / 1000 if answered else math.nan


def read_percentile(latency: Distribution, percent: float) -> float:
    """A percentile in ms; nan for fewer than 1 / (1 - p) requests, where it would only be the slowest."""
    return latency.percentile_ms(percent) if latency.total * (100 - percent) >= 100 - 1e-6 else math.nan


def shown_percentile(latency: Distribution, percent: float) -> str:
    """`read_percentile` as text; "-" for nan."""
    return ms(read_percentile(latency, percent))


@dataclass
class Second:
    second: int
    planned: int = 0
    attempted: int = 0
    ok: int = 0
    completed: int = 0
    dropped: int = 0
    tokens: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)
    """Kind of error -> the message of its first failure."""
    latencies: dict[Latency, list[tuple[np.ndarray, np.ndarray]]] = field(default_factory=dict)
    """Non-zero places of each worker's histogram and their counts; whole histograms would need too much memory."""

    def add(self, row: dict[str, Any]) -> None:
        for name in ("planned", "attempted", "ok", "completed", "dropped"):
            setattr(self, name, getattr(self, name) + row[name])
        self.tokens += row.get("tokens", 0)
        self.errors.update({kind: int(count) for kind, count in row["errors"].items()})
        self.messages = {**row.get("messages", {}), **self.messages}
        for kind in KINDS:
            if kind in row:
                counts = np.ctypeslib.as_array(HdrHistogram.decode(row[kind]).counts)
                places = np.flatnonzero(counts)
                self.latencies.setdefault(kind, []).append((places, counts[places].astype(np.int64)))

    @property
    def failed(self) -> int:
        return self.errors.total() + self.dropped


@dataclass(frozen=True)
class Stretch:
    """Several seconds of a run together; `duration_s` is their length."""

    settings: LoadSettings
    seconds: list[Second]
    duration_s: float

    @property
    def planned(self) -> int:
        """Number of planned requests; in a closed loop, of sent ones."""
        return int(self.planned_each.sum())

    @property
    def planned_each(self) -> np.ndarray:
        """Number of planned requests of each second; in a closed loop, of sent ones."""
        closed = not self.settings.open_loop
        return np.array([each.ok + each.failed if closed else each.planned for each in self.seconds])

    def over(self, kind: Latency, inside: Callable[[float], bool]) -> np.ndarray:
        """Number of requests of each second whose latency in ms is not `inside`; failed ones never are."""
        limit = bisect_left(VALUES_US, True, key=lambda value_us: not inside(float(value_us) / 1000))
        return np.array(
            [
                each.failed + sum(int(counts[places >= limit].sum()) for places, counts in each.latencies.get(kind, ()))
                for each in self.seconds
            ]
        )

    def sums_ms(self, kind: Latency) -> tuple[np.ndarray, np.ndarray]:
        """The sum of the latencies in ms of each second, and the number of answers."""
        found = [each.latencies.get(kind, ()) for each in self.seconds]
        sums = [sum(float(counts @ VALUES_US[places]) for places, counts in parts) / 1000 for parts in found]
        return np.array(sums), np.array([sum(int(counts.sum()) for _, counts in parts) for parts in found])

    @property
    def planned_rps(self) -> float:
        return self.planned / self.duration_s

    @property
    def ok(self) -> int:
        """Number of planned requests that were answered, at any time."""
        return sum(each.ok for each in self.seconds)

    @property
    def failed(self) -> int:
        """Number of planned requests without an answer: errors, time-outs, drops."""
        return sum(each.failed for each in self.seconds)

    @property
    def unsent(self) -> int:
        """Number of planned requests with neither answer nor error: the generator's failure, not the server's."""
        return self.planned - self.ok - self.failed

    @property
    def errors(self) -> Counter[str]:
        kinds = sum((each.errors for each in self.seconds), Counter())
        dropped = sum(each.dropped for each in self.seconds)
        return kinds + Counter({"dropped": dropped})

    @property
    def messages(self) -> dict[str, str]:
        """Kind of error -> the message of its first failure."""
        return {kind: text for each in reversed(self.seconds) for kind, text in each.messages.items()}

    @property
    def throughput_rps(self) -> float:
        """Good answers/s that arrived within these seconds."""
        return sum(each.completed for each in self.seconds) / self.duration_s

    @property
    def attempted_share(self) -> float:
        """Share of the planned requests that the generator started within these seconds; 1 in a closed loop."""
        if not self.settings.open_loop or not self.planned:
            return 1.0
        return min(1.0, sum(each.attempted for each in self.seconds) / self.planned)

    def latency(self, kind: Latency) -> Distribution:
        total = np.zeros(len(VALUES_US), np.int64)
        for second in self.seconds:
            for places, counts in second.latencies.get(kind, ()):
                total[places] += counts
        return Distribution(total, 0 if kind == "lag" else self.failed)

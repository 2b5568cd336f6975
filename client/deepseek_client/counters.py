"""What a client counts of itself: calls, errors, retries, hedges, ejections, latency percentiles by model.

Contract: thread-safe, bounded (about 25 KB a model), within 1 % of the true percentile: latencies are counted in
buckets that grow by 2 %, from 1 us to 20 minutes. Percentiles are of calls that were answered; a call that failed is
in `errors`. A call is counted once, whatever it took: its retries and hedges are counted beside it.

Example:
    >>> client.statistics().models["recommender"].p99_ms
    4.1
"""

import math
import threading
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

GROWTH = 0.02
BUCKETS = int(math.log(1.2e9) / GROWTH) + 1
RECENT_CALLS = 2048  # at least so many, at most twice, are "recent"
FEWEST_CALLS = 100  # below which no recent percentile is told


class Histogram:
    """Latencies in buckets of e^GROWTH."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets = array("Q", bytes(8 * BUCKETS))

    def record(self, latency_s: float) -> None:
        """Counts one latency."""
        index = int(math.log(max(latency_s * 1e6, 1.0)) / GROWTH)
        self._buckets[min(index, BUCKETS - 1)] += 1
        self.count += 1

    def percentile_ms(self, percent: float, other: "Histogram | None" = None) -> float | None:
        """The middle of the bucket that holds it, of both histograms together; None where nothing was counted."""
        total = self.count + (other.count if other else 0)
        if not total:
            return None
        wanted, seen = math.ceil(total * percent / 100), 0
        for index, count in enumerate(self._buckets):
            seen += count + (other._buckets[index] if other else 0)
            if seen >= wanted:
                break
        return math.exp((index + 0.5) * GROWTH) / 1000


@dataclass(frozen=True, kw_only=True)
class ModelStatistics:
    """Of the calls to one model since the client was made."""

    calls: int
    errors: Mapping[str, int]
    """Calls that failed, by the name of the error that they raised."""
    retries: int
    hedges: int
    hedges_won: int
    """Hedges whose answer came first."""
    denied: int
    """Retries and hedges that the budget did not allow."""
    through_shared_memory: int
    """Requests whose tensors went through shared memory."""
    p50_ms: float | None
    """Of answered calls, retries included; None before the first."""
    p99_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What a client has counted; `dataclasses.asdict` makes it JSON."""

    models: Mapping[str, ModelStatistics]
    replicas: Mapping[str, bool]
    """By address: whether it is in use, not ejected."""
    ejections: int
    readmissions: int


class ModelCounters:
    """The running counts of one model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._all = Histogram()
        self._recent, self._before = Histogram(), Histogram()

    def add(self, what: str) -> None:
        """One more of retries, hedges, hedges_won, denied or through_shared_memory."""
        with self._lock:
            self._counts[what] += 1

    def answered(self, latency_s: float) -> None:
        """A call succeeded."""
        with self._lock:
            self._all.record(latency_s)
            if self._recent.count >= RECENT_CALLS:
                self._recent, self._before = Histogram(), self._recent
            self._recent.record(latency_s)

    def failed(self, error: BaseException) -> None:
        """A call failed for good."""
        with self._lock:
            self._errors[type(error).__name__] += 1

    def recent_ms(self, percent: float) -> float | None:
        """A percentile of the latest calls; None where they are too few."""
        with self._lock:
            if self._recent.count + self._before.count < FEWEST_CALLS:
                return None
            return self._recent.percentile_ms(percent, self._before)

    def statistics(self) -> ModelStatistics:
        """The counts as they are now."""
        with self._lock:
            names = ("retries", "hedges", "hedges_won", "denied", "through_shared_memory")
            return ModelStatistics(
                calls=self._all.count + self._errors.total(),
                errors=dict(self._errors),
                p50_ms=self._all.percentile_ms(50),
                p99_ms=self._all.percentile_ms(99),
                **{name: self._counts[name] for name in names},
            )

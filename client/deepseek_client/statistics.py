"""A client's statistics: calls, errors, retries, hedges, ejections, latency percentiles by model.

Contract: thread-safe, about 25 KB per model, for `MOST_MODELS` names: beyond that, names that never answered count
together as `OTHERS`. Latencies are counted in buckets that grow by 2 %, from 1 us to 20 minutes, so percentiles are
within 1 % of the true ones. Percentiles cover answered calls; failed calls are in `errors`. A call counts once; its
retries and hedges are counted separately.

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
RECENT_CALLS = 2048  # the recent percentile covers the latest 2048 to 4096 calls
MOST_MODELS = 200  # names may come from users
OTHERS = "(other models)"
FEWEST_CALLS = 100  # the fewest calls that give a recent percentile


class Histogram:
    """Latencies in buckets of e^GROWTH."""

    def __init__(self) -> None:
        self.count = 0
        self._buckets = array("Q", bytes(8 * BUCKETS))

    def record(self, latency_s: float) -> None:
        index = int(math.log(max(latency_s * 1e6, 1.0)) / GROWTH)
        self._buckets[min(index, BUCKETS - 1)] += 1
        self.count += 1

    def percentile_ms(self, percent: float, other: "Histogram | None" = None) -> float | None:
        """The middle of the percentile's bucket, over both histograms; None if they are empty."""
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
    """Counts for the calls to one model."""

    calls: int
    errors: Mapping[str, int]
    """Failed calls by the name of the error."""
    retries: int
    hedges: int
    hedges_won: int
    """Hedges whose answer came first."""
    denied: int
    """Retries and hedges that the budget refused."""
    through_shared_memory: int
    """Requests whose tensors went through shared memory."""
    p50_ms: float | None
    """Latency of answered calls, retries included; None before the first."""
    p99_ms: float | None


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Counts for one client; `dataclasses.asdict` makes it JSON."""

    models: Mapping[str, ModelStatistics]
    replicas: Mapping[str, bool]
    """By address: True if in use, False if ejected."""
    ejections: int
    readmissions: int


class ModelCounters:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._errors: Counter[str] = Counter()
        self._all = Histogram()
        self._recent, self._before = Histogram(), Histogram()

    def add(self, what: str) -> None:
        """Counts one of: retries, hedges, hedges_won, denied, through_shared_memory."""
        with self._lock:
            self._counts[what] += 1

    def answered(self, latency_s: float) -> None:
        with self._lock:
            self._all.record(latency_s)
            if self._recent.count >= RECENT_CALLS:
                self._recent, self._before = Histogram(), self._recent
            self._recent.record(latency_s)

    def failed(self, error: BaseException) -> None:
        with self._lock:
            self._errors[type(error).__name__] += 1

    @property
    def has_answered(self) -> bool:
        return self._all.count > 0

    def absorb(self, other: "ModelCounters") -> None:
        """Adds the counts of a model that never answered."""
        with self._lock:
            self._counts += other._counts
            self._errors += other._errors

    def recent_ms(self, percent: float) -> float | None:
        """A latency percentile of the latest calls, in ms; None if they are too few."""
        with self._lock:
            if self._recent.count + self._before.count < FEWEST_CALLS:
                return None
            return self._recent.percentile_ms(percent, self._before)

    def statistics(self) -> ModelStatistics:
        with self._lock:
            names = ("retries", "hedges", "hedges_won", "denied", "through_shared_memory")
            return ModelStatistics(
                calls=self._all.count + self._errors.total(),
                errors=dict(self._errors),
                p50_ms=self._all.percentile_ms(50),
                p99_ms=self._all.percentile_ms(99),
                **{name: self._counts[name] for name in names},
            )


class Counters:
    def __init__(self) -> None:
        self._models: dict[str, ModelCounters] = {}
        self._lock = threading.Lock()

    def of(self, model: str) -> ModelCounters:
        return self._models.get(model) or self._added(model)

    def get(self, model: str) -> ModelCounters | None:
        """The counters for one model; None if it has none of its own yet."""
        return self._models.get(model)

    def _added(self, model: str) -> ModelCounters:
        """New counters; if there are too many, those of another name that never answered are folded into OTHERS."""
        with self._lock:
            if model not in self._models and len(self._models) >= MOST_MODELS:
                others = self._models.setdefault(OTHERS, ModelCounters())
                unknown = (n for n, found in self._models.items() if n != OTHERS and not found.has_answered)
                if (name := next(unknown, None)) is None:
                    return others
                others.absorb(self._models.pop(name))
            return self._models.setdefault(model, ModelCounters())

    def statistics(self) -> dict[str, ModelStatistics]:
        return {model: counters.statistics() for model, counters in list(self._models.items())}

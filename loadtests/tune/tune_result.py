"""The result of a search for better serving settings, as stored in `build/<model>/tuning.json`.

Contract: rates are in requests/s. Latencies are intended latencies in milliseconds under Poisson arrivals at
`reference_rps`, which is the same for all settings of one search.

Example:
    TuneResult.load(tuning_path("recommender")).best
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from deepseek.spec import Target, build_dir
from deepseek.spec.checks import Table
from loadtests.figures import formatted
from loadtests.search.saved_result import SavedResult
from loadtests.tune.search_space import ServingSettings


class MeasuredSettings(Table):
    """The measurements of one candidate."""

    settings: ServingSettings
    capacity_rps: float | None = None
    """The highest rate that met the SLO; null if none did or the candidate was stopped early."""
    at_least: bool = False
    """`capacity_rps` is a lower bound: the load generator was the limit."""
    throughput_rps: float = 0.0
    """In a closed loop, with the same number of users for every candidate."""
    p50_ms: float | None = None
    """At the reference rate, like `p99_ms`; null if it was not measured or not answered."""
    p99_ms: float | None = None
    reason: str = ""
    """Why the measurement of the candidate was stopped early."""

    @property
    def capacity(self) -> str:
        """`capacity_rps` as text."""
        if self.capacity_rps is None:
            return "-"
        return f"{'≥ ' if self.at_least else ''}{self.capacity_rps:g}/s"

    def __str__(self) -> str:
        figures = f"{self.throughput_rps:.1f}/s in flight, p99 {shown_ms(self.p99_ms)}, holds {self.capacity}"
        return f"{self.settings}: {figures}{f'  ({self.reason})' if self.reason else ''}"


class DefaultAndBest(Table):
    """One pair: the default and the best candidate, measured one right after the other."""

    default_rps: float
    """The highest rate that met the SLO."""
    best_rps: float
    default_p99_ms: float | None
    """At the reference rate."""
    best_p99_ms: float | None

    def __str__(self) -> str:
        latency = f"p99 {shown_ms(self.default_p99_ms)} and {shown_ms(self.best_p99_ms)}"
        return f"{self.default_rps:.1f}/s and {self.best_rps:.1f}/s hold, {latency}"


class Gain(Table):
    """How many times better the best candidate is than the default: a ratio above 1 is a gain."""

    of: Literal["capacity_rps", "p99_ms"]
    ratio: float
    low: float
    high: float
    confidence: float
    """Probability that the true ratio lies between `low` and `high`."""
    pairs: int

    def __str__(self) -> str:
        what = "rate inside the SLO" if self.of == "capacity_rps" else "p99 (default over best)"
        interval = f"{self.confidence:.0%}: {self.low:.2f} to {self.high:.2f}, {self.pairs} pairs"
        return f"{what} x {self.ratio:.2f} ({interval})"


class TuneResult(SavedResult):
    """One search."""

    made_by: ClassVar[str] = "make tune"
    schema_version: Literal[1] = 1
    model: str
    target: Target
    precision: str
    objectives: tuple[str, ...]
    default: ServingSettings
    """The settings of `deploy.toml`, without tuned values."""
    best: ServingSettings | None = None
    """Null if nothing is proved better than the default."""
    trials: tuple[MeasuredSettings, ...]
    users: int
    """In flight in the closed loop of `throughput_rps`."""
    reference_rps: float
    candidate: ServingSettings | None = None
    """The best of the search, proved better or not; `pairs` compare it with the default."""
    pairs: tuple[DefaultAndBest, ...] = ()
    gain: Gain | None = None
    """Of `candidate` over `default`; null if there is no candidate."""
    proved_rps: float | None = None
    """The rate at which the verdict on `candidate` holds with confidence; null if it is no gain or was not proved."""
    applied: bool = False
    """`best` was written to the file of tuned values."""
    conclusion: str
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    started: str
    """UTC."""


def tuning_path(model: str) -> Path:
    """The file of the latest result."""
    return build_dir(model) / "tuning.json"


def shown_ms(value: float | None) -> str:
    """A latency as text; "-" if it is unknown."""
    return "-" if value is None else formatted("ms", value)

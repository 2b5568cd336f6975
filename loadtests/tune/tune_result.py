"""The result of a search for better serving settings, as stored in `build/<model>/tuning.json`.

Contract: rates are in requests/s, latencies in milliseconds under Poisson arrivals.

Example:
    TuneResult.load(tuning_path("recommender"), "recommender").best
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from deepseek.spec import Target, build_dir
from deepseek.spec.checks import Table
from loadtests.search.result_file import SavedResult
from loadtests.tune.search_space import ServingSettings
from loadtests.tune.sequential_test import LEAST_PAIRS, Outcome, judge


class ExpectedSettings(Table):
    """What to expect of a setting, before it is compared with the default."""

    settings: ServingSettings
    p99_ms: float | None
    """At the usual rate; null if the setting was not served."""
    high_p99_ms: float | None
    """At the high rate."""
    reason: str = ""
    """Why the setting was not served."""


class Compared(Table):
    """A setting compared with the default in pairs of runs with the same arrivals."""

    settings: ServingSettings
    rate_rps: float
    pairs: tuple[tuple[float, float], ...] = ()
    """p99 in ms of the default and of the setting."""
    ratio: float | None = None
    """How many times lower the p99 is than the default's: above 1 is a gain. Null with fewer than LEAST_PAIRS."""
    low: float | None = None
    high: float | None = None
    confidence: float
    """Probability that the true ratios of all comparisons lie between their `low` and `high`."""
    outcome: Outcome = "undecided"
    note: str = ""
    """Why the comparison ended undecided."""

    def judged(self, pairs: tuple[tuple[float, float], ...], level: float) -> "Compared":
        """The same comparison after these pairs, judged at a nominal level."""
        if len(pairs) < LEAST_PAIRS:
            return self.model_copy(update={"pairs": pairs})
        interval, outcome = judge([default / other for default, other in pairs], level)
        return self.model_copy(update={"pairs": pairs, "outcome": outcome, **asdict(interval)})

    @property
    def result(self) -> str:
        """The figures, the outcome and why."""
        return f"{self}: {self.outcome}{f', {self.note}' if self.note else ''}"

    def __str__(self) -> str:
        if self.ratio is None:
            return f"p99 at {self.rate_rps:g}/s: {len(self.pairs)} pairs"
        interval = f"{self.confidence:.0%}: {self.low:.2f} to {self.high:.2f}, {len(self.pairs)} pairs"
        return f"p99 at {self.rate_rps:g}/s: the default's is {self.ratio:.2f} times as high ({interval})"


class TuneResult(SavedResult):
    made_by: ClassVar[str] = "make tune"
    schema_version: Literal[2] = 2
    model: str
    target: Target
    precision: str
    objectives: tuple[str, ...]
    default: ServingSettings
    """The settings of `deploy.toml`, without tuned values."""
    best: ServingSettings | None = None
    """Null if nothing is proved better than the default."""
    usual_rps: float
    """The SLO's rate, or a share of what the default answers in a closed loop: where p99 matters most."""
    high_rps: float
    """About the highest rate at which the default meets the SLO."""
    predicted: bool
    """The expected latencies come from measured batches; else from one short run each."""
    expected: tuple[ExpectedSettings, ...]
    """The default first."""
    comparisons: tuple[Compared, ...] = ()
    proved_rps: float | None = None
    """The rate at which the verdict on `best` holds with confidence; null if none was proved."""
    applied: bool = False
    """`best` was written to the file of tuned values."""
    conclusion: str
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    started: str
    """UTC."""

    @property
    def gain(self) -> Compared | None:
        """The comparison that proves the best setting better."""
        return next((each for each in self.comparisons if each.outcome == "better"), None)


def tuning_path(model: str) -> Path:
    return build_dir(model) / "tuning.json"

"""What a search for better settings found: every setting tried, the front of latency and rate, the gain and its
confidence.

Contract: `build/<model>/tuning.json` is a `Tuning`; it appears whole or not at all. Rates are requests/s, latencies
intended milliseconds under Poisson arrivals at `reference_rps`, the same for all settings of one search.

Example:
    tuning = Tuning.load(tuning_path("recommender"))
    [tried.settings for tried in tuning.trials if tried.pareto]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from scipy import stats

from deepseek.spec import DeploymentSpec, Target, TunedBatching, TunedTarget, build_dir
from deepseek.spec.checks import Table
from loadtests.saved import Saved

CONFIDENCE = 0.95
RESAMPLES = 10_000


class Setting(Table):
    """What is tuned: how Triton batches and on how many instances the model runs."""

    max_batch: int
    max_queue_delay_us: int
    instances: int
    threads: int | None = None
    """Of one instance; None: left to the runtime, or no setting of the target."""
    cuda_graphs: bool | None = None
    """Of the target `tensorrt` alone."""

    @classmethod
    def of(cls, spec: DeploymentSpec, target: Target, cores: int) -> Setting:
        """The one that a spec has for a target, on so many cores."""
        batching = spec.for_target(target).batching
        shared = max(1, cores // batching.instances) if target == "onnxruntime" else None
        return cls(
            max_batch=batching.max_batch or spec.max_batch,
            max_queue_delay_us=batching.max_queue_delay_us,
            instances=batching.instances,
            threads=batching.threads or shared,
            cuda_graphs=spec.tensorrt.cuda_graphs if target == "tensorrt" else None,
        )

    def tuned(self, measured: str = "") -> TunedTarget:
        """As the file of tuned values has it."""
        batching = TunedBatching(**self.model_dump(exclude={"cuda_graphs"}))
        return TunedTarget(measured=measured, batching=batching, cuda_graphs=self.cuda_graphs)

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" x {self.threads} thread{'s' * (self.threads > 1)}"
        graphs = ", CUDA graphs" if self.cuda_graphs else ""
        instances = f"{self.instances} instance{'s' * (self.instances > 1)}{threads}"
        return f"{instances}, batches of {self.max_batch}, delay {self.max_queue_delay_us} us{graphs}"


class TriedSetting(Table):
    """What was measured of one setting."""

    settings: Setting
    capacity_rps: float | None = None
    """The highest rate that was seen to hold the SLO; null where none was, or the search stopped before."""
    at_least: bool = False
    """The load generator, not the server, was the limit of `capacity_rps`."""
    throughput_rps: float = 0.0
    """In a closed loop of as many users for every setting."""
    p50_ms: float | None = None
    """At the reference rate, as `p99_ms`; null where it was not measured or not answered."""
    p99_ms: float | None = None
    stopped_early: bool = False
    reason: str = ""
    """Why no more was measured of it."""
    pareto: bool = False
    """No other setting has both more throughput and a lower p99."""


class Pair(Table):
    """The default and the best, measured one right after the other."""

    default_rps: float
    """The rate that held the SLO."""
    best_rps: float
    default_p99_ms: float | None
    """At the reference rate."""
    best_p99_ms: float | None


class Gain(Table):
    """How many times better the best setting is than the default: a ratio above 1 is a gain."""

    of: Literal["capacity_rps", "p99_ms"]
    ratio: float
    low: float
    high: float
    confidence: float
    """That the true ratio is within `low` to `high`."""
    pairs: int

    def __str__(self) -> str:
        what = "rate inside the SLO" if self.of == "capacity_rps" else "p99 (default over best)"
        interval = f"{self.confidence:.0%}: {self.low:.2f} to {self.high:.2f}, {self.pairs} pairs"
        return f"{what} x {self.ratio:.2f} ({interval})"


class Tuning(Saved):
    """One search."""

    made_by: ClassVar[str] = "make tune"
    schema_version: Literal[1] = 1
    model: str
    target: Target
    precision: str
    objectives: tuple[str, ...]
    default: Setting
    """What `deploy.toml` says, without tuned values."""
    best: Setting | None = None
    """Null where no other setting is better than the default."""
    trials: tuple[TriedSetting, ...]
    users: int
    """In flight in the closed loop of `throughput_rps`."""
    reference_rps: float
    candidate: Setting | None = None
    """What `pairs` hold against the default: the best of the search, proved better or not."""
    pairs: tuple[Pair, ...] = ()
    gain: Gain | None = None
    """Of `candidate` over `default`; null where there was none."""
    applied: bool = False
    """`best` was written to the file of tuned values."""
    conclusion: str
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    started: str
    """UTC."""


def tuning_path(model: str) -> Path:
    """Where the latest search's result lies."""
    return build_dir(model) / "tuning.json"


def with_front(trials: Iterable[TriedSetting]) -> tuple[TriedSetting, ...]:
    """The trials with the Pareto front of throughput and p99 marked."""
    trials = tuple(trials)
    measured = [each for each in trials if each.p99_ms is not None]
    return tuple(
        each.model_copy(update={"pareto": each in measured and not any(_dominates(other, each) for other in measured)})
        for each in trials
    )


def _dominates(other: TriedSetting, tried: TriedSetting) -> bool:
    assert other.p99_ms is not None
    assert tried.p99_ms is not None
    no_worse = other.throughput_rps >= tried.throughput_rps and other.p99_ms <= tried.p99_ms
    return no_worse and (other.throughput_rps, other.p99_ms) != (tried.throughput_rps, tried.p99_ms)


def interval(ratios: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """Geometric mean of paired ratios with its interval: the wider of a bootstrap's and of Student's t over the logs.

    The bootstrap keeps what is skew in them. Of few pairs it is too narrow (of three it holds the true ratio in three
    cases of four, whatever it says), and there t, exact for a log-normal ratio, is the wider one.
    """
    logs, count = np.log(ratios), len(ratios)
    generator = np.random.default_rng(0)
    means = generator.choice(logs, (RESAMPLES, count)).mean(1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * logs.std(ddof=1) / math.sqrt(count)
    mean = logs.mean()
    return math.exp(mean), math.exp(min(low, mean - half)), math.exp(max(high, mean + half))


def gains(pairs: Sequence[Pair]) -> dict[str, Gain]:
    """What the pairs say: of the rate inside the SLO and, where all were answered, of the p99."""
    ratios: dict[Literal["capacity_rps", "p99_ms"], list[float]] = {
        "capacity_rps": [pair.best_rps / pair.default_rps for pair in pairs],
        "p99_ms": [
            pair.default_p99_ms / pair.best_p99_ms for pair in pairs if pair.default_p99_ms and pair.best_p99_ms
        ],
    }
    found: dict[str, Gain] = {}
    for of, values in ratios.items():
        if len(values) == len(pairs) >= 2:
            ratio, low, high = interval(values)
            found[of] = Gain(of=of, ratio=ratio, low=low, high=high, confidence=CONFIDENCE, pairs=len(pairs))
    return found

"""How one server behaves at each rate: latency, time in the queue and in the model, and where it ends.

Contract: made from the trials of `build/<model>/capacity.json` and the runs that they kept: nothing is assumed but that
latency does not fall as the rate rises (pooled where measurements say otherwise), that between two measured rates it
lies on the line between them, and that below the lowest one it is as there. Beyond the highest rate at which answers
were seen to keep up there is no latency: a queue grows.

Example:
    curve = ServiceCurve.of(Capacity.load("build/recommender/capacity.json"))
    curve.p99_ms(800.0), curve.queue_ratio(800.0), curve.saturation_rps
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek.spec import InputError
from loadtests.capacity import Capacity
from loadtests.results import Run
from loadtests.server_statistics import means_ms
from loadtests.trial import Trial

Points = tuple[tuple[float, float], ...]  # rate in requests/s, value


def never_falling(points: Sequence[tuple[float, float, float]]) -> Points:
    """The nearest points whose values do not fall (pool adjacent violators); in: rate, value, weight."""
    blocks: list[tuple[list[float], float, float]] = []  # rates, mean, weight
    for rate, value, weight in sorted(points):
        blocks.append(([rate], value, weight))
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            (left, low, first), (right, high, second) = blocks[-2:]
            blocks[-2:] = [([*left, *right], (low * first + high * second) / (first + second), first + second)]
    by_rate = {rate: mean for rates, mean, _ in blocks for rate in rates}
    return tuple(sorted(by_rate.items()))


@dataclass(frozen=True, kw_only=True)
class ServiceCurve:
    """Of one server; rates in requests/s, times in milliseconds."""

    p99: Points
    queue: Points
    """Mean time of a request in Triton's queue; empty where no run knows it."""
    compute: Points
    """Mean time of a request in the model."""
    saturation_rps: float
    """The most that was answered."""
    capacity_rps: float
    """The highest rate that held the SLO."""

    @classmethod
    def of(cls, capacity: Capacity) -> ServiceCurve:
        """From a search's trials; InputError where no rate held."""
        if capacity.capacity_rps is None:
            raise InputError(
                f"capacity.json of {capacity.model}: {capacity.sentence}; one server has to hold some rate"
            )
        parts = [(trial, means) for trial in capacity.trials if (means := _means(trial))]
        return cls(
            p99=never_falling([_weighed(each, each.p99_ms) for each in capacity.trials if each.p99_ms is not None]),
            queue=never_falling([_weighed(trial, means["queue"]) for trial, means in parts]),
            compute=never_falling([_weighed(trial, means["compute_infer"]) for trial, means in parts]),
            saturation_rps=max(trial.achieved_rps for trial in capacity.trials),
            capacity_rps=capacity.capacity_rps,
        )

    def slowed(self, share: float) -> ServiceCurve:
        """Of a server that does so much less: each rate is lower, and what is seen at it the same."""

        def lower(points: Points) -> Points:
            return tuple((rate * (1 - share), value) for rate, value in points)

        return ServiceCurve(
            p99=lower(self.p99),
            queue=lower(self.queue),
            compute=lower(self.compute),
            saturation_rps=self.saturation_rps * (1 - share),
            capacity_rps=self.capacity_rps * (1 - share),
        )

    def p99_ms(self, rate_rps: float) -> float:
        """99th percentile of the latency while the server keeps up."""
        return _at(self.p99, rate_rps)

    def queue_ms(self, rate_rps: float) -> float:
        """Mean time in the queue while it keeps up."""
        return _at(self.queue, rate_rps)

    def compute_ms(self, rate_rps: float) -> float:
        """Mean time in the model."""
        return _at(self.compute, rate_rps)

    def queue_ratio(self, rate_rps: float) -> float:
        """Time in the queue over time in the model."""
        return self.queue_ms(rate_rps) / self.compute_ms(rate_rps) if self.queue else 0.0


def _weighed(trial: Trial, value: float) -> tuple[float, float, float]:
    return trial.rate_rps, value, trial.rate_rps * trial.duration_s


def _means(trial: Trial) -> dict[str, float]:
    """Of the trial's run; empty where it is gone, or where the server did not tell."""
    try:
        return means_ms(Run.load(trial.run).server.get("statistics") or {}) if trial.run else {}
    except InputError:
        return {}


def _at(points: Points, rate_rps: float) -> float:
    rates, values = zip(*points, strict=True)
    return float(np.interp(rate_rps, rates, values))

"""How one server behaves at each rate: latency, time in the queue and in the model, and saturation.

Contract: made from the trials of `build/<model>/capacity.json` and their runs. Three assumptions: latency does not fall
as the rate rises (measurements that fall are pooled), it is linear between two measured rates, and it is constant below
the lowest one. Above `saturation_rps` a queue grows, so the curve has no latency there. If a trial above the capacity
has no p99, since more than 1 % of its requests failed, the p99 is infinite above the trial before it.

Example:
    curve = ServiceCurve.of(Capacity.load("build/recommender/capacity.json", "recommender"))
    curve.p99_ms(800.0), curve.queue_ratio(800.0), curve.saturation_rps
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import isotonic_regression

from deepseek.spec import InputError
from loadtests.results.run import Run
from loadtests.search.capacity_result import Capacity
from loadtests.search.rate_trial import RateTrial
from loadtests.slo.time_split import means_ms

Points = tuple[tuple[float, float], ...]  # rate in requests/s, value


def never_falling(points: Sequence[tuple[float, float, float]]) -> Points:
    """Isotonic regression: the nearest points whose values do not fall; input: rate, value, weight."""
    if not points:
        return ()
    rates, place = np.unique([rate for rate, _, _ in points], return_inverse=True)
    _, values, weights = np.array(points).T
    total = np.bincount(place, weights)
    means = np.bincount(place, weights * values) / total  # trials at the same rate are one measurement
    return tuple(zip(rates.tolist(), isotonic_regression(means, weights=total).x.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class ServiceCurve:
    """The curve of one server; rates in requests/s, times in milliseconds."""

    p99: Points
    queue: Points
    """Mean time of a request in Triton's queue; empty if no run has it."""
    compute: Points
    """Mean time of a request in the model."""
    saturation_rps: float
    """The highest measured throughput."""
    capacity_rps: float
    """The highest rate that met the SLO."""

    @classmethod
    def of(cls, capacity: Capacity) -> "ServiceCurve":
        """Makes the curve from a search's trials; InputError if no rate held."""
        if capacity.capacity_rps is None:
            raise InputError(
                f"capacity.json of {capacity.model}: {capacity.sentence}; a simulation needs a rate that holds"
            )
        parts = [(trial, means) for trial in capacity.trials if (means := _means(trial))]
        return cls(
            p99=_p99(capacity.trials, capacity.capacity_rps),
            queue=never_falling([_weighed(trial, means["queue"]) for trial, means in parts]),
            compute=never_falling([_weighed(trial, means["compute_infer"]) for trial, means in parts]),
            saturation_rps=max(trial.achieved_rps for trial in capacity.trials),
            capacity_rps=capacity.capacity_rps,
        )

    def slowed(self, share: float) -> "ServiceCurve":
        """The curve of a slower server: the same times at rates that are lower by `share`."""
        kept = 1 - share
        p99, queue, compute = (
            tuple((rate * kept, value) for rate, value in points) for points in (self.p99, self.queue, self.compute)
        )
        rates = {"saturation_rps": self.saturation_rps * kept, "capacity_rps": self.capacity_rps * kept}
        return ServiceCurve(p99=p99, queue=queue, compute=compute, **rates)

    def p99_ms(self, rate_rps: float) -> float:
        """99th percentile of the latency while the server keeps up."""
        return _at(self.p99, rate_rps)

    def queue_ms(self, rate_rps: float) -> float:
        """Mean time in the queue while the server keeps up."""
        return _at(self.queue, rate_rps)

    def compute_ms(self, rate_rps: float) -> float:
        """Mean time in the model."""
        return _at(self.compute, rate_rps)

    def queue_ratio(self, rate_rps: float) -> float:
        """Time in the queue over time in the model; 0 if either is unknown, as for answers from a cache."""
        compute_ms = self.compute_ms(rate_rps) if self.queue else 0.0
        return self.queue_ms(rate_rps) / compute_ms if compute_ms else 0.0


def _p99(trials: Sequence[RateTrial], capacity_rps: float) -> Points:
    """The measured p99; infinite from the lowest rate above the capacity at which it fell on failed requests."""
    failing = [each.rate_rps for each in trials if each.outcome == "fails" and each.p99_ms is None]
    end_rps = min((rate for rate in failing if rate > capacity_rps), default=math.inf)
    known = [_weighed(each, each.p99_ms) for each in trials if each.p99_ms is not None and each.rate_rps < end_rps]
    return never_falling(known) + ((end_rps, math.inf),) * (end_rps < math.inf)


def _weighed(trial: RateTrial, value: float) -> tuple[float, float, float]:
    return trial.rate_rps, value, trial.rate_rps * trial.duration_s


def _means(trial: RateTrial) -> dict[str, float]:
    """Mean times of the trial's run; empty if the run was deleted or the server reported none."""
    try:
        return means_ms(Run.load(trial.run).server.get("statistics") or {}) if trial.run else {}
    except InputError:
        return {}


def _at(points: Points, rate_rps: float) -> float:
    rates, values = zip(*points, strict=True)
    return float(np.interp(rate_rps, rates, values))

"""Chooses an autoscaler's target and minimum of replicas: replays a day with each, takes the cheapest that holds.

Example:
    wanted = candidates(curve, ["queue", "rate"], peak_pods=5)
    choice = choose(rates, curve, settings, wanted, max_replicas=10, late=0.001)
    choice.best.target, choice.best.min_replicas
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.scale.autoscaler import Autoscaler
from loadtests.scale.cluster import ClusterSettings, Metric, replay
from loadtests.scale.service_curve import ServiceCurve
from loadtests.scale.traffic import TICK_S
from loadtests.search.highest_rate import rounded

Candidate = tuple[Metric, float, int]
"""Metric, target and minimum of replicas."""
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of one server's capacity: the load at each target
CUSTOMARY_RATIO = 1.0  # often recommended for the queue-to-compute ratio
LEAST_REPLICAS = 2  # one may fail or be drained
MIN_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the pods that the peak needs: the minimum of replicas


@dataclass(frozen=True, kw_only=True)
class ReplayedTarget:
    """A target and minimum of replicas, with the result of a replayed day."""

    metric: Metric
    target: float
    min_replicas: int
    late_share: float
    late_s: int
    node_hours: float
    pod_hours: float
    most_pods: int

    def holds(self, late: float) -> bool:
        """Whether the share of late requests is within `late`."""
        return self.late_share <= late

    def rank(self, late: float) -> tuple[bool, float, float]:
        """Sort key, the best first: settings that hold by cost, then the others by late requests."""
        if self.holds(late):
            return False, self.node_hours, self.pod_hours
        return True, self.late_share, self.node_hours

    def __str__(self) -> str:
        what = "queue-to-compute ratio" if self.metric == "queue" else "requests/s per pod"
        return f"{what} {self.target:g}, at least {self.min_replicas} pods"


@dataclass(frozen=True, kw_only=True)
class TargetChoice:
    """All settings tried, and the best: the chosen one, or the nearest to holding."""

    tried: tuple[ReplayedTarget, ...]
    best: ReplayedTarget
    late: float
    """Allowed share of late requests."""
    fixed_pods: int
    """Without an autoscaler: the pods that the highest rate needs, all day."""
    fixed_node_hours: float

    @property
    def holds(self) -> bool:
        return self.best.holds(self.late)

    @property
    def sentence(self) -> str:
        best = self.best
        told = f"{best.late_share:.3%} of the requests late in {best.late_s} s, {best.node_hours:.1f} node-hours"
        if not self.holds:
            return f"no setting keeps late requests within {self.late:.3%}; nearest: {best}: {told}"
        return f"{best}: {told}; a fixed {self.fixed_pods} pods take {self.fixed_node_hours:.1f}"


def targets(curve: ServiceCurve, metric: Metric) -> list[float]:
    """The targets to try: the metric's values at shares of the capacity, and the customary ratio."""
    if metric == "rate":
        return [rounded(share * curve.capacity_rps) for share in SHARES]
    if not curve.queue:
        return []
    found = {round(curve.queue_ratio(share * curve.capacity_rps), 3) for share in SHARES} | {CUSTOMARY_RATIO}
    return sorted(found - {0.0})


def candidates(curve: ServiceCurve, metrics: Sequence[Metric], peak_pods: int) -> list[Candidate]:
    """All settings to try, for a peak that needs `peak_pods`."""
    least = sorted({max(LEAST_REPLICAS, math.ceil(share * peak_pods)) for share in MIN_SHARES})
    return [(metric, target, count) for metric in metrics for target in targets(curve, metric) for count in least]


def choose(
    rates_rps: np.ndarray,
    curve: ServiceCurve,
    settings: ClusterSettings,
    wanted: Iterable[Candidate],
    *,
    max_replicas: int,
    late: float,
) -> TargetChoice:
    """Replays the day with each; the best is the cheapest that holds, or the one with the fewest late requests."""
    found: list[ReplayedTarget] = []
    for metric, target, least in wanted:
        scaler = Autoscaler(target=target, min_replicas=least, max_replicas=max_replicas)
        day = replay(rates_rps, curve, metric, scaler, settings)
        found.append(
            ReplayedTarget(
                metric=metric,
                target=target,
                min_replicas=least,
                late_share=day.late_share,
                late_s=day.late_s,
                node_hours=round(day.node_hours, 3),
                pod_hours=round(day.pod_hours, 3),
                most_pods=int(day.pods.max()),
            )
        )
    fixed_pods = math.ceil(float(rates_rps.max()) / curve.capacity_rps)
    return TargetChoice(
        tried=tuple(found),
        best=min(found, key=lambda each: each.rank(late)),
        late=late,
        fixed_pods=fixed_pods,
        fixed_node_hours=math.ceil(fixed_pods / settings.pods_per_node) * len(rates_rps) * TICK_S / 3600,
    )

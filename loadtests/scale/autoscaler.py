"""The published algorithm of Kubernetes' HorizontalPodAutoscaler: how many pods it asks for at each sync.

Contract: the algorithm of https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/ for one pod metric
with an average value as target, in the controller's order: desired replicas (ratio, tolerance, pods that are not ready
yet), stabilization windows, scaling policies, bounds. Details that the page does not specify follow the controller
(pkg/controller/podautoscaler: `calcPlainMetricReplicas`, `normalizeDesiredReplicasWithBehaviors`). The caller passes
the time, in seconds.

Example:
    scaler = Autoscaler(target=1.0, min_replicas=2, max_replicas=10)
    scaler.sync(0, 2, PodMetrics(values=[1.6, 1.4]))       # 3
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

SYNC_S = 15  # --horizontal-pod-autoscaler-sync-period
TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance


@dataclass(frozen=True, kw_only=True)
class ScalingPolicy:
    """The largest change allowed within a period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: int


@dataclass(frozen=True, kw_only=True)
class ScalingRules:
    """The rules of one direction; the policy that allows the largest change applies (selectPolicy: Max)."""

    stabilization_s: int
    policies: tuple[ScalingPolicy, ...]


# The same as in kubernetes/components/hpa; UP is Kubernetes' default.
UP = ScalingRules(
    stabilization_s=0,
    policies=(ScalingPolicy(kind="Percent", value=100, period_s=15), ScalingPolicy(kind="Pods", value=4, period_s=15)),
)
DOWN = ScalingRules(
    stabilization_s=300,
    policies=(ScalingPolicy(kind="Percent", value=10, period_s=60), ScalingPolicy(kind="Pods", value=1, period_s=60)),
)


@dataclass(frozen=True, kw_only=True)
class PodMetrics:
    values: Sequence[float]
    """The metric of every pod that has one."""
    missing: int = 0
    """Pods that run but have no metric yet."""
    pending: int = 0
    """Pods that do not run yet."""


def desired_replicas(replicas: int, metrics: PodMetrics, target: float) -> int | None:
    """The number of pods that the metric asks for; None if no pod has a metric.

    On the way down, pods without a metric count as at the target. On the way up, they and the pods that do not run yet
    count as 0. Neither rule may reverse the direction.
    """
    values, missing = metrics.values, metrics.missing
    if not values:
        return None
    ratio = sum(values) / len(values) / target
    unready = metrics.pending if ratio > 1 else 0
    if not missing and not unready:
        return replicas if _tolerated(ratio) else math.ceil(_exact(ratio * len(values)))
    filled = list(values) + [target if ratio < 1 else 0.0] * (missing if ratio != 1 else 0) + [0.0] * unready
    new_ratio = sum(filled) / len(filled) / target
    if _tolerated(new_ratio) or (ratio < 1 < new_ratio) or (new_ratio < 1 < ratio):
        return replicas
    wanted = math.ceil(_exact(new_ratio * len(filled)))
    reversed_ = (new_ratio < 1 and wanted > replicas) or (new_ratio > 1 and wanted < replicas)
    return replicas if reversed_ else wanted


def _tolerated(ratio: float) -> bool:
    return 1 - TOLERANCE <= _exact(ratio) <= 1 + TOLERANCE


def _exact(value: float) -> float:
    """Rounds off floating-point error, since the ceiling of 3.0000000000000004 would be 4."""
    return round(value, 9)


@dataclass(kw_only=True)
class Autoscaler:
    """One HorizontalPodAutoscaler; `target` is the average value per pod."""

    target: float
    min_replicas: int
    max_replicas: int
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def sync(self, now_s: float, replicas: int, metrics: PodMetrics) -> int:
        if not self._recommended:
            self._recommended.append((now_s, replicas))  # so that the first sync does not scale down at once
        wanted = desired_replicas(replicas, metrics, self.target)
        if replicas > self.max_replicas or replicas < self.min_replicas:
            wanted = min(max(replicas, self.min_replicas), self.max_replicas)
        elif wanted is None:
            return replicas
        else:
            wanted = self._limited(now_s, replicas, self._stabilized(now_s, replicas, wanted))
        if wanted != replicas:
            longest_s = max(policy.period_s for policy in (*UP.policies, *DOWN.policies))
            self._changes = [each for each in self._changes if each[0] > now_s - longest_s]
            self._changes.append((now_s, wanted - replicas))
        return wanted

    def _stabilized(self, now_s: float, replicas: int, wanted: int) -> int:
        """Limits a decrease to the highest recommendation within the window; UP has no window."""
        self._recommended = [each for each in self._recommended if each[0] > now_s - DOWN.stabilization_s]
        self._recommended.append((now_s, wanted))
        return min(max(replicas, wanted), max(count for _, count in self._recommended))

    def _limited(self, now_s: float, replicas: int, wanted: int) -> int:
        if wanted > replicas:
            most = max(self._allowed(now_s, replicas, policy, +1) for policy in UP.policies)
            return min(wanted, max(most, replicas), self.max_replicas)
        if wanted < replicas:
            least = min(self._allowed(now_s, replicas, policy, -1) for policy in DOWN.policies)
            return max(wanted, min(least, replicas), self.min_replicas)
        return wanted

    def _allowed(self, now_s: float, replicas: int, policy: ScalingPolicy, sign: int) -> int:
        """The number of pods that a policy allows, given the number at the start of its period."""
        before = replicas - sum(change for at, change in self._changes if at > now_s - policy.period_s)
        if policy.kind == "Pods":
            return before + sign * policy.value
        changed = _exact(before * (1 + sign * policy.value / 100))
        return math.ceil(changed) if sign > 0 else int(changed)

"""Kubernetes' HorizontalPodAutoscaler as it is published: how many pods it asks for, look by look.

Contract: the algorithm of https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/ for metrics of
pods with an average value as target, in the order in which the controller does it: the proposal of each metric (ratio,
tolerance, pods that are not there yet), the highest of them, stabilisation windows, scaling policies, bounds. Where the
page leaves something open, it is done as in the controller (pkg/controller/podautoscaler, `calcPlainMetricReplicas`,
`normalizeDesiredReplicasWithBehaviors`). No clock of its own: times are seconds that the caller passes.

Example:
    scaler = Autoscaler(targets={"queue": 1.0}, min_replicas=2, max_replicas=10)
    scaler.look(0, 2, Seen(values={"queue": [1.6, 1.4]}))       # 3
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

SYNC_S = 15  # --horizontal-pod-autoscaler-sync-period
TOLERANCE = 0.1  # --horizontal-pod-autoscaler-tolerance


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much may change within a period."""

    kind: Literal["Pods", "Percent"]
    value: int
    period_s: int


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Of one direction; of several policies the one that allows most counts (selectPolicy: Max)."""

    stabilization_s: int
    policies: tuple[Policy, ...]


# As in kubernetes/components/hpa; up: Kubernetes' own default.
UP = Rules(
    stabilization_s=0,
    policies=(Policy(kind="Percent", value=100, period_s=15), Policy(kind="Pods", value=4, period_s=15)),
)
DOWN = Rules(
    stabilization_s=300,
    policies=(Policy(kind="Percent", value=10, period_s=60), Policy(kind="Pods", value=1, period_s=60)),
)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the autoscaler finds at a look."""

    values: Mapping[str, Sequence[float]]
    """Of each metric, that of every pod that has one."""
    missing: int = 0
    """Pods that run and have none."""
    pending: int = 0
    """Pods that do not run yet."""


def proposal(
    replicas: int, values: Sequence[float], target: float, *, missing: int = 0, pending: int = 0
) -> int | None:
    """Pods that one metric asks for; None where no pod has it.

    Pods without a metric count as if they were at the target where fewer would be asked for, and as 0 where more
    would; so do those that do not run yet, in the second case alone. Neither may turn the direction.
    """
    if not values:
        return None
    ratio = sum(values) / len(values) / target
    unready = pending if ratio > 1 else 0
    if not missing and not unready:
        return replicas if _tolerated(ratio) else math.ceil(_exact(ratio * len(values)))
    filled = list(values) + [target if ratio < 1 else 0.0] * (missing if ratio != 1 else 0) + [0.0] * unready
    new_ratio = sum(filled) / len(filled) / target
    if _tolerated(new_ratio) or (ratio < 1 < new_ratio) or (new_ratio < 1 < ratio):
        return replicas
    wanted = math.ceil(_exact(new_ratio * len(filled)))
    turned = (new_ratio < 1 and wanted > replicas) or (new_ratio > 1 and wanted < replicas)
    return replicas if turned else wanted


def _tolerated(ratio: float) -> bool:
    return 1 - TOLERANCE <= _exact(ratio) <= 1 + TOLERANCE


def _exact(value: float) -> float:
    """Without the last digits of floating point, which would make 3.0000000000000004 into 4."""
    return round(value, 9)


@dataclass(kw_only=True)
class Autoscaler:
    """One HorizontalPodAutoscaler; `targets` are average values a pod, by metric."""

    targets: Mapping[str, float]
    min_replicas: int
    max_replicas: int
    up: Rules = UP
    down: Rules = DOWN
    _recommended: list[tuple[float, int]] = field(default_factory=list)
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def look(self, now_s: float, replicas: int, seen: Seen) -> int:
        """How many pods there are to be from now on."""
        if not self._recommended:
            self._recommended.append((now_s, replicas))  # so that the first look does not scale down at once
        wanted = self._wanted(replicas, seen)
        if replicas > self.max_replicas or replicas < self.min_replicas:
            wanted = min(max(replicas, self.min_replicas), self.max_replicas)
        elif wanted is None:
            return replicas
        else:
            wanted = self._limited(now_s, replicas, self._stabilized(now_s, replicas, wanted))
        if wanted != replicas:
            self._changes.append((now_s, wanted - replicas))
        return wanted

    def _wanted(self, replicas: int, seen: Seen) -> int | None:
        """The highest proposal; a metric that is not known keeps the others from scaling down."""
        proposals = [
            proposal(replicas, seen.values.get(name, ()), target, missing=seen.missing, pending=seen.pending)
            for name, target in self.targets.items()
        ]
        known = [each for each in proposals if each is not None]
        highest = max(known, default=None)
        return None if highest is None or (len(known) < len(proposals) and highest < replicas) else highest

    def _stabilized(self, now_s: float, replicas: int, wanted: int) -> int:
        """The lowest of what was asked for within the window of scaling up, the highest within that of scaling down."""
        longest_s = max(self.up.stabilization_s, self.down.stabilization_s)
        self._recommended = [each for each in self._recommended if each[0] > now_s - longest_s]
        up = min([wanted, *(n for at, n in self._recommended if at > now_s - self.up.stabilization_s)])
        down = max([wanted, *(n for at, n in self._recommended if at > now_s - self.down.stabilization_s)])
        self._recommended.append((now_s, wanted))
        return min(max(replicas, up), down)

    def _limited(self, now_s: float, replicas: int, wanted: int) -> int:
        """What the policies and the bounds leave of it."""
        if wanted > replicas:
            most = max(self._allowed(now_s, replicas, policy, +1) for policy in self.up.policies)
            return min(wanted, max(most, replicas), self.max_replicas)
        if wanted < replicas:
            least = min(self._allowed(now_s, replicas, policy, -1) for policy in self.down.policies)
            return max(wanted, min(least, replicas), self.min_replicas)
        return wanted

    def _allowed(self, now_s: float, replicas: int, policy: Policy, sign: int) -> int:
        """How far a policy lets the number go, from where it was when the period began."""
        self._changes = [each for each in self._changes if each[0] > now_s - self._longest_s]
        before = replicas - sum(change for at, change in self._changes if at > now_s - policy.period_s)
        if policy.kind == "Pods":
            return before + sign * policy.value
        changed = _exact(before * (1 + sign * policy.value / 100))
        return math.ceil(changed) if sign > 0 else int(changed)

    @property
    def _longest_s(self) -> int:
        return max(policy.period_s for policy in (*self.up.policies, *self.down.policies))

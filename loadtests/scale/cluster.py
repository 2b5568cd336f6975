"""Simulates a day on a cluster: pods, nodes and a queue, under an autoscaler.

Contract: time moves in ticks of TICK_S seconds.

- Within a tick the ready pods share the load evenly, as behind the gateway.
- A pod goes onto a node with room or onto a new node, which takes `node_start_s` to start; the pod then takes
  `pod_start_s` to become ready.
- The autoscaler syncs every SYNC_S seconds. It sees a window of METRIC_WINDOW_S that ended METRIC_LAG_S ago (scrape,
  rule, adapter). The requests/s of a pod are its answers divided by the whole window, also for a new pod, as in
  `rate(x[1m])`. The queue-to-compute ratio covers only the ticks of the pod; without a tick in the window it has none.
- Requests beyond the saturation of the pods wait up to Triton's queue time-out; the rest is refused.
- A request is *late* if it was refused, or sent while the p99 was above the limit.

Simplified: all pods are equal, none fails, there are always more nodes, pods fill as few nodes as possible, and the
service curve stands for the arrivals within a tick.

Example:
    scaler = Autoscaler(target=0.3, min_replicas=2, max_replicas=20)
    day = replay(rates, curve, "queue", scaler, settings)
    day.late_share, day.node_hours
"""

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from deepseek.spec.metric_windows import SCALING, WINDOWS_S
from loadtests.scale.autoscaler import SYNC_S, Autoscaler, PodMetrics
from loadtests.scale.service_curve import ServiceCurve
from loadtests.scale.traffic import TICK_S

Metric = Literal["queue", "rate"]
"""The queue-to-compute ratio, or requests/s."""
METRIC_WINDOW_S = WINDOWS_S[SCALING]
METRIC_LAG_S = 10  # 5 s between scrapes (one a tick), 5 s between evaluations
WINDOW_TICKS = METRIC_WINDOW_S // TICK_S
KEPT_TICKS = (METRIC_WINDOW_S + METRIC_LAG_S) // TICK_S
START_SHARE = 0.7  # of the capacity: the load of the pods at the first tick


@dataclass(frozen=True, kw_only=True)
class ClusterSettings:
    p99_limit_ms: float
    queue_timeout_ms: float
    """Triton refuses a request after this time in the queue."""
    pod_start_s: float
    node_start_s: float
    node_idle_s: float
    """A node without pods is removed after this time: scale-down-unneeded-time of the cluster autoscaler."""
    pods_per_node: int


@dataclass(kw_only=True)
class Node:
    """A machine, paid for from its request to its removal."""

    up_s: float
    pods: int = 0
    empty_since_s: float = 0.0


@dataclass(kw_only=True)
class Pod:
    node: Node
    runs_s: float
    ready_s: float


@dataclass(frozen=True, kw_only=True)
class ReplayedDay:
    """The result of a replay; arrays have one value per tick."""

    rates_rps: np.ndarray
    ready: np.ndarray
    pods: np.ndarray
    nodes: np.ndarray
    p99_ms: np.ndarray
    late: np.ndarray
    """Late requests."""

    @property
    def late_share(self) -> float:
        total = float(self.rates_rps.sum()) * TICK_S
        return float(self.late.sum()) / total if total else 0.0

    @property
    def late_s(self) -> int:
        """Seconds of the ticks in which at least one request was late."""
        return int(np.count_nonzero(self.late)) * TICK_S

    @property
    def node_hours(self) -> float:
        """Node-hours of all nodes, from request to removal."""
        return float(self.nodes.sum()) * TICK_S / 3600

    @property
    def pod_hours(self) -> float:
        """Pod-hours of all pods, ready or not."""
        return float(self.pods.sum()) * TICK_S / 3600


@dataclass(kw_only=True)
class Cluster:
    settings: ClusterSettings
    pods: list[Pod] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def start(self, count: int) -> None:
        """Adds pods that are ready from the start."""
        for _ in range(count):
            self.pods.append(Pod(node=self._place(-math.inf), runs_s=-math.inf, ready_s=-math.inf))

    def scale(self, now_s: float, count: int) -> None:
        """Scales to `count` pods: new ones go onto the fullest node with room; the newest are removed first."""
        while len(self.pods) < count:
            node = self._place(now_s + self.settings.node_start_s)
            runs_s = max(now_s, node.up_s)
            self.pods.append(Pod(node=node, runs_s=runs_s, ready_s=runs_s + self.settings.pod_start_s))
        self.pods.sort(key=lambda pod: pod.ready_s)
        for pod in self.pods[count:]:
            pod.node.pods -= 1
            pod.node.empty_since_s = now_s
        del self.pods[count:]

    def _place(self, up_s: float) -> Node:
        free = [node for node in self.nodes if node.pods < self.settings.pods_per_node]
        node = max(free, key=lambda each: each.pods, default=None)
        if node is None:
            node = Node(up_s=up_s)
            self.nodes.append(node)
        node.pods += 1
        return node

    def release_nodes(self, now_s: float) -> None:
        """Removes nodes that have been empty for `node_idle_s`."""
        idle_s = self.settings.node_idle_s
        self.nodes = [node for node in self.nodes if node.pods or now_s - node.empty_since_s < idle_s]

    def ready(self, now_s: float) -> int:
        return sum(pod.ready_s <= now_s for pod in self.pods)

    def metrics(self, now_s: float, load: "PodLoad", metric: Metric) -> PodMetrics:
        until_s = now_s - METRIC_LAG_S
        ticks = [int(min(METRIC_WINDOW_S, until_s - pod.ready_s) // TICK_S) for pod in self.pods]
        by_ticks = load.metrics()
        known = [by_ticks[count - 1][metric] for count in ticks if count > 0]
        pending = sum(pod.runs_s > now_s for pod in self.pods)
        return PodMetrics(values=known, missing=len(self.pods) - len(known) - pending, pending=pending)


@dataclass(kw_only=True)
class PodLoad:
    """The load of the pods: latency and late requests of each tick, and the metrics that result."""

    curve: ServiceCurve
    settings: ClusterSettings
    _waiting: float = 0.0
    """Waiting requests, of all pods."""
    _history: deque[tuple[float, float, float]] = field(
        default_factory=lambda: deque([(0.0, 0.0, 0.0)] * KEPT_TICKS, maxlen=KEPT_TICKS)
    )
    """For each of the last ticks, per pod: requests, their time in the queue and in the model (ms)."""

    def tick(self, rate_rps: float, ready: int) -> tuple[float, float]:
        """Advances one tick; returns the p99 in milliseconds and the number of late requests."""
        requests = rate_rps * TICK_S
        if not ready:
            self._waiting = 0.0
            self._history.append((0.0, 0.0, 0.0))
            return math.inf, requests
        most_rps = ready * self.curve.saturation_rps
        left = max(0.0, requests + self._waiting - most_rps * TICK_S)
        self._waiting = min(left, most_rps * self.settings.queue_timeout_ms / 1000)
        refused = left - self._waiting
        rate = min(rate_rps / ready, self.curve.saturation_rps)
        waited_ms = 1000 * self._waiting / most_rps
        p99_ms = self.curve.p99_ms(rate) + waited_ms
        late = requests if p99_ms > self.settings.p99_limit_ms else min(refused, requests)
        served = rate * TICK_S
        queue_ms = (self.curve.queue_ms(rate) + waited_ms) * served if self.curve.queue else 0.0
        compute_ms = self.curve.compute_ms(rate) * served if self.curve.queue else 0.0
        self._history.append((served, queue_ms, compute_ms))
        return (p99_ms if requests else 0.0), late

    def metrics(self) -> list[dict[Metric, float]]:
        """The metrics of a pod that has answered for 1, 2, ... ticks of the window, in this order."""
        found: list[dict[Metric, float]] = []
        served = queue_ms = compute_ms = 0.0
        for requests, queued_ms, computed_ms in reversed(list(self._history)[:WINDOW_TICKS]):
            served, queue_ms, compute_ms = served + requests, queue_ms + queued_ms, compute_ms + computed_ms
            found.append({"queue": queue_ms / compute_ms if compute_ms else 0.0, "rate": served / METRIC_WINDOW_S})
        return found


def replay(
    rates_rps: np.ndarray, curve: ServiceCurve, metric: Metric, scaler: Autoscaler, settings: ClusterSettings
) -> ReplayedDay:
    """Replays the traffic; the pods of the first tick have already run at its rate for a metric window."""
    cluster, load = Cluster(settings=settings), PodLoad(curve=curve, settings=settings)
    needed = math.ceil(float(rates_rps[0]) / (START_SHARE * curve.capacity_rps))
    cluster.start(min(max(needed, scaler.min_replicas), scaler.max_replicas))
    for _ in range(KEPT_TICKS):
        load.tick(float(rates_rps[0]), len(cluster.pods))
    rows = []
    for tick, rate in enumerate(rates_rps.tolist()):
        now_s = tick * TICK_S
        if now_s and now_s % SYNC_S == 0:
            wanted = scaler.sync(now_s, len(cluster.pods), cluster.metrics(now_s, load, metric))
            if wanted != len(cluster.pods):
                cluster.scale(now_s, wanted)
        cluster.release_nodes(now_s)
        ready = cluster.ready(now_s)
        p99_ms, late = load.tick(rate, ready)
        rows.append((ready, len(cluster.pods), len(cluster.nodes), p99_ms, late))
    ready_, pods, nodes, p99, late_ = (np.array(column, float) for column in zip(*rows, strict=True))
    return ReplayedDay(rates_rps=rates_rps, ready=ready_, pods=pods, nodes=nodes, p99_ms=p99, late=late_)

"""A day on a cluster that is computed: pods, nodes and a queue, under an autoscaler.

Contract: moves in ticks of TICK_S seconds; within one, all that is ready shares the load evenly, as the gateway does. A
pod takes the place on a node that is there or on a new one, which takes `node_start_s`; then `pod_start_s` to be ready
and known to the gateway. The autoscaler looks every SYNC_S seconds and sees what Prometheus has of each pod by then:
METRIC_WINDOW_S that ended METRIC_LAG_S ago (scrape, rule, adapter). As `rate(x[1m])` does, requests/s of a pod are what
it answered in that window over all of it, however short it has been there: their sum over pods does not depend on who
answers. The queue-to-compute ratio is over the pod's own ticks alone; a pod without one in the window has no value.
What is beyond the saturation of the pods waits, as long as Triton lets it; more is refused. A request is *late* where
it was refused, or sent while the p99 was beyond the limit.

What it leaves out: all pods are alike, none fails, nodes never run out, pods are packed onto as few nodes as there may
be, and how requests spread in time within a tick is the service curve's.

Example:
    scaler = Autoscaler(targets={"queue": 0.3}, min_replicas=2, max_replicas=20)
    day = replay(rates, curve, scaler, Setup(p99_limit_ms=80))
    day.late_share, day.node_hours
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from loadtests.autoscaler import SYNC_S, Autoscaler, Seen
from loadtests.service_curve import ServiceCurve
from loadtests.traffic import TICK_S

METRIC_WINDOW_S = 60  # rate(...[1m]) of kubernetes/components/monitoring
METRIC_LAG_S = 10  # 5 s between scrapes (one a tick), 5 s between evaluations
KEPT_TICKS = (METRIC_WINDOW_S + METRIC_LAG_S) // TICK_S
START_SHARE = 0.7  # of the capacity that the pods of the first tick are used to


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What does not follow from the traffic."""

    p99_limit_ms: float
    queue_timeout_ms: float = 200.0
    """As long as Triton lets a request wait."""
    pod_start_s: float = 60.0
    node_start_s: float = 120.0
    node_idle_s: float = 600.0
    """How long a node without pods is kept: scale-down-unneeded-time of the cluster autoscaler."""
    pods_per_node: int = 4


@dataclass(kw_only=True)
class Node:
    """A machine that is paid for."""

    there_s: float
    pods: int = 0
    empty_since_s: float = 0.0


@dataclass(kw_only=True)
class Pod:
    """One server."""

    node: Node
    runs_s: float
    ready_s: float


@dataclass(frozen=True, kw_only=True)
class Day:
    """What happened; arrays have a value a tick."""

    rates_rps: np.ndarray
    ready: np.ndarray
    pods: np.ndarray
    nodes: np.ndarray
    p99_ms: np.ndarray
    late: np.ndarray
    """Requests."""

    @property
    def late_share(self) -> float:
        """Of all requests."""
        total = float(self.rates_rps.sum()) * TICK_S
        return float(self.late.sum()) / total if total else 0.0

    @property
    def late_s(self) -> int:
        """Seconds in which some requests were late."""
        return int(np.count_nonzero(self.late)) * TICK_S

    @property
    def node_hours(self) -> float:
        """Of all nodes, from their request to their end."""
        return float(self.nodes.sum()) * TICK_S / 3600

    @property
    def pod_hours(self) -> float:
        """Of all pods, whether ready or not."""
        return float(self.pods.sum()) * TICK_S / 3600


@dataclass(kw_only=True)
class Cluster:
    """Pods and nodes, as they come and go."""

    setup: Setup
    pods: list[Pod] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def start(self, count: int) -> None:
        """Pods that have been there for long."""
        for _ in range(count):
            node = self._place(-math.inf)
            self.pods.append(Pod(node=node, runs_s=-math.inf, ready_s=-math.inf))

    def scale(self, now_s: float, count: int) -> None:
        """As many as that: new ones on the fullest node with room, and the newest go first."""
        while len(self.pods) < count:
            node = self._place(now_s + self.setup.node_start_s)
            runs_s = max(now_s, node.there_s)
            self.pods.append(Pod(node=node, runs_s=runs_s, ready_s=runs_s + self.setup.pod_start_s))
        self.pods.sort(key=lambda pod: pod.ready_s)
        for pod in self.pods[count:]:
            pod.node.pods -= 1
            pod.node.empty_since_s = now_s
        del self.pods[count:]

    def _place(self, there_s: float) -> Node:
        free = [node for node in self.nodes if node.pods < self.setup.pods_per_node]
        node = max(free, key=lambda each: each.pods, default=None)
        if node is None:
            node = Node(there_s=there_s)
            self.nodes.append(node)
        node.pods += 1
        return node

    def release(self, now_s: float) -> None:
        """Gives nodes back that have been empty for long."""
        self.nodes = [node for node in self.nodes if node.pods or now_s - node.empty_since_s < self.setup.node_idle_s]

    def ready(self, now_s: float) -> int:
        """Pods that answer."""
        return sum(pod.ready_s <= now_s for pod in self.pods)

    def seen(self, now_s: float, load: Load) -> Seen:
        """What the autoscaler finds, pod by pod."""
        until_s = now_s - METRIC_LAG_S
        ticks = [int(min(METRIC_WINDOW_S, until_s - pod.ready_s) // TICK_S) for pod in self.pods]
        metrics = load.metrics()
        known = [metrics[count - 1] for count in ticks if count > 0]
        pending = sum(pod.runs_s > now_s for pod in self.pods)
        return Seen(
            values={name: [each[name] for each in known] for name in metrics[0]},
            missing=len(self.pods) - len(known) - pending,
            pending=pending,
        )


@dataclass(kw_only=True)
class Load:
    """What the pods make of the requests of a tick, and what the metrics will say of it."""

    curve: ServiceCurve
    setup: Setup
    _waiting: float = 0.0
    """Requests, of all pods."""
    _history: deque[tuple[float, float, float]] = field(
        default_factory=lambda: deque([(0.0, 0.0, 0.0)] * KEPT_TICKS, maxlen=KEPT_TICKS)
    )
    """Of each of the last ticks: requests a pod, their time in the queue, their time in the model (ms)."""

    def tick(self, rate_rps: float, ready: int) -> tuple[float, float]:
        """p99 in milliseconds, and requests that were late."""
        requests = rate_rps * TICK_S
        if not ready:
            self._waiting = 0.0
            self._history.append((0.0, 0.0, 0.0))
            return math.inf, requests
        most_rps = ready * self.curve.saturation_rps
        left = max(0.0, requests + self._waiting - most_rps * TICK_S)
        self._waiting = min(left, most_rps * self.setup.queue_timeout_ms / 1000)
        refused = left - self._waiting
        rate = min(rate_rps / ready, self.curve.saturation_rps)
        waited_ms = 1000 * self._waiting / most_rps
        p99_ms = self.curve.p99_ms(rate) + waited_ms
        late = requests if p99_ms > self.setup.p99_limit_ms else min(refused, requests)
        served = rate * TICK_S
        if self.curve.queue:
            queue_ms = (self.curve.queue_ms(rate) + waited_ms) * served
            self._history.append((served, queue_ms, self.curve.compute_ms(rate) * served))
        else:
            self._history.append((served, 0.0, 0.0))
        return (p99_ms if requests else 0.0), late

    def metrics(self) -> list[dict[str, float]]:
        """Of a pod that answered in the newest tick of the window alone, in the newest two, ... in all of it."""
        found = []
        served = queue_ms = compute_ms = 0.0
        for requests, queued_ms, computed_ms in reversed(list(self._history)[: METRIC_WINDOW_S // TICK_S]):
            served, queue_ms, compute_ms = served + requests, queue_ms + queued_ms, compute_ms + computed_ms
            found.append({"queue": queue_ms / compute_ms if compute_ms else 0.0, "rate": served / METRIC_WINDOW_S})
        return found


def replay(rates_rps: np.ndarray, curve: ServiceCurve, scaler: Autoscaler, setup: Setup) -> Day:
    """Plays the traffic; the pods of the beginning are used to its first rate."""
    cluster, load = Cluster(setup=setup), Load(curve=curve, setup=setup)
    needed = math.ceil(float(rates_rps[0]) / (START_SHARE * curve.capacity_rps))
    cluster.start(min(max(needed, scaler.min_replicas), scaler.max_replicas))
    for _ in range(KEPT_TICKS):
        load.tick(float(rates_rps[0]), len(cluster.pods))
    rows = []
    for tick, rate in enumerate(rates_rps.tolist()):
        now_s = tick * TICK_S
        ready = cluster.ready(now_s)
        if now_s and now_s % SYNC_S == 0:
            wanted = scaler.look(now_s, len(cluster.pods), cluster.seen(now_s, load))
            if wanted != len(cluster.pods):
                cluster.scale(now_s, wanted)
                ready = cluster.ready(now_s)
        cluster.release(now_s)
        p99_ms, late = load.tick(rate, ready)
        rows.append((ready, len(cluster.pods), len(cluster.nodes), p99_ms, late))
    ready_, pods, nodes, p99, late_ = (np.array(column, float) for column in zip(*rows, strict=True))
    return Day(rates_rps=rates_rps, ready=ready_, pods=pods, nodes=nodes, p99_ms=p99, late=late_)

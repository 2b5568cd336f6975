"""The simulated cluster: pods and nodes, waiting and refused requests, and the autoscaler's metrics."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from loadtests.scale.autoscaler import Autoscaler
from loadtests.scale.cluster import START_SHARE, Cluster, ClusterSettings, PodLoad, replay
from loadtests.scale.service_curve import ServiceCurve
from loadtests.scale.traffic import TICK_S

CURVE = ServiceCurve(
    p99=((100, 10.0), (1000, 50.0)),
    queue=((100, 0.2), (1000, 2.0)),
    compute=((100, 1.0), (1000, 4.0)),
    saturation_rps=1200,
    capacity_rps=1000,
)
SETTINGS = ClusterSettings(p99_limit_ms=60, pod_start_s=60, node_start_s=120, node_idle_s=600, pods_per_node=4)


def curve_at(rate_rps: float) -> ServiceCurve:
    """A service curve; its capacity determines the pods at the start of a day."""
    return replace(CURVE, capacity_rps=rate_rps / START_SHARE)


def test_a_pod_without_room_waits_for_a_node_and_then_for_its_own_start() -> None:
    cluster = Cluster(settings=SETTINGS)
    cluster.start(3)
    cluster.scale(0, 5)  # the fourth fits on the first node, the fifth needs another
    assert len(cluster.nodes) == 2
    assert [cluster.ready(at) for at in (0, 59, 60, 179, 180)] == [3, 3, 4, 4, 5]
    seen = cluster.metrics(75, PodLoad(curve=CURVE, settings=SETTINGS), "queue")
    assert (seen.pending, seen.missing, len(seen.values)) == (1, 0, 4)


def test_the_newest_pods_are_removed_first_and_an_empty_node_is_paid_for_a_while() -> None:
    cluster = Cluster(settings=SETTINGS)
    cluster.start(4)
    cluster.scale(0, 5)
    cluster.scale(300, 4)
    assert cluster.ready(300) == 4
    cluster.release_nodes(300 + 599)
    assert len(cluster.nodes) == 2
    cluster.release_nodes(300 + 600)
    assert len(cluster.nodes) == 1


def test_requests_beyond_the_saturation_wait_until_the_time_out_and_are_refused() -> None:
    load = PodLoad(curve=CURVE, settings=SETTINGS)
    p99_ms, late = load.tick(1000, 1)
    assert (p99_ms, late) == (50, 0)
    p99_ms, late = load.tick(1400, 1)  # 1000 more than 5 s of 1200/s; 240 of them may wait for 200 ms
    assert p99_ms == pytest.approx(50 + 200)
    assert late == 1400 * TICK_S  # beyond the limit
    assert load.tick(500, 0) == (math.inf, 500 * TICK_S)


def test_the_autoscaler_sees_a_minute_that_ended_ten_seconds_ago() -> None:
    load = PodLoad(curve=CURVE, settings=SETTINGS)
    for rate in [1000] * 14 + [0] * 2:
        load.tick(rate, 1)
    assert load.metrics()[-1] == pytest.approx({"queue": 0.5, "rate": 1000})
    for _ in range(12):
        load.tick(0, 1)
    assert load.metrics()[-1] == {"queue": 0.0, "rate": 0.0}


def test_a_new_pods_rate_covers_the_whole_window_and_its_ratio_its_own_ticks() -> None:
    cluster, load = Cluster(settings=SETTINGS), PodLoad(curve=CURVE, settings=SETTINGS)
    cluster.start(1)
    cluster.scale(0, 2)  # on the same node: ready at 60 s
    for rate, ready in [(1000, 1)] * 12 + [(200, 2)] * 5:  # until 85 s
        load.tick(rate, ready)
    # The window ends at 75 s: 3 ticks of the new pod.
    assert cluster.metrics(85, load, "rate").values == pytest.approx([(9 * 1000 + 3 * 100) / 12, 3 * 100 / 12])
    assert cluster.metrics(85, load, "queue").values == pytest.approx([(9 * 2000 + 3 * 20) / (9 * 4000 + 3 * 100), 0.2])


@pytest.mark.parametrize(
    ("now_s", "missing", "pending", "known"),
    [(119, 0, 1, 4), (120, 1, 0, 4), (194, 1, 0, 4), (195, 0, 0, 5)],
    ids=["no node", "starts", "no tick", "one tick"],
)
def test_a_pod_is_missing_until_its_first_tick_is_known(now_s: float, missing: int, pending: int, known: int) -> None:
    cluster = Cluster(settings=SETTINGS)
    cluster.start(4)
    cluster.scale(0, 5)  # ready at 180 s; its first tick ends at 185 s, known 10 s later
    seen = cluster.metrics(now_s, PodLoad(curve=CURVE, settings=SETTINGS), "rate")
    assert (seen.missing, seen.pending, len(seen.values)) == (missing, pending, known)


def test_under_constant_traffic_a_new_pod_does_not_ask_for_another() -> None:
    rates = np.full(720, 3900.0)
    settings = replace(SETTINGS, pods_per_node=5)
    day = replay(rates, curve_at(3900 / 4), "rate", Autoscaler(target=875, min_replicas=1, max_replicas=9), settings)
    assert day.pods[0] == day.ready[0] == 4
    assert set(day.pods[3:].tolist()) == {5}  # 975 of 875 asks for 4.46; with five 780 each: 4.46
    assert day.ready[-1] == 5


def test_steady_traffic_that_fits_costs_its_nodes_and_nothing_is_late() -> None:
    rates = np.full(720, 1500.0)  # an hour
    day = replay(rates, CURVE, "rate", Autoscaler(target=700, min_replicas=2, max_replicas=9), SETTINGS)
    assert set(day.pods.tolist()) == {3}  # 1500 / 0.7 of 1000, rounded up; 500 a pod asks for 2.1
    assert day.late_share == 0
    assert day.node_hours == pytest.approx(1)
    assert day.pod_hours == pytest.approx(3)


def test_a_jump_is_late_until_the_pods_for_it_are_ready() -> None:
    rates = np.concatenate([np.full(120, 1500.0), np.full(480, 6000.0)])  # at 600 s
    day = replay(rates, CURVE, "rate", Autoscaler(target=800, min_replicas=2, max_replicas=20), SETTINGS)
    late_s = np.flatnonzero(day.late) * TICK_S
    assert late_s[0] == 600
    assert 600 + 180 < late_s[-1] < 600 + 1200  # a node, a pod, and more time: a metric of answered requests saturates
    assert day.ready[-1] >= 6
    assert day.late.sum() <= rates.sum() * TICK_S

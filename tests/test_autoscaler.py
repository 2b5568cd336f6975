"""The autoscaler's algorithm, compared with cases worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from loadtests.scale.autoscaler import Autoscaler, PodMetrics, desired_replicas


def scaler(target: float = 1.0, **bounds: Any) -> Autoscaler:
    return Autoscaler(target=target, **{"min_replicas": 1, "max_replicas": 100, **bounds})


@pytest.mark.parametrize(
    ("replicas", "values", "target", "wanted"),
    [
        (2, [0.2, 0.2], 0.1, 4),  # the example of Kubernetes' page: twice the target, twice the pods
        (2, [0.05, 0.05], 0.1, 1),  # half the target, half the pods
        (3, [1.1, 1.1, 1.1], 1.0, 3),  # 0.1 beyond 1 is tolerated
        (3, [1.11, 1.11, 1.11], 1.0, 4),  # 3.33
        (10, [0.9] * 10, 1.0, 10),
        (10, [0.89] * 10, 1.0, 9),  # 8.9
        (3, [3.0, 0.0, 0.0], 0.5, 6),  # the mean counts: 1.0 / 0.5 * 3
        (4, [0.0] * 4, 1.0, 0),  # bounds come later
    ],
)
def test_a_metric_asks_for_its_ratio_of_pods_rounded_up(
    replicas: int, values: list[float], target: float, wanted: int
) -> None:
    assert desired_replicas(replicas, PodMetrics(values=values), target) == wanted


@pytest.mark.parametrize(
    ("replicas", "values", "missing", "pending", "wanted"),
    [
        (5, [2.0] * 3, 2, 0, 6),  # up: pods without a metric count as 0: (6 + 0) / 5 = 1.2
        (5, [0.5] * 4, 1, 0, 3),  # down: they count as at the target: (2 + 1) / 5 = 0.6
        (3, [1.5] * 2, 0, 1, 3),  # up: a pending pod counts as 0: 3 / 3 = 1
        (4, [3.0] * 3, 0, 1, 9),  # 9 / 4 = 2.25
        (3, [0.4] * 2, 0, 1, 1),  # down: a pending pod does not count
        (3, [1.2] * 2, 1, 0, 3),  # 2.4 / 3 = 0.8 would turn up into down
    ],
)
def test_pods_that_are_not_ready_dampen_the_change(
    replicas: int, values: list[float], missing: int, pending: int, wanted: int
) -> None:
    assert desired_replicas(replicas, PodMetrics(values=values, missing=missing, pending=pending), 1.0) == wanted


def test_without_any_metric_the_number_of_pods_stays() -> None:
    assert desired_replicas(3, PodMetrics(values=[], missing=3), 1.0) is None
    assert scaler().sync(0, 3, PodMetrics(values=[], missing=3)) == 3


def test_scale_up_starts_at_once_and_doubles_or_adds_four_every_15_s() -> None:
    hot = PodMetrics(values=[9.0] * 2)
    autoscaler = scaler()
    assert autoscaler.sync(0, 2, hot) == 6  # 4 more is more than twice 2
    assert autoscaler.sync(10, 6, PodMetrics(values=[9.0] * 6)) == 6  # within the period that began with 2
    assert autoscaler.sync(15, 6, PodMetrics(values=[9.0] * 6)) == 12  # twice 6
    assert autoscaler.sync(30, 12, PodMetrics(values=[9.0] * 12)) == 24


def test_scale_down_waits_for_its_window_and_then_removes_a_tenth_a_minute() -> None:
    autoscaler = scaler()
    replicas, seen = 20, []
    for now_s in range(0, 436, 15):
        replicas = autoscaler.sync(now_s, replicas, PodMetrics(values=[0.1] * replicas))
        seen.append((now_s, replicas))
    changes = [now for now, before in zip(seen[1:], seen, strict=False) if now[1] != before[1]]
    assert changes == [(300, 18), (360, 16), (420, 14)]  # int(20 * 0.9), int(18 * 0.9), int(16 * 0.9)


def test_bounds_hold_for_every_metric() -> None:
    hot = PodMetrics(values=[9.0] * 2)
    assert scaler(max_replicas=5).sync(0, 2, hot) == 5
    assert scaler(min_replicas=3).sync(0, 2, hot) == 3  # below the minimum: raised at once, for any metric
    assert scaler(max_replicas=5).sync(0, 9, PodMetrics(values=[0.1] * 9)) == 5

"""The autoscaler's algorithm, the simulated cluster, a day of traffic, and the choice of a target."""

from __future__ import annotations

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import values_of
from cli.options import Misuse
from deepseek.spec import GateFailed, InputError
from loadtests.scale.autoscaler import Autoscaler, PodMetrics, desired_replicas
from loadtests.scale.cluster import START_SHARE, Cluster, ClusterSettings, PodLoad, replay
from loadtests.scale.service_curve import ServiceCurve, never_falling
from loadtests.scale.simulate_scale import main
from loadtests.scale.target_choice import candidates, choose, targets
from loadtests.scale.traffic import TICK_S, read_traffic, shape_of_day
from loadtests.search.capacity_result import Capacity
from tests.computed_server import trial
from tests.saved_runs import saved_run, steady

CURVE = ServiceCurve(
    p99=((100, 10.0), (1000, 50.0)),
    queue=((100, 0.2), (1000, 2.0)),
    compute=((100, 1.0), (1000, 4.0)),
    saturation_rps=1200,
    capacity_rps=1000,
)
SETTINGS = ClusterSettings(
    p99_limit_ms=60, queue_timeout_ms=200, pod_start_s=60, node_start_s=120, node_idle_s=600, pods_per_node=4
)


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


def test_bounds_hold_for_every_metric_and_without_one_the_number_of_pods_stays() -> None:
    nothing = PodMetrics(values=[], missing=3)
    assert (desired_replicas(3, nothing, 1.0), scaler().sync(0, 3, nothing)) == (None, 3)
    hot = PodMetrics(values=[9.0] * 2)
    assert scaler(max_replicas=5).sync(0, 2, hot) == 5
    assert scaler(min_replicas=3).sync(0, 2, hot) == 3  # below the minimum: raised at once, for any metric
    assert scaler(max_replicas=5).sync(0, 9, PodMetrics(values=[0.1] * 9)) == 5


def test_pods_wait_for_nodes_and_an_empty_node_is_paid_for_a_while() -> None:
    cluster = Cluster(settings=SETTINGS)
    cluster.start(3)
    cluster.scale(0, 5)  # the fourth fits on the first node, the fifth needs another
    assert len(cluster.nodes) == 2
    assert [cluster.ready(at) for at in (0, 59, 60, 179, 180)] == [3, 3, 4, 4, 5]
    cluster.scale(300, 4)  # the newest is removed first
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
)
def test_a_pod_is_missing_until_its_first_tick_is_known(now_s: float, missing: int, pending: int, known: int) -> None:
    cluster = Cluster(settings=SETTINGS)
    cluster.start(4)
    cluster.scale(0, 5)  # ready at 180 s; its first tick ends at 185 s, known 10 s later
    seen = cluster.metrics(now_s, PodLoad(curve=CURVE, settings=SETTINGS), "rate")
    assert (seen.missing, seen.pending, len(seen.values)) == (missing, pending, known)


def test_steady_traffic_costs_its_nodes_and_a_new_pod_does_not_ask_for_another() -> None:
    day = replay(np.full(720, 1500.0), CURVE, "rate", scaler(700, min_replicas=2), SETTINGS)  # an hour
    assert set(day.pods.tolist()) == {3}  # 1500 / 0.7 of 1000, rounded up; 500 a pod asks for 2.1
    assert (day.late_share, day.node_hours, day.pod_hours) == (0, pytest.approx(1), pytest.approx(3))
    curve, settings = replace(CURVE, capacity_rps=3900 / 4 / START_SHARE), replace(SETTINGS, pods_per_node=5)
    day = replay(np.full(720, 3900.0), curve, "rate", scaler(875, min_replicas=2), settings)
    assert day.pods[0] == day.ready[0] == 4
    assert set(day.pods[3:].tolist()) == {5}  # 975 of 875 asks for 4.46; with five 780 each: 4.46
    assert day.ready[-1] == 5


def test_a_jump_is_late_until_the_pods_for_it_are_ready() -> None:
    rates = np.concatenate([np.full(120, 1500.0), np.full(480, 6000.0)])  # at 600 s
    day = replay(rates, CURVE, "rate", scaler(800, min_replicas=2), SETTINGS)
    late_s = np.flatnonzero(day.late) * TICK_S
    assert late_s[0] == 600
    assert 600 + 180 < late_s[-1] < 600 + 1200  # a node, a pod, and more time: a metric of answered requests saturates
    assert day.ready[-1] >= 6
    assert day.late.sum() <= rates.sum() * TICK_S


def test_a_shape_is_one_day_and_the_same_for_the_same_seed() -> None:
    day = shape_of_day("day", 1000, seed=3)
    assert len(day) * TICK_S == 86400
    assert 800 < day.max() < 1200
    assert day.min() < 0.25 * day.max()
    assert np.array_equal(day, shape_of_day("day", 1000, seed=3))
    assert not np.array_equal(day, shape_of_day("day", 1000, seed=4))
    assert shape_of_day("spike", 1000).max() > 1.8 * 1000


def test_each_rate_of_a_file_holds_until_the_next(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text("seconds,rate_rps\n0,10\n20,30\n30,5\n")
    assert read_traffic(path).tolist() == [10, 10, 10, 10, 30, 30, 5, 5]
    path.write_text("seconds,rate_rps\n0,100\n1,1000\n5,100\n6,1000\n10,0\n15,0\n")  # between two ticks
    assert read_traffic(path).tolist() == [820, 820, 0, 0]
    path.write_text("seconds,rate_rps\n0.03,10\n5.03,20\n")  # 5.03 + 5 is more than 10.03
    assert read_traffic(path) == pytest.approx([10, 20])
    path.write_text("seconds,rate_rps\n0,10\n1e-9,10\n")
    assert read_traffic(path) == pytest.approx([10])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: seen ''"),
        ("time,rate\n0,1\n", "line 1: seen 'time,rate'"),
        ("seconds,rate_rps\n0,1\n\n# the night\n", "1 rates; at least two are needed"),
        ("seconds,rate_rps\n0,1\n5,x\n", "could not convert string 'x'"),
        ("seconds,rate_rps\n0,1\n5,-2\n", "rates must be 0 or more"),
        ("seconds,rate_rps\n0,1\n5,1e308\n", "a number is too large"),
        ("seconds,rate_rps\n0,1\n\n5,2\n5,3\n", "seconds must increase: 5 follows 5"),
        ("seconds,rate_rps\n0,1\n9e9,2\n", "days; at most 31"),
    ],
)
def test_an_invalid_file_gives_a_one_line_error(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        read_traffic(tmp_path / "t.csv")


def test_latencies_that_fall_with_the_rate_are_pooled() -> None:
    assert never_falling([(10, 1.0, 1.0), (30, 2.0, 1.0), (20, 4.0, 3.0)]) == ((10, 1.0), (20, 3.5), (30, 3.5))
    assert never_falling([(10, 3.0, 1.0), (20, 2.0, 1.0), (30, 1.0, 1.0)]) == ((10, 2.0), (20, 2.0), (30, 2.0))
    assert never_falling([(10, 9.0, 1.0), (20, 5.0, 1.0), (10, 1.0, 3.0)]) == ((10, 3.0), (20, 5.0))  # one was repeated


def capacity_of(folder: Path, **changes: Any) -> Capacity:
    """A search over three rates; its runs have the server's times."""
    trials = []
    for rate, queue_ms, compute_ms, p99_ms in ((100, 0.2, 1.0, 10.0), (1000, 2.0, 4.0, 50.0), (1500, 30.0, 9.0, None)):
        times = {"queue": queue_ms, "compute_infer": compute_ms, "compute_input": 0, "compute_output": 0}
        statistics = {name: {"count": 1000, "ns": int(ms * 1e9)} for name, ms in times.items()}
        statistics["success"] = {"count": 1000, "ns": 0}
        run = saved_run(folder / str(rate), steady(count=10), server={"version": "1", "statistics": statistics})
        seen: dict[str, Any] = {"achieved_rps": min(rate, 1200), "p99_ms": p99_ms, "run": str(run.folder)}
        trials.append(trial(rate, "holds" if p99_ms else "fails", **seen))
    fixed: dict[str, Any] = {"model": "recommender", "target": "onnxruntime", "precision": "int8", "protocol": "grpc"}
    fixed |= {"served_versions": ("3",), "url": "127.0.0.1:1", "machine": {"cores": 2}, "objectives": ()}
    fixed |= {"capacity_rps": 1000.0, "confirmed": True, "limited_by": "p99_ms", "started": "2026-11-25T12:00:00"}
    return Capacity.model_validate({**fixed, "trials": tuple(trials), **changes})


def test_the_curve_contains_the_measurements_of_the_trials(tmp_path: Path) -> None:
    curve = ServiceCurve.of(capacity_of(tmp_path))
    assert curve.p99_ms(550) == pytest.approx(30)
    assert (curve.p99_ms(1000), curve.p99_ms(1001)) == (50, math.inf)  # at 1500/s the p99 is a failed request
    assert curve.queue_ratio(1000) == pytest.approx(0.5)
    assert curve.queue_ratio(50) == pytest.approx(0.2)
    assert replace(curve, compute=((50.0, 0.0),)).queue_ratio(50) == 0.0
    assert curve.saturation_rps == 1200
    with pytest.raises(InputError, match="needs a rate that holds"):
        ServiceCurve.of(capacity_of(tmp_path, capacity_rps=None))
    slower = CURVE.slowed(0.2)  # the same times at a lower rate
    assert (slower.p99_ms(800), slower.queue_ratio(800)) == (CURVE.p99_ms(1000), CURVE.queue_ratio(1000))
    assert (slower.capacity_rps, slower.saturation_rps) == (800, 960)


def test_the_cheapest_target_that_holds_is_chosen() -> None:
    rates = np.concatenate([np.full(360, 1000.0), np.linspace(1000, 4000, 720), np.linspace(4000, 1000, 720)])
    wanted = candidates(CURVE, ["queue", "rate"], peak_pods=4)
    found = choose(rates, CURVE, SETTINGS, wanted, max_replicas=12, late=0.001)
    holding = [each for each in found.tried if each.late_share <= 0.001]
    assert found.best in holding
    assert found.best.node_hours == min(each.node_hours for each in holding)
    assert any(each.late_share > 0.001 for each in found.tried if each.target == 1.0)  # 0.5 is where the SLO ends
    assert (found.fixed_pods, found.fixed_node_hours) == (4, pytest.approx(2.5))


def test_targets_are_the_curves_values_at_shares_of_the_capacity() -> None:
    assert targets(CURVE, "rate") == [400, 500, 600, 700, 800, 900]
    assert targets(replace(CURVE, capacity_rps=0.1), "rate") == [0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
    assert targets(CURVE, "queue")[-1] == 1.0
    assert targets(CURVE, "queue")[-2] == pytest.approx(CURVE.queue_ratio(900), abs=1e-3)
    assert targets(replace(CURVE, queue=()), "queue") == []
    assert [least for metric, target, least in candidates(CURVE, ["rate"], 8) if target == 400] == [2, 4, 6, 8]


@pytest.fixture(scope="module")
def capacity(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a search."""
    folder = tmp_path_factory.mktemp("capacity")
    capacity_of(folder / "runs").save(folder / "capacity.json")
    return folder / "capacity.json"


@pytest.fixture
def measured(capacity: Path, tmp_path: Path, own_build: Path) -> tuple[str, ...]:
    """Arguments of the command over a short, measured day."""
    (tmp_path / "day.csv").write_text("seconds,rate_rps\n0,1000\n1800,2500\n3600,1000\n")
    return "--capacity", str(capacity), "--traffic", str(tmp_path / "day.csv")


def left(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "build" / "recommender" / "scale.json").read_text())


def test_the_command_writes_the_file_for_the_overlay(
    tmp_path: Path, measured: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    main(values_of("simulate-scale", *measured, "--late", "1", "--json"))
    saved = left(tmp_path)
    assert saved == json.loads(capsys.readouterr().out)
    assert (saved["chosen"]["cores"], saved["chosen"]["min_replicas"] >= 2) == (2, True)
    assert (saved["target"], saved["precision"], saved["served_versions"]) == ("onnxruntime", "int8", ["3"])


def test_as_many_requests_may_be_late_as_the_slo_lets_fail(tmp_path: Path, measured: tuple[str, ...]) -> None:
    spec = Path("models/recommender/deploy.toml").read_text()
    (tmp_path / "models" / "recommender").mkdir(parents=True)
    errors = 'objectives = ["error_rate < 0.2%"]'
    (tmp_path / "models" / "recommender" / "deploy.toml").write_text(spec.replace("[slo]", f"[slo]\n{errors}"))
    with suppress(GateFailed):
        main(values_of("simulate-scale", *measured, "--models", str(tmp_path / "models"), "--max-replicas", "2"))
    assert left(tmp_path)["late_allowed"] == 0.002


def test_if_no_setting_holds_the_command_names_the_nearest(tmp_path: Path, measured: tuple[str, ...]) -> None:
    flags = ("--late", "0", "--max-replicas", "2")  # two servers never hold 2500/s
    with pytest.raises(GateFailed, match=r"no setting keeps late requests within 0.000%; nearest: "):
        main(values_of("simulate-scale", *measured, *flags))
    assert left(tmp_path)["chosen"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--capacity", "nosuch.json"), "nosuch.json: no such file; make it with: make capacity"),
        (("--model", "minilm"), "of the model 'recommender', not of 'minilm'"),
        (("--max-replicas", "1"), "--max-replicas: seen '1'; a whole number, 2 or more, is needed"),
        (("--late", "5"), "--late: seen '5'; a share, 0 to 1, is needed"),
        (("--traffic", "nosuch.csv"), "nosuch.csv: No such file"),
        (("--traffic", "flat", "--peak-rps", "1e12"), "needs more than 10000 pods of 900/s each"),
        (("--pods-per-node", "9" * 400), f"--pods-per-node: seen '{'9' * 400}'; a whole number, 1 or more, is needed"),
    ],
)
def test_bad_input_is_one_line(measured: tuple[str, ...], flags: tuple[str, ...], message: str) -> None:
    with pytest.raises((InputError, Misuse), match=re.escape(message)):
        main(values_of("simulate-scale", *measured, *flags))

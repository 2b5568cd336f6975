"""The autoscaler's algorithm against cases worked out by hand, curve and traffic, and the choice of a target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.spec import InputError
from loadtests.autoscaler import UP, Autoscaler, Policy, Rules, Seen, proposal
from loadtests.capacity import Capacity
from loadtests.service_curve import ServiceCurve, never_falling
from loadtests.simulate_scale import fixed_node_hours, least_replicas, settings, simulate, targets
from loadtests.traffic import TICK_S, read_traffic, shape_of_day
from loadtests.trial import Trial
from tests.conftest import run_module
from tests.test_cluster import CURVE, SETUP
from tests.test_results import saved_run, steady


def scaler(target: float = 1.0, **bounds: Any) -> Autoscaler:
    return Autoscaler(targets={"queue": target}, **{"min_replicas": 1, "max_replicas": 100, **bounds})


# ---- one metric's proposal -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replicas", "values", "target", "wanted"),
    [
        (2, [0.2, 0.2], 0.1, 4),  # the page's own: twice the target, twice the pods
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
    assert proposal(replicas, values, target) == wanted


@pytest.mark.parametrize(
    ("replicas", "values", "missing", "pending", "wanted"),
    [
        (5, [2.0] * 3, 2, 0, 6),  # up: those without it count as 0: (6 + 0) / 5 = 1.2
        (5, [0.5] * 4, 1, 0, 3),  # down: as at the target: (2 + 1) / 5 = 0.6
        (3, [1.5] * 2, 0, 1, 3),  # up: one that does not run yet counts as 0: 3 / 3 = 1
        (4, [3.0] * 3, 0, 1, 9),  # 9 / 4 = 2.25
        (3, [0.4] * 2, 0, 1, 1),  # down: it does not count
        (3, [1.2] * 2, 1, 0, 3),  # 2.4 / 3 = 0.8 would turn up into down
    ],
)
def test_pods_that_are_not_there_yet_make_it_careful(
    replicas: int, values: list[float], missing: int, pending: int, wanted: int
) -> None:
    assert proposal(replicas, values, 1.0, missing=missing, pending=pending) == wanted


def test_without_any_value_a_metric_asks_for_nothing_and_nothing_changes() -> None:
    assert proposal(3, [], 1.0, missing=3) is None
    assert scaler().look(0, 3, Seen(values={}, missing=3)) == 3


# ---- windows, policies, bounds -------------------------------------------------------------------


def test_up_goes_at_once_doubled_or_four_more_every_15_s() -> None:
    hot = Seen(values={"queue": [9.0] * 2})
    autoscaler = scaler()
    assert autoscaler.look(0, 2, hot) == 6  # 4 more is more than twice 2
    assert autoscaler.look(10, 6, Seen(values={"queue": [9.0] * 6})) == 6  # within the period that began with 2
    assert autoscaler.look(15, 6, Seen(values={"queue": [9.0] * 6})) == 12  # twice 6
    assert autoscaler.look(30, 12, Seen(values={"queue": [9.0] * 12})) == 24


def test_down_waits_for_its_window_and_then_goes_a_tenth_a_minute() -> None:
    autoscaler = scaler()
    replicas, seen = 20, []
    for now_s in range(0, 436, 15):
        replicas = autoscaler.look(now_s, replicas, Seen(values={"queue": [0.1] * replicas}))
        seen.append((now_s, replicas))
    changes = [now for now, before in zip(seen[1:], seen, strict=False) if now[1] != before[1]]
    assert changes == [(300, 18), (360, 16), (420, 14)]  # int(20 * 0.9), int(18 * 0.9), int(16 * 0.9)


def test_within_the_window_the_highest_recommendation_counts() -> None:
    autoscaler = scaler(down=Rules(stabilization_s=60, policies=(Policy(kind="Percent", value=100, period_s=15),)))
    assert autoscaler.look(0, 4, Seen(values={"queue": [2.0] * 4})) == 8
    assert autoscaler.look(15, 8, Seen(values={"queue": [0.75] * 8})) == 8  # 6, but 8 was asked for 15 s ago
    assert autoscaler.look(45, 8, Seen(values={"queue": [0.25] * 8})) == 8
    assert autoscaler.look(60, 8, Seen(values={"queue": [0.25] * 8})) == 6  # the 8 is 60 s old, the 6 is not
    assert autoscaler.look(75, 6, Seen(values={"queue": [0.25] * 6})) == 2


def test_a_window_for_scaling_up_takes_the_lowest_of_it() -> None:
    autoscaler = scaler(up=Rules(stabilization_s=30, policies=UP.policies))
    assert autoscaler.look(0, 2, Seen(values={"queue": [2.0] * 2})) == 2
    assert autoscaler.look(15, 2, Seen(values={"queue": [2.0] * 2})) == 2
    assert autoscaler.look(30, 2, Seen(values={"queue": [1.5] * 2})) == 3


def test_bounds_hold_whatever_the_metric_says() -> None:
    hot = Seen(values={"queue": [9.0] * 2})
    assert scaler(max_replicas=5).look(0, 2, hot) == 5
    assert scaler(min_replicas=3).look(0, 2, hot) == 3  # below the least: there at once, whatever the metric
    assert scaler(max_replicas=5).look(0, 9, Seen(values={"queue": [0.1] * 9})) == 5


def test_of_two_metrics_the_higher_counts_and_an_unknown_one_stops_scaling_down_alone() -> None:
    two = {"queue": 1.0, "rate": 100.0}
    at_once = Rules(stabilization_s=0, policies=(Policy(kind="Percent", value=100, period_s=15),))
    fixed: dict[str, Any] = {"min_replicas": 1, "max_replicas": 9, "down": at_once}
    both = Seen(values={"queue": [0.5] * 4, "rate": [150.0] * 4})
    assert Autoscaler(targets=two, **fixed).look(0, 4, both) == 6
    assert Autoscaler(targets=two, **fixed).look(0, 4, Seen(values={"queue": [0.5] * 4})) == 4
    assert Autoscaler(targets=two, **fixed).look(0, 4, Seen(values={"queue": [1.5] * 4})) == 6


# ---- the service curve ---------------------------------------------------------------------------


def test_measurements_that_fall_where_they_cannot_are_pooled() -> None:
    assert never_falling([(10, 1.0, 1.0), (30, 2.0, 1.0), (20, 4.0, 3.0)]) == ((10, 1.0), (20, 3.5), (30, 3.5))
    assert never_falling([(10, 3.0, 1.0), (20, 2.0, 1.0), (30, 1.0, 1.0)]) == ((10, 2.0), (20, 2.0), (30, 2.0))


def capacity_of(folder: Path, **changes: Any) -> Capacity:
    """A search over three rates whose runs know the server's times."""
    trials = []
    for rate, queue_ms, compute_ms, p99_ms in ((100, 0.2, 1.0, 10.0), (1000, 2.0, 4.0, 50.0), (1500, 30.0, 9.0, None)):
        times = {"queue": queue_ms, "compute_infer": compute_ms, "compute_input": 0, "compute_output": 0}
        statistics = {name: {"count": 1000, "ns": int(ms * 1e9)} for name, ms in times.items()}
        statistics["success"] = {"count": 1000, "ns": 0}
        run = saved_run(folder / str(rate), steady(), server={"version": "1", "statistics": statistics})
        facts: dict[str, Any] = {"achieved_rps": min(rate, 1200), "p50_ms": 5.0, "error_rate": 0.0, "duration_s": 10.0}
        facts["outcome"] = "holds" if p99_ms else "fails"
        trials.append(Trial(rate_rps=rate, phase="bisect", p99_ms=p99_ms, run=str(run.folder), **facts))
    fixed: dict[str, Any] = {
        "model": "recommender",
        "target": "onnxruntime",
        "precision": "int8",
        "served_versions": ("3",),
        "url": "127.0.0.1:1",
        "protocol": "grpc",
    }
    fixed |= {"capacity_rps": 1000.0, "confirmed": True, "limited_by": "p99_ms", "machine": {"cores": 2}}
    return Capacity.model_validate(
        {**fixed, "objectives": (), "started": "2026-11-25T12:00:00", "trials": tuple(trials), **changes}
    )


def test_the_curve_is_what_the_trials_measured(tmp_path: Path) -> None:
    curve = ServiceCurve.of(capacity_of(tmp_path))
    assert curve.p99_ms(550) == pytest.approx(30)
    assert curve.queue_ratio(1000) == pytest.approx(0.5)
    assert curve.queue_ratio(50) == pytest.approx(0.2)
    assert curve.saturation_rps == 1200
    with pytest.raises(InputError, match="has to hold some rate"):
        ServiceCurve.of(capacity_of(tmp_path, capacity_rps=None))


def test_a_slower_server_is_the_same_at_a_lower_rate() -> None:
    slower = CURVE.slowed(0.2)
    assert slower.p99_ms(800) == CURVE.p99_ms(1000)
    assert slower.queue_ratio(800) == CURVE.queue_ratio(1000)
    assert (slower.capacity_rps, slower.saturation_rps) == (800, 960)


# ---- traffic -------------------------------------------------------------------------------------


def test_a_shape_is_a_day_the_same_for_the_same_seed() -> None:
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: seen 'nothing'"),
        ("time,rate\n0,1\n", "line 1: seen 'time,rate'"),
        ("seconds,rate_rps\n0,1\n", "1 rates; it takes two or more"),
        ("seconds,rate_rps\n0,1\n5,x\n", "line 3: seen '5,x'"),
        ("seconds,rate_rps\n0,1\n5,-2\n", "line 3: seen '5,-2'"),
        ("seconds,rate_rps\n0,1\n\n5,2\n5,3\n", "line 5: 5 s does not come after 5 s"),
        ("seconds,rate_rps\n0,1\n9e9,2\n", "days; at most 31"),
    ],
    ids=["empty", "header", "one", "word", "negative", "order", "years"],
)
def test_a_file_that_is_no_traffic_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError) as error:
        read_traffic(tmp_path / "t.csv")
    assert message in str(error.value)


# ---- the choice ----------------------------------------------------------------------------------


def test_the_cheapest_setting_that_holds_is_chosen() -> None:
    rates = np.concatenate([np.full(360, 1000.0), np.linspace(1000, 4000, 720), np.linspace(4000, 1000, 720)])
    wanted = settings(CURVE, ["queue", "rate"], peak_pods=4)
    found = simulate(rates, CURVE, SETUP, wanted, max_replicas=12, late=0.001)
    holding = [each for each in found.tried if each.late_share <= 0.001]
    assert found.best in holding
    assert found.best.node_hours == min(each.node_hours for each in holding)
    assert any(each.late_share > 0.001 for each in found.tried if each.target == 1.0)  # 0.5 is where the SLO ends
    assert found.fixed_pods == 4
    assert fixed_node_hours(found, SETUP) == pytest.approx(2.5)


def test_targets_are_where_the_curve_is_at_shares_of_the_capacity() -> None:
    assert targets(CURVE, "rate") == [400, 500, 600, 700, 800, 900]
    assert targets(CURVE, "queue")[-1] == 1.0
    assert targets(CURVE, "queue")[-2] == pytest.approx(CURVE.queue_ratio(900), abs=1e-3)
    assert least_replicas(8) == [2, 4, 6, 8]


@pytest.fixture
def measured(tmp_path: Path) -> tuple[str, ...]:
    """Arguments of the command over a short, measured day."""
    capacity_of(tmp_path / "runs").save(tmp_path / "capacity.json")
    (tmp_path / "day.csv").write_text("seconds,rate_rps\n0,1000\n1800,2500\n3600,1000\n")
    return "--capacity", str(tmp_path / "capacity.json"), "--traffic", str(tmp_path / "day.csv")


def test_the_command_leaves_what_the_overlay_reads_and_a_page(tmp_path: Path, measured: tuple[str, ...]) -> None:
    flags = ("--late", "1", "--node-price", "0.5", "--json")
    run = run_module("loadtests.simulate_scale", *measured, *flags, BUILD=str(tmp_path / "build"))
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "build" / "recommender" / "scale.json").read_text())
    assert saved == json.loads(run.stdout)
    assert saved["chosen"]["cores"] == 2
    assert saved["chosen"]["min_replicas"] >= 2
    assert (saved["target"], saved["precision"], saved["served_versions"]) == ("onnxruntime", "int8", ["3"])
    html = (tmp_path / "build" / "recommender" / "scale.html").read_text()
    assert saved["conclusion"][1:] in html
    assert "<script" not in html
    assert html.count("<svg") == 4


def test_with_a_price_every_setting_and_the_fixed_number_have_a_cost(tmp_path: Path, measured: tuple[str, ...]) -> None:
    run = run_module(
        "loadtests.simulate_scale", *measured, "--late", "1", "--node-price", "0.5", BUILD=str(tmp_path / "build")
    )
    assert run.returncode == 0, run.stderr
    saved = json.loads((tmp_path / "build" / "recommender" / "scale.json").read_text())
    assert saved["node_price"] == 0.5
    for each in [saved["best"], saved["fixed"], *saved["tried"]]:
        assert each["cost"] == pytest.approx(each["node_hours"] * 0.5, abs=1e-4)
    fixed = next(line for line in run.stdout.splitlines() if line.split()[:1] == ["fixed"])
    assert fixed.split()[-1] == f"{saved['fixed']['cost']:.2f}"
    html = (tmp_path / "build" / "recommender" / "scale.html").read_text()
    assert f"{saved['fixed']['node_hours']:.1f} node hours, cost {saved['fixed']['cost']:.2f}" in html
    assert f"<th scope='row'>cost</th><td>{saved['best']['cost']:.2f}</td>" in html


def test_where_nothing_holds_the_command_says_what_came_nearest(tmp_path: Path, measured: tuple[str, ...]) -> None:
    flags = ("--late", "0", "--max-replicas", "2")  # two servers never hold 2500/s
    run = run_module("loadtests.simulate_scale", *measured, *flags, BUILD=str(tmp_path / "build"))
    assert run.returncode == 1, run.stderr
    assert "no setting keeps late requests within 0.000%; the nearest: " in run.stderr
    saved = json.loads((tmp_path / "build" / "recommender" / "scale.json").read_text())
    assert saved["chosen"] is saved["node_price"] is None
    assert "cost" not in {*saved["best"], *saved["fixed"], *saved["tried"][0]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--capacity", "nosuch.json"), "nosuch.json: no such file; make it with: make capacity"),
        (("--model", "minilm"), "of the model 'recommender', not 'minilm'"),
        (("--late", "-1"), "--late -1: it must be 0 or more"),
        (("--margin", "1"), "--margin 1: it must be 0 or more and below 1"),
        (("--pods-per-node", "0"), "--pods-per-node 0: it must be more than 0"),
        (("--max-replicas", "1"), "--max-replicas 1: it must be 2 or more"),
        (("--seed", "-1"), "--seed -1: it must be 0 or more"),
        (("--traffic", "nosuch.csv"), "nosuch.csv: No such file"),
    ],
    ids=["capacity", "model", "late", "margin", "pods", "most", "seed", "traffic"],
)
def test_what_is_wrong_is_one_line(
    tmp_path: Path, measured: tuple[str, ...], flags: tuple[str, ...], message: str
) -> None:
    run = run_module("loadtests.simulate_scale", *measured, *flags, BUILD=str(tmp_path / "build"))
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert message in run.stderr


def test_what_comes_and_goes_between_two_ticks_is_load_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "traffic.csv"
    path.write_text("seconds,rate_rps\n0,100\n1,1000\n5,100\n6,1000\n10,0\n15,0\n")
    assert read_traffic(path).tolist() == [820, 820, 0, 0]

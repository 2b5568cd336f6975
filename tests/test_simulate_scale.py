"""The choice of an autoscaler's target: the service curve, what is tried, and the command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import values_of
from cli.options import Misuse
from deepseek.spec import GateFailed, InputError
from loadtests.scale.service_curve import ServiceCurve, never_falling
from loadtests.scale.simulate_scale import main
from loadtests.scale.target_choice import candidates, choose, targets
from loadtests.search.capacity_result import Capacity
from loadtests.search.rate_trial import RateTrial
from tests.conftest import run_module
from tests.saved_runs import saved_run, steady
from tests.test_cluster import CURVE, SETTINGS


def test_latencies_that_fall_with_the_rate_are_pooled() -> None:
    assert never_falling([(10, 1.0, 1.0), (30, 2.0, 1.0), (20, 4.0, 3.0)]) == ((10, 1.0), (20, 3.5), (30, 3.5))
    assert never_falling([(10, 3.0, 1.0), (20, 2.0, 1.0), (30, 1.0, 1.0)]) == ((10, 2.0), (20, 2.0), (30, 2.0))


def capacity_of(folder: Path, **changes: Any) -> Capacity:
    """A search over three rates; its runs have the server's times."""
    trials = []
    for rate, queue_ms, compute_ms, p99_ms in ((100, 0.2, 1.0, 10.0), (1000, 2.0, 4.0, 50.0), (1500, 30.0, 9.0, None)):
        times = {"queue": queue_ms, "compute_infer": compute_ms, "compute_input": 0, "compute_output": 0}
        statistics = {name: {"count": 1000, "ns": int(ms * 1e9)} for name, ms in times.items()}
        statistics["success"] = {"count": 1000, "ns": 0}
        run = saved_run(folder / str(rate), steady(), server={"version": "1", "statistics": statistics})
        facts: dict[str, Any] = {"achieved_rps": min(rate, 1200), "p50_ms": 5.0, "error_rate": 0.0, "duration_s": 10.0}
        facts["outcome"] = "holds" if p99_ms else "fails"
        trials.append(RateTrial(rate_rps=rate, phase="bisect", p99_ms=p99_ms, run=str(run.folder), **facts))
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


def test_the_curve_contains_the_measurements_of_the_trials(tmp_path: Path) -> None:
    curve = ServiceCurve.of(capacity_of(tmp_path))
    assert curve.p99_ms(550) == pytest.approx(30)
    assert curve.queue_ratio(1000) == pytest.approx(0.5)
    assert curve.queue_ratio(50) == pytest.approx(0.2)
    assert curve.saturation_rps == 1200
    with pytest.raises(InputError, match="needs a rate that holds"):
        ServiceCurve.of(capacity_of(tmp_path, capacity_rps=None))


def test_a_slower_server_has_the_same_times_at_a_lower_rate() -> None:
    slower = CURVE.slowed(0.2)
    assert slower.p99_ms(800) == CURVE.p99_ms(1000)
    assert slower.queue_ratio(800) == CURVE.queue_ratio(1000)
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
    assert targets(CURVE, "queue")[-1] == 1.0
    assert targets(CURVE, "queue")[-2] == pytest.approx(CURVE.queue_ratio(900), abs=1e-3)
    assert targets(replace(CURVE, queue=()), "queue") == []
    assert [least for metric, target, least in candidates(CURVE, ["rate"], 8) if target == 400] == [2, 4, 6, 8]


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Arguments of the command over a short, measured day."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "build"))
    capacity_of(tmp_path / "runs").save(tmp_path / "capacity.json")
    (tmp_path / "day.csv").write_text("seconds,rate_rps\n0,1000\n1800,2500\n3600,1000\n")
    return "--capacity", str(tmp_path / "capacity.json"), "--traffic", str(tmp_path / "day.csv")


def left(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "build" / "recommender" / "scale.json").read_text())


def test_the_command_writes_the_file_for_the_overlay(tmp_path: Path, measured: tuple[str, ...]) -> None:
    run = run_module("cli", "simulate-scale", *measured, "--late", "1", "--json")
    assert run.returncode == 0, run.stderr
    saved = left(tmp_path)
    assert saved == json.loads(run.stdout)
    assert saved["chosen"]["cores"] == 2
    assert saved["chosen"]["min_replicas"] >= 2
    assert (saved["target"], saved["precision"], saved["served_versions"]) == ("onnxruntime", "int8", ["3"])


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
        (("--traffic", "nosuch.csv"), "nosuch.csv: No such file"),
    ],
)
def test_bad_input_is_one_line(measured: tuple[str, ...], flags: tuple[str, ...], message: str) -> None:
    with pytest.raises((InputError, Misuse)) as error:
        main(values_of("simulate-scale", *measured, *flags))
    assert message in str(error.value)

"""Replicas and cost, from a measurement and from a prediction."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from deepseek.sizing import Demand, bill, predict, predicted_serving, presets
from deepseek.sizing.cost import SERVER_MS, Serving, measured_serving, p99_limits
from deepseek.sizing.devices import read_devices
from deepseek.spec.objectives import SloSpec

DEVICES = read_devices(Path("deepseek/devices.toml"))
BERT = presets()["bert-base"]


def capacity(tmp_path: Path, **changes: Any) -> Path:
    """A file like the one that `make capacity` writes."""
    path = tmp_path / "capacity.json"
    found = {
        "model": "m",
        "capacity_rps": 120.0,
        "confirmed": True,
        "objectives": ["p99_ms ≤ 50.0 ms", "rate_rps ≥ 100.0/s", "max_error_rate ≤ 0.100%"],
    }
    path.write_text(json.dumps(found | changes))
    return path


def test_replicas_handle_growth_during_scale_out_and_the_loss_of_one() -> None:
    demand = Demand(rate_rps=2000, p99_ms=30, growth_per_minute=0.1, scale_out_s=120)
    assert demand.grown_rps == 2400
    assert bill(demand, 500, 1.0).replicas == math.ceil(2400 / 500) + 1
    assert bill(Demand(rate_rps=1, p99_ms=30), 500, 1.0).replicas == 2


def test_cost_per_million_is_the_monthly_cost_over_the_monthly_inferences() -> None:
    found = bill(Demand(rate_rps=100, p99_ms=30, growth_per_minute=0), 50, 2.0)
    assert found.month_usd == 3 * 2.0 * 730
    assert found.million_usd == pytest.approx(3 * 2.0 / (100 * 3600) * 1e6)
    unpriced = bill(Demand(rate_rps=100, p99_ms=30), 50, None)
    assert (unpriced.month_usd, unpriced.million_usd) == (None, None)


def test_the_predicted_batch_meets_p99_and_the_next_does_not() -> None:
    found = predicted_serving(BERT, DEVICES["a30"], precision="fp16", length=128, p99_ms=10)
    assert isinstance(found, Serving)
    assert found.batch is not None
    ms = [
        1e3 * predict(BERT, DEVICES["a30"], precision="fp16", batch=batch, length=128).latency_s
        for batch in (found.batch, 2 * found.batch)
    ]
    assert 2 * ms[0] + SERVER_MS <= 10 < 2 * ms[1] + SERVER_MS
    assert found.capacity_rps == pytest.approx(0.7 * 1000 * found.batch / ms[0])


def test_the_predicted_batch_is_within_the_models_limit() -> None:
    found = [
        predicted_serving(BERT, DEVICES["a30"], precision="fp16", length=128, p99_ms=1000, most_batch=most)
        for most in (1, 12, 256)
    ]
    assert [each.batch for each in found if isinstance(each, Serving)] == [1, 8, 256]


def test_an_unreachable_limit_and_a_too_small_device_are_reported() -> None:
    slow = predicted_serving(BERT, DEVICES["t4"], precision="fp16", length=512, p99_ms=2)
    assert isinstance(slow, str)
    assert "one sample takes" in slow
    tiny = DEVICES["t4"].model_copy(update={"memory_gib": 0.5})
    small = predicted_serving(BERT, tiny, precision="fp16", length=512, p99_ms=50)
    assert small == "does not fit in 80 % of 0.5 GiB"


def test_a_measured_capacity_is_used_if_its_p99_is_as_strict(tmp_path: Path) -> None:
    found = measured_serving(capacity(tmp_path), 50)
    assert isinstance(found, Serving)
    assert found.capacity_rps == 120.0
    loose = measured_serving(capacity(tmp_path), 30)
    assert isinstance(loose, str)
    assert "measured for p99 <= 50 ms, but the limit is 30 ms" in loose


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"capacity_rps": None}, "no rate met the SLO"),
        ({"objectives": ["error_rate <= 0.1%"]}, "measured for no p99"),
        ({"objectives": ["p99_ms < 5 @ 100 rps"]}, "measured for no p99"),
    ],
    ids=["none", "no-p99", "p99-of-a-lower-rate"],
)
def test_a_capacity_without_a_matching_objective_is_not_used(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    found = measured_serving(capacity(tmp_path, **changes), 50)
    assert isinstance(found, str)
    assert says in found


def test_objectives_as_the_capacity_search_writes_them_are_read() -> None:
    from loadtests.figures import SIGNS, formatted
    from loadtests.search.capacity_result import Capacity

    assert {"capacity_rps", "objectives", "confirmed"} <= Capacity.model_fields.keys()
    slo = SloSpec(p99_ms=80, p50_ms=9.5, rate_rps=100, objectives=("mean_ms < 20",))
    lines = slo.all_objectives()
    assert p99_limits([f"{each.name} {SIGNS[each.relation]} {formatted(each.kind, each.limit)}" for each in lines]) == [
        80.0
    ]

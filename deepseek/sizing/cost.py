"""From a rate and a latency limit to replicas and money, by what was measured or by prediction.

Contract: no torch. What `make capacity` measured (`build/<model>/capacity.json`) is used for the machine it was
measured on, where its own p99 objective is at least as strict as what is asked; all else is prediction, and says so.

Rules of the prediction, stated and not fitted:
    batch     the largest (a power of two that the model takes) with 2 x time of a batch + SERVER_MS <= p99: who just
              misses a batch waits for all of it and then for its own
    capacity  UTILISATION of what such batches give a second: queues grow without bound towards 100 %
    replicas  what the rate needs by the time that new ones answer (it grows meanwhile), and one more, so that any one
              may be lost (N+1)

Examples:
    demand = Demand(rate_rps=2000, p99_ms=30)
    serving = predicted_serving(model, device, precision="fp16", length=128, p99_ms=30)
    bill(demand, serving.capacity_rps, device.price_usd_hour)
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.config import check_float
from deepseek.sizing.counting import Countable
from deepseek.sizing.devices import Device
from deepseek.sizing.memory import InferenceSetup, inference_memory
from deepseek.sizing.roofline import predict
from deepseek.spec import InputError, Objective

HOURS_A_MONTH = 730
UTILISATION = 0.7
SERVER_MS = 1.0
"""Triton, copies and a network within one zone, on top of the model's time."""
LARGEST_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What has to be answered."""

    rate_rps: float
    """At its peak: machines are rented for it."""
    p99_ms: float
    mean_share: float = 1.0
    """Mean rate as a share of the peak: inferences that a month's bill is divided by."""
    growth_per_minute: float = 0.1
    """Share by which the rate may rise in a minute."""
    scale_out_s: float = 120.0
    """From the alarm until a new replica answers: scheduling, pulling, loading, warming up."""

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_float(owner, "rate_rps", self.rate_rps, 0, math.inf, open_low=True)
        check_float(owner, "p99_ms", self.p99_ms, 0, math.inf, open_low=True)
        check_float(owner, "mean_share", self.mean_share, 0, 1 + 1e-9, open_low=True)
        check_float(owner, "growth_per_minute", self.growth_per_minute, 0, math.inf)
        check_float(owner, "scale_out_s", self.scale_out_s, 0, math.inf)

    @property
    def grown_rps(self) -> float:
        """The rate by the time that replicas ordered now answer."""
        return self.rate_rps * (1 + self.growth_per_minute * self.scale_out_s / 60)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What one replica bears within the latency limit."""

    capacity_rps: float
    measured: bool
    batch: int | None
    """Of the prediction."""
    latency_ms: float | None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """What a demand takes."""

    replicas: int
    month_usd: float | None
    """None: the device has no price."""
    million_usd: float | None


def bill(demand: Demand, capacity_rps: float, price_usd_hour: float | None) -> Bill:
    """Replicas (N+1, and what scale-out takes) and their cost."""
    if capacity_rps <= 0:
        raise InputError(f"capacity_rps: seen {capacity_rps:g}; a capacity above 0 is needed")
    replicas = math.ceil(demand.grown_rps / capacity_rps) + 1
    if price_usd_hour is None:
        return Bill(replicas=replicas, month_usd=None, million_usd=None)
    month = replicas * price_usd_hour * HOURS_A_MONTH
    millions = demand.rate_rps * demand.mean_share * HOURS_A_MONTH * 3600 / 1e6
    return Bill(replicas=replicas, month_usd=month, million_usd=month / millions)


def predicted_serving(
    model: Countable,
    device: Device,
    *,
    precision: str,
    length: int | None,
    p99_ms: float,
    most_batch: int = LARGEST_BATCH,
) -> Serving | str:
    """What one device bears by the roofline, in batches of up to `most_batch`; a sentence where it cannot at all."""
    length = model.default_length if length is None else length
    best: tuple[int, float] | None = None
    batch, first_ms = 1, math.inf
    while batch <= most_batch:
        setup = InferenceSetup(
            batch=batch,
            length=length,
            precision=precision,  # type: ignore[arg-type]
            instances=device.instances,
            shared_weights=device.platform == "accelerator",
            platform=device.platform,
        )
        if inference_memory(model, setup).total_bytes > device.usable_bytes:
            break
        ms = 1e3 * predict(model, device, precision=precision, batch=batch, length=length).latency_s
        first_ms = min(first_ms, ms)
        if 2 * ms + SERVER_MS > p99_ms:
            break
        if best is None or batch / ms > best[0] / best[1]:
            best = batch, ms
        batch *= 2
    if best is not None:
        capacity = UTILISATION * device.instances * best[0] / best[1] * 1e3
        return Serving(capacity_rps=capacity, measured=False, batch=best[0], latency_ms=best[1])
    if math.isinf(first_ms):
        return f"does not fit in 80 % of {device.memory_gib:g} GiB"
    return (
        f"one sample takes {first_ms:.1f} ms: p99 would be {2 * first_ms + SERVER_MS:.1f} ms, {p99_ms:g} are asked for"
    )


def measured_serving(path: Path, p99_ms: float) -> Serving | str:
    """What `make capacity` measured; a sentence where it cannot be used. Raises InputError for another kind of file."""
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; measure it with: make capacity") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}; measure it anew with: make capacity") from None
    if not isinstance(data, dict) or "capacity_rps" not in data:
        raise InputError(f"{path}: capacity_rps: missing; measure it anew with: make capacity")
    capacity = data["capacity_rps"]
    if capacity is None:
        return f"{path}: no rate held the SLO on the machine that was measured"
    if isinstance(capacity, bool) or not isinstance(capacity, int | float) or not 0 < capacity < math.inf:
        raise InputError(f"{path}: capacity_rps: seen {capacity!r}; a number above 0 or null is allowed")
    objectives = data.get("objectives") or []
    if not isinstance(objectives, list):
        raise InputError(f"{path}: objectives: seen {objectives!r}; a list is needed")
    limits = p99_limits(objectives, capacity)
    if not limits or min(limits) > p99_ms:
        held = f"p99 <= {min(limits):g} ms" if limits else "no p99"
        return f"{path}: measured for {held}, {p99_ms:g} ms are asked for: set slo.p99_ms and run make capacity"
    confirmed = "" if data.get("confirmed", True) else "; not confirmed by a longer run"
    return Serving(
        capacity_rps=float(capacity),
        measured=True,
        batch=None,
        latency_ms=None,
        note=f"{path}, for p99 <= {min(limits):g} ms{confirmed}",
    )


def p99_limits(objectives: list[Any], rate_rps: float = 0.0) -> list[float]:
    """Limits on p99, in ms, that lines of an SLO set at a rate; lines as in deploy.toml, or as they are printed."""
    found = []
    for line in objectives:
        try:
            objective = Objective.parse(str(line).replace("≤", "<=").replace("≥", ">="))
        except ValueError:  # of a kind that bounds no latency
            continue
        if objective.percent == 99 and (objective.rate_rps is None or objective.rate_rps >= rate_rps):
            found.append(objective.limit)
    return found

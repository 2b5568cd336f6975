"""Replicas and cost for a request rate and a latency limit, from a measurement or a prediction.

Contract: no torch. The result of `make capacity` (`build/<model>/capacity.json`) is used for the machine that it was
measured on, if its p99 objective is at least as strict as the requested one. Everything else is marked as a prediction.

Rules of the prediction; none is fitted:
    batch     the largest power of two that the model accepts with 2 x batch time + SERVER_MS <= p99: a request that
              just misses a batch waits for that batch and then for its own
    capacity  UTILISATION of the throughput in such batches: queues grow without bound towards 100 %
    replicas  enough for the rate at the time when new replicas answer, as it grows until then, plus one spare (N+1)
"""

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from deepseek.settings import NotNegative, Positive, settings
from deepseek.sizing.devices import Device
from deepseek.sizing.memory import InferenceSetup, inference_memory
from deepseek.sizing.model.counting import Countable
from deepseek.sizing.roofline import predict
from deepseek.spec import InputError
from deepseek.spec.checks import checked
from deepseek.spec.objectives import p99_limits

HOURS_A_MONTH = 730
UTILISATION = 0.7
SERVER_MS = 1.0
"""Time of Triton, copies and a network within one zone, in addition to the model's."""
LARGEST_BATCH = 256


@settings
class Demand:
    rate_rps: Positive
    """Peak request rate, which determines the number of machines."""
    p99_ms: Positive
    """Limit for the 99th percentile of latency."""
    growth_per_minute: NotNegative = 0.1
    """Largest growth of the rate per minute, as a share."""
    scale_out_s: NotNegative = 120.0
    """Time from the alarm until a new replica answers: scheduling, pulling, loading, warm-up."""

    @property
    def grown_rps(self) -> float:
        """The rate when replicas that are requested now answer."""
        return self.rate_rps * (1 + self.growth_per_minute * self.scale_out_s / 60)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """Capacity of one replica within the latency limit."""

    capacity_rps: float
    batch: int | None = None
    """Batch size of a prediction."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """Replicas and cost for a demand."""

    replicas: int
    month_usd: float | None
    """None: the device has no price."""
    million_usd: float | None


def bill(demand: Demand, capacity_rps: float, price_usd_hour: float | None) -> Bill:
    """Number of replicas (N+1, with room for growth during scale-out) and their cost."""
    if capacity_rps <= 0:
        raise InputError(f"capacity_rps: seen {capacity_rps:g}; a capacity above 0 is needed")
    replicas = math.ceil(demand.grown_rps / capacity_rps) + 1
    if price_usd_hour is None:
        return Bill(replicas=replicas, month_usd=None, million_usd=None)
    month = replicas * price_usd_hour * HOURS_A_MONTH
    millions = demand.rate_rps * HOURS_A_MONTH * 3600 / 1e6
    return Bill(replicas=replicas, month_usd=month, million_usd=month / millions)


def predicted_serving(
    model: Countable,
    device: Device,
    *,
    precision: str,
    length: int | None,
    p99_ms: float,
    most_batch: int = LARGEST_BATCH,
    instances: int = 1,
) -> Serving | str:
    """Capacity of one device by the roofline, in batches of up to `most_batch`; a sentence if it cannot serve.

    `instances` are the copies that must fit; copies beyond those of the device add no throughput.
    """
    length = model.default_length if length is None else length
    best: tuple[int, float] | None = None
    batch, first_ms = 1, math.inf
    while batch <= most_batch:
        setup = InferenceSetup(
            batch=batch,
            length=length,
            precision=precision,  # type: ignore[arg-type]
            instances=max(instances, device.instances),
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
        return Serving(capacity_rps=capacity, batch=best[0])
    if math.isinf(first_ms):
        return f"does not fit in 80 % of {device.memory_gib:g} GiB"
    return f"one sample takes {first_ms:.1f} ms: p99 would be {2 * first_ms + SERVER_MS:.1f} ms, above {p99_ms:g} ms"


class MeasuredCapacity(BaseModel):
    """The keys that are read from the file that `make capacity` writes."""

    capacity_rps: Positive | None
    objectives: tuple[str, ...] = ()
    confirmed: bool = True


def measured_serving(path: Path, p99_ms: float) -> Serving | str:
    """The result of `make capacity`; a sentence if it cannot be used. Raises InputError for another kind of file."""
    try:
        found = checked(MeasuredCapacity, path.read_bytes(), path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; measure it with: make capacity") from None
    if found.capacity_rps is None:
        return f"{path}: no rate met the SLO on the measured machine"
    limits = p99_limits(found.objectives, found.capacity_rps)
    if not limits or min(limits) > p99_ms:
        held = f"p99 <= {min(limits):g} ms" if limits else "no p99"
        return f"{path}: measured for {held}, but the limit is {p99_ms:g} ms: set slo.p99_ms and run make capacity"
    confirmed = "" if found.confirmed else "; not confirmed by a longer run"
    return Serving(capacity_rps=found.capacity_rps, note=f"{path}, for p99 <= {min(limits):g} ms{confirmed}")

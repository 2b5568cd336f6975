"""One plan: what a model needs, which devices fit it, how, how fast and at what cost.

Contract: no torch; nothing is measured here. `make_plan` combines the results of the other modules; `--json` prints
`HardwarePlan.as_dict`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deepseek.precisions import PRECISIONS
from deepseek.sizing.cost import LARGEST_BATCH, Bill, Demand, Serving, bill, measured_serving, predicted_serving
from deepseek.sizing.devices import Device
from deepseek.sizing.memory import (
    BYTES,
    HostNeeds,
    InferenceMemory,
    InferenceSetup,
    TrainingMemory,
    host_needs,
    inference_memory,
    largest_batch,
    training_memory,
    weight_bytes,
)
from deepseek.sizing.model.counting import TransformerSize, flops
from deepseek.sizing.model.onnx_graph import OnnxModel
from deepseek.sizing.parallel import Layout, choose, serving_layouts, training_layouts
from deepseek.sizing.roofline import predict, predict_decode
from deepseek.sizing.training_step import AnyModel, TrainingSetup


@dataclass(frozen=True, kw_only=True)
class Request:
    training: TrainingSetup
    serving_batch: int = 8
    serving_precision: str = "auto"
    """auto: fp16 on an accelerator, fp32 on a CPU."""
    instances: int = 1
    generate: bool = False
    """Whether the model generates token by token, with cached keys and values."""
    disk_mb_s: float = 500.0
    demand: Demand | None = None
    most_batch: int = LARGEST_BATCH
    """Largest batch that the model's server accepts."""
    capacity: Path | None = None
    """Result file of `make capacity`, for the machine where it ran."""
    price_usd_hour: float | None = None
    """Price of that machine."""


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """The results for one kind of device."""

    name: str
    price_usd_hour: float | None
    training: Layout | None
    """None: nothing fits."""
    training_ways: tuple[Layout, ...]
    largest_training_batch: int
    """Largest batch on a single device that holds everything; 0: none fits."""
    serving: Layout | None
    precision: str
    latency_ms: float | None
    """Latency of the serving batch; of one token, if the model generates."""
    samples_s: float | None
    """Samples per second; tokens per second, if the model generates."""
    calibrated: bool
    capacity: Serving | None
    no_capacity: str
    """Why `capacity` is None although it was requested."""
    bill: Bill | None


@dataclass(frozen=True, kw_only=True)
class MeasuredPlan:
    """Replicas and cost for the demand on the machine that `make capacity` measured."""

    serving: Serving | None
    why_not: str
    bill: Bill | None


@dataclass(frozen=True, kw_only=True)
class HardwarePlan:
    name: str
    parameters: int
    flops_sample: float
    flops_token: float
    length: int
    training_batch: int
    generate: bool
    bytes_by_precision: Mapping[str, int]
    training: Mapping[str, TrainingMemory]
    """By variant: the requested set-up first, then others."""
    host: HostNeeds
    inference: Mapping[str, InferenceMemory]
    devices: Mapping[str, DevicePlan]
    measured: MeasuredPlan | None
    """None: no capacity was measured, or no rate was requested."""
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """The plan for JSON, with the totals of the memory tables."""
        found = asdict(self)
        for table in ("training", "inference"):
            for name, memory in getattr(self, table).items():
                found[table][name]["total_bytes"] = memory.total_bytes
        for name, memory in self.training.items():
            found["training"][name] |= {"peak_bytes": memory.peak_bytes, "peak_at": memory.peak_at}
        return found


def make_plan(model: AnyModel, request: Request, devices: Mapping[str, Device]) -> HardwarePlan:
    """Computes the whole plan. Raises InputError for sizes that the model does not support."""
    setup = request.training
    length, sample = setup.length, flops(model.ops(1, setup.length))
    variants = training_variants(model, setup)
    one_a_width = list({row.bits: name for name, row in reversed(PRECISIONS.items())}.values())[::-1]
    return HardwarePlan(
        name=model.name,
        parameters=model.parameters,
        flops_sample=sample,
        flops_token=sample / length,
        length=length,
        training_batch=setup.batch,
        generate=request.generate,
        bytes_by_precision={name: weight_bytes(model, name) for name in BYTES if name != "tf32"},
        training=variants,
        host=host_needs(model, next(iter(variants.values())), disk_bytes_s=request.disk_mb_s * 1e6),
        inference={name: inference_memory(model, _serving(request, name)) for name in one_a_width},
        devices={key: plan_device(model, request, device) for key, device in devices.items()},
        measured=plan_measured(request),
        notes=_notes(model, request, devices),
    )


def plan_measured(request: Request) -> MeasuredPlan | None:
    """Replicas of the measured machine. Raises InputError if the file was not written by `make capacity`."""
    if request.demand is None or request.capacity is None:
        return None
    found = measured_serving(request.capacity, request.demand.p99_ms)
    if isinstance(found, str):
        return MeasuredPlan(serving=None, why_not=found, bill=None)
    paid = bill(request.demand, found.capacity_rps, request.price_usd_hour)
    return MeasuredPlan(serving=found, why_not="", bill=paid)


def training_variants(model: AnyModel, setup: TrainingSetup) -> dict[str, TrainingMemory]:
    """The requested set-up, then with 16 bits, with checkpointing, and with both. A module that is given checkpoints
    what it checkpoints, and a graph nothing."""
    low = "bf16" if setup.precision == "fp32" else setup.precision
    wanted = {described(setup): setup}
    for precision in ("fp32", low):
        for checkpointing in (False, True):
            other = replace(setup, precision=precision, checkpointing=checkpointing)
            wanted.setdefault(described(other), other)
    if not isinstance(model, TransformerSize):
        only = setup.checkpointing and not isinstance(model, OnnxModel)
        wanted = {name: each for name, each in wanted.items() if each.checkpointing == only}
    return {name: training_memory(model, each) for name, each in wanted.items()}


def described(setup: TrainingSetup) -> str:
    master = " master" if setup.precision != "fp32" and setup.mixed == "master" else ""
    return f"{setup.precision}{master}{', checkpointing' if setup.checkpointing else ''}"


def plan_device(model: AnyModel, request: Request, device: Device) -> DevicePlan:
    setup = replace(request.training, platform=device.platform)
    ways = tuple(training_layouts(model, setup, device))
    precision = precision_of(request, device)
    serving = _serving(request, precision, device)
    chosen = choose(
        serving_layouts(model, serving, device),
        lambda layout: _latency_s(model, request, device, precision, layout)[0] or 0.0,
    )
    seconds, calibrated = _latency_s(model, request, device, precision, chosen)
    capacity, why = _capacity(model, request, device, precision, chosen)
    paid = bill(request.demand, capacity.capacity_rps, device.price_usd_hour) if request.demand and capacity else None
    return DevicePlan(
        name=device.name,
        price_usd_hour=device.price_usd_hour,
        training=choose(ways),
        training_ways=ways,
        largest_training_batch=largest_batch(
            lambda batch: training_memory(model, replace(setup, batch=batch)).total_bytes, device.usable_bytes
        ),
        serving=chosen,
        precision=precision,
        latency_ms=None if seconds is None else seconds * 1e3,
        samples_s=None if seconds is None else device.instances * request.serving_batch / seconds,
        calibrated=calibrated,
        capacity=capacity,
        no_capacity=why,
        bill=paid,
    )


def precision_of(request: Request, device: Device) -> str:
    """The precision to serve on a device: the requested one if the device has units for it, else the next best."""
    if request.serving_precision == "auto":
        return "fp16" if device.platform == "accelerator" and device.runs("fp16") else "fp32"
    if device.runs(request.serving_precision):
        return request.serving_precision
    return "fp16" if device.runs("fp16") and BYTES[request.serving_precision] <= 2 else "fp32"


def _serving(request: Request, precision: str, device: Device | None = None) -> InferenceSetup:
    return InferenceSetup(
        batch=request.serving_batch,
        length=request.training.length,
        precision=precision,  # type: ignore[arg-type]
        instances=max(request.instances, device.instances) if device else request.instances,
        generate=request.generate,
        platform=device.platform if device else "accelerator",
    )


def _latency_s(
    model: AnyModel, request: Request, device: Device, precision: str, chosen: Layout | None
) -> tuple[float | None, bool]:
    if chosen is None:
        return None, False
    batch, length, shared = request.serving_batch, request.training.length, chosen.devices or 1
    if request.generate and isinstance(model, TransformerSize):
        found = predict_decode(model, device, precision=precision, batch=batch, context=length)
    else:
        found = predict(model, device, precision=precision, batch=batch, length=length)
    if chosen.way != "tensor":  # a pipeline's stages come one after the other
        return found.latency_s + (chosen.sent_s or 0.0) * (shared - 1), found.calibrated
    return found.latency_s / shared + (chosen.sent_s or 0.0), found.calibrated


def _capacity(
    model: AnyModel, request: Request, device: Device, precision: str, chosen: Layout | None
) -> tuple[Serving | None, str]:
    if request.demand is None:
        return None, ""
    if request.generate:
        return None, "a model that generates has no single latency: plan by tokens per second"
    if chosen is not None and chosen.devices != 1:
        return None, f"one copy needs {chosen.devices} devices: plan by the latency above"
    length, p99_ms = request.training.length, request.demand.p99_ms
    predicted = predicted_serving(
        model,
        device,
        precision=precision,
        length=length,
        p99_ms=p99_ms,
        most_batch=request.most_batch,
        instances=request.instances,
    )
    return (None, predicted) if isinstance(predicted, str) else (predicted, "")


def _notes(model: AnyModel, request: Request, devices: Mapping[str, Device]) -> tuple[str, ...]:
    notes, precision = [], request.training.precision
    if precision != "fp32" and (without := [key for key, device in devices.items() if not device.runs(precision)]):
        notes.append(f"{', '.join(without)}: no units for {precision}; train in another precision there")
    if isinstance(model, OnnxModel):
        notes.append(
            "training memory of a graph is an upper bound: every intermediate value is kept, without checkpointing"
        )
        if model.uncounted:
            notes.append(f"not counted, so the plan is too low: {', '.join(model.uncounted)}")
        if model.open_axes and request.training.length == 1:
            notes.append(f"axes {', '.join(model.open_axes)} are 1 here: give --length, or --axis name=size")
    return tuple(notes)

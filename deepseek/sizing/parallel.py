"""How to distribute a model over several devices: what each holds and sends, and which way needs the fewest devices.

Contract: no torch; all devices are of one kind, joined by its interconnect. For each way, `training_layouts` and
`serving_layouts` return the smallest number of devices on which the model fits in 80 % of memory, or why it never fits.
`choose` takes the way with the least device time for the same samples, including idling and sending, and says why.
Bytes are those that one device sends per optimizer step; when serving, per batch, or per token of each sequence. Up to
8 devices share a machine and its interconnect; more are joined by a network of NETWORK_GB_S each. Times are estimates
and were not compared with measurements.

    data      each device holds a copy; gradients are all-reduced: 2 (N-1)/N of their bytes
    sharded   weights, gradients and optimizer state are divided (FSDP, ZeRO-3): each micro-batch gathers the weights
              for forward and for backward, and scatters gradients: 3 (N-1)/N of their bytes (ZeRO, section 7.2.2).
              Autocast's 16-bit copies of the weights are not divided
    tensor    each product is divided over at most 8 devices: 4 all-reduces of the hidden states per block and
              micro-batch, 2 more with checkpointing (Shoeybi et al. 2019, Megatron-LM, figure 4)
    pipeline  whole blocks are divided; a stage passes hidden states on and gets their gradients back. With M
              micro-batches, (N-1)/(M+N-1) of the time is idle, and the first stage keeps up to N of them (1F1B)
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from deepseek.sizing.devices import Device
from deepseek.sizing.memory import (
    InferenceSetup,
    TrainingMemory,
    activation_width,
    inference_memory,
    training_memory,
    weight_bytes,
)
from deepseek.sizing.model.counting import Countable, TransformerSize
from deepseek.sizing.roofline import predict
from deepseek.sizing.training_step import AnyModel, TrainingSetup, TransformerStep

Way = Literal["single", "data", "sharded", "tensor", "pipeline"]
MOST_DEVICES = 1024
MOST_TENSOR = 8  # devices of one machine: a network is too slow for the all-reduces
NETWORK_GB_S = 50.0
"""Bandwidth per device between machines: 400 Gbit/s."""
BACKWARD = 2  # FLOPs of backward relative to forward; checkpointing runs forward again
TENSOR_NEVER = f"at most {MOST_TENSOR} devices of one machine share a product, and their number must divide the heads"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to distribute a model, with the smallest number of devices that hold it."""

    way: Way
    devices: int | None
    """None: it does not fit on any number of devices."""
    memory_bytes: float | None
    """Memory of the fullest device; if nothing fits, with the most devices tried. None: no number can be tried."""
    sent_bytes: float
    sent_s: float | None
    """Time to send them; None if the device has no interconnect."""
    device_s: float | None = None
    """Device time for one device's samples of a step, including idling and sending."""
    idle_share: float = 0.0
    """Share of the time that a pipeline is idle."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class _Way:
    way: Way
    counts: list[int]
    memory: Callable[[int], float]
    sent: Callable[[int], float]
    idle: Callable[[int], float] = lambda count: 0.0
    own_samples: bool = False
    """Whether each device processes its own samples, instead of sharing the same ones."""
    never: str = ""


def training_layouts(model: AnyModel, setup: TrainingSetup, device: Device) -> list[Layout]:
    """The ways to train, each with the fewest devices."""
    whole = training_memory(model, setup)
    weights, gradients = setup.full_bytes * model.parameters, setup.full_bytes * model.trained_parameters
    steps = setup.accumulation_steps
    rest = whole.activation_bytes + whole.workspace_bytes + whole.context_bytes
    largest = 2 * _largest_part(model) * setup.full_bytes  # one part in use, the next being gathered
    copies = whole.weight_bytes - weights  # autocast's, of gathered weights: backward keeps them
    ways = [
        _Way(way="single", counts=[1], memory=lambda count: whole.total_bytes, sent=lambda count: 0.0),
        _Way(
            way="data",
            own_samples=True,
            counts=_counts(MOST_DEVICES),
            memory=lambda count: whole.total_bytes,
            sent=lambda count: 2 * (count - 1) / count * gradients,
            never="each device holds the whole model: more devices do not save memory",
        ),
        _Way(
            way="sharded",
            own_samples=True,
            counts=_counts(MOST_DEVICES),
            memory=lambda count: (whole.state_bytes - copies) / count + copies + largest + rest,
            sent=lambda count: (count - 1) / count * (2 * weights + gradients) * steps,
            never="activations are not divided: checkpoint, or use a smaller batch",
        ),
    ]
    if isinstance(model, TransformerSize):
        ways += [_tensor_training(model, setup, whole.state_bytes, rest), _pipeline_training(model, setup, whole)]
    compute_s = training_compute_s(model, setup, device)
    return [_fewest(way, device, compute_s) for way in ways]


def training_compute_s(model: Countable, setup: TrainingSetup, device: Device) -> float:
    """One device's compute time for a step, from the roofline of a forward pass."""
    low = () if setup.precision == "fp32" else (setup.precision, "fp16")
    precision = next(name for name in (*low, "fp32") if device.runs(name))
    forward = predict(model, device, precision=precision, batch=setup.batch, length=setup.length).latency_s
    return (1 + BACKWARD + setup.checkpointing) * forward * setup.accumulation_steps


def _tensor_training(model: TransformerSize, setup: TrainingSetup, state: float, rest: float) -> _Way:
    layers, width = model.config.num_layers, setup.value_bytes
    states = setup.batch * setup.length * model.config.hidden_size
    # Not divided: the residual, the outputs of both LayerNorms (one copy per cast), the mask of the last dropout.
    block, copied = TransformerStep(model, setup).block, states * (2.0 * setup.full_bytes + width * 4 + 1)
    if not setup.autocast:
        copied -= 2 * states * width
    if setup.checkpointing:
        block = copied = float(setup.full_bytes * states)
    reduces = (6 if setup.checkpointing else 4) * layers * setup.accumulation_steps
    return _Way(
        way="tensor",
        counts=_heads(model),
        memory=lambda count: state / count + rest - layers * (block - copied) * (1 - 1 / count),
        sent=lambda count: reduces * 2 * (count - 1) / count * states * width,
        never=TENSOR_NEVER,
    )


def _pipeline_training(model: TransformerSize, setup: TrainingSetup, whole: TrainingMemory) -> _Way:
    layers, steps = model.config.num_layers, setup.accumulation_steps
    around = model.parameters - layers * model.block_parameters
    states = setup.batch * setup.length * model.config.hidden_size
    per_block = float(setup.full_bytes * states) if setup.checkpointing else TransformerStep(model, setup).block
    rest = whole.activation_bytes - layers * per_block + whole.workspace_bytes + whole.context_bytes

    def memory(count: int) -> float:
        blocks = layers // count
        held = whole.state_bytes / model.parameters * (blocks * model.block_parameters + around)
        return held + min(count, steps) * blocks * per_block + rest

    return _Way(
        way="pipeline",
        counts=_stages(model),
        memory=memory,
        sent=lambda count: 2.0 * steps * states * setup.full_bytes,
        idle=lambda count: (count - 1) / (steps + count - 1),
        never="a stage holds at least one block with its micro-batches: checkpoint, or use a smaller batch",
    )


def serving_layouts(model: Countable, setup: InferenceSetup, device: Device) -> list[Layout]:
    """The ways to serve one copy of a model, each with the fewest devices."""
    whole = inference_memory(model, setup)
    ways = [_Way(way="single", counts=[1], memory=lambda count: whole.total_bytes, sent=lambda count: 0.0)]
    if isinstance(model, TransformerSize):
        layers, width = model.config.num_layers, activation_width(setup.precision, setup.platform)
        states = setup.batch * (1 if setup.generate else setup.length) * model.config.hidden_size * width
        weights = weight_bytes(model, setup.precision, setup.platform)
        around = weights * (1 - layers * model.block_parameters / model.parameters)
        blocks, rest = whole.weight_bytes - around, whole.activation_bytes + whole.context_bytes
        ways += [
            _Way(
                way="tensor",
                counts=_heads(model),
                memory=lambda count: (whole.weight_bytes + whole.cache_bytes) / count + rest,
                sent=lambda count: 2 * layers * 2 * (count - 1) / count * states,
                never=TENSOR_NEVER,
            ),
            _Way(
                way="pipeline",
                counts=_stages(model),
                memory=lambda count: (blocks + whole.cache_bytes) / count + around + rest,
                sent=lambda count: float(states),
                never="a stage holds at least one block: use a device with more memory, or a smaller batch",
            ),
        ]
    return [_fewest(way, device, None) for way in ways]


def choose(
    layouts: Iterable[Layout], latency_s: Callable[[Layout], float] = lambda layout: layout.sent_s or 0.0
) -> Layout | None:
    """Chooses one device if the model fits, else the least device time; if that is unknown, the fewest devices and then
    the least `latency_s`. None if nothing fits."""
    fitting = [layout for layout in layouts if layout.devices is not None]
    if not fitting:
        return None
    timed = all(layout.device_s is not None for layout in fitting)

    def cost(layout: Layout) -> tuple[float, ...]:
        count = layout.devices or 0
        return (count != 1, layout.device_s or 0.0, count) if timed else (count != 1, count, latency_s(layout))

    best = min(fitting, key=cost)
    if best.devices == 1:
        return replace(best, reason="it fits on one device; more devices (data parallel) only make it faster")
    others = [f"{each.way} needs {each.devices}{_took(each)}" for each in fitting if each.way != best.way]
    why = "least device time" if timed else "fewest devices"
    reason = f"{best.way} on {best.devices}{_took(best)}: {why}"
    return replace(best, reason=reason + (f"; {', '.join(others)}" if others else "; no other way fits"))


def _took(layout: Layout) -> str:
    return "" if layout.device_s is None else f" ({layout.device_s:.3g} s of device time)"


def _fewest(way: _Way, device: Device, compute_s: float | None) -> Layout:
    fits = [count for count in way.counts if way.memory(count) <= device.usable_bytes]
    shown = fits[0] if fits else way.counts[-1] if way.counts else 1
    sent, idle = way.sent(shown), way.idle(shown)
    sent_s = device_s = None
    if device.interconnect_gb_s:
        own = device.interconnect_gb_s
        sent_s = sent / (1e9 * (own if shown <= MOST_TENSOR else min(own, NETWORK_GB_S)))
        if compute_s is not None:
            device_s = compute_s / (1 - idle) + sent_s * (1 if way.own_samples else shown)
    return Layout(
        way=way.way,
        devices=shown if fits else None,
        memory_bytes=way.memory(shown) if way.counts else None,
        sent_bytes=sent,
        sent_s=sent_s,
        device_s=device_s,
        idle_share=idle,
        reason="" if fits else way.never or f"needs more than 80 % of {device.memory_gib:g} GiB",
    )


def _counts(most: int) -> list[int]:
    """Powers of two from 2, the usual sizes of machines."""
    return [2**power for power in range(1, most.bit_length())]


def _heads(model: TransformerSize) -> list[int]:
    return [count for count in _counts(MOST_TENSOR) if model.config.num_attention_heads % count == 0]


def _stages(model: TransformerSize) -> list[int]:
    layers = model.config.num_layers
    return [count for count in range(2, min(layers, MOST_DEVICES) + 1) if layers % count == 0]


def _largest_part(model: Countable) -> float:
    if not isinstance(model, TransformerSize):
        return model.parameters / 4  # assumes a few parts
    embeddings = (model.config.vocab_size + model.config.max_length) * model.config.hidden_size
    return float(max(model.block_parameters, embeddings))

"""How a model is spread over several devices: what each holds, what it sends, and which way needs the fewest.

Contract: no torch; one kind of device, joined by its interconnect. `training_layouts` and `serving_layouts` give, for
each way, the smallest number of devices on which it fits in 80 % of memory, or why it never does; `choose` takes the
one that costs least device time for the same samples, idling and sending included, and says why. Bytes are what one
device sends in one step of the optimizer (serving: for one batch, or for a token of each sequence). Up to 8 devices
share a machine and its interconnect; more are joined by a network of NETWORK_GB_S each. Times are estimates that
nothing was held against.

    data      a copy each; gradients are all-reduced: 2 (N-1)/N of their bytes
    sharded   weights, gradients and optimizer state divided (FSDP, ZeRO-3): each micro-batch gathers the weights for
              forward and for backward, and scatters gradients: 3 (N-1)/N of their bytes (ZeRO, section 7.2.2)
    tensor    each product divided over at most 8 devices, in step: 4 all-reduces of the hidden states a block and
              micro-batch, 2 more with checkpointing (Shoeybi et al. 2019, Megatron-LM, figure 4)
    pipeline  whole blocks divided; a stage passes hidden states on and gets their gradients back. A share of
              (N-1)/(M+N-1) of the time is idle at M micro-batches, and the first stage keeps up to N of them (1F1B)

Examples:
    layouts = training_layouts(model, setup, load_devices()["v100-32"])
    choose(layouts).reason
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from deepseek.sizing.counting import Countable, TransformerSize
from deepseek.sizing.devices import Device
from deepseek.sizing.memory import (
    CONTEXT_BYTES,
    InferenceSetup,
    activation_width,
    inference_memory,
    training_memory,
    weight_bytes,
)
from deepseek.sizing.roofline import predict
from deepseek.sizing.training_step import Saved, TrainingSetup, block_saved, saved_bytes
from deepseek.spec import InputError

Way = Literal["single", "data", "sharded", "tensor", "pipeline"]
MOST_DEVICES = 1024
MOST_TENSOR = 8  # of one machine: its all-reduces do not bear a slower network
NETWORK_GB_S = 50.0
"""Of one device, between machines: 400 Gbit/s."""
BACKWARD = 2  # of forward's FLOPs; checkpointing runs forward once more
TENSOR_NEVER = f"at most {MOST_TENSOR} devices of one machine share a product, and their number divides the heads"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of spreading a model, with the fewest devices that hold it."""

    way: Way
    devices: int | None
    """None: it does not fit however many there are."""
    memory_bytes: float | None
    """Of the fullest device; where nothing fits, at the most devices tried. None: no number of devices can be tried."""
    sent_bytes: float
    sent_s: float | None
    """Time of that; None where the device has no interconnect."""
    device_s: float | None = None
    """Device time for one device's samples of a step, idling and sending included."""
    idle_share: float = 0.0
    """Of the time, in a pipeline."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class _Way:
    way: Way
    counts: list[int]
    memory: Callable[[int], float]
    sent: Callable[[int], float]
    idle: Callable[[int], float] = lambda count: 0.0
    own_samples: bool = False
    """Whether each device has samples of its own, and does not share those of all."""
    never: str = ""


def training_layouts(
    model: Countable, setup: TrainingSetup, device: Device, *, saved: Saved | None = None
) -> list[Layout]:
    """The ways to train, each at its fewest devices. `saved` is a trace's measure where the model is no Transformer."""
    whole = training_memory(model, setup, saved=saved)
    kept = saved or saved_bytes(_transformer(model), setup)
    gradient, width = 4.0 if setup.precision == "fp32" or setup.autocast else 2.0, 4 if setup.precision == "fp32" else 2
    gradients, steps = gradient * model.parameters, setup.accumulation_steps
    rest = whole.activation_bytes + whole.workspace_bytes + whole.context_bytes
    ways = [_Way(way="single", counts=[1], memory=lambda count: whole.total_bytes, sent=lambda count: 0.0)]
    ways.append(
        _Way(
            way="data",
            own_samples=True,
            counts=_counts(2, MOST_DEVICES),
            memory=lambda count: whole.total_bytes,
            sent=lambda count: 2 * (count - 1) / count * gradients,
            never="each device holds all of it: more of them take no byte away",
        )
    )
    largest = 2 * _largest_part(model) * width  # one part in use, the next on its way
    ways.append(
        _Way(
            way="sharded",
            own_samples=True,
            counts=_counts(2, MOST_DEVICES),
            memory=lambda count: whole.state_bytes / count + largest + rest,
            sent=lambda count: 3 * (count - 1) / count * width * model.parameters * steps,
            never="activations are not divided: checkpoint, or take a smaller batch",
        )
    )
    if isinstance(model, TransformerSize):
        ways += [_tensor_training(model, setup, kept, rest), _pipeline_training(model, setup, kept)]
    compute_s = training_compute_s(model, setup, device)
    return [_fewest(way, device, compute_s) for way in ways]


def training_compute_s(model: Countable, setup: TrainingSetup, device: Device) -> float:
    """One device's time for the sums of a step, by the roofline of a forward pass."""
    types = (setup.precision, "fp16", "fp32") if setup.precision != "fp32" else ("fp32",)
    precision = next(name for name in types if device.runs(name))
    forward = predict(model, device, precision=precision, batch=setup.batch, length=setup.length).latency_s
    return (1 + BACKWARD + setup.checkpointing) * forward * setup.accumulation_steps


def _tensor_training(model: TransformerSize, setup: TrainingSetup, kept: Saved, rest: float) -> _Way:
    config, width = model.config, 4 if setup.precision == "fp32" else 2
    states = setup.batch * setup.length * config.hidden_size
    block = block_saved(model, setup).whole
    # Not divided: the residual, both LayerNorms' outputs (one copy a cast), the last dropout's mask.
    copied = states * (2.0 * setup.full_bytes + width * (4 if setup.autocast else 2) + 1)
    alone = copied if not setup.checkpointing else float(setup.full_bytes * states)
    reduces = (6 if setup.checkpointing else 4) * config.num_layers * setup.accumulation_steps
    blocks = config.num_layers * (block if not setup.checkpointing else alone)
    state = training_memory(model, setup).state_bytes

    def memory(count: int) -> float:
        divided = config.num_layers * alone + max(0.0, blocks - config.num_layers * alone) / count
        return state / count + divided + (rest - blocks)

    return _Way(
        way="tensor",
        counts=[count for count in _counts(2, MOST_TENSOR) if config.num_attention_heads % count == 0],
        memory=memory,
        sent=lambda count: reduces * 2 * (count - 1) / count * states * width,
        never=TENSOR_NEVER,
    )


def _pipeline_training(model: TransformerSize, setup: TrainingSetup, kept: Saved) -> _Way:
    config, steps, width = model.config, setup.accumulation_steps, 4 if setup.precision == "fp32" else 2
    bytes_each = training_memory(model, setup).state_bytes / model.parameters
    around = model.parameters - config.num_layers * model.block_parameters
    states = setup.batch * setup.length * config.hidden_size
    per_block = float(setup.full_bytes * states) if setup.checkpointing else block_saved(model, setup).whole
    outside = kept.kept - config.num_layers * per_block

    def memory(count: int) -> float:
        blocks = config.num_layers // count
        in_flight = min(count, steps)
        held = bytes_each * (blocks * model.block_parameters + around)
        return held + in_flight * blocks * per_block + outside + kept.workspace + CONTEXT_BYTES[setup.platform]

    return _Way(
        way="pipeline",
        counts=[count for count in range(2, config.num_layers + 1) if config.num_layers % count == 0],
        memory=memory,
        sent=lambda count: 2.0 * steps * states * width,
        idle=lambda count: (count - 1) / (steps + count - 1),
        never="a stage holds one block at least, with its micro-batches: checkpoint, or take a smaller batch",
    )


def serving_layouts(model: Countable, setup: InferenceSetup, device: Device) -> list[Layout]:
    """The ways to serve one copy of a model, each at its fewest devices."""
    whole = inference_memory(model, setup)
    ways = [_Way(way="single", counts=[1], memory=lambda count: whole.total_bytes, sent=lambda count: 0.0)]
    if isinstance(model, TransformerSize):
        config, width = model.config, activation_width(setup.precision, setup.platform)
        passing = setup.batch * (1 if setup.generate else setup.length)
        states = passing * config.hidden_size * width
        around = weight_bytes(model, setup.precision, setup.platform) * (
            1 - config.num_layers * model.block_parameters / model.parameters
        )
        blocks = whole.weight_bytes - around
        rest = whole.activation_bytes + whole.context_bytes
        heads = [count for count in _counts(2, MOST_TENSOR) if config.num_attention_heads % count == 0]
        stages = [count for count in range(2, config.num_layers + 1) if config.num_layers % count == 0]
        ways.append(
            _Way(
                way="tensor",
                counts=heads,
                memory=lambda count: (whole.weight_bytes + whole.cache_bytes) / count + rest,
                sent=lambda count: 2 * config.num_layers * 2 * (count - 1) / count * states,
                never=TENSOR_NEVER,
            )
        )
        ways.append(
            _Way(
                way="pipeline",
                counts=stages,
                memory=lambda count: (blocks + whole.cache_bytes) / count + around + rest,
                sent=lambda count: float(states),
                never="a stage holds one block at least: take a device with more memory, or a smaller batch",
            )
        )
    return [_fewest(way, device, None) for way in ways]


def choose(layouts: Iterable[Layout]) -> Layout | None:
    """The way to take: one device where it fits, else the least device time, or, where that is not known, the fewest
    devices and the least time lost to sending. None where nothing fits."""
    fitting = [layout for layout in layouts if layout.devices is not None]
    if not fitting:
        return None
    timed = all(layout.device_s is not None for layout in fitting)
    cost = _device_time if timed else _fewest_devices
    best = min(fitting, key=lambda each: (each.devices != 1, *cost(each)))
    if best.devices == 1:
        return replace(best, reason="it fits on one device; more of them (data parallel) make it faster only")
    others = [f"{each.way} needs {each.devices}{_took(each)}" for each in fitting if each.way != best.way]
    why = "least device time" if timed else "fewest devices"
    reason = f"{best.way} on {best.devices}{_took(best)}: {why}"
    return replace(best, reason=reason + (f"; {', '.join(others)}" if others else "; no other way fits"))


def _device_time(layout: Layout) -> tuple[float, ...]:
    return (layout.device_s or 0.0, layout.devices or 0)


def _fewest_devices(layout: Layout) -> tuple[float, ...]:
    return (layout.devices or 0, layout.sent_s or 0.0)


def _took(layout: Layout) -> str:
    return "" if layout.device_s is None else f" ({layout.device_s:.3g} s of device time)"


def _fewest(way: _Way, device: Device, compute_s: float | None) -> Layout:
    fits = [count for count in way.counts if way.memory(count) <= device.usable_bytes]
    shown = fits[0] if fits else way.counts[-1] if way.counts else 1
    sent, idle = way.sent(shown), way.idle(shown)
    sent_s = sent / (_joined_gb_s(device, shown) * 1e9) if device.interconnect_gb_s else None
    device_s = None
    if compute_s is not None and sent_s is not None:
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


def _joined_gb_s(device: Device, count: int) -> float:
    """What a device sends a second: within its machine, or by the network between machines."""
    own = device.interconnect_gb_s or NETWORK_GB_S
    return own if count <= MOST_TENSOR else min(own, NETWORK_GB_S)


def _counts(first: int, last: int) -> list[int]:
    """Powers of two: what machines come in."""
    return [2**power for power in range(last.bit_length()) if first <= 2**power <= last]


def _largest_part(model: Countable) -> float:
    if not isinstance(model, TransformerSize):
        return model.parameters / 4  # wrapped in a few parts
    embeddings = (model.config.vocab_size + model.config.max_length) * model.config.hidden_size
    return float(max(model.block_parameters, embeddings))


def _transformer(model: Countable) -> TransformerSize:
    if not isinstance(model, TransformerSize):
        raise InputError(f"{model.name}: what backward keeps is known of a TransformerConfig or a traced nn.Module")
    return model

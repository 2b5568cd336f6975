"""How a model is spread over several devices: what each holds, what it sends, and which way needs the fewest.

Contract: no torch; one kind of device, joined by its interconnect. `training_layouts` and `serving_layouts` give, for
each way, the smallest number of devices on which it fits in 80 % of memory, or why it never does; `choose` takes one
and says why. Bytes are what one device sends in one step of the optimizer (serving: for one batch).

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
    Saved,
    TrainingSetup,
    activation_width,
    block_saved_bytes,
    inference_memory,
    saved_bytes,
    training_memory,
    weight_bytes,
)
from deepseek.spec import InputError

Way = Literal["single", "data", "sharded", "tensor", "pipeline"]
MOST_DEVICES = 1024
MOST_TENSOR = 8  # of one machine: its all-reduces do not bear a slower network
TENSOR_NEVER = f"at most {MOST_TENSOR} devices of one machine share a product, and their number divides the heads"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way of spreading a model, with the fewest devices that hold it."""

    way: Way
    devices: int | None
    """None: it does not fit however many there are."""
    memory_bytes: float
    """Of the fullest device; where nothing fits, at the most devices tried."""
    sent_bytes: float
    sent_s: float | None
    """Time of that on the device's interconnect, if it has one."""
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
    never: str = ""


def training_layouts(
    model: Countable, setup: TrainingSetup, device: Device, *, saved: Saved | None = None
) -> list[Layout]:
    """The ways to train, each at its fewest devices. `saved` is a trace's measure where the model is no Transformer."""
    whole = training_memory(model, setup, saved=saved)
    kept = saved or saved_bytes(_transformer(model), setup)
    gradient, width = 4.0 if setup.precision == "fp32" or setup.autocast else 2.0, 4 if setup.precision == "fp32" else 2
    gradients, steps = gradient * model.parameters, setup.accumulation_steps
    rest = whole.total_bytes - whole.state_bytes
    ways = [_Way(way="single", counts=[1], memory=lambda count: whole.total_bytes, sent=lambda count: 0.0)]
    ways.append(
        _Way(
            way="data",
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
            counts=_counts(2, MOST_DEVICES),
            memory=lambda count: whole.state_bytes / count + largest + rest,
            sent=lambda count: 3 * (count - 1) / count * width * model.parameters * steps,
            never="activations are not divided: checkpoint, or take a smaller batch",
        )
    )
    if isinstance(model, TransformerSize):
        ways += [_tensor_training(model, setup, kept, rest), _pipeline_training(model, setup, kept)]
    return [_fewest(way, device) for way in ways]


def _tensor_training(model: TransformerSize, setup: TrainingSetup, kept: Saved, rest: float) -> _Way:
    config, width = model.config, 4 if setup.precision == "fp32" else 2
    states = setup.batch * setup.length * config.hidden_size
    block = block_saved_bytes(model, setup)
    # Not divided: the residual, both LayerNorms' outputs (one copy a cast), the last dropout's mask.
    copied = states * (8.0 + width * (4 if setup.autocast else 2) + 1)
    alone = copied if not setup.checkpointing else 4.0 * states
    reduces = (6 if setup.checkpointing else 4) * config.num_layers * setup.accumulation_steps
    blocks = config.num_layers * (block if not setup.checkpointing else 4.0 * states)
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
    per_block = 4.0 * states if setup.checkpointing else block_saved_bytes(model, setup)
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
        config, width = model.config, activation_width(setup)
        states = setup.batch * setup.length * config.hidden_size * width
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
    return [_fewest(way, device) for way in ways]


def choose(layouts: Iterable[Layout]) -> Layout | None:
    """The way to take: one device where it fits, else the fewest devices; among equals the least time lost to sending
    and idling. None where nothing fits."""
    fitting = [layout for layout in layouts if layout.devices is not None]
    if not fitting:
        return None
    best = min(fitting, key=lambda each: (each.devices or 0, each.sent_s or 0.0, each.idle_share))
    if best.devices == 1:
        return replace(best, reason="it fits on one device; more of them (data parallel) make it faster only")
    others = [f"{each.way} needs {each.devices}" for each in fitting if each.way != best.way]
    why = f"{best.way} holds it on the fewest devices, {best.devices}"
    return replace(best, reason=why + (f" ({', '.join(others)})" if others else ""))


def _fewest(way: _Way, device: Device) -> Layout:
    fits = [count for count in way.counts if way.memory(count) <= device.usable_bytes]
    shown = fits[0] if fits else way.counts[-1] if way.counts else 1
    sent = way.sent(shown)
    reason = "" if fits else way.never or f"needs more than 80 % of {device.memory_gib:g} GiB"
    return Layout(
        way=way.way,
        devices=shown if fits else None,
        memory_bytes=way.memory(shown) if way.counts else float("inf"),
        sent_bytes=sent,
        sent_s=sent / (device.interconnect_gb_s * 1e9) if device.interconnect_gb_s else None,
        idle_share=way.idle(shown),
        reason=reason,
    )


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

"""How to distribute a model over several devices: what each holds and sends, and which way needs the fewest devices.

Contract: no torch; all devices are of one kind, joined by its interconnect. For each way, `training_layouts` and
`serving_layouts` return the smallest number of devices on which the model fits in 80 % of memory, or why it never fits.
`choose` takes the way with the fewest devices and says why. Bytes are those that one device sends per optimizer step;
when serving, per batch, or per token of each sequence. Up to 8 devices share a machine and its interconnect; more are
joined by a network of NETWORK_GB_S each. Times are estimates and were not compared with measurements.

    sharded   training: weights, gradients and optimizer state are divided (FSDP, ZeRO-3): each micro-batch gathers the
              weights for forward and for backward, and scatters gradients: 3 (N-1)/N of their bytes (ZeRO, section
              7.2.2)
    tensor    serving: each product is divided over at most 8 devices: 2 all-reduces of the hidden states per block
              (Shoeybi et al. 2019, Megatron-LM, figure 4)
    pipeline  serving: whole blocks are divided; a stage passes hidden states on
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from deepseek.sizing.devices import Device
from deepseek.sizing.memory import InferenceSetup, activation_width, inference_memory, training_memory, weight_bytes
from deepseek.sizing.model.counting import Countable, TransformerSize
from deepseek.sizing.training_step import AnyModel, TrainingSetup

Way = Literal["single", "sharded", "tensor", "pipeline"]
MOST_DEVICES = 1024
MOST_TENSOR = 8  # devices of one machine: a network is too slow for the all-reduces
NETWORK_GB_S = 50.0
"""Bandwidth per device between machines: 400 Gbit/s."""
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
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class _Way:
    way: Way
    counts: list[int]
    memory: Callable[[int], float]
    sent: Callable[[int], float] = lambda count: 0.0
    never: str = ""


def training_layouts(model: AnyModel, setup: TrainingSetup, device: Device) -> list[Layout]:
    """The ways to train, each with the fewest devices."""
    whole = training_memory(model, setup)
    width, rest = setup.value_bytes, whole.activation_bytes + whole.workspace_bytes + whole.context_bytes
    largest = 2 * _largest_part(model) * width  # one part in use, the next being gathered
    ways = (
        _Way(way="single", counts=[1], memory=lambda count: whole.total_bytes),
        _Way(
            way="sharded",
            counts=_counts(MOST_DEVICES),
            memory=lambda count: whole.state_bytes / count + largest + rest,
            sent=lambda count: 3 * (count - 1) / count * width * model.parameters * setup.accumulation_steps,
            never="activations are not divided: checkpoint, or use a smaller batch",
        ),
    )
    return [_fewest(way, device) for way in ways]


def serving_layouts(model: Countable, setup: InferenceSetup, device: Device) -> list[Layout]:
    """The ways to serve one copy of a model, each with the fewest devices."""
    whole = inference_memory(model, setup)
    ways = [_Way(way="single", counts=[1], memory=lambda count: whole.total_bytes)]
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
    return [_fewest(way, device) for way in ways]


def choose(layouts: Iterable[Layout]) -> Layout | None:
    """The layout with the fewest devices, and then the least sending time. None if nothing fits."""
    fitting = [layout for layout in layouts if layout.devices is not None]
    if not fitting:
        return None
    best = min(fitting, key=lambda layout: (layout.devices, layout.sent_s or 0.0))
    if best.devices == 1:
        return replace(best, reason="it fits on one device; more devices (data parallel) only make it faster")
    others = ", ".join(f"{each.way} needs {each.devices}" for each in fitting if each.way != best.way)
    return replace(best, reason=f"{best.way} on {best.devices}: fewest devices; {others or 'no other way fits'}")


def _fewest(way: _Way, device: Device) -> Layout:
    fits = [count for count in way.counts if way.memory(count) <= device.usable_bytes]
    shown = fits[0] if fits else way.counts[-1] if way.counts else 1
    sent, sent_s = way.sent(shown), None
    if device.interconnect_gb_s:
        own = device.interconnect_gb_s
        sent_s = sent / (1e9 * (own if shown <= MOST_TENSOR else min(own, NETWORK_GB_S)))
    return Layout(
        way=way.way,
        devices=shown if fits else None,
        memory_bytes=way.memory(shown) if way.counts else None,
        sent_bytes=sent,
        sent_s=sent_s,
        reason="" if fits else way.never or f"needs more than 80 % of {device.memory_gib:g} GiB",
    )


def _counts(most: int) -> list[int]:
    """Powers of two from 2, the usual sizes of machines."""
    return [2**power for power in range(1, most.bit_length())]


def _heads(model: TransformerSize) -> list[int]:
    return [count for count in _counts(MOST_TENSOR) if model.config.num_attention_heads % count == 0]


def _stages(model: TransformerSize) -> list[int]:
    return [count for count in range(2, model.config.num_layers + 1) if model.config.num_layers % count == 0]


def _largest_part(model: Countable) -> float:
    if not isinstance(model, TransformerSize):
        return model.parameters / 4  # assumes a few parts
    embeddings = (model.config.vocab_size + model.config.max_length) * model.config.hidden_size
    return float(max(model.block_parameters, embeddings))

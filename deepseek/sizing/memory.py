"""How much memory training and serving a model take, part by part.

Contract: no torch; bytes of one device that holds the whole model (`deepseek.sizing.parallel` divides).
`training_memory` and `inference_memory` take any `Countable`; what backward needs of a Transformer is computed by
`deepseek.sizing.training_step`, and of another module measured by `deepseek.sizing.traced`.

Training state a parameter (Rajbhandari et al. 2020, ZeRO, section 3.1, counts the last): weights + gradients + Adam
    fp32                  4 + 4 + 8      = 16 bytes
    fp16, bf16: autocast  4 + 4 + 8 + 2  = 18 bytes: weights stay fp32, their 16-bit copies live until backward is over.
                                              This is what `deepseek.training` does
    fp16, bf16: master    2 + 2 + (4+8)  = 16 bytes: 16-bit weights and gradients, an fp32 master copy in the optimizer
So mixed precision saves nothing of the state; what it saves is activations and time.

What backward keeps, and what lies there at each moment of a step: `deepseek.sizing.training_step`.

Examples:
    memory = training_memory(model, TrainingSetup(batch=32, length=512, precision="fp32"))
    memory.total_bytes, memory.activation_bytes
    largest_batch(lambda batch: training_memory(model, replace(setup, batch=batch)).total_bytes, 0.8 * 80e9)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek.config import check_choice, check_float, check_int
from deepseek.sizing.counting import Countable, TransformerSize
from deepseek.sizing.training_step import Platform, Saved, TrainingSetup, moments, saved_bytes
from deepseek.spec import InputError

InferencePrecision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]

BYTES: dict[str, int] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
OPTIMIZER_BYTES: dict[str, int] = {"adamw": 8, "momentum": 4, "sgd": 0}  # fp32 state a parameter
FILL = 0.8
"""Share of a device's memory that a plan uses; the rest is fragmentation, and what no sum foresees."""
CONTEXT_BYTES: dict[str, int] = {"accelerator": 600 * 2**20, "cpu": 50 * 2**20}
"""Of one process: CUDA context and libraries (300 to 700 MiB by driver and version); an interpreter, a runtime."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes while training, by what they are for."""

    weight_bytes: float
    """With the 16-bit copies that autocast makes."""
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    """Kept from forward to backward."""
    workspace_bytes: float
    """On top at the worst moment of backward: a recomputed block, gradients of activations, the logits."""
    context_bytes: float = 0.0
    moments: Mapping[str, float]
    """Bytes at each moment of a step that may be the worst, all but the process's own."""

    @property
    def state_bytes(self) -> float:
        """What does not depend on the batch."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> float:
        """State and activations at once, whether or not they are: what has to fit."""
        at_once = self.state_bytes + self.activation_bytes + self.workspace_bytes
        return self.context_bytes + max(at_once, *self.moments.values())

    @property
    def peak_at(self) -> str:
        """The worst moment: gradients come while activations and autocast's copies go."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak_bytes(self) -> float:
        """What a measurement should see then."""
        return self.context_bytes + self.moments[self.peak_at]


def training_memory(model: Countable, setup: TrainingSetup, *, saved: Saved | None = None) -> TrainingMemory:
    """Memory of a training step. `saved` is what a trace measured; without it the model has to be a Transformer."""
    count, full = model.parameters, setup.full_bytes
    master = 4 if full == 2 else 0
    weights, gradients = float(full * count), float(full * count)
    optimizer = float(count * (OPTIMIZER_BYTES[setup.optimizer] + master))
    lying = {"optimizer's step": gradients + _step_bytes(model, setup)}
    if saved is not None:
        copies = 0.0 if saved.with_copies else _copy_bytes(model, setup)
        lying |= _moments_of(saved, copies + (0.0 if setup.accumulation_steps == 1 else gradients), gradients)
    elif isinstance(model, TransformerSize):
        lying |= moments(model, setup)
        saved = saved_bytes(model, setup)
    else:
        raise InputError(f"{model.name}: what backward keeps is known of a TransformerConfig or a traced nn.Module")
    return TrainingMemory(
        weight_bytes=weights + (0.0 if saved.with_copies else _copy_bytes(model, setup)),
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=saved.kept,
        workspace_bytes=saved.workspace,
        context_bytes=CONTEXT_BYTES[setup.platform],
        moments={name: weights + optimizer + value for name, value in lying.items()},
    )


def _moments_of(saved: Saved, before: float, gradients: float) -> dict[str, float]:
    """Of a module that is no Transformer: as traced; else the ends of backward, as it is not known what goes when."""
    if saved.backward_bytes is not None:
        return {"backward": saved.backward_bytes}
    begins = before + saved.kept + saved.workspace
    return {"backward begins": begins, "backward ends": gradients + saved.workspace}


def _step_bytes(model: Countable, setup: TrainingSetup) -> float:
    """On top when the optimizer steps: AdamW on an accelerator takes all parameters together (a root of each second
    moment), on a CPU one after the other; the others work in place."""
    if setup.optimizer != "adamw":
        return 0.0
    return 4.0 * model.parameters if setup.platform == "accelerator" else 4.0 * model.stepped_elements


def _copy_bytes(model: Countable, setup: TrainingSetup) -> float:
    """16-bit copies that autocast makes of weights: all, or those of the block that is run again and of the logits."""
    if not setup.autocast:
        return 0.0
    if not isinstance(model, TransformerSize):
        return 2.0 * model.product_parameters
    blocks = 1 if setup.checkpointing else model.config.num_layers
    logits = 0 if model.head == "none" else model.config.vocab_size * model.config.hidden_size
    return 2.0 * (blocks * model.block_product_parameters + logits)


@dataclass(frozen=True, kw_only=True)
class InferenceSetup:
    """How a model is served on one device."""

    batch: int
    length: int
    precision: InferencePrecision = "fp16"
    instances: int = 1
    """Copies that run side by side."""
    shared_weights: bool = True
    """TensorRT's instances on one device share the engine's weights; instances that are processes do not."""
    generate: bool = False
    """Whether keys and values of all `length` tokens are cached, as in a model that writes a token at a time."""
    platform: Platform = "accelerator"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("batch", "length", "instances"):
            check_int(owner, name, getattr(self, name), 1)
        check_choice(owner, "precision", self.precision, InferencePrecision)
        check_choice(owner, "platform", self.platform, Platform)


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes while serving, by what they are for."""

    weight_bytes: float
    activation_bytes: float
    cache_bytes: float
    """Keys and values."""
    context_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weight_bytes + self.activation_bytes + self.cache_bytes + self.context_bytes


def inference_memory(model: Countable, setup: InferenceSetup) -> InferenceMemory:
    """Memory of `instances` copies, each with its own batch."""
    cached, width = 0.0, activation_width(setup.precision, setup.platform)
    if setup.generate:
        if not isinstance(model, TransformerSize):
            raise InputError(f"{model.name}: the cache of keys and values is known of a TransformerConfig only")
        cached = model.cache_elements(setup.batch * setup.length) * width
    copies = 1 if setup.shared_weights else setup.instances
    return InferenceMemory(
        weight_bytes=float(copies * weight_bytes(model, setup.precision, setup.platform)),
        activation_bytes=setup.instances * width * model.live_elements(setup.batch, setup.length),
        cache_bytes=setup.instances * cached,
        context_bytes=float(copies * CONTEXT_BYTES[setup.platform]),
    )


def weight_bytes(model: Countable, precision: str, platform: Platform = "accelerator") -> int:
    """Weights on disk and in memory: 8 bits are for products, all else stays at 16 bits (on a CPU at 32)."""
    width = BYTES[precision]
    high = width if width > 1 else (4 if platform == "cpu" else 2)
    return width * model.product_parameters + high * (model.parameters - model.product_parameters)


def activation_width(precision: str, platform: Platform = "accelerator") -> int:
    """Bytes of an activation, or of a cached key or value: 8-bit engines keep the residual, and so the worst moment,
    at 16 bits."""
    return max(BYTES[precision], 4 if platform == "cpu" else 2)


def largest_batch(bytes_of: Callable[[int], float], limit_bytes: float, *, most: int = 2**20) -> int:
    """The largest batch whose memory is within a limit; 0 where a batch of 1 is not. `bytes_of` must not fall."""
    if bytes_of(1) > limit_bytes:
        return 0
    low, high = 1, 2
    while high <= most and bytes_of(high) <= limit_bytes:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if bytes_of(middle) <= limit_bytes else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class HostNeeds:
    """What the machine around the devices needs."""

    ram_bytes: tuple[float, float]
    """The guide's 2 to 3 times the training state."""
    ram_computed_bytes: float
    """Weights loaded, once, and the state that a checkpoint gathers in RAM before it is written."""
    checkpoint_bytes: float
    """Weights and optimizer state."""
    checkpoint_s: float
    model_load_s: float


def host_needs(model: Countable, training: TrainingMemory, *, disk_bytes_s: float = 500e6) -> HostNeeds:
    """RAM and disk of a training machine; the guide asks for 500 MB/s of sequential bandwidth."""
    check_float("HostNeeds", "disk_bytes_s", disk_bytes_s, 0, math.inf, open_low=True)
    state, weights = training.state_bytes, 4.0 * model.parameters
    checkpoint = weights + training.optimizer_bytes
    return HostNeeds(
        ram_bytes=(2 * state, 3 * state),
        ram_computed_bytes=weights + checkpoint,
        checkpoint_bytes=checkpoint,
        checkpoint_s=checkpoint / disk_bytes_s,
        model_load_s=weights / disk_bytes_s,
    )

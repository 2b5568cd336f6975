"""How much memory training and serving a model take, part by part.

Contract: no torch; bytes on one device that holds the whole model (`deepseek.sizing.parallel` divides it).
`deepseek.sizing.training_step` computes the activations of a Transformer and the memory at each moment of a step; other
modules and graphs provide theirs (`saved`).

Training state per parameter: weights + gradients + Adam (ZeRO, Rajbhandari et al. 2020, section 3.1, counts the last):
    fp32                  4 + 4 + 8      = 16 bytes
    fp16, bf16: autocast  4 + 4 + 8 + 2  = 18 bytes: weights stay fp32, their 16-bit copies live until backward ends.
                                              `deepseek.training` works this way
    fp16, bf16: master    2 + 2 + (4+8)  = 16 bytes: 16-bit weights and gradients, an fp32 master copy in the optimizer
So mixed precision does not reduce the training state; it reduces activations and time.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deepseek.precisions import BITS, NumberType
from deepseek.settings import Count, settings
from deepseek.sizing.model.counting import Countable, TransformerSize
from deepseek.sizing.training_step import (
    AnyModel,
    Optimizer,
    Platform,
    SavedActivations,
    TrainingSetup,
    TransformerStep,
    saved_bytes,
)
from deepseek.spec import InputError

BYTES: dict[str, int] = {name: bits // 8 for name, bits in BITS.items()}
OPTIMIZER_BYTES: dict[Optimizer, int] = {"adamw": 8, "momentum": 4, "sgd": 0}  # fp32 state per parameter
FILL = 0.8
"""Share of a device's memory that a plan uses; the rest is for fragmentation and unpredicted memory."""
CONTEXT_BYTES: dict[str, int] = {"accelerator": 600 * 2**20, "cpu": 50 * 2**20}
"""Overhead per process: CUDA context and libraries (300 to 700 MiB by driver and version); interpreter and runtime."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes while training, by purpose."""

    weight_bytes: float
    """Includes the 16-bit copies that autocast makes."""
    gradient_bytes: float
    optimizer_bytes: float
    activation_bytes: float
    """Kept from forward to backward."""
    workspace_bytes: float
    """Additional bytes at the peak of backward: a recomputed block, gradients of activations, the logits."""
    context_bytes: float = 0.0
    moments: Mapping[str, float]
    """Bytes at each moment of a step that may be the peak, without `context_bytes`."""

    @property
    def state_bytes(self) -> float:
        """The part that does not depend on the batch."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> float:
        """Bytes that must fit: state and activations, as if all existed at once."""
        at_once = self.state_bytes + self.activation_bytes + self.workspace_bytes
        return self.context_bytes + max(at_once, *self.moments.values())

    @property
    def peak_at(self) -> str:
        """The moment of the peak: gradients appear while activations and autocast's copies are freed."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def peak_bytes(self) -> float:
        """The peak that a measurement should see."""
        return self.context_bytes + self.moments[self.peak_at]


def training_memory(model: AnyModel, setup: TrainingSetup) -> TrainingMemory:
    trained, full = model.trained_parameters, setup.full_bytes
    master = 4 if full == 2 else 0
    weights, gradients = float(full * model.parameters), float(full * trained)
    optimizer = float(trained * (OPTIMIZER_BYTES[setup.optimizer] + master))
    moments = {"optimizer's step": gradients + _step_bytes(model, setup)}
    if isinstance(model, TransformerSize):
        saved, copies = saved_bytes(model, setup), _copy_bytes(model, setup)
        moments |= TransformerStep(model, setup).moments()
    else:
        saved = model.saved(setup)
        copies = 0.0 if saved.with_copies else _copy_bytes(model, setup)
        moments |= _moments_of(saved, copies + (0.0 if setup.accumulation_steps == 1 else gradients), gradients)
    return TrainingMemory(
        weight_bytes=weights + copies,
        gradient_bytes=gradients,
        optimizer_bytes=optimizer,
        activation_bytes=saved.kept,
        workspace_bytes=saved.workspace,
        context_bytes=CONTEXT_BYTES[setup.platform],
        moments={name: weights + optimizer + value for name, value in moments.items()},
    )


def _moments_of(saved: SavedActivations, before: float, gradients: float) -> dict[str, float]:
    """Moments of a traced module; for a graph, only the ends of backward, as the order of frees is unknown."""
    if saved.backward_bytes is not None:
        return {"backward": saved.backward_bytes}
    begins = before + saved.kept + saved.workspace
    return {"backward begins": begins, "backward ends": gradients + saved.workspace}


def _step_bytes(model: Countable, setup: TrainingSetup) -> float:
    """Temporaries of the optimizer's step. AdamW takes the roots of all second moments at once on an accelerator, and
    one after the other on a CPU; other optimizers work in place."""
    if setup.optimizer != "adamw":
        return 0.0
    return 4.0 * model.trained_parameters if setup.platform == "accelerator" else 4.0 * model.stepped_elements


def _copy_bytes(model: Countable, setup: TrainingSetup) -> float:
    """Autocast's 16-bit copies of all weights; with checkpointing, of the recomputed block and the logits."""
    if not setup.autocast:
        return 0.0
    if not isinstance(model, TransformerSize):
        return 2.0 * model.product_parameters
    blocks = 1 if setup.checkpointing else model.config.num_layers
    logits = 0 if model.head == "none" else model.config.vocab_size * model.config.hidden_size
    return 2.0 * (blocks * model.block_product_parameters + logits)


@settings
class InferenceSetup:
    """How a model is served on one device."""

    batch: Count
    length: Count
    precision: NumberType = "fp16"
    instances: Count = 1
    """Copies of the model that run in parallel."""
    generate: bool = False
    """Whether keys and values of all `length` tokens are cached, as in token-by-token generation."""
    platform: Platform = "accelerator"


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes while serving, by purpose."""

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
            raise InputError(f"{model.name}: the size of the key-value cache is only known for a TransformerConfig")
        cached = model.cache_elements(setup.batch * setup.length) * width
    # TensorRT's instances on one device share the engine's weights; instances that are processes do not.
    copies = 1 if setup.platform == "accelerator" else setup.instances
    return InferenceMemory(
        weight_bytes=float(copies * weight_bytes(model, setup.precision, setup.platform)),
        activation_bytes=setup.instances * width * model.live_elements(setup.batch, setup.length),
        cache_bytes=setup.instances * cached,
        context_bytes=float(copies * CONTEXT_BYTES[setup.platform]),
    )


def weight_bytes(model: Countable, precision: str, platform: Platform = "accelerator") -> int:
    """Bytes of the weights, on disk and in memory. In 8 bits, only products have 8 bits; the rest has 16 (CPU: 32)."""
    width = BYTES[precision]
    high = width if width > 1 else (4 if platform == "cpu" else 2)
    return width * model.product_parameters + high * (model.parameters - model.product_parameters)


def activation_width(precision: str, platform: Platform = "accelerator") -> int:
    """Bytes of an activation, or of a cached key or value: 8-bit engines keep the residual, which sets the peak, at 16
    bits."""
    return max(BYTES[precision], 4 if platform == "cpu" else 2)


def largest_batch(bytes_of: Callable[[int], float], limit_bytes: float, *, most: int = 2**20) -> int:
    """The largest batch whose memory is within a limit; 0 if not even 1 fits. `bytes_of` must not decrease."""
    tried = 1
    while tried < most and bytes_of(tried) <= limit_bytes:  # doubling first: a trace of a huge batch takes long
        tried *= 2
    return bisect_right(range(1, min(tried, most) + 1), limit_bytes, key=bytes_of)


@dataclass(frozen=True, kw_only=True)
class HostNeeds:
    ram_bytes: tuple[float, float]
    """The guide's 2 to 3 times the training state."""
    ram_computed_bytes: float
    """The loaded weights, and the state that a checkpoint collects in RAM before it is written."""
    checkpoint_bytes: float
    """Weights and optimizer state."""
    checkpoint_s: float
    model_load_s: float


def host_needs(model: Countable, training: TrainingMemory, *, disk_bytes_s: float = 500e6) -> HostNeeds:
    """RAM and disk of a training machine; the guide requires 500 MB/s of sequential bandwidth."""
    state, weights = training.state_bytes, 4.0 * model.parameters
    frozen = 4.0 * (model.parameters - model.trained_parameters)
    checkpoint = training.gradient_bytes + frozen + training.optimizer_bytes  # weights are as wide as their gradients
    return HostNeeds(
        ram_bytes=(2 * state, 3 * state),
        ram_computed_bytes=weights + checkpoint,
        checkpoint_bytes=checkpoint,
        checkpoint_s=checkpoint / disk_bytes_s,
        model_load_s=weights / disk_bytes_s,
    )

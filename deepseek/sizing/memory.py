"""How much memory training and serving a model take, part by part.

Contract: no torch; bytes of one device that holds the whole model (`deepseek.sizing.parallel` divides).
`training_memory` and `inference_memory` take any `Countable`; what backward needs of a Transformer is computed by
`saved_bytes`, and of another module measured by `deepseek.sizing.traced`.

Training state a parameter (Rajbhandari et al. 2020, ZeRO, section 3.1, counts the last): weights + gradients + Adam
    fp32                  4 + 4 + 8      = 16 bytes
    fp16, bf16: autocast  4 + 4 + 8 + 2  = 18 bytes: weights stay fp32, their 16-bit copies live until backward is over.
                                              This is what `deepseek.training` does
    fp16, bf16: master    2 + 2 + (4+8)  = 16 bytes: 16-bit weights and gradients, an fp32 master copy in the optimizer
So mixed precision saves nothing of the state; what it saves is activations and time.

Activations: what autograd keeps for backward, tensor by tensor, for this project's pre-norm block (tests compare it
with the module's own saved tensors, to the byte). Korthikanti et al. 2022, "Reducing Activation Recomputation",
equation 1, has sbh(34 + 5as/h) bytes for a 16-bit Megatron block. Here, with n = s*b*h, F = s*b*(inner width), fused
kernels and 16 bits by autocast:
    8n        the residual before each LayerNorm, which autocast keeps in fp32
    6n + 2n   the inputs of query, key and value (a cast each), and of the feed-forward layer
    6n + 2n   query, key and value; what attention gives
    n + F     dropout masks of one byte
    2F + 2F   before the activation, and behind it: 25n + 5F in all, or 45n where F = 4n
The 5as/h belongs to the T x T scores. Flash and memory-efficient kernels keep none of them (only a sum a row), which is
what CUDA devices run here; the math kernel keeps them: softmax, dropout mask and what was dropped out. A CPU runs the
math kernel where attention_dropout > 0, and keeps dropout masks in the width of the values instead of one byte.

Examples:
    memory = training_memory(model, TrainingSetup(batch=32, length=512, precision="fp32"))
    memory.total_bytes, memory.activation_bytes
    largest_batch(lambda batch: training_memory(model, replace(setup, batch=batch)).total_bytes, 0.8 * 80e9)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from deepseek.config import check_choice, check_int
from deepseek.sizing.counting import Countable, TransformerSize
from deepseek.spec import InputError

InferencePrecision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "int8"]
TrainingPrecision = Literal["fp32", "fp16", "bf16"]
Mixed = Literal["autocast", "master"]
Optimizer = Literal["adamw", "momentum", "sgd"]
AttentionKernel = Literal["auto", "fused", "math"]
Platform = Literal["accelerator", "cpu"]

BYTES: dict[str, int] = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}
OPTIMIZER_BYTES: dict[str, int] = {"adamw": 8, "momentum": 4, "sgd": 0}  # fp32 state a parameter
FILL = 0.8
"""Share of a device's memory that a plan uses; the rest is fragmentation, and what no sum foresees."""
CONTEXT_BYTES: dict[str, int] = {"accelerator": 600 * 2**20, "cpu": 50 * 2**20}
"""Of one process: CUDA context and libraries (300 to 700 MiB by driver and version); an interpreter, a runtime."""


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a step is run on one device."""

    batch: int
    """Samples that go through at once on one device (the micro-batch)."""
    length: int
    precision: TrainingPrecision = "fp32"
    mixed: Mixed = "autocast"
    """What a 16-bit precision means; see the module."""
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    """Keep each block's input only, and run the block again in backward."""
    accumulation_steps: int = 1
    attention: AttentionKernel = "auto"
    platform: Platform = "accelerator"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        for name in ("batch", "length", "accumulation_steps"):
            check_int(owner, name, getattr(self, name), 1)
        choices = {"precision": TrainingPrecision, "mixed": Mixed, "optimizer": Optimizer, "attention": AttentionKernel}
        for name, literal in (choices | {"platform": Platform}).items():
            check_choice(owner, name, getattr(self, name), literal)

    @property
    def autocast(self) -> bool:
        return self.precision != "fp32" and self.mixed == "autocast"


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
    step_bytes: float = 0.0
    """What the optimizer's step takes for a moment, when activations are gone: AdamW on an accelerator takes all
    parameters together (a root of each second moment), on a CPU one after the other (two of the largest)."""
    gradients_stay: bool = False
    """Whether those of earlier micro-batches lie there while activations are made."""

    @property
    def state_bytes(self) -> float:
        """What does not depend on the batch."""
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes

    @property
    def total_bytes(self) -> float:
        """Everything at once, whether or not it is: what has to fit."""
        return (
            self.state_bytes + self.context_bytes + max(self.activation_bytes + self.workspace_bytes, self.step_bytes)
        )

    @property
    def peak_bytes(self) -> float:
        """What a measurement should see at the worst moment: gradients grow while activations are let go, unless they
        stay from one micro-batch to the next; then comes the optimizer's step."""
        held = self.weight_bytes + self.optimizer_bytes + self.context_bytes
        if self.gradients_stay:
            backward = self.gradient_bytes + self.activation_bytes
        else:
            backward = max(self.gradient_bytes, self.activation_bytes)
        return held + max(backward + self.workspace_bytes, self.gradient_bytes + self.step_bytes)


def training_memory(model: Countable, setup: TrainingSetup, *, saved: Saved | None = None) -> TrainingMemory:
    """Memory of a training step. `saved` is what a trace measured; without it the model has to be a Transformer."""
    if saved is None:
        if not isinstance(model, TransformerSize):
            raise InputError(f"{model.name}: what backward keeps is known of a TransformerConfig or a traced nn.Module")
        saved = saved_bytes(model, setup)
    count = model.parameters
    if setup.precision == "fp32" or setup.autocast:
        weights = 4.0 * count + (0 if saved.with_copies else _copy_bytes(model, setup))
        gradients, master = 4.0 * count, 0
    else:
        weights, gradients, master = 2.0 * count, 2.0 * count, 4
    return TrainingMemory(
        weight_bytes=weights,
        gradient_bytes=gradients,
        optimizer_bytes=float(count * (OPTIMIZER_BYTES[setup.optimizer] + master)),
        activation_bytes=saved.kept,
        workspace_bytes=saved.workspace,
        context_bytes=CONTEXT_BYTES[setup.platform],
        step_bytes=_step_bytes(model, setup),
        gradients_stay=setup.accumulation_steps > 1,
    )


def _step_bytes(model: Countable, setup: TrainingSetup) -> float:
    if setup.optimizer != "adamw":
        return 0.0  # works in place
    if setup.platform == "accelerator" or not isinstance(model, TransformerSize):
        return 4.0 * model.parameters
    config = model.config
    return 2 * 4.0 * config.hidden_size * max(config.vocab_size, config.intermediate_size, config.max_length)


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of activations: kept for backward, and on top of them at its worst moment."""

    kept: float
    workspace: float
    with_copies: bool = False
    """Whether 16-bit copies of weights are among what is kept."""


def _copy_bytes(model: Countable, setup: TrainingSetup) -> float:
    """16-bit copies that autocast makes of weights: all, or those of the block that is run again."""
    if not setup.autocast:
        return 0.0
    if setup.checkpointing and isinstance(model, TransformerSize):
        return 2.0 * (model.block_product_parameters + model.head_parameters)
    return 2.0 * model.product_parameters


def saved_bytes(model: TransformerSize, setup: TrainingSetup) -> Saved:
    """What autograd keeps of a Transformer's forward pass, and the workspace of its backward pass."""
    config = model.config
    model.check_length(setup.length)
    tokens = setup.batch * setup.length
    width = tokens * config.hidden_size
    block = block_saved_bytes(model, setup)
    masks = 4.0 * setup.batch * setup.length**2 if config.padding_id is not None and _keeps_mask(model, setup) else 0.0
    around = 4.0 * width + 8 * tokens + 8 * tokens  # the last LayerNorm's input and statistics, the ids
    if config.embedding_dropout:
        around += width * (4 if setup.platform == "cpu" else 1)
    passed = width * (2 if setup.precision != "fp32" and setup.mixed == "master" else 4)
    kept = config.num_layers * (passed if setup.checkpointing else block)
    if setup.checkpointing or setup.autocast:
        masks = 4.0 * setup.batch * setup.length**2 if setup.checkpointing and config.padding_id is not None else 0.0
    # Where backward begins, on the last block's feed-forward layer, all that was kept is still there; what comes on top
    # is the gradient of that layer's input and of its output. Later ones take the place of what was let go meanwhile.
    element = 4 if setup.precision == "fp32" else 2
    workspace = float(element * tokens * (config.hidden_size + config.intermediate_size))
    logits = 0.0
    if model.head != "none":
        # The fp32 log-softmax is kept; its gradient and that of the logits come on top of it.
        rows = tokens * config.vocab_size
        logits = 4.0 * rows
        workspace = max(workspace + (block if setup.checkpointing else 0.0), 8.0 * rows)
    elif setup.checkpointing:
        workspace += block
    return Saved(kept=kept + masks + around + logits, workspace=workspace)


def block_saved_bytes(model: TransformerSize, setup: TrainingSetup) -> float:
    """What autograd keeps of one block, without checkpointing."""
    config, low = model.config, setup.precision != "fp32"
    tokens = setup.batch * setup.length
    width, inner = tokens * config.hidden_size, tokens * config.intermediate_size
    value = 2 if low else 4  # bytes of what products read and write
    residual = 2 if low and setup.mixed == "master" else 4
    mask = value if setup.platform == "cpu" else 1  # of a dropout: on a CPU what to multiply by
    kept = 2.0 * residual * width + 4 * 4 * tokens  # inputs and statistics of two LayerNorms
    kept += value * width * (3 if setup.autocast else 1) + value * width  # inputs of query, key, value; of feed-forward
    kept += value * inner  # the activation's input (of ReLU its output)
    if config.ffn_dropout:
        kept += (value + mask) * inner + mask * width
    elif config.activation != "relu":
        kept += value * inner
    if _math(model, setup):
        score = 4 if setup.platform == "cpu" else value  # a CPU computes them in fp32
        scores = setup.batch * config.num_attention_heads * setup.length**2
        kept += 3 * score * width + value * width + score * scores
        if config.attention_dropout:
            kept += (score + (4 if setup.platform == "cpu" else 1)) * scores
    else:
        kept += 4 * value * width + 4.0 * setup.batch * config.num_attention_heads * setup.length  # and a sum a row
        if setup.autocast and config.padding_id is not None:
            kept += 2.0 * setup.batch * setup.length**2  # each block casts the padding mask
    return kept


def _math(model: TransformerSize, setup: TrainingSetup) -> bool:
    if setup.attention != "auto":
        return setup.attention == "math"
    return setup.platform == "cpu" and model.config.attention_dropout > 0


def _keeps_mask(model: TransformerSize, setup: TrainingSetup) -> bool:
    return not _math(model, setup) and not setup.autocast


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
    cached = 0.0
    if setup.generate:
        if not isinstance(model, TransformerSize):
            raise InputError(f"{model.name}: the cache of keys and values is known of a TransformerConfig only")
        cached = model.cache_elements(setup.batch * setup.length) * activation_width(setup)
    copies = 1 if setup.shared_weights else setup.instances
    return InferenceMemory(
        weight_bytes=float(copies * weight_bytes(model, setup.precision, setup.platform)),
        activation_bytes=setup.instances * activation_width(setup) * model.live_elements(setup.batch, setup.length),
        cache_bytes=setup.instances * cached,
        context_bytes=float(copies * CONTEXT_BYTES[setup.platform]),
    )


def weight_bytes(model: Countable, precision: str, platform: Platform = "accelerator") -> int:
    """Weights on disk and in memory: 8 bits are for products, all else stays at 16 bits (on a CPU at 32)."""
    width = BYTES[precision]
    high = width if width > 1 else (4 if platform == "cpu" else 2)
    return width * model.product_parameters + high * (model.parameters - model.product_parameters)


def activation_width(setup: InferenceSetup) -> int:
    """Bytes of an activation: 8-bit engines keep the residual, and so the worst moment, at 16 bits."""
    return max(BYTES[setup.precision], 4 if setup.platform == "cpu" else 2)


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
    if disk_bytes_s <= 0:
        raise InputError(f"disk_bytes_s: seen {disk_bytes_s:g}; a bandwidth above 0 is needed")
    state, weights = training.state_bytes, 4.0 * model.parameters
    checkpoint = weights + training.optimizer_bytes
    return HostNeeds(
        ram_bytes=(2 * state, 3 * state),
        ram_computed_bytes=weights + checkpoint,
        checkpoint_bytes=checkpoint,
        checkpoint_s=checkpoint / disk_bytes_s,
        model_load_s=weights / disk_bytes_s,
    )

"""Memory of a Transformer's training step besides weights and optimizer state: activations, and peaks over time.

Contract: no torch; bytes on one device. `kept` is what autograd keeps from a forward pass, tensor by tensor, for this
project's pre-norm block; tests compare it with the module's saved tensors, to the byte. `moments` has the bytes at each
moment that may be the peak; nothing is fitted.

Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation", equation 1, gives sbh(34 + 5as/h) bytes for a
16-bit Megatron block. Here, with n = s*b*h, F = s*b*(inner width), fused kernels and 16 bits by autocast:
    8n        the residual before each LayerNorm, which autocast keeps in fp32
    6n + 2n   the inputs of query, key and value (one cast each), and of the feed-forward layer
    6n + 2n   query, key and value; the output of attention
    n + F     dropout masks of one byte
    2F + 2F   before and after the activation: 25n + 5F in total, or 45n if F = 4n
The term 5as/h is for the T x T scores. Flash and memory-efficient kernels, which CUDA devices use here, keep only one
sum per row. The math kernel keeps softmax, dropout mask and dropped-out scores. A CPU uses the math kernel if
attention_dropout > 0, and keeps dropout masks in the width of the values instead of one byte.

Moments: backward runs from the last block to the first. Each block frees its activations and autocast's copies of its
weights, and adds its gradients. So memory changes linearly from block to block, and the peak is at the last or the
first block, in its feed-forward layer or its attention. Other candidates: the loss, the product of the head, the
gradients of the embeddings, the optimizer's step, and the end of forward, when the padding mask still exists and, with
checkpointing, autocast's cache holds the copies of all weights.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from deepseek.settings import Count, settings
from deepseek.sizing.model.counting import Countable, TransformerSize

TrainingPrecision = Literal["fp32", "fp16", "bf16"]
Mixed = Literal["autocast", "master"]
Optimizer = Literal["adamw", "momentum", "sgd"]
Platform = Literal["accelerator", "cpu"]


@settings
class TrainingSetup:
    """How one device runs a training step."""

    batch: Count
    """Samples per forward pass on one device (the micro-batch)."""
    length: Count
    precision: TrainingPrecision = "fp32"
    mixed: Mixed = "autocast"
    """How a 16-bit precision is implemented; `deepseek.sizing.memory` explains both ways."""
    optimizer: Optimizer = "adamw"
    checkpointing: bool = False
    """Keep only the input of each block, and recompute the block in backward."""
    accumulation_steps: Count = 1
    platform: Platform = "accelerator"

    @property
    def autocast(self) -> bool:
        return self.precision != "fp32" and self.mixed == "autocast"

    @property
    def value_bytes(self) -> int:
        """Bytes of an element that products read or write."""
        return 4 if self.precision == "fp32" else 2

    @property
    def full_bytes(self) -> int:
        """Bytes of an element of the residual, of a weight and of its gradient."""
        return 4 if self.precision == "fp32" or self.autocast else 2

    @property
    def mask_bytes(self) -> int:
        """Bytes of an element of a dropout mask; on a CPU, the mask is a factor."""
        return self.value_bytes if self.platform == "cpu" else 1


@dataclass(frozen=True, kw_only=True)
class SavedActivations:
    """Bytes of activations: those kept for backward, and the additional ones at its peak."""

    kept: float
    workspace: float
    with_copies: bool = False
    """Whether `kept` includes 16-bit copies of weights."""
    backward_bytes: float | None = None
    """Peak of a traced forward and backward pass, with gradients, without weights and optimizer state."""


class Measured(Countable, Protocol):
    """A module or a graph that provides its own saved activations."""

    def saved(self, setup: TrainingSetup) -> SavedActivations: ...


AnyModel = TransformerSize | Measured


@dataclass(frozen=True)
class TransformerStep:
    """The memory of a Transformer's training step, tensor by tensor, in bytes unless stated otherwise."""

    model: TransformerSize
    setup: TrainingSetup

    def __post_init__(self) -> None:
        self.model.check_length(self.setup.length)

    @property
    def tokens(self) -> int:
        return self.setup.batch * self.setup.length

    @property
    def width(self) -> int:
        """Elements of the hidden states."""
        return self.tokens * self.model.config.hidden_size

    @property
    def inner(self) -> int:
        """Elements inside a feed-forward layer."""
        return self.tokens * self.model.config.intermediate_size

    @property
    def scores(self) -> int:
        return self.tokens * self.model.config.num_attention_heads * self.setup.length

    @property
    def math(self) -> bool:
        """Whether attention uses the math kernel, which stores the scores."""
        return self.setup.platform == "cpu" and self.model.config.attention_dropout > 0

    @property
    def head_weights(self) -> int:
        """Weights of the head. Their gradient comes before the blocks'; a tied head's is added to the embeddings'."""
        return 0 if self.model.head == "none" else self.model.config.vocab_size * self.model.config.hidden_size

    @property
    def mask(self) -> float:
        """The padding mask, in fp32."""
        return 4.0 * self.tokens * self.setup.length if self.model.config.padding_id is not None else 0.0

    @property
    def block_input(self) -> float:
        return float(self.setup.full_bytes * self.width)

    # ---- kept for backward ------------------------------------------------------------------------

    @property
    def kept_mask(self) -> float:
        """The mask that all blocks share, if it is kept until backward."""
        held = self.setup.checkpointing or not (self.math or self.setup.autocast)
        return self.mask if held else 0.0

    @property
    def attention(self) -> float:
        """Kept from a block's first half: the residual before it, the inputs of query, key and value, and attention's
        own tensors: query, key, value, its output, and the scores in the math kernel."""
        value = self.setup.value_bytes
        kept = self.block_input + 8.0 * self.tokens  # a LayerNorm's input and statistics
        kept += value * self.width * (3 if self.setup.autocast else 1)
        if self.math:  # in fp32; for the scores: softmax, dropout mask and dropped-out scores
            return kept + (12.0 + value) * self.width + 12.0 * self.scores
        kept += 4.0 * value * self.width + 4.0 * self.tokens * self.model.config.num_attention_heads  # and a sum a row
        return kept + (self.mask / 2 if self.setup.autocast else 0.0)  # each block casts the mask

    @property
    def ffn(self) -> float:
        """Kept from a block's second half, with the residual before it."""
        value, mask, config = self.setup.value_bytes, self.setup.mask_bytes, self.model.config
        kept = self.block_input + 8.0 * self.tokens + value * self.width + value * self.inner  # activation's input, too
        if config.ffn_dropout:
            kept += (value + mask) * self.inner + mask * self.width
        elif config.activation != "relu":  # a ReLU keeps its output instead of its input
            kept += value * self.inner
        return kept

    @property
    def block(self) -> float:
        """Kept from one block, without checkpointing."""
        return self.attention + self.ffn

    @property
    def body(self) -> float:
        """Kept from blocks and embeddings, without loss and head."""
        config = self.model.config
        each = self.block_input if self.setup.checkpointing else self.block
        around = 4.0 * self.width + 16 * self.tokens  # the last LayerNorm's input and statistics, the ids
        if config.embedding_dropout:
            around += self.width * (4 if self.setup.platform == "cpu" else 1)
        return config.num_layers * each + around + self.kept_mask

    @property
    def kept(self) -> float:
        """Everything that autograd keeps from a forward pass."""
        if self.model.head == "none":
            return self.body  # input of the logits' product; fp32 log-softmax:
        return self.body + self.setup.value_bytes * self.width + 4.0 * self.tokens * self.model.config.vocab_size

    # ---- on top, at a moment of backward ------------------------------------------------------------

    @property
    def workspace(self) -> float:
        on_top = max(self.ffn_on_top, self.attention_on_top)
        if self.setup.checkpointing:
            on_top += self.block - self.block_input  # its input is kept anyway
        return max(on_top, self.loss_on_top)

    @property
    def ffn_on_top(self) -> float:
        """Additional bytes in backward of the feed-forward layer's second product: its gradients."""
        config, value = self.model.config, self.setup.value_bytes
        weight = float(config.hidden_size * config.intermediate_size)
        product = value * (self.inner + weight)
        if config.activation == "relu" and not config.ffn_dropout:
            product = max(product, 2 * value * self.inner + self.setup.full_bytes * weight)
        if self.setup.autocast:  # the weight's gradient becomes fp32 after the input and the weight's copy are freed
            product = max(product, 4 * weight)
        apart = self.width * value if self.setup.autocast or config.ffn_dropout else 0.0  # from the residual's gradient
        return product + apart - (self.width * self.setup.mask_bytes if config.ffn_dropout else 0.0)

    @property
    def attention_on_top(self) -> float:
        """Additional bytes in backward of attention: gradients of output, query, key and value, or of the scores."""
        if not self.math:
            return 4.0 * self.setup.value_bytes * self.width
        # Softmax, mask and product are kept; the product's gradient is added, then the mask's replaces the product.
        return 4.0 * (self.scores + self.width)

    @property
    def loss_on_top(self) -> float:
        """Additional bytes when backward begins: gradients of the logits before and after the softmax.

        Without a head, the loss is a mean square of the hidden states: the states, their square and product, and two
        gradients.
        """
        return 20.0 * self.width if self.model.head == "none" else 8.0 * self.tokens * self.model.config.vocab_size

    @property
    def head_on_top(self) -> float:
        """Additional bytes in backward of the logits' product: gradients of the logits, the input and the weight."""
        logits, weight = self.tokens * self.model.config.vocab_size, self.head_weights
        product = self.setup.value_bytes * (logits + weight + 2.0 * self.width) + self.copies(weight)
        return max(product, 6.0 * weight) if self.setup.autocast else product

    def copies(self, weights: int) -> float:
        """Bytes of autocast's 16-bit copies of `weights` weights of products."""
        return 2.0 * weights if self.setup.autocast else 0.0

    # ---- moments ------------------------------------------------------------------------------------

    def moments(self) -> dict[str, float]:
        """Bytes without weights and optimizer state, at each moment of forward and backward that may be the peak.

        With accumulation, the gradients of earlier micro-batches exist from the start.
        """
        model, setup, grown = self.model, self.setup, self.setup.accumulation_steps > 1
        gradient = 0.0 if grown else float(setup.full_bytes)  # bytes that each parameter adds
        before = float(setup.full_bytes * model.parameters) if grown else 0.0
        blocks = model.config.num_layers * model.block_product_parameters
        copies = 0.0 if setup.checkpointing else self.copies(blocks)
        masked = self.kept + self.mask - self.kept_mask + 4.0 * self.width
        found = {
            "loss": self.kept + self.loss_on_top + copies + self.copies(self.head_weights),
            "end of forward": masked + self.copies(blocks + self.head_weights),
        }
        if self.head_weights:
            found["head"] = self.body + copies + self.head_on_top
        # A tied head's gradient is new even if the others already exist.
        waiting = (setup.full_bytes if model.head == "tied" else gradient) * self.head_weights
        found |= self._block_moments(gradient, waiting)
        found["embeddings"] = self._embedding_moment(gradient) + waiting
        return {name: before + value for name, value in found.items()}

    def _block_moments(self, gradient: float, waiting: float) -> dict[str, float]:
        """Bytes at the last and the first block, each at the larger of its halves."""
        model, config, setup = self.model, self.model.config, self.setup
        ffn_weights = 2 * config.hidden_size * config.intermediate_size
        freed, copies, recomputed = self.block, self.copies(model.block_product_parameters), 0.0
        held = self.body + config.num_layers * copies + waiting
        if setup.checkpointing:  # recomputes one block at a time: its output, and its input before autocast's cast
            recomputed = float(self.width * (setup.value_bytes + (4 if setup.autocast else 0)))
            freed = self.block_input
            held = self.body + copies + waiting + self.block - freed
            copies = 0.0
        half = gradient * ffn_weights - self.copies(ffn_weights) - self.ffn + self.attention_on_top
        last = held + max(self.ffn_on_top, half, recomputed)
        first = last + (config.num_layers - 1) * (gradient * model.block_parameters - freed - copies)
        return {"last block": last, "first block": first}

    def _embedding_moment(self, gradient: float) -> float:
        """Bytes when all gradients exist, and the token embeddings' gradient is added to another one."""
        config, full = self.model.config, self.setup.full_bytes
        table, positions = config.vocab_size * config.hidden_size, config.max_length * config.hidden_size
        made = gradient * (table + positions) or float(full * max(table, positions))
        if self.model.head == "tied":
            made += full * table  # the sum of both
        blocks = config.num_layers * self.model.block_parameters
        return gradient * blocks + made + 4.0 * self.width + 16.0 * self.tokens


def saved_bytes(model: TransformerSize, setup: TrainingSetup) -> SavedActivations:
    """Bytes that autograd keeps from a Transformer's forward pass, and the workspace of its backward pass."""
    step = TransformerStep(model, setup)
    return SavedActivations(kept=step.kept, workspace=step.workspace)

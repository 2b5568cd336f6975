"""What a Transformer's training step holds beside weights and optimizer state: for backward, and moment by moment.

Contract: no torch; bytes of one device. `saved_bytes` is what autograd keeps of a forward pass, tensor by tensor, for
this project's pre-norm block (tests compare it with the module's own saved tensors, to the byte). `moments` is what
lies there at each moment that may be the worst; nothing in it is fitted.

Activations: Korthikanti et al. 2022, "Reducing Activation Recomputation", equation 1, has sbh(34 + 5as/h) bytes for a
16-bit Megatron block. Here, with n = s*b*h, F = s*b*(inner width), fused kernels and 16 bits by autocast:
    8n        the residual before each LayerNorm, which autocast keeps in fp32
    6n + 2n   the inputs of query, key and value (a cast each), and of the feed-forward layer
    6n + 2n   query, key and value; what attention gives
    n + F     dropout masks of one byte
    2F + 2F   before the activation, and behind it: 25n + 5F in all, or 45n where F = 4n
The 5as/h belongs to the T x T scores. Flash and memory-efficient kernels keep none of them (only a sum a row), which is
what CUDA devices run here; the math kernel keeps them: softmax, dropout mask and what was dropped out. A CPU runs the
math kernel where attention_dropout > 0, and keeps dropout masks in the width of the values instead of one byte.

Moments: backward goes from the last block to the first. With each block its activations and autocast's copies of its
weights go, and its gradients come, so that what lies there between two blocks is a straight line: the worst is at the
last block or at the first, in its feed-forward layer or in its attention. Beside these: the loss, the product of the
head, the gradients of the embeddings, the optimizer's step; and the end of forward, until which the padding mask is
there and, with checkpointing, autocast's cache has the copies of all weights.

Examples:
    saved_bytes(model, TrainingSetup(batch=32, length=512)).kept
    max(moments(model, setup), key=moments(model, setup).get)      # "last block", "embeddings", ...
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek.config import check_choice, check_int
from deepseek.sizing.counting import TransformerSize

TrainingPrecision = Literal["fp32", "fp16", "bf16"]
Mixed = Literal["autocast", "master"]
Optimizer = Literal["adamw", "momentum", "sgd"]
AttentionKernel = Literal["auto", "fused", "math"]
Platform = Literal["accelerator", "cpu"]


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """How a step is run on one device."""

    batch: int
    """Samples that go through at once on one device (the micro-batch)."""
    length: int
    precision: TrainingPrecision = "fp32"
    mixed: Mixed = "autocast"
    """What a 16-bit precision means; see `deepseek.sizing.memory`."""
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

    @property
    def value_bytes(self) -> int:
        """Of an element that products read and write."""
        return 4 if self.precision == "fp32" else 2

    @property
    def full_bytes(self) -> int:
        """Of an element of the residual, of a weight and of its gradient."""
        return 4 if self.precision == "fp32" or self.autocast else 2

    @property
    def mask_bytes(self) -> int:
        """Of an element of a dropout's mask: on a CPU what to multiply by."""
        return self.value_bytes if self.platform == "cpu" else 1

    @property
    def score_bytes(self) -> int:
        """Of a score in the math kernel; a CPU computes them in fp32."""
        return 4 if self.platform == "cpu" else self.value_bytes


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Bytes of activations: kept for backward, and on top of them at its worst moment."""

    kept: float
    workspace: float
    with_copies: bool = False
    """Whether 16-bit copies of weights are among what is kept."""
    backward_bytes: float | None = None
    """Where forward and backward were traced: the most beside weights and optimizer state, gradients included."""


@dataclass(frozen=True, kw_only=True)
class BlockSaved:
    """What autograd keeps of one block, without checkpointing."""

    attention: float
    ffn: float

    @property
    def whole(self) -> float:
        return self.attention + self.ffn


def saved_bytes(model: TransformerSize, setup: TrainingSetup) -> Saved:
    """What autograd keeps of a Transformer's forward pass, and the workspace of its backward pass."""
    model.check_length(setup.length)
    tokens, width, _ = _elements(model, setup)
    kept = _kept(model, setup)
    on_top = max(_ffn_on_top(model, setup), _attention_on_top(model, setup))
    if setup.checkpointing:
        on_top += block_saved(model, setup).whole - setup.full_bytes * width  # its input is kept anyhow
    if model.head != "none":
        kept += setup.value_bytes * width + 4.0 * tokens * model.config.vocab_size  # input; fp32 log-softmax
    return Saved(kept=kept, workspace=max(on_top, _loss_on_top(model, setup)))


def _elements(model: TransformerSize, setup: TrainingSetup) -> tuple[int, int, int]:
    """Tokens of a batch, elements of their hidden states, and of the feed-forward layer's."""
    tokens = setup.batch * setup.length
    return tokens, tokens * model.config.hidden_size, tokens * model.config.intermediate_size


def _kept(model: TransformerSize, setup: TrainingSetup) -> float:
    """Of blocks and embeddings, without loss and head."""
    config = model.config
    tokens, width, _ = _elements(model, setup)
    each = setup.full_bytes * width if setup.checkpointing else block_saved(model, setup).whole
    around = 4.0 * width + 8 * tokens + 8 * tokens  # the last LayerNorm's input and statistics, the ids
    if config.embedding_dropout:
        around += width * (4 if setup.platform == "cpu" else 1)
    return config.num_layers * each + around + _padding_mask(model, setup)


def _padding_mask(model: TransformerSize, setup: TrainingSetup) -> float:
    """The fp32 one that all blocks share, where something holds it until backward."""
    held = setup.checkpointing or not (_math(model, setup) or setup.autocast)
    return 4.0 * setup.batch * setup.length**2 if held and model.config.padding_id is not None else 0.0


def block_saved(model: TransformerSize, setup: TrainingSetup) -> BlockSaved:
    """What autograd keeps of one block's two halves, each with the residual before it."""
    config, value, mask = model.config, setup.value_bytes, setup.mask_bytes
    tokens, width, inner = _elements(model, setup)
    residual = setup.full_bytes * width + 8.0 * tokens  # a LayerNorm's input and statistics
    ffn = residual + value * width + value * inner  # and the activation's input (of ReLU its output)
    if config.ffn_dropout:
        ffn += (value + mask) * inner + mask * width
    elif config.activation != "relu":
        ffn += value * inner
    attention = residual + value * width * (3 if setup.autocast else 1)  # inputs of query, key and value
    return BlockSaved(attention=attention + _kernel_saved(model, setup), ffn=ffn)


def _kernel_saved(model: TransformerSize, setup: TrainingSetup) -> float:
    """What attention itself keeps: query, key, value, its output, and the scores where the kernel writes them down."""
    config, value, score = model.config, setup.value_bytes, setup.score_bytes
    _, width, _ = _elements(model, setup)
    if _math(model, setup):
        kept = 3.0 * score * width + value * width + score * _scores(model, setup)
        if config.attention_dropout:
            kept += (score + (4 if setup.platform == "cpu" else 1)) * _scores(model, setup)
        return kept
    kept = 4.0 * value * width + 4.0 * setup.batch * config.num_attention_heads * setup.length  # and a sum a row
    if setup.autocast and config.padding_id is not None:
        kept += 2.0 * setup.batch * setup.length**2  # each block casts the padding mask
    return kept


def _scores(model: TransformerSize, setup: TrainingSetup) -> int:
    return setup.batch * model.config.num_attention_heads * setup.length**2


def _math(model: TransformerSize, setup: TrainingSetup) -> bool:
    if setup.attention != "auto":
        return setup.attention == "math"
    return setup.platform == "cpu" and model.config.attention_dropout > 0


def _ffn_on_top(model: TransformerSize, setup: TrainingSetup) -> float:
    """At the backward of the feed-forward layer's second product: gradients of its output, its input, its weight."""
    _, width, inner = _elements(model, setup)
    weight = float(model.config.hidden_size * model.config.intermediate_size)
    value = setup.value_bytes
    product = value * (inner + weight)
    if model.config.activation == "relu" and not model.config.ffn_dropout:  # keeps what it gave, not what it took
        product = max(product, 2 * value * inner + setup.full_bytes * weight)
    if setup.autocast:  # then the weight's becomes fp32, when the product's input and the weight's copy have gone
        product = max(product, 4 * weight)
    apart = width * value if setup.autocast or model.config.ffn_dropout else 0.0  # from the residual's gradient
    gone = width * setup.mask_bytes if model.config.ffn_dropout else 0.0
    return product + apart - gone


def _forward_on_top(model: TransformerSize, setup: TrainingSetup) -> float:
    """At the end of a block's forward: the layer's output, and its input before autocast made it small."""
    _, width, _ = _elements(model, setup)
    return float(width * (setup.value_bytes + (4 if setup.autocast else 0)))


def _attention_on_top(model: TransformerSize, setup: TrainingSetup) -> float:
    """At the backward of attention itself: gradients of its output, of query, key and value, or of scores."""
    _, width, _ = _elements(model, setup)
    if not _math(model, setup):
        return 4.0 * setup.value_bytes * width
    # Softmax, mask and product are kept; the product's gradient comes, then the mask's in the product's place. Without
    # dropout the softmax's own gradient comes on top of the product's.
    times = 1 if model.config.attention_dropout else 2
    return float(setup.score_bytes * (times * _scores(model, setup) + width))


def _loss_on_top(model: TransformerSize, setup: TrainingSetup) -> float:
    """Where backward begins: gradients of the logits on both sides of the softmax, beside the log-softmax that is kept.

    Without a head: of a mean square of the hidden states, these, what they are raised and multiplied to, and the
    gradient on both sides.
    """
    tokens, width, _ = _elements(model, setup)
    return 20.0 * width if model.head == "none" else 8.0 * tokens * model.config.vocab_size


def moments(model: TransformerSize, setup: TrainingSetup) -> dict[str, float]:
    """Bytes beside weights and optimizer state at each moment of forward and backward that may be the worst.

    With accumulation the gradients of earlier micro-batches are there from the start.
    """
    config, saved, grown = model.config, saved_bytes(model, setup), setup.accumulation_steps > 1
    gradient = 0.0 if grown else float(setup.full_bytes)  # bytes that come with each parameter
    before = float(setup.full_bytes * model.parameters) if grown else 0.0
    blocks, head = config.num_layers * model.block_product_parameters, _head_weights(model)
    copies = 0.0 if setup.checkpointing else _copies(blocks, setup)
    found = {"loss": saved.kept + _loss_on_top(model, setup) + copies + _copies(head, setup)}
    mask = 4.0 * setup.batch * setup.length**2 if config.padding_id is not None else 0.0
    width = 4.0 * setup.batch * setup.length * config.hidden_size
    masked = saved.kept + mask - _padding_mask(model, setup) + width
    found["end of forward"] = masked + _copies(blocks + head, setup)
    if head:
        found["head"] = _kept(model, setup) + copies + _head_on_top(model, setup)
    found |= _block_moments(model, setup, gradient)
    found["embeddings"] = _embedding_moment(model, setup, gradient)
    return {name: before + value for name, value in found.items()}


def _block_moments(model: TransformerSize, setup: TrainingSetup, gradient: float) -> dict[str, float]:
    """At the last block and at the first, each at the worse of its halves."""
    config, block, kept = model.config, block_saved(model, setup), _kept(model, setup)
    _, width, _ = _elements(model, setup)
    ffn_weights = 2 * config.hidden_size * config.intermediate_size
    waiting = _head_gradient(model, setup, gradient)
    goes, copies = block.whole, _copies(model.block_product_parameters, setup)
    lying = kept + config.num_layers * copies + waiting
    if setup.checkpointing:  # one block at a time is run again
        goes = float(setup.full_bytes * width)
        lying = kept + copies + waiting + block.whole - goes
        copies = 0.0
    half = gradient * ffn_weights - _copies(ffn_weights, setup) - block.ffn + _attention_on_top(model, setup)
    again = _forward_on_top(model, setup) if setup.checkpointing else 0.0
    last = lying + max(_ffn_on_top(model, setup), half, again)
    others = config.num_layers - 1
    first = last + others * (gradient * model.block_parameters - goes - copies)
    return {"last block": last, "first block": first}


def _embedding_moment(model: TransformerSize, setup: TrainingSetup, gradient: float) -> float:
    """All gradients there, and that of the tokens' table just made, beside another to which it is added."""
    config = model.config
    tokens, width, _ = _elements(model, setup)
    table, blocks = config.vocab_size * config.hidden_size, config.num_layers * model.block_parameters
    positions = config.max_length * config.hidden_size
    made = gradient * (table + positions) or float(setup.full_bytes * max(table, positions))
    if model.head == "tied":
        made += setup.full_bytes * table  # the sum of both
    return gradient * blocks + _head_gradient(model, setup, gradient) + made + 4.0 * width + 16.0 * tokens


def _head_gradient(model: TransformerSize, setup: TrainingSetup, gradient: float) -> float:
    """What lies there of the head's weights from its backward on: a tied one's gradient even where others stay."""
    return (setup.full_bytes if model.head == "tied" else gradient) * _head_weights(model)


def _head_weights(model: TransformerSize) -> int:
    """Whose gradient is made before the blocks'; a tied head's waits for the embeddings', and is added to it."""
    return 0 if model.head == "none" else model.config.vocab_size * model.config.hidden_size


def _head_on_top(model: TransformerSize, setup: TrainingSetup) -> float:
    """At the backward of the logits' product: their gradient, and those of its input and of its weight."""
    tokens, width, _ = _elements(model, setup)
    value, weight = setup.value_bytes, _head_weights(model)
    copy = 2.0 * weight if setup.autocast else 0.0
    product = value * (tokens * model.config.vocab_size + weight + 2.0 * width) + copy
    return max(product, 6.0 * weight) if setup.autocast else product


def _copies(weights: int, setup: TrainingSetup) -> float:
    """16-bit copies that autocast makes of so many weights of products."""
    return 2.0 * weights if setup.autocast else 0.0

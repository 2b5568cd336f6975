"""Parameters of a model, and the operations of one forward pass.

Contract: no torch. Every model that can be planned is a `Countable`: a Transformer by its `TransformerConfig` (here), a
traced `nn.Module` (`traced`), or an ONNX file (`onnx_graph`). Counts are in elements; bytes depend on the precision. A
multiply-add counts as two FLOPs.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from deepseek.config import TransformerConfig
from deepseek.settings import settings
from deepseek.spec import InputError

Head = Literal["none", "tied", "untied"]
OpKind = Literal["product", "attention", "memory", "elementwise"]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation as an engine runs it, after fusion, `count` times."""

    kind: OpKind
    """product: a matrix product or convolution; attention: scores, softmax and sum in one kernel; memory: only moves
    data; elementwise: an accelerator's engine fuses it with its neighbours, a CPU's runtime runs it separately."""
    flops: float = 0.0
    outputs: float = 0.0
    """Elements that it computes; too few leave a wide device partly idle."""
    moved: float = 0.0
    """Activations read and written."""
    cached: float = 0.0
    """Cached keys and values read, which 8-bit precisions do not shrink."""
    weights: float = 0.0
    """Weights read."""
    count: int = 1


class Countable(Protocol):
    """A model that can be planned."""

    @property
    def name(self) -> str: ...
    @property
    def parameters(self) -> int: ...
    @property
    def trained_parameters(self) -> int:
        """Parameters that get a gradient: all, unless a module has frozen ones."""
        ...

    @property
    def product_parameters(self) -> int:
        """Parameters of matrix products and convolutions, which 8-bit precisions shrink."""
        ...

    @property
    def stepped_elements(self) -> int:
        """Peak of AdamW's temporaries, in elements, if it updates one tensor after the other: see `stepped`."""
        ...

    @property
    def default_length(self) -> int:
        """Tokens per sample; 1 if samples have no length."""
        ...

    def ops(self, batch: int, length: int) -> list[Op]:
        """Operations of one forward pass of `batch` samples of `length` tokens."""
        ...

    def live_elements(self, batch: int, length: int) -> float:
        """Peak number of activations in memory during a forward pass without gradients."""
        ...


def stepped(sizes: Iterable[int]) -> int:
    """Peak of AdamW's temporaries, in elements, for tensors of these sizes in order: the root of the second moment, the
    quotient, and the quotient of the previous tensor."""
    most = before = 0
    for size in sizes:
        most, before = max(most, before + 2 * size), size
    return most


def flops(ops: Iterable[Op]) -> float:
    return sum(op.flops * op.count for op in ops)


@settings
class TransformerSize:
    """A `deepseek.transformer.Transformer`, optionally with a layer of logits over the vocabulary."""

    config: TransformerConfig
    head: Head = "none"
    """tied: the weights of the logits are the token embeddings: no additional parameters, but the same FLOPs."""
    name: str = "transformer"

    @property
    def block_product_parameters(self) -> int:
        """Weights of one block's six matrix products, without biases."""
        width, inner = self.config.hidden_size, self.config.intermediate_size
        return 4 * width * width + 2 * width * inner

    @property
    def block_parameters(self) -> int:
        """All parameters of one block: products with their biases, two LayerNorms."""
        width, inner = self.config.hidden_size, self.config.intermediate_size
        return self.block_product_parameters + 5 * width + inner + 4 * width

    @property
    def head_parameters(self) -> int:
        return self.config.vocab_size * self.config.hidden_size if self.head == "untied" else 0

    @property
    def parameters(self) -> int:
        """Exactly the parameters of the module; a tied head adds none."""
        config = self.config
        embeddings = (config.vocab_size + config.max_length) * config.hidden_size
        return embeddings + config.num_layers * self.block_parameters + 2 * config.hidden_size + self.head_parameters

    @property
    def trained_parameters(self) -> int:
        return self.parameters

    @property
    def product_parameters(self) -> int:
        return self.config.num_layers * self.block_product_parameters + self.head_parameters

    @property
    def stepped_elements(self) -> int:
        config = self.config
        rows = [config.vocab_size, config.max_length, 1, config.hidden_size, 1, config.intermediate_size]
        return config.hidden_size * stepped(rows)

    @property
    def default_length(self) -> int:
        return self.config.max_length

    def check_length(self, length: int) -> None:
        """Raises InputError for a sequence longer than max_length."""
        if length > self.config.max_length:
            raise InputError(
                f"length: seen {length}; the model's max_length is {self.config.max_length}: give a larger max_length"
            )

    def ops(self, batch: int, length: int) -> list[Op]:
        """Per block: four products (query, key and value are one), attention, two normalisations; then the head.

        Attention counts all T x T scores, causal or not, like published FLOP figures.
        """
        self.check_length(length)
        config, width, inner = self.config, self.config.hidden_size, self.config.intermediate_size
        tokens = batch * length
        block = [_product(tokens, width, 3 * width), _product(tokens, width, width)]
        block += [_product(tokens, width, inner), _product(tokens, inner, width)]
        scores = batch * config.num_attention_heads * length * length
        block.append(
            Op(kind="attention", flops=4.0 * scores * config.head_size, outputs=scores, moved=4.0 * tokens * width)
        )
        block.append(Op(kind="memory", count=2))  # the caches of the products around it hold what it moves
        # Two normalisations, two residual sums, four changes of layout, the activation; softmax and mask of the scores.
        block.append(Op(kind="elementwise", outputs=tokens * (8.0 * width + inner) + 2.0 * scores))
        found = [replace(op, count=op.count * config.num_layers) for op in block]
        found.append(Op(kind="memory", moved=2.0 * tokens * width))  # the embedding
        if self.head != "none":
            found.append(_product(tokens, width, config.vocab_size))
        return found

    def decode_ops(self, batch: int, context: int) -> list[Op]:
        """Operations of one generated token for each of `batch` sequences with `context` cached tokens."""
        config, width, inner = self.config, self.config.hidden_size, self.config.intermediate_size
        block = [_product(batch, width, 3 * width), _product(batch, width, width)]
        block += [_product(batch, width, inner), _product(batch, inner, width)]
        cached = 2.0 * batch * context * width
        block.append(Op(kind="attention", flops=2 * cached, outputs=batch * width, cached=cached))
        block.append(Op(kind="memory", count=2))
        head = [] if self.head == "none" else [_product(batch, width, config.vocab_size)]
        return [replace(op, count=op.count * config.num_layers) for op in block] + head

    def live_elements(self, batch: int, length: int) -> float:
        """The residual, a product's input and its output; or the logits, if they are wider."""
        self.check_length(length)
        config, tokens = self.config, batch * length
        widest = max(3 * config.hidden_size, config.intermediate_size)
        logits = 0 if self.head == "none" else config.vocab_size
        return float(tokens * (config.hidden_size + max(config.hidden_size + widest, logits)))

    def cache_elements(self, tokens: int) -> float:
        return 2.0 * self.config.num_layers * self.config.hidden_size * tokens


def _product(rows: float, width_in: int, width_out: int) -> Op:
    return Op(
        kind="product",
        flops=2.0 * rows * width_in * width_out,
        outputs=rows * width_out,
        moved=rows * (width_in + width_out),
        weights=width_in * width_out,
    )


# Layers, width, heads, vocabulary, length. Devlin et al. 2019, section 3; Radford et al. 2019, table 2; Brown et al.
# 2020, table 2.1.
_SHAPES = {
    "bert-base": (12, 768, 12, 30_522, 512),
    "bert-large": (24, 1024, 16, 30_522, 512),
    "gpt2-xl": (48, 1600, 25, 50_257, 1024),
    "gpt3-175b": (96, 12_288, 96, 50_257, 2048),
}


def presets() -> dict[str, TransformerSize]:
    """Well-known shapes; GPT's logits are tied to its embeddings."""
    found = {}
    for name, (layers, width, heads, vocabulary, length) in _SHAPES.items():
        config = TransformerConfig.of_any_size(
            num_layers=layers,
            hidden_size=width,
            num_attention_heads=heads,
            intermediate_size=4 * width,
            vocab_size=vocabulary,
            max_length=length,
            causal=name.startswith("gpt"),
        )
        found[name] = TransformerSize(config=config, head="tied" if config.causal else "none", name=name)
    return found

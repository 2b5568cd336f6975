"""A pre-norm Transformer on `scaled_dot_product_attention`, and weight initialisation for any module.

Contract: `Transformer(config)(ids)` maps ids (B, T) to hidden states (B, T, D). Padding is never
attended to and never makes a NaN, not even in a row of nothing else. The graph exports through
`torch.onnx.export(dynamo=True)` with batch and sequence axes dynamic, and holds in fp16: masked
scores are a finite number that fp16 can carry.

Examples:
    model = Transformer(TransformerConfig(num_layers=12, hidden_size=768, num_attention_heads=12,
                                          intermediate_size=3072, vocab_size=30_000, causal=True))
    hidden = model(ids)                         # padding is where ids == config.padding_id
    hidden = model(ids, attention_mask)         # or where the mask is 0
    model.gradient_checkpointing = True         # less memory in training, a third more compute
    init_weights(torch.nn.LSTM(8, 16))          # any module
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from deepseek.config import TransformerConfig, check_choice
from deepseek.spec import InputError

# Added to a score that must not count. Finite, and small enough for fp16 (65504) and for ModelOpt's
# AutoCast, which leaves in fp32 whatever exceeds 512: with -1e4 here no softmax becomes fp16. Exactly
# nothing leaks through: exp(x) is 0 in fp32 below -104, and attention scores do not differ by 196.
MASKED = -300.0

Scheme = Literal["auto", "xavier_uniform", "kaiming_uniform"]
ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
Fill = Callable[[Tensor], object]
_XAVIER: Fill = nn.init.xavier_uniform_
_KAIMING: Fill = partial(nn.init.kaiming_uniform_, nonlinearity="relu")
SPECTRAL_STEPS = 15  # as many as torch's spectral_norm begins with
_RELUS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_DENSE = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): softmax(q kᵀ / √head_size + mask) v, in every head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.head_size  # how many heads there are, the layers' width says: pruning takes some
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, T, D), (B, 1, T, T)
        heads = (x.shape[0], x.shape[1], -1, self.head_size)
        query, key, value = (layer(x).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if mask is None else mask.to(query.dtype),
            dropout_p=self.config.attention_dropout if self.training else 0.0,
            is_causal=mask is None and self.config.causal,  # no mask to build: the fused kernels take this one
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention, then x + feed-forward, each behind a LayerNorm.

    Pre-norm, which trains stably when deep (Xiong et al. 2020).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            ACTIVATIONS[config.activation](),
            nn.Dropout(config.ffn_dropout),
            nn.Linear(config.intermediate_size, config.hidden_size),
            nn.Dropout(config.ffn_dropout),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (B, T, D)
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    """Encoder (or, with `causal`, decoder) from ids to hidden states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.padding_id)
        self.positions = nn.Embedding(config.max_length, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        init_weights(self, config.initialization)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, D) of ids (B, T); `attention_mask` (B, T) is 0 where there is padding.

        Without a mask, padding is where ids equal `config.padding_id`. What stands at padding is
        finite and means nothing. Raises InputError for a sequence longer than `config.max_length`.
        """
        length = ids.shape[1]
        exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # where a size is no plain number
        if not exporting and length > self.config.max_length:
            raise InputError(f"sequence of {length} tokens; the model's max_length is {self.config.max_length}")
        if attention_mask is None and self.config.padding_id is not None:
            attention_mask = ids != self.config.padding_id
        mask = None if attention_mask is None else self._additive(attention_mask)
        x = self.dropout(self.tokens(ids) + self.positions.weight[:length])  # (B, T, D)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return self.norm(x)

    def _additive(self, attention_mask: Tensor) -> Tensor:
        """What is added to the scores (B, 1, T, T): 0 where query may see key, MASKED elsewhere."""
        steps = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        visible = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        if self.config.causal:
            visible = visible & (steps[:, None] >= steps)
        # Every token sees itself, so that no row of scores is masked throughout: the softmax of such a
        # row is 0/0. Real tokens lose nothing by it, and nobody sees the padding that does.
        visible = visible | (steps[:, None] == steps)
        return torch.where(visible, 0.0, MASKED)


def init_weights(module: nn.Module, scheme: Scheme = "auto") -> nn.Module:
    """Initialises the layers of any module in place and returns it; normalisation layers stay as they are.

    - Linear, convolution, embedding, attention: Xavier uniform, ±√(6 / (fan in + fan out)) (Glorot and
      Bengio 2010); Kaiming uniform, ±√(6 / fan in) (He et al. 2015), where the next activation is a ReLU
      ("auto" goes by the order in which layers are registered; a ReLU that is only called as a function is
      not seen: pass "kaiming_uniform"). Biases 0, padding embeddings 0.
    - LSTM, GRU, RNN and their cells: Xavier uniform for each gate by itself, biases 0, forget bias 1
      (Jozefowicz et al. 2015).
      torch adds two bias vectors, `bias_ih` and `bias_hh`: the 1 stands in `bias_ih` only, so that the
      sum is 1. A GRU has no forget gate; what keeps the old state is its update gate z, as torch has it
      (h' = (1 - z) * n + z * h), so z gets the 1: both kinds then remember at the start of training.
    - A weight with a parametrization (weight_norm, spectral_norm) is assigned through it.
    """
    check_choice("init_weights", "scheme", scheme, Scheme)
    kaiming = _layers_before_relu(module) if scheme == "auto" else set()
    with torch.no_grad():
        for layer in module.modules():
            if any(nn.parameter.is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
                raise InputError(f"init_weights: {type(layer).__name__} has no shape yet; run one forward pass first")
            if isinstance(layer, _DENSE):
                _set(layer, "weight", _KAIMING if scheme == "kaiming_uniform" or layer in kaiming else _XAVIER)
                if layer.bias is not None:
                    _set(layer, "bias", nn.init.zeros_)
            elif isinstance(layer, nn.Embedding | nn.EmbeddingBag):
                _set(layer, "weight", _XAVIER)
            elif isinstance(layer, nn.MultiheadAttention):
                _init_multihead(layer)
            elif isinstance(layer, nn.RNNBase | nn.RNNCellBase):
                _init_recurrent(layer)
        for layer in module.modules():  # last: a layer that shares an embedding's weights has filled all of its rows
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None:
                _set(layer, "weight", partial(_zero_row, row=layer.padding_idx))
    return module


def _zero_row(weight: Tensor, row: int) -> None:
    weight[row].zero_()


def _layers_before_relu(module: nn.Module) -> set[nn.Module]:
    found: set[nn.Module] = set()
    last: nn.Module | None = None
    for layer in module.modules():
        if isinstance(layer, _DENSE):
            last = layer
        elif isinstance(layer, _RELUS) and last is not None:
            found.add(last)
        elif type(layer).__module__ == nn.GELU.__module__:  # another activation stands between
            last = None
    return found


def _set(layer: nn.Module, name: str, fill: Fill) -> None:
    """Fills a tensor of a layer; what is computed from others is gone by the next forward pass unless they are set."""
    if any(hasattr(layer, f"{name}_{end}") for end in ("v", "orig")):
        raise InputError(
            f"init_weights: {name} of {type(layer).__name__} is computed by a hook (torch.nn.utils.weight_norm, "
            "spectral_norm or prune); run init_weights before it, or use torch.nn.utils.parametrizations"
        )
    if not parametrize.is_parametrized(layer, name):
        fill(getattr(layer, name))
        return
    value = getattr(layer, name).clone()
    fill(value)
    through: Any = getattr(layer.parametrizations, name)
    try:
        setattr(layer, name, value)
    except RuntimeError:  # one that has no inverse
        fill(through.original)
    training = through.training
    through.train()
    for _ in range(SPECTRAL_STEPS):  # spectral_norm steps as it is read; its vectors were those of the old weight
        getattr(layer, name)
    through.train(training)


def _init_multihead(layer: nn.MultiheadAttention) -> None:
    """The projections in one packed tensor are three layers; `out_proj` is a Linear of its own."""
    if layer.in_proj_weight is not None:
        _set(layer, "in_proj_weight", partial(_xavier_of_each, parts=3))
    else:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            _set(layer, name, _XAVIER)
    if layer.in_proj_bias is not None:
        _set(layer, "in_proj_bias", nn.init.zeros_)


def _xavier_of_each(packed: Tensor, parts: int) -> None:
    for weight in packed.chunk(parts):
        nn.init.xavier_uniform_(weight)


def _init_recurrent(layer: nn.RNNBase | nn.RNNCellBase) -> None:
    lstm, gru = isinstance(layer, nn.LSTM | nn.LSTMCell), isinstance(layer, nn.GRU | nn.GRUCell)
    gates = 4 if lstm else 3 if gru else 1

    def fill_bias(bias: Tensor, remembers: bool) -> None:
        nn.init.zeros_(bias)
        if remembers:
            # torch orders an LSTM's gates input, FORGET, cell, output and a GRU's reset, UPDATE, new.
            nn.init.ones_(bias.chunk(gates)[1])

    plain = [name for name, _ in layer.named_parameters(recurse=False)]
    for name in [*plain, *getattr(layer, "parametrizations", ())]:
        if name.startswith("weight"):
            # an LSTM's projection has no gates
            _set(layer, name, partial(_xavier_of_each, parts=1 if name.startswith("weight_hr") else gates))
        else:
            _set(layer, name, partial(fill_bias, remembers=gates > 1 and name.startswith("bias_ih")))

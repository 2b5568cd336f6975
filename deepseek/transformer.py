"""A pre-norm Transformer on `scaled_dot_product_attention`, and weight initialisation for any module.

Contract: `Transformer(config)(ids)` maps ids (B, T) to hidden states (B, T, D). Tokens never attend to padding, and
padding never causes a NaN, even in a row of padding only. The graph exports through `torch.onnx.export(dynamo=True)`
with dynamic batch and sequence axes, and works in fp16: masked scores are finite and within its range.

Examples:
    model = Transformer(TransformerConfig(num_layers=12, hidden_size=768, num_attention_heads=12,
                                          intermediate_size=3072, vocab_size=30_000, causal=True))
    hidden = model(ids)                         # padding is where ids == config.padding_id
    hidden = model(ids, attention_mask)         # or where the mask is 0
    model.gradient_checkpointing = True         # less memory in training, about a third more compute
    init_weights(torch.nn.LSTM(8, 16))          # any module
"""

from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from deepseek.config import Initialization, TransformerConfig
from deepseek.spec import InputError

# Added to masked attention scores. Finite, within the range of fp16 (65504) and within 512, above which ModelOpt's
# AutoCast keeps values in fp32: with -1e4, no softmax would become fp16. Masked tokens get a weight of exactly 0:
# exp(x) is 0 in fp32 below -104, and attention scores do not differ by 196.
MASKED = -300.0

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}
Fill = Callable[[Tensor], object]
_XAVIER: Fill = nn.init.xavier_uniform_
_KAIMING: Fill = partial(nn.init.kaiming_uniform_, nonlinearity="relu")
_RELUS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU)
_DENSE = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017): softmax(q kᵀ / √head_size + mask) v in each head."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.head_size = config.head_size  # the number of heads follows from the layers' width: pruning removes heads
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
            is_causal=mask is None and self.config.causal,  # without a mask, fused kernels apply the causal one
        )
        return self.out(attended.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)): pre-norm, stable in deep models (Xiong et al. 2020)."""

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
    """Encoder, or decoder with `config.causal`: token ids (B, T) to hidden states (B, T, D).

    It exports to ONNX with dynamic batch and sequence axes. Set `gradient_checkpointing = True` to save memory in
    training.
    """

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
        """Computes the hidden states (B, T, D) of `ids` (B, T).

        `attention_mask` (B, T) is 0 at padding; without it, padding is where ids equal `config.padding_id`. Hidden
        states at padding are finite and meaningless. Raises InputError for a sequence longer than `config.max_length`.
        """
        length = ids.shape[1]
        exporting = torch.compiler.is_exporting() or torch.jit.is_tracing()  # sizes are symbolic there
        if not exporting and length > self.config.max_length:
            raise InputError(f"seen a sequence of {length} tokens; the model's max_length is {self.config.max_length}")
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
        """The mask (B, 1, T, T) added to the scores: 0 where the query may attend to the key, else MASKED."""
        steps = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        visible = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        if self.config.causal:
            visible = visible & (steps[:, None] >= steps)
        # Every token attends to itself, so no row of scores is fully masked: its softmax would be 0/0. This does not
        # change real tokens, and no other token attends to padding.
        visible = visible | (steps[:, None] == steps)
        return torch.where(visible, 0.0, MASKED)


def init_weights(module: nn.Module, scheme: Initialization = "auto") -> nn.Module:
    """Initialises the layers of any module in place and returns the module. Normalisation layers are unchanged.

    - Linear, convolution, embedding and attention layers: Xavier uniform, ±√(6 / (fan in + fan out)) (Glorot and
      Bengio 2010). Layers before a ReLU: Kaiming uniform, ±√(6 / fan in) (He et al. 2015). Biases and padding
      embeddings are 0.
    - LSTM, GRU, RNN and their cells: Xavier uniform for each gate separately, biases 0, forget bias 1 (Jozefowicz et
      al. 2015). torch adds two bias vectors; only `bias_ih` gets the 1, so that the sum is 1. A GRU has no forget
      gate: its update gate z, which keeps the old state (h' = (1 - z) * n + z * h), gets the 1.

    `scheme` "auto" finds ReLUs by the order in which layers are registered. It does not see a ReLU that is only called
    as a function: pass "kaiming_uniform" then, or "xavier_uniform" to use Xavier everywhere.

    Raises InputError for an unknown scheme, for a lazy layer that has no shape yet, and for a weight that is computed
    from other tensors, as by weight_norm.
    """
    if scheme not in get_args(Initialization):
        raise InputError(f"init_weights: scheme: seen {scheme!r}; allowed: {', '.join(get_args(Initialization))}")
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
        for layer in module.modules():  # last, as a layer that shares an embedding's weights fills all of its rows
            if isinstance(layer, nn.Embedding | nn.EmbeddingBag) and layer.padding_idx is not None:
                _set(layer, "weight", lambda weight, row=layer.padding_idx: weight[row].zero_())  # type: ignore[misc]
    return module


def _layers_before_relu(module: nn.Module) -> set[nn.Module]:
    found: set[nn.Module] = set()
    last: nn.Module | None = None
    for layer in module.modules():
        if isinstance(layer, _DENSE):
            last = layer
        elif isinstance(layer, _RELUS) and last is not None:
            found.add(last)
        elif type(layer).__module__ == nn.GELU.__module__:  # another activation comes first
            last = None
    return found


def _set(layer: nn.Module, name: str, fill: Fill) -> None:
    """Fills a tensor of a layer; refuses computed tensors, which the next forward pass would overwrite."""
    if parametrize.is_parametrized(layer, name) or any(hasattr(layer, f"{name}_{end}") for end in ("v", "orig")):
        raise InputError(
            f"init_weights: {name} of {type(layer).__name__} is computed from other tensors (weight_norm, "
            "spectral_norm, prune); run init_weights before you apply them"
        )
    fill(getattr(layer, name))


def _init_multihead(layer: nn.MultiheadAttention) -> None:
    """Initialises the three packed projections as separate layers; `out_proj` is a Linear and handled as one."""
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

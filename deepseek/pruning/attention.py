"""nn.MultiheadAttention with one layer per projection, so that heads can be removed.

Contract: `HeadAttention(attention)` takes over the weights of an `nn.MultiheadAttention`, is called in the same way
and returns the same outputs. The total width of its heads may differ from the width of the input.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class HeadAttention(nn.Module):
    """Attention over `num_heads` heads of `head_dim` each."""

    # nn.TransformerEncoder checks these before it takes its fast path, which reads packed weights.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, packed: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.head_dim = packed.num_heads, packed.head_dim
        self.dropout, self.batch_first = packed.dropout, packed.batch_first
        if packed.in_proj_weight is not None:
            weights = packed.in_proj_weight.detach().chunk(3)
        else:
            weights = tuple(getattr(packed, f"{name}_proj_weight").detach() for name in "qkv")
        biases = (None,) * 3 if packed.in_proj_bias is None else packed.in_proj_bias.detach().chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = packed.out_proj
        self.train(packed.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Like nn.MultiheadAttention's; the returned weights are (B, T, S), or (B, heads, T, S) if not averaged."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        pairs = ((self.query, query), (self.key, key), (self.value, value))
        q, k, v = (layer(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2) for layer, x in pairs)  # (B, H, T, d)
        mask = _additive(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) * self.head_dim**-0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)  # (B, H, T, S)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, T, D)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights


def split_attention(module: nn.Module) -> dict[str, nn.Module]:
    """Replaces each supported nn.MultiheadAttention by HeadAttention; returns the originals by name."""
    found = {name: part for name, part in module.named_modules() if type(part) is nn.MultiheadAttention and name}
    found = {name: part for name, part in found.items() if part.bias_k is None and not part.add_zero_attn}
    for name, part in found.items():
        module.set_submodule(name, HeadAttention(part))
    return dict(found)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def _additive(attn_mask: Tensor | None, key_padding_mask: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum of both masks, to be added to the scores. True, which means "ignore", becomes -inf."""
    masks = []
    if attn_mask is not None:  # (T, S), or (B * H, T, S)
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, like.shape[1])))
    if key_padding_mask is not None:  # (B, S), or (S,) if not batched
        masks.append(key_padding_mask.reshape(-1, 1, 1, key_padding_mask.shape[-1]))
    added: Tensor | None = None
    for mask in masks:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
        added = mask.to(like.dtype) if added is None else added + mask
    return added

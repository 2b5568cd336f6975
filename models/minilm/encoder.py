"""BERT as all-MiniLM-L6-v2 uses it: ids and their mask in, one unit vector out.

This is a plain module instead of the one in `transformers`, so that the exporter, the quantizer and the pruner see
simple blocks, and that library is not needed. Its outputs equal those of `transformers` 5.23 on real sentences, within
the rounding of float32.

Contract: `SentenceEncoder(config)(input_ids, attention_mask)`, both (B, T) int64, returns (B, D). Padding at any
position changes only rounding; a row of padding only gives the zero vector. Unknown ids are treated as [UNK].
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek.config import TransformerConfig
from deepseek.transformer import MASKED, Attention

UNKNOWN = 100  # [UNK] in BERT's uncased vocabulary
SMALLEST_NORM = 1e-6  # of a vector that is scaled to length 1; representable in fp16

# Parts of names in the weights file, and their names here; applied in this order.
RENAMED = (
    ("embeddings.word_embeddings", "tokens"),
    ("embeddings.position_embeddings", "positions"),
    ("embeddings.token_type_embeddings", "segments"),
    ("embeddings.LayerNorm", "norm"),
    ("encoder.layer", "blocks"),
    ("attention.self", "attention"),
    ("attention.output.dense", "attention.out"),
    ("attention.output.LayerNorm", "attention_norm"),
    ("intermediate.dense", "ffn.0"),
    ("output.dense", "ffn.2"),
    ("output.LayerNorm", "ffn_norm"),
)
UNUSED = ("pooler.", "embeddings.position_ids")  # BERT's pooling layer, and a table of 0, 1, 2, ...


class EncoderBlock(nn.Module):
    """norm(x + attention(x)), then norm(x + feed-forward(x)): post-norm (Devlin et al. 2018)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.ffn_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # (B, T, D), (B, 1, 1, T)
        x = self.attention_norm(x + self.attention(x, mask))
        return self.ffn_norm(x + self.ffn(x))


class SentenceEncoder(nn.Module):
    """BERT's encoder, mean pooling over the tokens, and scaling to length 1: ids and mask (B, T) to (B, D)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.padding_id)
        self.positions = nn.Embedding(config.max_length, config.hidden_size)
        self.segments = nn.Embedding(2, config.hidden_size)  # BERT marks two sentences; here there is only one
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.blocks = nn.ModuleList(EncoderBlock(config) for _ in range(config.num_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        known = (input_ids >= 0) & (input_ids < self.config.vocab_size)
        ids = torch.where(known, input_ids, UNKNOWN)
        real = attention_mask != 0  # (B, T)
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]] + self.segments.weight[0]
        x = self.norm(x)  # (B, T, D)
        mask = torch.where(real, 0.0, MASKED)[:, None, None, :]
        for block in self.blocks:
            x = block(x, mask)
        share = real.to(x.dtype) / real.sum(dim=1, keepdim=True).clamp(min=1)  # (B, T), a token's share of the mean
        mean = (x * share[:, :, None]).sum(dim=1)  # not a MatMul, which a quantizer would treat as a layer
        return F.normalize(mean, dim=-1, eps=SMALLEST_NORM)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `BertModel`, renamed for this module."""
    found = {}
    for name, tensor in weights.items():
        if not name.startswith(UNUSED):
            for theirs, ours in RENAMED:
                name = name.replace(theirs, ours)
            found[name] = tensor
    return found

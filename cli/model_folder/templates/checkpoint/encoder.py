"""A text encoder from a checkpoint of Hugging Face transformers: token ids in, one embedding per text out.

`samples` stands in texts.py. For a metric of your own, add `evaluate(predict)` and name it in deploy.toml.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

from .texts import samples

CHECKPOINT = Path(__file__).parent / "checkpoint"
POOLING = "mean"  # of the vectors of the tokens: "mean", "max", or "cls" for the first one
NORMALIZED = False  # True divides each embedding by its length
SIZE = None  # how many numbers of each embedding are kept, the first ones; None: all

__all__ = ["load", "samples"]


class Encoder(nn.Module):
    """input_ids, attention_mask (B, L) -> embedding (B, D)."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors = self.transformer(**inputs, return_dict=True).last_hidden_state  # (B, L, D)
        embedding = pooled(vectors, attention_mask.unsqueeze(-1).to(vectors.dtype))
        embedding = nn.functional.normalize(embedding, dim=-1) if NORMALIZED else embedding
        return embedding[:, :SIZE]


def pooled(vectors: Tensor, mask: Tensor) -> Tensor:
    """One vector for each text (B, D), from those of its tokens (B, L, D); mask (B, L, 1) is 0 for padding."""
    if POOLING == "cls":
        return vectors[:, 0]
    if POOLING == "max":
        return vectors.masked_fill(mask == 0, -1e4).amax(1)  # a number that fp16 has too
    return (vectors * mask).sum(1) / mask.sum(1).clamp(min=1)


def load() -> nn.Module:
    """The encoder with its weights. Raises ValueError if the checkpoint lacks some."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no table of weights that are not used
    settings = {"local_files_only": True, "weights_only": True, "dtype": torch.float32, "output_loading_info": True}
    transformer, report = AutoModel.from_pretrained(CHECKPOINT, ignore_mismatched_sizes=True, **settings)
    missing = [*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])]
    missing = sorted(name for name in missing if "pooler" not in name)  # the pooler is not used
    if missing:
        raise ValueError(f"{CHECKPOINT}: no weights for {', '.join(missing[:3])} in the sizes of config.json")
    return Encoder(transformer)

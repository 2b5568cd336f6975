"""A classifier from a checkpoint of Hugging Face transformers: token ids in, logits out, without softmax or sigmoid.

`samples` stands in texts.py. For a metric of your own, add `evaluate(predict)` and name it in deploy.toml.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from .texts import samples

CHECKPOINT = Path(__file__).parent / "checkpoint"

__all__ = ["load", "samples"]


class Classifier(nn.Module):
    """The inputs of deploy.toml (B, L) -> logits, as deploy.toml says."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.transformer(input_ids=input_ids, attention_mask=attention_mask, **types, return_dict=True).logits


def load() -> nn.Module:
    """The classifier with its weights. Raises ValueError if the checkpoint lacks some."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # no table of weights that are not used
    settings = {"local_files_only": True, "weights_only": True, "dtype": torch.float32, "output_loading_info": True}
    transformer, report = AutoModelForSequenceClassification.from_pretrained(
        CHECKPOINT, ignore_mismatched_sizes=True, **settings
    )
    missing = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
    if missing:
        raise ValueError(f"{CHECKPOINT}: no weights for {', '.join(missing[:3])} in the sizes of config.json")
    return Classifier(transformer)

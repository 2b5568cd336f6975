"""A text encoder from a checkpoint of Hugging Face transformers: token ids in, one embedding per text out.

`samples` stands in texts.py. For a metric of your own, add `evaluate(predict)` and name it in deploy.toml.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.utils import logging

from .texts import samples

CHECKPOINT = Path(__file__).parent / "checkpoint"
POOLING = "mean"  # of the tokens' vectors: mean, cls (the first), max, lasttoken, weightedmean, mean_sqrt_len_tokens
LAYERS: list[str] = []  # what follows: 2_Dense is a folder in checkpoint/, 3_Normalize divides by the length
SIZE = None  # how many numbers of each embedding are kept, the first ones; None: all

__all__ = ["load", "samples"]


class Encoder(nn.Module):
    """input_ids, attention_mask (B, L) -> embedding (B, D)."""

    def __init__(self, transformer: nn.Module, layers: list[nn.Module]) -> None:
        super().__init__()
        self.transformer = transformer
        self.layers = nn.Sequential(*layers)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors = self.transformer(**inputs, return_dict=True).last_hidden_state  # (B, L, D)
        return self.layers(pooled(vectors, attention_mask))[:, :SIZE]


def pooled(vectors: Tensor, mask: Tensor) -> Tensor:
    """One vector for each text (B, D), from those of its tokens (B, L, D); mask (B, L) is 0 for padding."""
    if POOLING == "cls":
        return vectors[:, 0]
    if POOLING == "max":
        return vectors.masked_fill(mask.unsqueeze(-1) == 0, -1e4).amax(1)  # a number that fp16 has too
    place = mask.cumsum(1)  # 1 for the first token of a text
    if POOLING == "lasttoken":
        mask = mask * (place == place[:, -1:])
    weights = mask.unsqueeze(-1).to(vectors.dtype)  # (B, L, 1)
    if POOLING == "weightedmean":
        weights = weights * place.unsqueeze(-1) / place.shape[1]  # at most 1, so that fp16 has their sum
    total = weights.sum(1).clamp(min=1e-4)
    return (vectors * weights).sum(1) / (total.sqrt() if POOLING == "mean_sqrt_len_tokens" else total)


class Normalize(nn.Module):
    """Divides each embedding by its length."""

    def forward(self, embedding: Tensor) -> Tensor:
        return nn.functional.normalize(embedding, dim=-1)


def dense(folder: Path) -> nn.Module:
    """A linear layer and its activation, as sentence-transformers saves them."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    linear = nn.Linear(settings["in_features"], settings["out_features"], bias=settings.get("bias", True))
    if (path := folder / "model.safetensors").is_file():
        weights = load_file(path)
    else:
        weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    linear.load_state_dict({name.removeprefix("linear."): value for name, value in weights.items()})
    activation = settings.get("activation_function", "torch.nn.Tanh").rpartition(".")[2]
    return nn.Sequential(linear, getattr(nn, activation)())


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
    transformer.config.use_cache = False  # a decoder would return its keys and values too
    layers = [Normalize() if name.endswith("Normalize") else dense(CHECKPOINT / name) for name in LAYERS]
    return Encoder(transformer, layers)

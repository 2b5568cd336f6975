"""Checkpoints of transformers with tiny random weights and a tokenizer of single characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from cli.main import values_of
from cli.model_folder.import_checkpoint import main

POSITIONS = 66  # max_position_embeddings
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 120,
    "max_position_embeddings": POSITIONS,
}
HEADS_OF_16 = SIZES | {"num_key_value_heads": 1, "head_dim": 16}
CONFIGS: dict[str, Any] = {
    "albert": lambda: transformers.AlbertConfig(**SIZES, embedding_size=16),
    "bert": lambda: transformers.BertConfig(**SIZES),
    "camembert": lambda: transformers.CamembertConfig(**SIZES),
    "deberta-v2": lambda: transformers.DebertaV2Config(
        **SIZES | {"relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=120, max_position_embeddings=POSITIONS
    ),
    "electra": lambda: transformers.ElectraConfig(**SIZES, embedding_size=16),
    "modernbert": lambda: transformers.ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2, local_attention=16
    ),
    "eurobert": lambda: transformers.EuroBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, mask_token_id=3
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **HEADS_OF_16,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=16,
        use_bidirectional_attention=True,
    ),
    "gte": lambda: transformers.GteConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**HEADS_OF_16, sliding_window=16),
    "mpnet": lambda: transformers.MPNetConfig(**SIZES),
    "nomic_bert": lambda: transformers.NomicBertConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, num_key_value_heads=1),
    "qwen3": lambda: transformers.Qwen3Config(**HEADS_OF_16),
    "roberta": lambda: transformers.RobertaConfig(**SIZES),
    "t5": lambda: transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, vocab_size=120),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SIZES),
}
MEAN = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
"""Settings of a pooling module."""
TANH = "torch.nn.modules.activation.Tanh"
HEADS = {
    "encoder": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
    "token-classifier": "AutoModelForTokenClassification",
    "cross-encoder": "AutoModelForSequenceClassification",
}
LABELS = {
    "classifier": ["bad", "fair", "good"],
    "token-classifier": ["O", "B-PER", "I-PER", "B-LOC"],
    "cross-encoder": ["0"],
}


def write_checkpoint(folder: Path, kind: str, task: str = "encoder", *, tokenizer: bool = True, **saving: Any) -> Any:
    """Saves a checkpoint with `save_pretrained(**saving)`; returns its model."""
    config = CONFIGS[kind]()
    if labels := LABELS.get(task):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: place for place, label in enumerate(labels)}
    torch.manual_seed(0)
    made = transformers.T5EncoderModel if kind == "t5" else getattr(transformers, HEADS[task]).from_config
    model = made(config).eval()
    for weights in model.parameters():
        torch.nn.init.normal_(weights, std=0.2)
    model.save_pretrained(folder, **saving)
    if tokenizer:
        write_tokenizer(folder / "tokenizer.json", config.pad_token_id or 0)
    return model


def import_checkpoint(folder: Path, *words: str) -> None:
    """Imports a checkpoint into the folder models/ beside it."""
    main(values_of("import", str(folder), "--models", str(folder.parent / "models"), *words))


def write_tokenizer(path: Path, padding: int) -> None:
    """A WordPiece tokenizer of single characters that frames texts as BERT's does."""
    vocabulary = {"[PAD]": padding, "[CLS]": 1 - padding, "[SEP]": 2, "[UNK]": 3}
    for character in "abcdefghijklmnopqrstuvwxyz0123456789.,?!'%-:()":
        vocabulary |= {character: len(vocabulary), f"##{character}": len(vocabulary) + 1}
    made = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", 2)]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    made.save(str(path))


def write_modules(folder: Path, pooling: dict[str, Any], *more: str) -> None:
    """The files that sentence-transformers writes beside a checkpoint: modules.json and each module's settings.

    A Dense module halves each number of the first half of an embedding, and adds 0.1. The first one is a pickle.
    """
    kinds, size = ("Transformer", "Pooling", *more), 32
    rows = [
        {
            "idx": place,
            "name": str(place),
            "path": f"{place}_{kind}" if place else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for place, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    for place, kind in enumerate(kinds[1:], 1):
        inside = folder / f"{place}_{kind}"
        inside.mkdir(exist_ok=True)
        settings = pooling if kind == "Pooling" else {}
        if kind == "Dense":
            weights = {"linear.weight": torch.eye(size // 2, size) / 2, "linear.bias": torch.full((size // 2,), 0.1)}
            settings = {"in_features": size, "out_features": size // 2, "activation_function": TANH}
            if place == 2:
                torch.save(weights, inside / "pytorch_model.bin")
            else:
                save_file(weights, inside / "model.safetensors")
            size //= 2
        (inside / "config.json").write_text(json.dumps(settings))


def change(folder: Path, **values: Any) -> None:
    """Sets keys of config.json; None removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))

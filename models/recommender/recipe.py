"""The recommender's sizes, and how it is trained: settings that fit the available memory, and the training windows.

Contract: a step always has the same number of histories. If their logits would take too much memory, because the
catalogue is large, the step is split into several batches; for MovieLens it never is.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepseek.config import TrainingConfig, TransformerConfig
from deepseek.spec import InputError
from deepseek.training.memory import limit_bytes
from models.recommender import data
from models.recommender.data import HISTORY, PADDING, Interactions

HIDDEN_SIZE = 96  # width of the model, and so of an item's vector
# Tensors of the size of the logits that exist at once (measured with deepseek.sizing.model.live_memory), in training
# and in fine-tuning, which also runs the unpruned model.
TRAINING_COPIES, FINETUNING_COPIES = 3, 7
STATE_COPIES = 8  # of the items' vectors: weights, gradients, moments, running average, temporaries of a step
ACTIVATION_BYTES = 1_000_000  # per history, independent of the catalogue
SETTINGS = TrainingConfig(
    max_epochs=28,
    batch_size=64,
    learning_rate=3e-3,
    plateau_patience=1,  # the loss of averaged weights is smooth: two worse epochs are a real plateau
    ema_decay=0.99,
    early_stopping_patience=5,
)


def transformer_config(num_items: int) -> TransformerConfig:
    """The model's sizes: small on purpose, for a catalogue of some thousand items."""
    return TransformerConfig.of_any_size(
        num_layers=2,
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=2,
        intermediate_size=192,
        vocab_size=num_items + 1,
        max_length=HISTORY,
        padding_id=PADDING,
        causal=True,
        embedding_dropout=0.3,
        attention_dropout=0.0,
        ffn_dropout=0.3,
    )


def training_config(seed: int, num_items: int) -> TrainingConfig:
    """Settings chosen on MovieLens' validation split; training takes about 90 s on two free cores."""
    return within_memory(replace(SETTINGS, seed=seed), num_items, TRAINING_COPIES)


def finetuning_config(num_items: int) -> TrainingConfig:
    """Settings for a pruned model, also chosen on the validation split."""
    return within_memory(replace(SETTINGS, max_epochs=16), num_items, FINETUNING_COPIES)


def within_memory(config: TrainingConfig, num_items: int, copies: int) -> TrainingConfig:
    """Splits each step into smaller batches if those of `config` would take more than half of the memory.

    `copies` is the number of copies of the logits. Raises InputError if not even one history fits.
    """
    half = limit_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / 2
    row = ACTIVATION_BYTES + copies * HISTORY * (num_items + 1) * 4
    state = STATE_COPIES * (num_items + 1) * HIDDEN_SIZE * 4
    whole = size = int(config.batch_size)
    while size > 1 and state + size * row > half:
        size //= 2
    if state + size * row > half:
        raise InputError(
            f"{num_items:,} items: training takes {(state + row) / 1e9:.2f} GB at one history per batch, but half of "
            f"the memory is {half / 1e9:.2f} GB; remove rare items from the log, or use a machine with more memory"
        )
    return replace(config, batch_size=size, accumulation_steps=whole // size)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of the histories, drawn again in every epoch: inputs and targets (HISTORY,).

    Each epoch takes other windows of long histories, and shuffles items that a user saw at the same moment: their order
    is random, and learning it costs quality. A small log is repeated until there are `at_least` windows, because
    patience counts epochs, and an epoch of three steps is too short to judge.
    """

    def __init__(self, log: Interactions, seed: int, at_least: int) -> None:
        pairs = zip(log.training, log.training_times, strict=True)
        self.histories = [(items, times) for items, times in pairs if len(items) >= 2]
        shares = [-(-(len(items) - 1) // HISTORY) for items, _ in self.histories]  # windows that would cover it
        once = np.repeat(np.arange(len(self.histories)), shares)
        self.owners = np.tile(once, -(-at_least // len(once)))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.owners)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        items, times = self.histories[self.owners[index]]
        random = np.random.default_rng([self.seed, self.epoch, index])
        items = items[np.lexsort((random.random(len(items)), times))]
        end = random.integers(min(HISTORY + 1, len(items)), len(items) + 1)
        row = torch.from_numpy(data.left_padded([items[:end]], HISTORY + 1)[0])
        return row[:-1], row[1:]

"""How the recommender is trained: settings that fit the memory there is, and what is learned from.

Contract: a step is of as many histories whatever the catalogue; where the logits of all of them at once would take too
much memory, it is made of several batches. MovieLens' never do.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.training.memory import limit_bytes
from models.recommender import data
from models.recommender.data import HISTORY, Interactions

HIDDEN_SIZE = 96  # of the model, and so of an item's vector
# Measured (deepseek.sizing.live): logits, and what has their size, that are there at once; so with the unpruned model.
TRAINING_COPIES, FINETUNING_COPIES = 3, 7
STATE_COPIES = 8  # of the items' vectors: weights, gradients, moments, the running average, what steps take
ACTIVATION_BYTES = 1_000_000  # of a history, whatever the catalogue


def training_config(seed: int, num_items: int) -> TrainingConfig:
    """Chosen on MovieLens' validation split; about a minute and a half on two free cores."""
    config = TrainingConfig(
        max_epochs=28,
        batch_size=64,
        learning_rate=3e-3,
        plateau_patience=1,  # the loss of averaged weights hardly wavers: two worse epochs are no accident
        ema_decay=0.99,
        early_stopping_patience=5,
        seed=seed,
    )
    return within_memory(config, num_items, TRAINING_COPIES)


def finetuning_config(num_items: int) -> TrainingConfig:
    """For a pruned model; chosen on the validation split as well."""
    config = TrainingConfig(
        max_epochs=16,
        batch_size=64,
        learning_rate=3e-3,
        plateau_patience=1,
        ema_decay=0.99,
        early_stopping_patience=5,
    )
    return within_memory(config, num_items, FINETUNING_COPIES)


def within_memory(config: TrainingConfig, num_items: int, copies: int) -> TrainingConfig:
    """The same steps in smaller batches, where those of `config` would take more than half of the memory.

    `copies` are of the logits. Raises InputError where not even one history fits.
    """
    half = limit_bytes(torch.device("cuda" if torch.cuda.is_available() else "cpu")) / 2
    row = ACTIVATION_BYTES + copies * HISTORY * (num_items + 1) * 4
    state = STATE_COPIES * (num_items + 1) * HIDDEN_SIZE * 4
    whole = size = int(config.batch_size)
    while size > 1 and state + size * row > half:
        size //= 2
    if state + size * row > half:
        raise InputError(
            f"{num_items:,} items: training takes {(state + row) / 1e9:.2f} GB at one history a batch, half of the "
            f"memory is {half / 1e9:.2f} GB; leave rare items out of the log, or train on a machine with more"
        )
    return replace(config, batch_size=size, accumulation_steps=whole // size)


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """Stretches of the histories, drawn anew in every epoch: inputs and targets (HISTORY,).

    Of a long history another stretch, and what one user saw at the same moment in another order: that
    order is chance, and to learn it costs quality. A small log is gone through several times, until
    there are `at_least` windows: patience counts epochs, and an epoch of three steps says nothing.
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

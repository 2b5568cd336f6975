"""The order of the rows in each epoch, and their batches."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from deepseek.config import TrainingConfig
from deepseek.spec import InputError


class EpochSampler(Sampler[int]):
    """A random order. It depends only on seed and epoch, so a resumed epoch has the same one."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())


def loader_of(
    data: Dataset[Any], order: EpochSampler, batch_rows: int, config: TrainingConfig, *, drop_last: bool
) -> DataLoader[Any]:
    """Batches of the training data in this order."""
    # With its own generator: otherwise a loader draws from the global random state at the start of each epoch, once
    # more in a resumed run than in an uninterrupted one, and dropout would differ.
    generator = torch.Generator().manual_seed(config.seed)
    return DataLoader(
        data,
        batch_size=batch_rows,
        sampler=order,
        num_workers=config.num_workers,
        generator=generator,
        collate_fn=stacked,
        drop_last=drop_last,
    )


def stacked(rows: list[Any]) -> Any:
    """A batch of rows, as torch makes it. Raises InputError for rows that do not fit together."""
    try:
        return default_collate(rows)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"dataset: these rows make no batch: {reason}; give every row tensors, arrays or numbers of the same "
            "shapes, padded if they have lengths"
        ) from None


def leaves_a_row(model: nn.Module, rows: int, batch_rows: int) -> bool:
    """Whether each epoch would end with a single row, too few for BatchNorm."""
    has_batch_norm = any(isinstance(each, _BatchNorm) for each in model.modules())
    return rows > batch_rows and rows % batch_rows == 1 and has_batch_norm

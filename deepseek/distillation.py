"""Fine-tuning without labels: a changed model learns the outputs of the model that it came from.

For a pruned model that has inputs but no training data of its own. Contract: the training recipe
(`deepseek.training`) over given batches, every fifth of them held out: the weights that come closest on those are
kept, those before among them. Dropout stays off and batch norm's statistics stay as they are: both models give
what they would give when served. Resumes from `checkpoints` as every training does.

Examples:
    before, after = distil(pruned, original, [(ids,) for ids in batches], checkpoints="build/mine/distillation")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from deepseek.checkpoints import digest
from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.training import train_model

HELD_OUT = 5  # every fifth batch
SETTINGS = TrainingConfig(
    max_epochs=20,
    batch_size=1,  # an item is a batch already
    learning_rate=3e-4,
    plateau_patience=1,
    early_stopping_patience=4,
    explosion_factor=None,  # what began near nothing may well grow tenfold; the best weights are kept in any case
)

Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs, float outputs of the teacher


def distil(
    module: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    config: TrainingConfig | None = None,
    *,
    checkpoints: str | Path | None = None,
) -> tuple[float, float]:
    """Trains in place; the error on held-out batches before and after, 1 being as far off as zeros.

    Raises InputError where there are too few batches to hold one out, or no output is a float.
    """
    if len(batches) < 2:
        raise InputError(f"distillation: seen {len(batches)} batch; at least 2 are needed, one of them to hold out")
    module.eval()
    pairs = [(tuple(inputs), _outputs(teacher.eval(), inputs)) for inputs in batches]
    held_out = [pair for place, pair in enumerate(pairs) if place % HELD_OUT == min(HELD_OUT, len(pairs)) - 1]
    student = AsServed(module)
    identity = {"weights": digest(dict(module.state_dict())), "held_out": digest(held_out)}
    with torch.no_grad():
        before = sum(float(_error(student, _as_item(pair))) for pair in held_out) / len(held_out)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    rest = [pair for place, pair in enumerate(pairs) if place % HELD_OUT != min(HELD_OUT, len(pairs)) - 1]
    with _learning(module):
        result = train_model(
            student,
            _Items(rest),
            _Items(held_out),
            _error,
            config or SETTINGS,
            checkpoints=checkpoints,
            identity=identity,
        )
    module.cpu()
    if result.best_loss >= before:
        module.load_state_dict(kept)
    return before, min(before, result.best_loss)


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """All of it learns, for as long: that a model which is served is frozen says nothing of what may be tuned."""
    frozen = [each for each in module.parameters() if each.is_floating_point() and not each.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each in frozen:
            each.requires_grad_(False)


class AsServed(nn.Module):
    """A module that stays in eval mode when it is trained."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> AsServed:
        self.training = mode
        return self

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


class _Items(Dataset[Pair]):
    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.pairs[index]


def _error(student: nn.Module, item: Pair) -> Tensor:
    """Mean over the outputs of their squared error, relative to their mean square. A loader's item has one batch."""
    inputs, wanted = item
    errors = []
    for output, goal in zip(_floats(student(*(each[0] for each in inputs))), (each[0] for each in wanted), strict=True):
        finite = output.isfinite() & goal.isfinite()
        scale = goal[finite].float().square().mean().clamp(min=1e-12)
        errors.append((output[finite].float() - goal[finite].float()).square().mean() / scale)
    return torch.stack(errors).mean()


def _as_item(pair: Pair) -> Pair:
    inputs, wanted = (tuple(each[None] for each in part) for part in pair)
    return inputs, wanted


def _outputs(teacher: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = _floats(teacher(*inputs))
    if not found:
        raise InputError(f"distillation: no output of {type(teacher).__name__} is a float, there is nothing to learn")
    return tuple(found)


def _floats(returned: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

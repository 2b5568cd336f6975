"""Fine-tuning without labels: a pruned model learns the outputs of the original model.

Contract: runs the training recipe (`deepseek.training`) on the given batches and holds out every fifth batch. It keeps
the weights with the smallest error on those, which may be the initial weights. Both models behave as when served:
dropout is off and the statistics of batch norm are fixed. Resumes from `checkpoints` like any training run.

Examples:
    before, after = distil(pruned, original, [(ids,) for ids in batches], checkpoints="build/mine/distillation")
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from deepseek.checkpoints import digest
from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.training import train_model

HELD_OUT = 5  # every fifth batch
SETTINGS = TrainingConfig(
    max_epochs=20,
    batch_size=1,  # each item is already a batch
    learning_rate=3e-4,
    plateau_patience=1,
    early_stopping_patience=4,
    explosion_factor=None,  # a loss that starts near 0 may grow tenfold; the best weights are kept anyway
)

Pair = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # inputs, float outputs of the teacher


def distil(
    module: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    *,
    checkpoints: str | Path | None = None,
) -> tuple[float, float]:
    """Trains `module` in place; returns its error on held-out batches before and after.

    The error is the mean squared error relative to the teacher's mean square: outputs of all zeros have an error of 1.
    Raises InputError for fewer than 2 batches, or if no output is a float.
    """
    if len(batches) < 2:
        raise InputError(f"distillation: seen {len(batches)} batch; at least 2 are needed, one of them to hold out")
    module.eval()
    pairs = [(tuple(inputs), _outputs(teacher.eval(), inputs)) for inputs in batches]
    last = min(HELD_OUT, len(pairs)) - 1
    held_out = [pair for place, pair in enumerate(pairs) if place % HELD_OUT == last]
    rest: Any = [pair for place, pair in enumerate(pairs) if place % HELD_OUT != last]
    student = AsServed(module)
    identity = {"weights": digest(dict(module.state_dict())), "held_out": digest(held_out)}
    with torch.no_grad():
        before = sum(float(_error(student, pair)) for pair in held_out) / len(held_out)
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    with _learning(module):
        result = train_model(
            student,
            rest,
            cast(Any, held_out),  # a list is a dataset
            lambda student, item: _error(student, tree_map(lambda each: each[0], item)),  # a loader's batch of one
            SETTINGS,
            checkpoints=checkpoints,
            identity=identity,
        )
    module.cpu()
    if result.best_loss >= before:
        module.load_state_dict(kept)
    return before, min(before, result.best_loss)


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """Unfreezes all float parameters for the duration: a served model may be frozen, but should still be tuned."""
    frozen = [each for each in module.parameters() if each.is_floating_point() and not each.requires_grad]
    for each in frozen:
        each.requires_grad_(True)
    try:
        yield
    finally:
        for each in frozen:
            each.requires_grad_(False)


class AsServed(nn.Module):
    """Wraps a module so that it stays in eval mode while it is trained."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def train(self, mode: bool = True) -> "AsServed":
        self.training = mode
        return self

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def _error(student: nn.Module, pair: Pair) -> Tensor:
    """Mean over the outputs of the squared error relative to the target's mean square."""
    inputs, wanted = pair
    errors = []
    for output, goal in zip(_floats(student(*inputs)), wanted, strict=True):
        finite = output.isfinite() & goal.isfinite()
        scale = goal[finite].float().square().mean().clamp(min=1e-12)
        errors.append((output[finite].float() - goal[finite].float()).square().mean() / scale)
    return torch.stack(errors).mean()


def _outputs(teacher: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found = _floats(teacher(*inputs))
    if not found:
        raise InputError(f"distillation: no output of {type(teacher).__name__} is a float: there is nothing to learn")
    return tuple(found)


def _floats(returned: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

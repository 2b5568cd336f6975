"""The loss of a run: what the user's function must return, and its mean over the validation rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from deepseek.spec import InputError

LossFunction = Callable[[nn.Module, Any], Tensor]


def checked(loss: LossFunction) -> LossFunction:
    """The same function; raises InputError unless it returns one number, with a gradient while training."""

    def checked_loss(model: nn.Module, batch: Any) -> Tensor:
        value: Any = loss(model, batch)
        if not isinstance(value, Tensor):
            seen = type(value).__name__
        elif value.numel() != 1:
            seen = f"a tensor of shape {[*value.shape]}"
        elif torch.is_grad_enabled() and not value.requires_grad:
            seen = "a tensor without a gradient"
        else:
            return value
        raise InputError(f"loss(model, batch): seen {seen}; allowed: a tensor of one number, computed from the model")

    return checked_loss


def mean_loss(loss: LossFunction, model: nn.Module, batches: Iterable[Any], accelerator: Accelerator) -> float:
    """Mean over all rows, each counted once; each process has batches of its own rows."""
    model.eval()
    loss_sum, rows = 0.0, 0
    with torch.no_grad():
        for each in batches:
            batch = send_to_device(each, accelerator.device)
            size = rows_of(batch)
            loss_sum, rows = loss_sum + float(loss(model, batch)) * size, rows + size
    if accelerator.num_processes > 1:
        sums = torch.tensor([loss_sum, rows], device=accelerator.device)
        loss_sum, rows = accelerator.reduce(sums).tolist()
    return loss_sum / rows


def rows_of(batch: Any) -> int:
    """Rows of a batch: the first dimension of its first tensor, or 1 if it has no tensor."""
    try:
        return find_batch_size(batch) or 1
    except (TypeError, ValueError, IndexError):  # its first field is not a tensor, but strings, for example
        return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)

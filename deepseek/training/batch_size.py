"""`batch_size="auto"`: from the guide's 256 up or down to what fills 80 % of the memory.

Contract: peaks of a forward and backward pass are measured, never guessed: at 4 and at 16 rows, then at the size that
their line leads to, and again along the new line where that was too much. Weights, buffers and random states are as
before; the optimizer's state, which is not there yet, is added by its sum. A multiple of 8, and no more than there are
rows of data. What was found stands in the checkpoints of a run, so that a resumed one keeps it.

A larger batch means fewer steps an epoch: the learning rate is not changed with it.

Examples:
    found = fitting_batch(model, data, loss, config, torch.device("cpu"))
    found.batch_size, found.needed_bytes, found.limit_bytes
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset

from deepseek.config import TrainingConfig
from deepseek.sizing.live import LiveBytes
from deepseek.sizing.memory import FILL, OPTIMIZER_BYTES, largest_batch
from deepseek.spec import InputError
from deepseek.training.memory import besides_bytes, limit_bytes

GUIDE = 256
PROBES = (4, 16)
TRIES = 4

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class FittingBatch:
    """What was found; bytes are of one process."""

    batch_size: int
    needed_bytes: float
    """Measured at this size, with the optimizer's state and what the process has beside tensors."""
    room_bytes: float
    """80 % of the limit."""
    limit_bytes: float

    @property
    def line(self) -> str:
        moved = "as the guide has it" if self.batch_size == GUIDE else f"from the guide's {GUIDE}"
        needs = f"needs {self.needed_bytes / 1e9:.2f} of {self.room_bytes / 1e9:.2f} GB"
        return f"batch size {self.batch_size}, {moved}: {needs} (80 % of {self.limit_bytes / 1e9:.2f} GB)"


def fitting_batch(
    model: nn.Module,
    data: Dataset[Any],
    loss: LossFunction,
    config: TrainingConfig,
    device: torch.device,
    *,
    autocast: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    limit: float | None = None,
    processes: int = 1,
) -> FittingBatch:
    """The largest batch whose step stays within 80 % of the memory. Raises InputError where not even one row's does.

    `processes` share the rows of the data, so that none takes more than its part of them.
    """
    limit = limit_bytes(device) if limit is None else limit
    room = FILL * limit
    passes = min(2, config.accumulation_steps)  # with gradients of an earlier batch already there
    outside = besides_bytes(device, model.parameters()) + _state_bytes(model, config)
    step = _step_bytes(model, device)
    rows = max(1, len(data) // processes)  # type: ignore[arg-type]

    def needed(size: int) -> float:
        peak = _peak_bytes(model, next(_batches(data, size)), loss, device, autocast, passes)
        return outside + max(peak, step)

    with _untouched(model):
        small, large = (min(rows, size) for size in PROBES)
        points = [(size, needed(size)) for size in sorted({small, large})]
        for _ in range(TRIES):
            size = _next(points, room, rows)
            if size == 0:
                least = min(bytes_ for _, bytes_ in points)
                raise InputError(
                    f"TrainingConfig: batch_size: auto: {least / 1e9:.3f} GB are needed at {points[0][0]} rows, and 80 "
                    f"% of the memory is {room / 1e9:.3f} GB; set gradient_checkpointing=True, or take a smaller model"
                )
            found = dict(points).get(size) or needed(size)
            if found <= room:
                return FittingBatch(batch_size=size, needed_bytes=found, room_bytes=room, limit_bytes=limit)
            points = [points[0], (size, found)] if math.isfinite(found) else [points[0], (size, 2 * room)]
    raise InputError(
        f"TrainingConfig: batch_size: auto: {TRIES} trials needed more than {room / 1e9:.3f} GB; set a number"
    )


def _next(points: list[tuple[int, float]], room: float, rows: int) -> int:
    """Where the line through two trials meets the room; from 256 up or down is the same place."""
    (small, least), (large, most) = points[0], points[-1]
    slope = max(0.0, (most - least) / (large - small)) if large > small else 0.0
    found = largest_batch(lambda size: least + slope * (size - small), room, most=rows)
    found = min(found, rows)
    return found - found % 8 if found > 8 else found


def _state_bytes(model: nn.Module, config: TrainingConfig) -> float:
    """AdamW's moments, and the running average's copy."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copy = sum(tensor.nbytes for tensor in model.state_dict().values()) if config.ema_decay else 0
    return float(OPTIMIZER_BYTES["adamw"] * trained + copy)


def _step_bytes(model: nn.Module, device: torch.device) -> float:
    """Weights and gradients while AdamW steps: of all parameters at once on a GPU, one by one on a CPU."""
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return 2.0 * sum(sizes) + (2 * max(sizes, default=0) if device.type == "cpu" else sum(sizes))


def _batches(data: Dataset[Any], size: int) -> Iterator[Any]:
    return iter(DataLoader(data, batch_size=size, generator=torch.Generator().manual_seed(0)))


def _peak_bytes(
    model: nn.Module,
    batch: Any,
    loss: LossFunction,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[None]],
    passes: int,
) -> float:
    """The most that weights, batch, activations and gradients take; infinite where the GPU had not so much."""
    batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    model.zero_grad(set_to_none=True)
    try:
        with LiveBytes() as live:
            live.watch([*model.parameters(), *model.buffers()])
            live.watch(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
            for _ in range(passes):
                with autocast():
                    value = loss(model, batch)
                value.backward()
                del value
    except torch.cuda.OutOfMemoryError:
        return math.inf
    finally:
        model.zero_grad(set_to_none=True)
    return float(live.most)


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Buffers, mode and random states come back as they were."""
    buffers, training = {name: buffer.clone() for name, buffer in model.named_buffers()}, model.training
    try:
        with torch.random.fork_rng():
            model.train()
            yield
    finally:
        model.train(training)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])

"""`batch_size="auto"`: the batch size that fills 80 % of the memory, more or less than the guide's 256.

Contract: the peak memory of a forward and backward pass is measured, never guessed: at 4 and 16 rows, then at the size
extrapolated from these two points. If that is too large, a new line is fitted and tried. Weights, buffers and random
states are unchanged afterwards. The optimizer's state, which does not exist yet, is computed and added. The result is a
multiple of 8 and at most the number of rows. Checkpoints record it, so that a resumed run keeps it.

A larger batch means fewer steps per epoch; the learning rate is not adjusted.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, Dataset

from deepseek.config import TrainingConfig
from deepseek.sizing.memory import FILL, OPTIMIZER_BYTES, largest_batch
from deepseek.sizing.model.live_memory import LiveBytes, tensors_in
from deepseek.spec import InputError
from deepseek.training.loader import stacked
from deepseek.training.memory import besides_bytes, limit_bytes
from deepseek.training.ways import LossFunction

GUIDE = 256
PROBES = (4, 16)
TRIES = 4


@dataclass(frozen=True, kw_only=True)
class FittingBatch:
    """The batch size found; bytes are per process."""

    batch_size: int
    needed_bytes: float
    """Measured at this size, including the optimizer's state and the memory of the process outside tensors."""
    room_bytes: float
    """80 % of `limit_bytes`."""
    limit_bytes: float

    @property
    def line(self) -> str:
        moved = "as in the guide" if self.batch_size == GUIDE else f"instead of the guide's {GUIDE}"
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
    """The largest batch whose step fits in 80 % of the memory. Raises InputError if not even one row fits.

    `processes` divide the rows of the data, so no batch is larger than the share of one process.
    """
    limit = limit_bytes(device) if limit is None else limit
    room = FILL * limit
    passes = min(2, config.accumulation_steps)  # the second pass runs beside the gradients of the first
    outside = besides_bytes(device, model.parameters()) + _state_bytes(model, config)
    step = _step_bytes(model, device)
    rows = max(1, len(data) // processes)  # type: ignore[arg-type]

    def needed(size: int) -> float:
        order = torch.Generator().manual_seed(0)
        batch = next(iter(DataLoader(data, batch_size=size, generator=order, collate_fn=stacked)))
        peak = _peak_bytes(model, batch, loss, device, autocast, passes)
        return outside + max(peak, step)

    with _untouched(model):
        small, large = (min(rows, size) for size in PROBES)
        points = [(size, needed(size)) for size in sorted({small, large})]
        for _ in range(TRIES):
            size = _next(points, room, rows)
            if size == 0:
                least = min(bytes_ for _, bytes_ in points)
                raise InputError(
                    f"TrainingConfig: batch_size: auto: {points[0][0]} rows need {least / 1e9:.3f} GB, and 80 % of the "
                    f"memory is {room / 1e9:.3f} GB; set gradient_checkpointing=True, or use a smaller model"
                )
            found = dict(points).get(size) or needed(size)
            if found <= room:
                return FittingBatch(batch_size=size, needed_bytes=found, room_bytes=room, limit_bytes=limit)
            points = [points[0], (size, found)] if math.isfinite(found) else [points[0], (size, 2 * room)]
    raise InputError(
        f"TrainingConfig: batch_size: auto: all {TRIES} trials needed more than {room / 1e9:.3f} GB; set a number"
    )


def _next(points: list[tuple[int, float]], room: float, rows: int) -> int:
    """The batch size at which the line through two trials reaches `room`."""
    (small, least), (large, most) = points[0], points[-1]
    slope = max(0.0, (most - least) / (large - small)) if large > small else 0.0
    found = largest_batch(lambda size: least + slope * (size - small), room, most=rows)
    return found - found % 8 if found > 8 else found


def _state_bytes(model: nn.Module, config: TrainingConfig) -> float:
    """Bytes of AdamW's moments and of the running average's copy."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    copy = sum(tensor.nbytes for tensor in model.state_dict().values()) if config.ema_decay else 0
    return float(OPTIMIZER_BYTES["adamw"] * trained + copy)


def _step_bytes(model: nn.Module, device: torch.device) -> float:
    """Bytes while AdamW steps: it updates all parameters at once on a GPU, one after the other on a CPU."""
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return 2.0 * sum(sizes) + (2 * max(sizes, default=0) if device.type == "cpu" else sum(sizes))


def _peak_bytes(
    model: nn.Module,
    batch: Any,
    loss: LossFunction,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[None]],
    passes: int,
) -> float:
    """Peak bytes of weights, batch, activations and gradients; infinite if the GPU runs out of memory."""
    batch = tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)
    model.zero_grad(set_to_none=True)
    try:
        with LiveBytes() as live:
            live.watch([*model.parameters(), *model.buffers()])
            live.watch(tensors_in(batch))
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

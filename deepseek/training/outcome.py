"""What a run comes to, where it stands meanwhile, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek.spec import GateFailed
from deepseek.training.meter import LossWatch, Meter
from deepseek.training.ways import Weights


class TrainingDiverged(GateFailed):
    """The loss or its gradient is no finite number, or has exploded; the last good weights are in the model."""

    def __init__(self, message: str, *, step: int, learning_rate: float, gradient_norm: float) -> None:
        super().__init__(message)
        self.step, self.learning_rate, self.gradient_norm = step, learning_rate, gradient_norm


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch came to; the learning rate is that of its last step."""

    epoch: int
    train_loss: float
    validation_loss: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to; `epochs[best_epoch]` is where the model's weights are from."""

    best_loss: float
    best_epoch: int
    steps: int
    epochs: tuple[Epoch, ...]
    resumed_at_step: int | None
    """The step of the checkpoint that this run went on from; None: it began anew."""
    batch_size: int
    """Rows at once in each process: what `batch_size="auto"` found, or was given."""
    rows_per_s: float
    """Of all processes, over the time of training steps."""
    data_share: float
    """Part of that time spent waiting for the next batch."""
    peak_memory_bytes: int
    """Of this process, or on its GPU."""


@dataclass
class Position:
    """Where a run stands. accelerate saves and loads it with model, optimizer and random states."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    loss_sum: float = 0.0  # over this epoch's steps
    gradient_norm: float = math.nan
    best_loss: float = math.inf
    best_epoch: int = -1
    best_weights: Weights = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False
    meter: Meter = field(default_factory=Meter)
    watch: LossWatch = field(default_factory=lambda: LossWatch(None))

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"meter": self.meter.state(), "watch": self.watch.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.meter.load(state["meter"])
        self.watch.load(state["watch"])
        vars(self).update({name: value for name, value in state.items() if name not in ("meter", "watch")})

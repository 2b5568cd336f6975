"""Result, progress and failure of a training run."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepseek.spec import GateFailed
from deepseek.training.meter import LossWatch, Meter
from deepseek.training.ways import Weights


class TrainingDiverged(GateFailed):
    """The loss or its gradient is NaN or infinite, or the loss exploded. The model holds the last good weights."""

    def __init__(self, message: str, *, step: int, learning_rate: float, gradient_norm: float) -> None:
        super().__init__(message)
        self.step, self.learning_rate, self.gradient_norm = step, learning_rate, gradient_norm


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Result of one epoch; the learning rate is that of its last step."""

    epoch: int
    train_loss: float
    validation_loss: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a run. The model's weights are those of `epochs[best_epoch]`."""

    best_loss: float
    best_epoch: int
    steps: int
    epochs: tuple[Epoch, ...]
    resumed_at_step: int | None
    """Step of the checkpoint from which this run resumed; None: it started from the beginning."""
    batch_size: int
    """Rows per batch in each process, as configured or found by `batch_size="auto"`."""
    rows_per_s: float
    """Throughput of all processes together, over the time of training steps."""
    data_share: float
    """Share of that time spent waiting for the next batch."""
    peak_memory_bytes: int
    """Peak memory of this process, or of its tensors on the GPU."""


@dataclass
class Position:
    """Progress of a run. accelerate saves and loads it with model, optimizer and random states."""

    epoch: int = 0
    batch: int = 0  # finished batches of this epoch
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

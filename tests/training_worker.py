"""One process of a parallel training run, started by `tests/test_training_parallel.py`."""

from __future__ import annotations

import atexit
import dataclasses
import os
import sys
from pathlib import Path

import torch
from torch import nn

from deepseek.config import TrainingConfig
from deepseek.spec import run_command
from deepseek.training import TrainingResult, train_model
from tests.test_training import cross_entropy, points

ROWS_A_STEP = 16


def network() -> nn.Module:
    """A network without dropout: each process would draw different masks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def config(processes: int) -> TrainingConfig:
    """Settings with 16 rows per step, over any number of processes."""
    return TrainingConfig(max_epochs=6, batch_size=ROWS_A_STEP // processes, learning_rate=0.01, checkpoint_every_s=0.0)


def train(model: nn.Module, settings: TrainingConfig, folder: Path | None) -> TrainingResult:
    """Trains on 64 rows and validates on 17, which two processes cannot halve."""
    return train_model(model, points(), points(1, rows=17), cross_entropy, settings, checkpoints=folder)


def threads() -> str:
    """The names of this process's threads."""
    return " ".join(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def main() -> None:
    """Trains. The argument is a folder for checkpoints, process ids and results."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    atexit.register(lambda: (folder / f"threads-{rank}").write_text(threads()))  # runs after later handlers
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    model = network()
    result = train(model, config(processes), folder / "checkpoints")
    done = {"weights": model.state_dict(), "result": dataclasses.asdict(result)}
    torch.save(done, folder / f"done-{rank}.pt")


if __name__ == "__main__":
    run_command(main)

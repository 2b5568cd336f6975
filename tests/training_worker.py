"""One process of a training run that tests start several of. See `tests/test_training_parallel.py`."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepseek.config import TrainingConfig
from deepseek.spec import run_command
from deepseek.training import TrainingResult, train_model

ROWS_A_STEP = 16


def data(rows: int, seed: int) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :2].sum(dim=1) > 0).long())


def network() -> nn.Module:
    """No dropout: processes draw masks of their own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def config(parallel: str, processes: int, **changes: Any) -> TrainingConfig:
    """Sixteen rows a step, however they are divided."""
    batch = {"batch_size": ROWS_A_STEP // processes, "accumulation_steps": 1}
    if parallel == "pipeline" and processes > 1:
        batch = {"batch_size": ROWS_A_STEP // 4, "accumulation_steps": 4}
    settings = {"max_epochs": 6, "learning_rate": 0.01, "parallel": parallel, "checkpoint_every_s": 0.0}
    return TrainingConfig(**(settings | batch | changes))  # type: ignore[arg-type]


def train(model: nn.Module, settings: TrainingConfig, folder: Path | None) -> TrainingResult:
    """64 rows to learn from; 17 to validate on, which two processes cannot halve."""
    return train_model(model, data(64, 0), data(17, 1), cross_entropy, settings, checkpoints=folder)


def threads() -> str:
    """Names of this process's."""
    return " ".join(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def main() -> None:
    """Arguments: a folder for checkpoints and process ids, the way, and changes of the settings as JSON."""
    folder, parallel, changes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    atexit.register(lambda: (folder / f"threads-{rank}").write_text(threads()))  # the last of what runs at exit
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    model = network()
    result = train(model, config(parallel, processes, **changes), folder / "checkpoints")
    torch.save({"weights": model.state_dict(), "result": dataclasses.asdict(result)}, folder / f"done-{rank}.pt")


if __name__ == "__main__":
    run_command(main)

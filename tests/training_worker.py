"""One process of a parallel training run, started by `tests/test_training_parallel.py`."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from deepseek.config import TrainingConfig
from deepseek.spec.command import exit_code
from deepseek.training import TrainingDiverged, TrainingResult, recipe, train_model
from tests.test_training import cross_entropy, points

ROWS_A_STEP = 16


def network() -> nn.Module:
    """A network without dropout: each process would draw different masks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))


def config(parallel: str, processes: int, **changes: Any) -> TrainingConfig:
    """Settings with 16 rows per step, over any number of processes."""
    batch = {"batch_size": ROWS_A_STEP // processes, "accumulation_steps": 1}
    if parallel == "pipeline" and processes > 1:
        batch = {"batch_size": ROWS_A_STEP // 4, "accumulation_steps": 4}
    settings = {"max_epochs": 6, "learning_rate": 0.01, "parallel": parallel, "checkpoint_every_s": 0.0}
    return TrainingConfig(**(settings | batch | changes))  # type: ignore[arg-type]


def train(model: nn.Module, settings: TrainingConfig, folder: Path | None) -> TrainingResult:
    """Trains on 64 rows and validates on 17, which two processes cannot halve."""
    return train_model(model, points(), points(1, rows=17), cross_entropy, settings, checkpoints=folder)


def threads() -> str:
    """The names of this process's threads."""
    return " ".join(path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))


def main() -> None:
    """Trains in each way in turn. Arguments: a folder for checkpoints and process ids, the ways, settings as JSON."""
    folder, ways, changes = Path(sys.argv[1]), sys.argv[2].split(","), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    atexit.register(lambda: (folder / f"threads-{rank}").write_text(threads()))  # runs after later handlers
    rank, processes = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    for way in ways:
        model = network()
        result = train(model, config(way, processes, **changes), folder / way / "checkpoints")
        done = {"weights": model.state_dict(), "result": dataclasses.asdict(result)}
        torch.save(done, folder / way / f"done-{rank}.pt")


def main_in_fork(folder: Path, ways: Sequence[str], environment: dict[str, str]) -> None:
    """Trains in a fork of a process that has imported torch, as one process of a job without a launcher."""
    os.environ.update(environment)
    sys.argv[1:] = [str(folder), ",".join(ways), "{}"]
    main()
    atexit._run_exitfuncs()  # at whose end these do not run


def diverge_in_fork(folder: Path, environment: dict[str, str]) -> None:
    """Diverges; rank 0 writes slowly. Notes whether the last good weights are there when the process would end."""
    os.environ.update(environment)
    torch.set_num_threads(1)

    def slowly(*arguments: Any) -> None:
        time.sleep(1)
        save(*arguments)

    rank, save = int(environment["RANK"]), recipe.save_model
    try:
        with patch.object(recipe, "save_model", slowly):
            train(network(), config("data", 2, learning_rate=1e20), folder)
    except TrainingDiverged:
        (folder / f"kept-{rank}").write_text(str((folder / "last_good.safetensors").is_file()))


if __name__ == "__main__":
    sys.exit(exit_code(main))

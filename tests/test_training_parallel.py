"""Several processes: the same losses as one process, and recovery after a killed rank."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training_worker import config, network, train

pytestmark = pytest.mark.server

TOLERANCE = 1e-4  # relative, for losses and weights after 24 steps: sums are in another order
Ranks = list[dict[str, Any]]


def start(folder: Path) -> subprocess.Popen[str]:
    """Starts the worker on two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "tests/training_worker.py", str(folder)],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(folder: Path) -> Ranks:
    """The results of each rank, and its threads at the end of the interpreter."""
    return [
        torch.load(folder / f"done-{rank}.pt", weights_only=False)
        | {"threads": (folder / f"threads-{rank}").read_text()}
        for rank in (0, 1)
    ]


def kill_rank_1(process: subprocess.Popen[str], folder: Path) -> None:
    """Kills rank 1 after some checkpoints have been written."""
    while not any(int(path.name[-6:]) >= 5 for path in folder.glob("checkpoints/checkpoint-*")):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.003)
    os.kill(int((folder / "pid-1").read_text()), signal.SIGKILL)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The results of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("unkilled")
    process = start(folder)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    return finished(folder)


def test_two_processes_have_the_losses_and_weights_of_one(unkilled: Ranks) -> None:
    model = network()
    alone = train(model, config(1), None)
    for rank in unkilled:
        for one, two in zip(alone.epochs, rank["result"]["epochs"], strict=True):
            assert two == pytest.approx(dataclasses.asdict(one), rel=TOLERANCE)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=TOLERANCE, atol=1e-5)


def test_no_thread_of_the_process_group_remains_at_the_end_of_the_interpreter(unkilled: Ranks) -> None:
    assert [rank["threads"].count("gloo") for rank in unkilled] == [0, 0]


@pytest.mark.slow
def test_a_job_with_a_killed_rank_ends_and_resumes(unkilled: Ranks, tmp_path: Path) -> None:
    process = start(tmp_path)
    kill_rank_1(process, tmp_path)
    process.communicate()
    assert process.returncode == 1

    process = start(tmp_path)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    for rank, whole in zip(finished(tmp_path), unkilled, strict=True):
        assert rank["result"]["resumed_at_step"] >= 5
        assert rank["result"]["epochs"] == whole["result"]["epochs"]
        assert all(torch.equal(weight, whole["weights"][name]) for name, weight in rank["weights"].items())

"""Several processes: the same losses as one process, recovery after a killed rank, one-line errors."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepseek.spec import InputError
from deepseek.spec.processes.children import free_ports
from deepseek.training.pipeline import arguments, as_layers, cut, part
from deepseek.training.ways import check_tied
from tests.conftest import run_module
from tests.test_training import cross_entropy
from tests.test_transformer import tiny
from tests.training_worker import config, diverge_in_fork, main_in_fork, network, train
from tests.warm import WARM

pytestmark = pytest.mark.server

WAYS = ("data", pytest.param("sharded", marks=pytest.mark.slow), "pipeline")
TOLERANCE = 1e-4  # relative, for losses and weights after 24 steps: sums are in another order


def start(folder: Path, *ways: str, **changes: Any) -> subprocess.Popen[str]:
    """Starts the worker on two processes."""
    command = [sys.executable, "-m", "cli", "launch-training", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [*command, "tests/training_worker.py", "--", str(folder), ",".join(ways), json.dumps(changes)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder: Path, way: str) -> list[dict[str, Any]]:
    """The results of each rank, and its threads at the end of the interpreter."""
    return [
        torch.load(folder / way / f"done-{rank}.pt", weights_only=False)
        | {"threads": (folder / f"threads-{rank}").read_text()}
        for rank in (0, 1)
    ]


def kill_rank_1(process: subprocess.Popen[str], folder: Path) -> str:
    """Kills rank 1 after some checkpoints have been written; returns its process id."""
    while not any(int(path.name[-6:]) >= 5 for path in folder.glob("*/checkpoints/checkpoint-*")):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.003)
    pid = (folder / "pid-1").read_text()
    os.kill(int(pid), signal.SIGKILL)
    return pid


def in_forks(target: Callable[..., None], *arguments: Any) -> None:
    """Runs `target` in two processes of one job, each with its environment as the last argument."""
    (port,) = free_ports(1)
    job = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [job | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
    processes = [WARM.Process(target=target, args=(*arguments, rank)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


Ranks = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The results of an uninterrupted run, by way."""

    @cache
    def run(*ways: str) -> Path:
        folder = tmp_path_factory.mktemp(ways[0])
        in_forks(main_in_fork, folder, ways)
        return folder

    # DTensor's caches keep the group of a sharded model
    return lambda way: finished(run(way) if way == "sharded" else run("data", "pipeline"), way)


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_and_weights_of_one(way: str, unkilled: Ranks) -> None:
    model = network()
    alone = train(model, config(way, 1), None)
    for rank in unkilled(way):
        for one, two in zip(alone.epochs, rank["result"]["epochs"], strict=True):
            assert two == pytest.approx(dataclasses.asdict(one), rel=TOLERANCE)
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=TOLERANCE, atol=1e-5)


def test_no_thread_of_the_process_group_remains_at_the_end_of_the_interpreter(unkilled: Ranks) -> None:
    assert [rank["threads"].count("gloo") for way in ("data", "pipeline") for rank in unkilled(way)] == [0] * 4


def test_no_process_of_a_diverged_run_ends_before_the_last_good_weights_are_kept(tmp_path: Path) -> None:
    in_forks(diverge_in_fork, tmp_path)
    assert [(tmp_path / f"kept-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


@pytest.mark.parametrize(
    ("code", "returned", "said"),
    [(0, 0, ""), (2, 2, ""), (7, 1, "ended with exit code 7, and the other ranks were stopped")],
)
def test_the_launcher_starts_each_rank_and_ends_with_what_they_ended_with(
    code: int, returned: int, said: str, tmp_path: Path
) -> None:
    program = "import os, sys; print(os.environ['RANK'], 'of', os.environ['WORLD_SIZE']); sys.exit(int(sys.argv[1]))"
    (tmp_path / "program.py").write_text(program)
    run = run_module("cli", "launch-training", "--processes", "2", str(tmp_path / "program.py"), "--", str(code))
    assert (run.returncode, said in run.stderr) == (returned, True), run.stderr
    assert code or sorted(run.stdout.splitlines()) == ["0 of 2", "1 of 2"]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_ends_the_job_in_one_line_and_the_job_resumes(way: str, unkilled: Ranks, tmp_path: Path) -> None:
    process = start(tmp_path, way)
    pid = kill_rank_1(process, tmp_path)
    _, said = process.communicate()
    assert process.returncode == 1
    assert said.strip().splitlines()[-1].startswith(f"error: rank 1 (process {pid}) was killed by SIGKILL; the other")

    process = start(tmp_path, way)
    _, said = process.communicate()
    assert process.returncode == 0, said
    for rank, whole in zip(finished(tmp_path, way), unkilled(way), strict=True):
        assert rank["result"]["resumed_at_step"] >= 5
        assert rank["result"]["epochs"] == whole["result"]["epochs"]
        assert all(torch.equal(weight, whole["weights"][name]) for name, weight in rank["weights"].items())


@pytest.mark.slow
def test_an_unsupported_setting_ends_the_job_with_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, "pipeline", accumulation_steps=1)
    _, said = process.communicate()
    assert (process.returncode, said.count("Traceback")) == (2, 0)
    assert "accumulation_steps: seen 1; a pipeline of 2 processes needs 2 micro-batches" in said


def test_a_decoder_equals_the_chain_of_its_layers() -> None:
    whole = nn.Sequential(tiny(padding_id=None, causal=True), nn.Linear(16, 3))
    layers = as_layers(whole)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(layers(ids), whole(ids))
    parts = [part(layers, rank, 2) for rank in (0, 1)]
    assert torch.equal(parts[1](parts[0](ids)), whole(ids))
    assert {name for each in parts for name in each.state_dict()} == set(layers.state_dict())
    with pytest.raises(InputError, match=r"needs an nn.Sequential, or .* padding_id=None .* seen Transformer"):
        as_layers(tiny())


def test_a_weight_that_two_parts_share_is_refused() -> None:
    """Each process would train its own copy: tied embeddings would come apart."""
    head = nn.Linear(16, 32, bias=False)
    layers = as_layers(nn.Sequential(tiny(padding_id=None, vocab_size=32), head))
    check_tied(layers, [part(layers, rank, 2) for rank in (0, 1)], "pipeline")
    head.weight = layers[0].get_parameter("tokens.weight")
    with pytest.raises(InputError, match=r"parallel: 'pipeline': \d.weight is also a weight of another layer"):
        check_tied(layers, [part(layers, rank, 2) for rank in (0, 1)], "pipeline")


@pytest.mark.parametrize(
    ("sizes", "parts", "cuts"),
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([1, 1, 1, 9], 2, [0, 3, 4]),
        ([5, 1, 1], 3, [0, 1, 2, 3]),
        ([0, 9, 0, 0, 1], 2, [0, 4, 5]),
    ],
    ids=["even", "heavy-last", "one-each", "without-parameters"],
)
def test_layers_are_divided_into_parts_of_similar_size(sizes: list[int], parts: int, cuts: list[int]) -> None:
    assert cut(sizes, parts) == cuts


def test_the_input_of_a_pipeline_is_the_argument_that_the_loss_passes_to_the_model() -> None:
    batch = (torch.ones(2, 4), torch.zeros(2))
    assert arguments(cross_entropy, batch) == (batch[0],)
    with pytest.raises(InputError, match="one tensor, by position"):
        arguments(lambda model, batch: model(x=batch[0]), batch)
    with pytest.raises(InputError, match="must call the model that it is given"):
        arguments(lambda model, batch: batch[0].mean(), batch)

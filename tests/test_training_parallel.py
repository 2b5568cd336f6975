"""Several processes: the same losses as one, weights that survive a killed rank, one line that says what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepseek.config import TransformerConfig
from deepseek.spec import InputError
from deepseek.training.pipeline import arguments, as_layers, cut, part
from deepseek.transformer import Transformer
from tests.training_worker import config, cross_entropy, network, train

WAYS = ("data", "sharded", "pipeline")
TOLERANCE = 1e-4  # relative, of losses and weights after 24 steps: sums in another order


def start(folder: Path, parallel: str, **changes: Any) -> subprocess.Popen[str]:
    """Two processes of the worker."""
    command = [sys.executable, "-m", "deepseek.training.launch", "--processes", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    return subprocess.Popen(
        [*command, "tests/training_worker.py", str(folder), parallel, json.dumps(changes)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(folder: Path) -> list[dict[str, Any]]:
    """What each rank left, and its threads at the interpreter's end."""
    return [
        torch.load(folder / f"done-{rank}.pt", weights_only=False)
        | {"threads": (folder / f"threads-{rank}").read_text()}
        for rank in (0, 1)
    ]


def kill_rank_1(process: subprocess.Popen[str], folder: Path) -> str:
    """Its process id, when some checkpoints have been written."""
    while not any(int(path.name[-6:]) >= 5 for path in folder.glob("checkpoints/checkpoint-*")):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.003)
    pid = (folder / "pid-1").read_text()
    os.kill(int(pid), signal.SIGKILL)
    return pid


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Each way, from beginning to end."""
    found = {}
    for way in WAYS:
        folder = tmp_path_factory.mktemp(way)
        process = start(folder, way)
        _, said = process.communicate(timeout=180)
        assert process.returncode == 0, said
        found[way] = finished(folder)
    return found


@pytest.mark.parametrize("way", WAYS)
def test_two_processes_have_the_losses_and_weights_of_one(way: str, unkilled: Any) -> None:
    model = network()
    alone = train(model, config(way, 1), None)
    for rank in unkilled[way]:
        epochs = rank["result"]["epochs"]
        assert [each["train_loss"] for each in epochs] == pytest.approx(
            [each.train_loss for each in alone.epochs], rel=TOLERANCE
        )
        assert [each["validation_loss"] for each in epochs] == pytest.approx(
            [each.validation_loss for each in alone.epochs], rel=TOLERANCE
        )
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(rank["weights"][name], weight, rtol=TOLERANCE, atol=1e-5)


@pytest.mark.parametrize("way", ["data", "pipeline"])  # DTensor's caches keep the group of a sharded model
def test_no_thread_of_the_process_group_is_left_to_the_interpreters_end(way: str, unkilled: Any) -> None:
    assert [rank["threads"].count("gloo") for rank in unkilled[way]] == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_ends_the_job_in_one_line_and_the_job_resumes(way: str, unkilled: Any, tmp_path: Path) -> None:
    process = start(tmp_path, way)
    pid = kill_rank_1(process, tmp_path)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 1
    assert said.strip().splitlines()[-1].startswith(f"error: rank 1 (process {pid}) was killed by SIGKILL; the other")

    process = start(tmp_path, way)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 0, said
    for rank, whole in zip(finished(tmp_path), unkilled[way], strict=True):
        assert rank["result"]["resumed_at_step"] >= 5
        assert rank["result"]["epochs"] == whole["result"]["epochs"]
        assert all(torch.equal(weight, whole["weights"][name]) for name, weight in rank["weights"].items())


def test_a_setting_that_a_way_does_not_have_ends_the_job_with_that_line_alone(tmp_path: Path) -> None:
    process = start(tmp_path, "pipeline", accumulation_steps=1)
    _, said = process.communicate(timeout=180)
    assert process.returncode == 2
    assert "accumulation_steps: seen 1; a pipeline of 2 processes needs 2 micro-batches" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes", "0", "x.py"], "--processes: seen 0; 1 or more is needed"),
        (["--processes", "2", "nowhere.py"], "nowhere.py: no such file; a training script is needed"),
        (["x.py"], "--processes"),
    ],
    ids=["none", "script", "missing"],
)
def test_a_wrong_launch_is_one_line(arguments: list[str], says: str) -> None:
    command = [sys.executable, "-m", "deepseek.training.launch", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert says in run.stderr
    assert len(run.stderr.strip().splitlines()) == 1


@pytest.mark.filterwarnings("ignore::deepseek.config.AdviceWarning")
def test_a_decoder_is_the_chain_of_its_layers() -> None:
    sizes: dict[str, Any] = {"num_layers": 3, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    transformer = Transformer(TransformerConfig(**sizes, vocab_size=50, padding_id=None, causal=True)).eval()
    whole = nn.Sequential(transformer, nn.Linear(16, 3))
    layers = as_layers(whole)
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(layers(ids), whole(ids))
    parts = [part(layers, rank, 2) for rank in (0, 1)]
    assert torch.equal(parts[1](parts[0](ids)), whole(ids))
    assert {name for each in parts for name in each.state_dict()} == set(layers.state_dict())
    with pytest.raises(InputError, match=r"needs an nn.Sequential, or .* padding_id=None .* seen Transformer"):
        as_layers(Transformer(TransformerConfig(**sizes, vocab_size=50)))


@pytest.mark.parametrize(
    ("sizes", "parts", "cuts"),
    [
        ([1, 1, 1, 1], 2, [0, 2, 4]),
        ([9, 1, 1, 1], 2, [0, 1, 4]),
        ([1, 1, 1, 9], 2, [0, 3, 4]),
        ([5, 1, 1], 3, [0, 1, 2, 3]),
        ([9, 0, 1, 0, 1], 3, [0, 2, 4, 5]),
        ([0, 9, 0, 0, 1], 2, [0, 2, 5]),
    ],
    ids=["even", "heavy-first", "heavy-last", "one-each", "without-parameters", "first-without"],
)
def test_layers_are_cut_so_that_parts_weigh_alike(sizes: list[int], parts: int, cuts: list[int]) -> None:
    assert cut(sizes, parts) == cuts


def test_more_processes_than_layers_are_refused() -> None:
    with pytest.raises(InputError, match="2 layers do not go round 3 processes"):
        cut([1, 1], 3)
    with pytest.raises(InputError, match="2 layers with parameters do not go round 3 processes"):
        cut([1, 0, 1, 0], 3)


def test_what_goes_into_a_pipeline_is_what_the_loss_gives_the_model() -> None:
    batch = (torch.ones(2, 4), torch.zeros(2))
    assert arguments(cross_entropy, batch) == (batch[0],)
    with pytest.raises(InputError, match="one tensor, by position"):
        arguments(lambda model, batch: model(x=batch[0]), batch)
    with pytest.raises(InputError, match="has to call the model"):
        arguments(lambda model, batch: batch[0].mean(), batch)

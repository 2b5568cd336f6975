"""`batch_size="auto"`: the batch size found, compared with measured memory and with the plan's prediction."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepseek.sizing import TrainingSetup, TransformerSize, largest_batch, training_memory
from deepseek.sizing.model.live_memory import LiveBytes
from deepseek.spec import InputError
from deepseek.training import train_model
from deepseek.training.batch_size import fitting_batch
from deepseek.training.memory import limit_bytes
from deepseek.transformer import Transformer
from tests.test_sizing_memory import config
from tests.test_training import cross_entropy, network, points, same, settings

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
OUTSIDE = 500e6


@pytest.fixture
def outside_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory outside tensors is OUTSIDE: that of this process changes at any time."""
    monkeypatch.setattr("deepseek.training.batch_size.besides_bytes", lambda *_: OUTSIDE)


def ids(rows: int = 2000) -> TensorDataset:
    return TensorDataset(torch.ones(rows, 24, dtype=torch.int64))


def mean_square(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def test_live_bytes_are_the_peak_and_not_the_sum() -> None:
    with LiveBytes() as live:
        for _ in range(5):
            made = torch.ones(1000)
            del made
        kept = [torch.ones(1000), torch.ones(1000)]
    assert live.most == 8000
    assert len(kept) == 2


@pytest.mark.usefixtures("outside_tensors")
@pytest.mark.parametrize(
    ("checkpointing", "steps"), [(False, 1), (True, 2)], ids=["one batch", "checkpointed and accumulated"]
)
def test_the_batch_that_fits_equals_the_plans_and_fills_the_memory(checkpointing: bool, steps: int) -> None:
    size = TransformerSize(config=config())
    model = Transformer(size.config)
    model.gradient_checkpointing = checkpointing
    limit = (OUTSIDE + 60e6) / 0.8
    train = settings(accumulation_steps=steps)
    found = fitting_batch(model, ids(), mean_square, train, CPU, limit=limit)
    assert 0.9 * 60e6 < found.needed_bytes - OUTSIDE <= 60e6
    setup = TrainingSetup(batch=1, length=24, checkpointing=checkpointing, accumulation_steps=steps, platform="cpu")

    def planned(batch: int) -> float:
        memory = training_memory(size, replace(setup, batch=batch))
        return memory.peak_bytes - memory.context_bytes

    assert found.batch_size == pytest.approx(largest_batch(planned, 60e6), rel=0.1)
    assert found.batch_size > 8


@pytest.mark.usefixtures("outside_tensors")
def test_little_memory_gives_a_smaller_batch_than_the_guides_and_much_memory_all_rows_and_1_mb_an_error() -> None:
    model = Transformer(config())
    small = fitting_batch(model, ids(), mean_square, settings(), CPU, limit=(OUTSIDE + 10e6) / 0.8)
    large = fitting_batch(model, ids(600), mean_square, settings(), CPU, limit=1e12)
    assert small.batch_size < 256 < large.batch_size == 600
    assert "instead of the guide's 256" in small.line
    with pytest.raises(InputError, match=r"batch_size: auto: \d rows need .* GB, .*; set gradient_checkpointing=True"):
        fitting_batch(model, ids(), mean_square, settings(), CPU, limit=1e6)


def test_the_search_does_not_change_weights_buffers_mode_or_random_states() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2)).eval()
    before, state = copy.deepcopy(model), torch.get_rng_state()
    fitting_batch(model, points(), cross_entropy, settings(), CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert same(model, before)


def test_a_resumed_run_keeps_the_batch_size_that_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(batch_size="auto")
    first = train_model(network(), points(), points(1), cross_entropy, config, checkpoints=tmp_path)
    monkeypatch.setattr("deepseek.training.recipe.fitting_batch", lambda *_, **__: 1 / 0)
    again = train_model(network(), points(), points(1), cross_entropy, config, checkpoints=tmp_path)
    assert again.batch_size == first.batch_size
    assert again.resumed_at_step == first.steps


def test_the_limit_of_a_process_is_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = limit_bytes(CPU)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert limit_bytes(CPU) == whole / 4

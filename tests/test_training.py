"""The training recipe: learning, its schedule, and recovery after a kill or a NaN."""

import contextlib
import errno
import functools
import math
import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from deepseek.checkpoints import Checkpoints, digest
from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.training import TrainingDiverged, train_model
from deepseek.training.switches import enable_gradient_checkpointing
from deepseek.training.ways import rows_of
from tests.warm import WARM

pytestmark = pytest.mark.usefixtures("one_thread")


def points(seed: int = 0, rows: int = 64) -> TensorDataset:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, (x[:, :2].sum(dim=1) > 0).long())


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def settings(**changes: Any) -> TrainingConfig:
    exact = {"mixed_precision": "no"}  # also on a GPU
    return TrainingConfig(**({"max_epochs": 6, "batch_size": 16, "learning_rate": 0.02} | exact | changes))


def same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_a_model_with_batch_norm_skips_a_last_batch_of_one_row() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    assert train_model(model, points(rows=33), points(1), cross_entropy, settings(max_epochs=1)).steps == 2
    assert train_model(network(), points(rows=33), points(1), cross_entropy, settings(max_epochs=1)).steps == 3


def test_batch_norm_on_batches_of_one_row_is_one_line() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    with pytest.raises(InputError, match=r"^batch_size: BatchNorm cannot train on a batch of 1 row"):
        train_model(model, points(), points(1), cross_entropy, settings(batch_size=1))


def test_it_learns_and_leaves_the_best_weights_in_eval_mode() -> None:
    model = network()
    with torch.no_grad():  # as code for inference may have it everywhere
        result = train_model(model, points(), points(1), cross_entropy, settings(max_epochs=20))
    losses = [epoch.validation_loss for epoch in result.epochs]
    assert result.best_loss == losses[result.best_epoch] == min(losses) < 0.5 * losses[0]
    with torch.no_grad():
        assert float(cross_entropy(model, points(1)[:])) == pytest.approx(result.best_loss, rel=1e-5)
    assert not model.training


def test_the_average_of_the_weights_is_validated_and_kept() -> None:
    seen: list[Tensor] = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        if not model.training:
            seen.append(next(model.parameters()).detach().clone())
        return cross_entropy(model, batch)

    model, plain = network(), network()
    config = settings(max_epochs=1, ema_decay=0.9)
    train_model(model, points(), points(1, rows=16), watched, config)
    train_model(plain, points(), points(1), cross_entropy, settings(max_epochs=1))
    assert torch.equal(next(model.parameters()), seen[0])
    start, end = (next(each.parameters()) for each in (network(), plain))
    assert 0 < float((seen[0] - start).detach().norm()) < float((end - start).detach().norm())


def test_equal_seeds_give_equal_weights_and_different_seeds_different_ones() -> None:
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        train_model(model, points(), points(1), cross_entropy, settings(seed=seed))
    assert [same(models[0], other) for other in models[1:]] == [True, False]


@pytest.mark.parametrize(
    ("change", "level", "rates"),
    [
        # Two epochs of warm-up (8 steps); the plateau is watched from the end of the second.
        ({"plateau_patience": 1}, 1.0, [0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4]),
        ({"plateau_patience": 1}, -1.0, [0.05, 0.1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4]),
        ({"warmup_fraction": 0.0, "plateau_patience": None, "clip_norm": None}, 1.0, [0.1] * 10),
    ],
    ids=["on", "a negative loss", "off"],
)
def test_the_learning_rate_rises_linearly_and_falls_on_a_plateau(
    change: dict[str, Any], level: float, rates: list[float]
) -> None:
    def stuck(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * 0 + level

    config = settings(**({"max_epochs": 10, "warmup_fraction": 0.2, "learning_rate": 0.1} | change))
    result = train_model(network(), points(), points(1), stuck, config)
    assert [epoch.learning_rate for epoch in result.epochs] == pytest.approx(rates)


def test_early_stopping_ends_a_run_that_no_longer_improves() -> None:
    def rising(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) if model.training else model[0].weight.abs().sum()  # type: ignore[index]

    config = settings(max_epochs=50, early_stopping_patience=2)
    result = train_model(network(), points(), points(1), rising, config)
    assert len(result.epochs) == result.best_epoch + 3 < 50


@pytest.mark.parametrize(("rows", "taken"), [(64, 4), (72, 6)], ids=["equal steps", "last step of one batch"])
def test_accumulated_batches_give_the_step_of_one_large_batch(rows: int, taken: int) -> None:
    models = [network() for _ in range(2)]
    for model, (size, steps) in zip(models, ((32, 1), (8, 4)), strict=True):
        model[2].p = 0.0  # type: ignore[index]
        config = settings(batch_size=size, accumulation_steps=steps, max_epochs=2)
        assert train_model(model, points(rows=rows), points(1), cross_entropy, config).steps == taken
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Shifting(Dataset[tuple[Tensor, Tensor]]):
    """Different rows in every epoch, determined by epoch and index."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return points(100 * self.epoch + index, rows=1)[0]


def train_shifting(folder: Path | None, loss: Callable[[nn.Module, Any], Tensor] = cross_entropy) -> nn.Module:
    """The model after three epochs, with a checkpoint after each step in `folder`."""
    model, data = network(), Shifting()
    config = settings(max_epochs=3, checkpoint_every_s=0.0, batch_size=4, accumulation_steps=2, ema_decay=0.9)
    train_model(model, data, points(1), loss, config, checkpoints=folder)
    assert data.epoch == 2
    return model


def train_until_killed(folder: Path, losses: int, saves: int) -> None:
    """Kills its own process at that loss, or in that checkpoint, before it has its final name."""
    torch.set_num_threads(1)
    left, save_state = {"losses": losses, "saves": saves}, Accelerator.save_state

    def count(name: str) -> None:
        left[name] -= 1
        if left[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        count("losses")
        return cross_entropy(model, batch)

    def save(*arguments: Any) -> None:
        save_state(*arguments)
        count("saves")

    Accelerator.save_state = save
    train_shifting(folder, loss)


def test_a_run_killed_repeatedly_ends_with_the_exact_weights_of_an_uninterrupted_one(tmp_path: Path) -> None:
    for losses, saves in ((17, -1), (-1, 9)):
        process = WARM.Process(target=train_until_killed, args=(tmp_path, losses, saves))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert same(train_shifting(tmp_path), train_shifting(None))


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    first, again = network(), network(5)
    done, repeated = (
        train_model(each, points(), points(1), cross_entropy, settings(), checkpoints=tmp_path)
        for each in (first, again)
    )
    assert (repeated.resumed_at_step, repeated.epochs) == (done.steps, done.epochs)
    assert same(first, again)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"config": settings(learning_rate=0.01)}, "learning_rate was 0.02, now it is 0.01"),
        ({"data": points(7)}, "train_data was '64 rows"),
        ({"model": nn.Linear(4, 2)}, "model was"),
        ({"identity": {"log": "b"}}, "log was 'a', now it is 'b'"),
    ],
    ids=["settings", "data", "model", "identity"],
)
def test_a_checkpoint_of_another_run_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    def run(model: nn.Module, data: TensorDataset, config: TrainingConfig, identity: dict[str, str]) -> None:
        train_model(model, data, points(1), cross_entropy, config, checkpoints=tmp_path, identity=identity)

    own = {"model": network(), "data": points(), "config": settings(), "identity": {"log": "a"}}
    run(**own)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        run(**(own | change))  # type: ignore[arg-type]


@pytest.mark.parametrize(("free", "error"), [(0, OSError), (2**30, RuntimeError)])
def test_a_checkpoint_that_a_full_disk_cuts_off_is_removed_and_the_disk_named(
    free: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_state(folder: str) -> None:
        Path(folder).mkdir()
        raise RuntimeError("unexpected pos 226304 vs 226192")  # as torch says it

    monkeypatch.setattr("deepseek.checkpoints.shutil.disk_usage", lambda _: Mock(free=free))
    with pytest.raises(error) as caught:
        Checkpoints(tmp_path, {}).save(Mock(save_state=save_state))
    assert list(tmp_path.iterdir()) == []
    assert getattr(caught.value, "errno", errno.ENOSPC) == errno.ENOSPC


def test_a_nan_stops_the_run_with_step_rate_and_norm_and_keeps_the_last_good_weights(tmp_path: Path) -> None:
    validated: list[dict[str, Tensor]] = []

    def breaking(model: nn.Module, batch: Any) -> Tensor:
        if not model.training:
            validated.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return cross_entropy(model, batch) * (float("nan") if validated and model.training else 1)

    model = network()
    with pytest.raises(TrainingDiverged, match=r"step 5: loss is nan; .* rate 0\.02, gradient norm nan") as error:
        train_model(model, points(), points(1), breaking, settings(), checkpoints=tmp_path)
    assert (error.value.step, error.value.learning_rate) == (5, 0.02)
    kept = load_file(tmp_path / "last_good.safetensors")
    for name, weight in model.state_dict().items():
        assert torch.equal(kept[name], weight)
        assert torch.equal(kept[name], validated[-1][name])


def test_gradient_checkpointing_needs_a_model_with_the_switch() -> None:
    class Switched(nn.Linear):
        gradient_checkpointing = False

    config = settings(max_epochs=1, gradient_checkpointing=True)
    model = Switched(4, 2)
    train_model(model, points(), points(1), cross_entropy, config)
    assert model.gradient_checkpointing
    with pytest.raises(InputError, match="Sequential has no module with a gradient_checkpointing switch"):
        train_model(network(), points(), points(1), cross_entropy, config)


def test_gradient_checkpointing_of_a_hugging_face_model_uses_the_method_that_its_next_version_keeps() -> None:
    model = transformers.BertModel(transformers.BertConfig(vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        enable_gradient_checkpointing(model)
    assert model.is_activation_checkpointing


def test_a_wrong_argument_is_a_one_line_error() -> None:
    with pytest.raises(InputError, match=r"report: seen 'run.json'; use a name that ends in .html"):
        train_model(network(), points(), points(1), cross_entropy, settings(), report="run.json")
    with pytest.raises(InputError, match="validation_data: a dataset with a length of at least 1"):
        train_model(network(), points(), points(rows=0), cross_entropy, settings())
    with pytest.raises(InputError, match="model: no parameter of Sequential requires a gradient"):
        train_model(network().requires_grad_(False), points(), points(), cross_entropy, settings())
    with pytest.raises(InputError, match="checkpoints: /dev/null/run: Not a directory"):
        train_model(network(), points(), points(), cross_entropy, settings(), checkpoints="/dev/null/run")


def doubled(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return functools.wraps(forward)(lambda self, x: 2 * forward(self, x))


class Decorated(nn.Linear):
    @doubled
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("factor", [1.0, math.nan], ids=["trained", "diverged"])
def test_a_model_trained_in_mixed_precision_computes_as_written_afterwards(factor: float) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(model, batch) * factor

    model, fresh = Decorated(4, 2), Decorated(4, 2)
    with pytest.raises(TrainingDiverged) if math.isnan(factor) else contextlib.nullcontext():
        train_model(model, points(), points(1), loss, settings(max_epochs=1, mixed_precision="bf16"))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(points()[:][0]), fresh(points()[:][0]))


@pytest.mark.parametrize(
    ("rows", "reason"),
    [([torch.zeros(4), torch.zeros(5)], "stack expects each tensor to be equal size"), ([object(), object()], "found <class 'object'>")],
    ids=["ragged", "objects"],
)  # fmt: skip
@pytest.mark.parametrize("batch_size", [2, "auto"])
def test_rows_that_make_no_batch_are_a_one_line_error(rows: Any, reason: str, batch_size: Any) -> None:
    with pytest.raises(InputError, match=f"dataset: these rows make no batch: .*{reason}.*; give every row") as raised:
        train_model(network(), rows, points(), cross_entropy, settings(batch_size=batch_size))
    assert "\n" not in str(raised.value)


def test_a_process_trains_in_one_precision_after_another() -> None:
    def trained(mixed_precision: Any) -> float:
        torch.manual_seed(0)
        config = settings(max_epochs=1, mixed_precision=mixed_precision)
        return train_model(network(), points(), points(1), cross_entropy, config).best_loss

    first, low, again = trained("no"), trained("bf16"), trained("no")
    assert first == again != low


@pytest.mark.parametrize(
    ("change", "seen"),
    [(lambda loss: loss.item(), "float"), (Tensor.detach, "a tensor without a gradient"), (lambda loss: loss.expand(3), r"a tensor of shape \[3\]")],
)  # fmt: skip
def test_a_loss_that_cannot_be_trained_on_is_a_one_line_error(change: Callable[[Tensor], Any], seen: str) -> None:
    with pytest.raises(InputError, match=rf"loss\(model, batch\): seen {seen}; allowed: a tensor of one number"):
        train_model(network(), points(), points(), lambda *given: change(cross_entropy(*given)), settings())


def test_numpy_scalars_distinguish_datasets() -> None:
    values = [kind(number) for kind in (np.int64, np.float32, np.bool_) for number in (0, 1)]
    assert len({digest([value]) for value in (*values, np.int64(0))}) == len(values)


def test_rows_are_counted_in_a_batch_that_begins_with_strings() -> None:
    assert rows_of({"id": ["a", "b"], "x": torch.ones(2, 3)}) == 2

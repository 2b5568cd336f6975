"""Metrics of a training run: curves, waiting for data, exploding losses, the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from deepseek.training import TrainingDiverged, train_model
from deepseek.training.meter import MOST, WINDOW, LossWatch, Meter
from deepseek.training.report import draw
from tests.test_training import cross_entropy, network, points, settings

pytestmark = pytest.mark.usefixtures("one_thread")


def one_step(meter: Meter, step: int, **changes: float) -> None:
    values = {"loss": 1.0, "learning_rate": 0.1, "gradient_norm": 1.0, "rows": 8, "memory_bytes": 5}
    meter.step(step=step, **(values | changes))


@pytest.mark.parametrize(("waited_s", "share"), [(0.03, 0.75), (0.001, 1 / 11)], ids=["starved", "fed"])
def test_time_counts_as_waiting_or_training_and_a_checkpoint_as_neither(
    monkeypatch: pytest.MonkeyPatch, waited_s: float, share: float
) -> None:
    now_s = 0.0
    monkeypatch.setattr("deepseek.training.meter.time", SimpleNamespace(perf_counter=lambda: now_s))

    def slowly() -> Iterator[int]:
        nonlocal now_s
        for number in range(3):
            now_s += waited_s
            yield number

    meter = Meter()
    for number in meter.timed(slowly()):
        now_s += 0.01
        one_step(meter, number)
        now_s += 5  # a checkpoint
    assert meter.seconds == pytest.approx(3 * (waited_s + 0.01))
    assert meter.data_share == pytest.approx(share)
    said = "the model waited for data 75% of the time: raise num_workers (seen 0)"
    assert meter.starved(0) == (said if share > 0.5 else None)


def test_a_log_has_lines_instead_of_a_bar_even_if_it_has_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    train_model(network(), points(), points(1), cross_entropy, settings(max_epochs=1))
    printed = capsys.readouterr().err
    assert ("epoch 1, step 4" in printed, "\r" in printed, "lr " in printed) == (True, False, False)


def test_merging_points_keeps_sums_spikes_and_the_end_of_a_curve() -> None:
    meter, steps = Meter(), 5 * MOST + 3
    for number, _ in enumerate(meter.timed(range(steps)), 1):
        one_step(meter, number, gradient_norm=1000.0 if number == 700 else 1.0)
    assert len(meter.curve) <= MOST
    assert sum(point["rows"] for point in meter.curve) == 8 * steps
    assert max(point["gradient_norm"] for point in meter.curve) == 1000
    assert meter.curve[-1]["step"] == steps


@pytest.mark.parametrize(
    ("losses", "explodes"),
    [
        ([1.0] * 40 + [30.0] * 20, True),
        ([1.0] * 40 + [1e6] * (WINDOW // 2 - 1) + [1.0] * 20, False),
        ([5.0] * 20 + [0.01] * 20 + [4.0] * 20, False),
        ([-3.0] * 20 + [40.0] * 20, True),
        ([0.0] * 20 + [5.0] * 20, False),
    ],
    ids=["exploded", "a-few-bad-rows", "back-to-the-start", "negative-exploded", "starts-at-zero"],
)
def test_a_loss_that_stays_ten_times_above_its_start_has_exploded(losses: list[float], explodes: bool) -> None:
    watch = LossWatch(10.0)
    said = [watch.see(step, loss, 1.0) for step, loss in enumerate(losses, 1)]
    assert any(said) == explodes


def sums(rows: int, seed: int) -> TensorDataset:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :4].sum(dim=1, keepdim=True))


def explode(clip_norm: float | None, report: Path | None = None) -> tuple[nn.Module, Any]:
    """A run that explodes unless gradients are clipped."""
    torch.manual_seed(0)
    wide = [nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), *wide, nn.Linear(32, 1))
    clean = sums(64, seed=2)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return nn.functional.mse_loss(network(batch[0]), batch[1])

    config = settings(max_epochs=6, batch_size=16, learning_rate=0.01, clip_norm=clip_norm)
    broken = sums(512, seed=1)
    broken.tensors[1][128::256] *= 1e4  # as after a change of units
    return model, train_model(model, broken, clean, loss, config, report=report)


def test_an_exploding_run_is_caught_explained_and_cured_by_clipping(tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged) as error:
        explode(None, tmp_path / "run.html")
    said = str(error.value)
    assert re.search(r"the loss exploded to [\d.e+]+, \d+ times its initial [\d.]+", said)
    assert re.search(r"the largest gradient norm was [\d.]+e\+\d+, at step \d+", said)
    assert "Gradients were not clipped: set clip_norm=1.0" in said
    assert "the loss exploded" in (tmp_path / "run.html").read_text()
    _, cured = explode(1.0)
    assert cured.best_loss < 0.3  # of 4


def test_an_explosion_despite_clipping_suggests_other_causes() -> None:
    def rising(model: nn.Module, batch: Any) -> Tensor:
        rising.steps += model.training  # type: ignore[attr-defined]
        return cross_entropy(model, batch) * 1.3**rising.steps  # type: ignore[attr-defined]

    rising.steps = 0  # type: ignore[attr-defined]
    with pytest.raises(TrainingDiverged, match=r"clipped at 1, so .*: lower the learning rate"):
        train_model(network(), points(), points(1), rising, settings(max_epochs=20, clip_norm=1.0))


def test_the_report_draws_every_curve_and_keeps_its_figures(tmp_path: Path) -> None:
    page = tmp_path / "deep" / "run.html"
    result = train_model(network(), points(), points(1), cross_entropy, settings(), report=page)
    text, record = page.read_text(), json.loads(page.with_suffix(".json").read_text())
    for title in ("Loss", "Learning rate", "Gradient norm", "Rows per second", "Waiting for data", "Memory"):
        assert f"<figcaption>{title}" in text
    assert text.count('<path class="line') == 7  # and the validation's loss
    assert "no data" not in text
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org", "")
    assert record["steps_done"] == result.steps == record["steps"][-1]["step"]
    assert draw(record) == text


def test_a_resumed_run_draws_one_curve(tmp_path: Path) -> None:
    page, folder = tmp_path / "run.html", tmp_path / "checkpoints"

    def stopped(model: nn.Module, batch: Any) -> Tensor:
        stopped.calls += 1  # type: ignore[attr-defined]
        if stopped.calls > 15:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return cross_entropy(model, batch)

    stopped.calls = 0  # type: ignore[attr-defined]
    config = settings(checkpoint_every_s=0.0)
    with pytest.raises(KeyboardInterrupt):
        train_model(network(), points(), points(1), stopped, config, checkpoints=folder)
    result = train_model(network(), points(), points(1), cross_entropy, config, checkpoints=folder, report=page)
    assert result.resumed_at_step
    record = json.loads(page.with_suffix(".json").read_text())
    assert [point["step"] for point in record["steps"]] == list(range(1, result.steps + 1))

"""The training recipe, on Hugging Face accelerate: for any module, any loss, any map-style dataset.

AdamW (0.9, 0.999) with weight decay 1e-4, linear warm-up over the first tenth of the steps, then
ReduceLROnPlateau (patience 3, factor 0.1) on the validation loss, gradients clipped at norm 1, gradient
accumulation and checkpointing, mixed precision where the device has it; on request a running average of
the weights. The best weights by validation loss are what the model holds in the end.

Contract: a run that is killed at any moment, and started again with the same arguments, goes on from
its last checkpoint and ends with the weights of an unkilled run: bit for bit on a CPU, and on a GPU as
far as its kernels are deterministic. For that an item of a dataset may depend on its index, on the
epoch (`set_epoch(epoch)` is called on a dataset that has it) and on nothing else. A checkpoint of other
settings or other data is an InputError. A loss that turns NaN raises TrainingDiverged.

Examples:
    def loss(model, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(model(inputs), labels)

    result = train_model(model, train_data, validation_data, loss, TrainingConfig(max_epochs=20),
                         checkpoints="build/mine/checkpoints")
    print(result.best_loss, result.best_epoch)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, set_seed
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler

from deepseek.checkpoints import Checkpoints, digest, probe, replace
from deepseek.config import TrainingConfig
from deepseek.spec import GateFailed, InputError

LossFunction = Callable[[nn.Module, Any], Tensor]
LINE_EVERY_S = 10.0  # without a terminal to draw a bar on


class TrainingDiverged(GateFailed):
    """The loss or its gradient is no longer a finite number; the last good weights are in the model."""

    def __init__(self, message: str, *, step: int, learning_rate: float, gradient_norm: float) -> None:
        super().__init__(message)
        self.step, self.learning_rate, self.gradient_norm = step, learning_rate, gradient_norm


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What one epoch came to; the learning rate is that of its last step."""

    epoch: int
    train_loss: float
    validation_loss: float
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run came to; `epochs[best_epoch]` is where the model's weights are from."""

    best_loss: float
    best_epoch: int
    steps: int
    epochs: tuple[Epoch, ...]
    resumed_at_step: int | None
    """The step of the checkpoint that this run went on from; None: it began anew."""


@dataclass
class _Position:
    """Where a run stands. accelerate saves and loads it with model, optimizer and random states."""

    epoch: int = 0
    batch: int = 0  # batches of this epoch that are done
    step: int = 0
    loss_sum: float = 0.0  # over this epoch's steps
    gradient_norm: float = math.nan
    best_loss: float = math.inf
    best_epoch: int = -1
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    finished: bool = False

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class _EpochSampler(Sampler[int]):
    """An order that depends on the seed and the epoch alone, so that a resumed epoch has the same one."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.size).tolist())


def train_model(
    model: nn.Module,
    train_data: Dataset[Any],
    validation_data: Dataset[Any],
    loss: LossFunction,
    config: TrainingConfig,
    *,
    checkpoints: str | Path | None = None,
    identity: Mapping[str, object] | None = None,
) -> TrainingResult:
    """Trains in place; the model ends with its best weights by validation loss, in eval mode.

    `loss(model, batch)` gives the mean over a batch, as a scalar; it must call the model that it is
    given. `checkpoints` is a folder for this run alone; without it nothing can be resumed. `identity`
    is what else tells this run from another, as a hash of the data (of which a few rows are looked at
    anyhow). Raises TrainingDiverged, and InputError for data or a checkpoint that does not fit.
    """
    for name, data in (("train_data", train_data), ("validation_data", validation_data)):
        if not isinstance(data, Sized) or len(data) == 0:
            raise InputError(f"{name}: a dataset with a length of at least 1 is needed; seen {type(data).__name__}")
    if config.gradient_checkpointing:
        _enable_gradient_checkpointing(model)
    run = _Run(model, train_data, validation_data, loss, config)
    if checkpoints is not None:
        run.keep_checkpoints(Path(checkpoints), identity or {})
    return run.to_the_end()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset[Any],
        validation_data: Dataset[Any],
        loss: LossFunction,
        config: TrainingConfig,
    ) -> None:
        self.loss, self.config, self.train_data, self.validation_data = loss, config, train_data, validation_data
        self.accelerator = _accelerator(config)
        self.average = _average(model, config.ema_decay, self.accelerator.device) if config.ema_decay else None
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=config.plateau_patience, factor=config.plateau_factor
        )
        order = _EpochSampler(len(cast(Sized, train_data)), config.seed)
        self.model, self.optimizer, self.train, self.validation = self.accelerator.prepare(
            model, optimizer, self._loader(train_data, order), self._loader(validation_data, None)
        )
        self.position = _Position()
        self.accelerator.register_for_checkpointing(self.position, self.plateau, *filter(None, [self.average]))
        self.steps_per_epoch = math.ceil(len(self.train) / config.accumulation_steps)
        self.warmup_steps = round(config.warmup_fraction * config.max_epochs * self.steps_per_epoch)
        self.checkpoints: Checkpoints | None = None
        self.resumed_at_step: int | None = None
        set_seed(config.seed)

    def _loader(self, data: Dataset[Any], order: Sampler[int] | None) -> DataLoader[Any]:
        # A generator of its own: a loader that begins an epoch would else draw from the global random
        # state, once more in a resumed run than in an unkilled one, and dropout would differ.
        generator = torch.Generator().manual_seed(self.config.seed)
        size, workers = self.config.batch_size, self.config.num_workers
        return DataLoader(data, batch_size=size, sampler=order, num_workers=workers, generator=generator)

    def keep_checkpoints(self, folder: Path, identity: Mapping[str, object]) -> None:
        """From now on; and goes on from the last one, if there is any."""
        shapes = {name: [*weight.shape] for name, weight in self.accelerator.get_state_dict(self.model).items()}
        self.checkpoints = Checkpoints(
            folder,
            {
                **self.config.identity(),
                "model": digest(shapes),
                "train_data": probe(self.train_data),
                "validation_data": probe(self.validation_data),
                **identity,
            },
        )
        set_seed(self.config.seed)  # the probes may have drawn from it
        if self.checkpoints.resume(self.accelerator):
            self.resumed_at_step = self.position.step

    def to_the_end(self) -> TrainingResult:
        position = self.position
        self.checkpointed_at = time.monotonic()
        with _Report(self.config.max_epochs * self.steps_per_epoch, self.accelerator.is_main_process) as report:
            while not position.finished:
                self._train_epoch(report)
                self._finish_epoch(self._validate())
                report.epoch(position)
                self._checkpoint(due=position.finished)
        self._load_best()
        return TrainingResult(
            best_loss=position.best_loss,
            best_epoch=position.best_epoch,
            steps=position.step,
            epochs=tuple(Epoch(**epoch) for epoch in position.epochs),
            resumed_at_step=self.resumed_at_step,
        )

    def _train_epoch(self, report: _Report) -> None:
        position, accelerator = self.position, self.accelerator
        self.train.set_epoch(position.epoch)
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(position.epoch)
        batches = accelerator.skip_first_batches(self.train, position.batch) if position.batch else self.train
        self.model.train()
        losses: list[Tensor] = []  # of the batches of one step
        for batch in batches:
            with accelerator.accumulate(self.model):
                loss = self.loss(self.model, batch)
                losses.append(loss.detach())
                accelerator.backward(loss)
                position.batch += 1
                if not accelerator.sync_gradients:
                    continue
                self._step(torch.stack(losses).mean())
                losses.clear()
            report.step(position, self._learning_rate())
            self._checkpoint()

    def _step(self, loss: Tensor) -> None:
        position, config = self.position, self.config
        if position.step < self.warmup_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * (position.step + 1) / self.warmup_steps
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        loss_value, norm_value = torch.stack([loss.float(), torch.as_tensor(norm).to(loss.device)]).tolist()
        # With fp16's loss scaling an infinite gradient is ordinary: that step is skipped, the scale halved.
        if not math.isfinite(loss_value) or (not math.isfinite(norm_value) and self.accelerator.scaler is None):
            raise self._diverged(f"loss is {loss_value:g}", norm_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.accelerator.unwrap_model(self.model))
        position.step += 1
        position.loss_sum += loss_value
        position.gradient_norm = norm_value

    def _validate(self) -> float:
        """Mean validation loss over all rows. Raises TrainingDiverged where that is no number."""
        model = self.model if self.average is None else self.average.module
        model.eval()
        loss_sum, rows = 0.0, 0
        with torch.no_grad():
            for batch in self.validation:
                size = find_batch_size(batch) or 1
                loss_sum += float(self.loss(model, batch)) * size
                rows += size
        if self.accelerator.num_processes > 1:
            sums = torch.tensor([loss_sum, rows], device=self.accelerator.device)
            loss_sum, rows = self.accelerator.reduce(sums).tolist()
        if not math.isfinite(loss_sum):
            raise self._diverged(f"validation loss is {loss_sum:g}", self.position.gradient_norm)
        return loss_sum / rows

    def _finish_epoch(self, validation_loss: float) -> None:
        position, config = self.position, self.config
        position.epochs.append(
            asdict(
                Epoch(
                    epoch=position.epoch,
                    train_loss=position.loss_sum / self.steps_per_epoch,
                    validation_loss=validation_loss,
                    learning_rate=self._learning_rate(),
                )
            )
        )
        if position.step >= self.warmup_steps:
            self.plateau.step(validation_loss)
        if validation_loss < position.best_loss:
            position.best_loss, position.best_epoch = validation_loss, position.epoch
            position.best_weights = self._weights()
        stale = position.epoch - position.best_epoch
        position.epoch, position.batch, position.loss_sum = position.epoch + 1, 0, 0.0
        stopped = config.early_stopping_patience is not None and stale >= config.early_stopping_patience
        position.finished = stopped or position.epoch == config.max_epochs

    def _learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    def _weights(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model) if self.average is None else self.average.module
        state = model.state_dict()
        return {name: weight.detach().cpu().clone() for name, weight in state.items()}

    def _load_best(self) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if self.position.best_weights:
            model.load_state_dict(self.position.best_weights)
        model.eval()

    def _diverged(self, what: str, norm: float) -> TrainingDiverged:
        position = self.position
        self._load_best()
        kept = f"those of epoch {position.best_epoch + 1}" if position.best_weights else "those before this step"
        if self.checkpoints and self.accelerator.is_main_process:
            path = self.checkpoints.folder / "last_good.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            replace(path, lambda beside: save_model(self.accelerator.unwrap_model(self.model), str(beside)))
            kept += f", in {path}"
        step, rate = position.step + 1, self._learning_rate()
        message = (
            f"training stopped at step {step}: {what}; learning rate {rate:.3g}, gradient norm {norm:.3g} "
            f"(the step before: {position.gradient_norm:.3g}). Last good weights: {kept}. "
            "Try a lower learning rate, and look for NaN or huge values in the data"
        )
        return TrainingDiverged(message, step=step, learning_rate=rate, gradient_norm=norm)

    def _checkpoint(self, due: bool = False) -> None:
        due = due or time.monotonic() - self.checkpointed_at >= self.config.checkpoint_every_s
        if self.checkpoints and due:
            self.checkpoints.save(self.accelerator)
            self.checkpointed_at = time.monotonic()


class _Report:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self, total_steps: int, shown: bool) -> None:
        self.console = Console(stderr=True, quiet=not shown, highlight=False, soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("training", total=total_steps)
        self.said_at = -math.inf
        self.summary = ""

    def __enter__(self) -> _Report:
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def step(self, position: _Position, learning_rate: float) -> None:
        text = f"epoch {position.epoch + 1}, lr {learning_rate:.1e}{self.summary}"
        self.bar.update(self.task, completed=position.step, description=text)

    def epoch(self, position: _Position) -> None:
        last = position.epochs[-1]
        losses = f"loss {last['train_loss']:.4f}, validation {last['validation_loss']:.4f}"
        self.summary = f", {losses} (best {position.best_loss:.4f})"
        due = time.monotonic() - self.said_at >= LINE_EVERY_S or position.finished
        if self.bar.disable and due:
            self.said_at = time.monotonic()
            self.console.print(f"epoch {position.epoch}, step {position.step}{self.summary}")


def _accelerator(config: TrainingConfig) -> Accelerator:
    precision: str = config.mixed_precision
    if precision == "auto":
        cuda = torch.cuda.is_available()
        precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "no"
    try:
        return Accelerator(mixed_precision=precision, gradient_accumulation_steps=config.accumulation_steps)
    except ValueError as error:  # fp16 without a GPU; another precision earlier in this process
        raise InputError(f"TrainingConfig: mixed_precision: seen {config.mixed_precision!r}; {error}") from None


def _average(model: nn.Module, decay: float, device: torch.device) -> AveragedModel:
    """A copy of the model that follows its weights; soon at first, when they still change much."""

    def follow(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        done = float(steps)
        return torch.lerp(averaged, current, 1 - min(decay, (1 + done) / (10 + done)))

    return AveragedModel(model, device, avg_fn=follow)


def _enable_gradient_checkpointing(model: nn.Module) -> None:
    """Switches it on in our modules, and in Hugging Face models by their own method."""
    ours = [module for module in model.modules() if isinstance(getattr(module, "gradient_checkpointing", None), bool)]
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if callable(enable):
        enable()
    elif ours:
        for module in ours:
            module.gradient_checkpointing = True  # type: ignore[assignment]
    else:
        raise InputError(
            f"TrainingConfig: gradient_checkpointing: {type(model).__name__} has no module with a "
            "gradient_checkpointing switch; set it to False"
        )

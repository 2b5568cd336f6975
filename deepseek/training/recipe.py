"""The training loop. The package docstring of `deepseek.training` has its contract and an example."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import accelerate
import numpy as np
import torch
from accelerate.utils import broadcast, gather_object, set_seed
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from deepseek.checkpoints import Checkpoints, digest, probe
from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.spec.files.folders import beside
from deepseek.training.batch_size import fitting_batch
from deepseek.training.loss import LossFunction, checked, mean_loss, rows_of
from deepseek.training.memory import used_bytes
from deepseek.training.meter import LossWatch, cure
from deepseek.training.outcome import Epoch, Position, TrainingDiverged, TrainingResult, Weights
from deepseek.training.progress import LINE_EVERY_S, ProgressLine
from deepseek.training.report import write_report
from deepseek.training.switches import (
    enable_gradient_checkpointing,
    leave_processes_at_exit,
    make_accelerator,
    running_average,
)

NAN_ADVICE = "Try a lower learning rate, and look for NaN or huge values in the data"


class _EpochSampler(Sampler[int]):
    """A random order that depends only on seed and epoch, so that a resumed epoch has the same order."""

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
    report: str | Path | None = None,
) -> TrainingResult:
    """Trains `model` in place; it ends in eval mode with the weights of the best validation loss.

    `loss(model, batch)` returns the mean over a batch, as a scalar, and must call the model that it is given.
    `checkpoints` is a folder used only by this run; without it, the run cannot be resumed. `identity` is anything else
    that distinguishes this run from others, such as a hash of the data; a few rows are always compared. `report` is an
    HTML file for curves, written after each epoch with a JSON file of the figures beside it.
    Raises TrainingDiverged, and InputError for data, a model or a checkpoint that does not fit.
    """
    for name, data in (("train_data", train_data), ("validation_data", validation_data)):
        if not isinstance(data, Sized) or len(data) == 0:
            raise InputError(f"{name}: a dataset with a length of at least 1 is needed; seen {type(data).__name__}")
    if report is not None and Path(report).suffix != ".html":
        raise InputError(f"report: seen {str(report)!r}; use a name that ends in .html (a .json is written beside it)")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"model: no parameter of {type(model).__name__} requires a gradient: nothing can be trained")
    if config.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    run = _Run(model, train_data, validation_data, checked(loss), config, checkpoints, report)
    if checkpoints is not None:
        run.keep_checkpoints(Path(checkpoints), identity or {})
    return run.train()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        train_data: Dataset[Any],
        validation_data: Dataset[Any],
        loss: LossFunction,
        config: TrainingConfig,
        checkpoints: str | Path | None,
        report: str | Path | None,
    ) -> None:
        self.given, self.train_data, self.validation_data, self.loss = model, train_data, validation_data, loss
        self.accelerator = make_accelerator(config)
        self.found = ""  # the result of batch_size="auto", in words
        self.config = config = self._with_batch_size(config, loss, checkpoints)
        self.report_path = None if report is None else Path(report)
        device = self.accelerator.device
        self.average = running_average(model, config.ema_decay, device) if config.ema_decay else None
        self.raw_optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.raw_optimizer, patience=config.plateau_patience or 0, factor=config.plateau_factor
        )
        self.order = _EpochSampler(len(cast(Sized, train_data)), config.seed)
        prepared = self.accelerator.prepare(model, self.raw_optimizer, self._loader(train_data, sampler=self.order))
        self.model, self.optimizer, self.batches = prepared
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        rows = range(rank, len(cast(Sized, validation_data)), ranks)
        self.validation = self._loader(validation_data if ranks == 1 else Subset(validation_data, rows))
        self.position = Position(watch=LossWatch(config.explosion_factor))
        self.accelerator.register_for_checkpointing(self.position, self.plateau, *filter(None, [self.average]))
        self.steps_per_epoch = math.ceil(len(self.batches) / config.accumulation_steps)
        self.warmup_steps = round(config.warmup_fraction * config.max_epochs * self.steps_per_epoch)
        self.checkpoints: Checkpoints | None = None
        self.resumed_at_step: int | None = None
        set_seed(config.seed, device_specific=True)  # each process has its own dropout masks

    def _with_batch_size(
        self, config: TrainingConfig, loss: LossFunction, checkpoints: str | Path | None
    ) -> TrainingConfig:
        """Resolves `auto`: the batch size in the run's checkpoint, or the one that fits in every process."""
        if config.batch_size != "auto":
            return config
        kept = Checkpoints(checkpoints, {}).recorded("batch_size") if checkpoints is not None else None
        if kept is not None:
            return replace(config, batch_size=kept)
        accelerator, device = self.accelerator, self.accelerator.device
        home = next((parameter.device for parameter in self.given.parameters()), device)
        mine = fitting_batch(
            self.given.to(device),
            self.train_data,
            loss,
            config,
            device,
            autocast=accelerator.autocast,
            processes=accelerator.num_processes,
        )
        self.given.to(home)
        self.found = mine.line
        return replace(config, batch_size=min(gather_object([mine.batch_size])))

    def _loader(self, data: Dataset[Any], sampler: Sampler[int] | None = None) -> DataLoader[Any]:
        # With its own generator: otherwise a loader draws from the global random state at the start of each epoch,
        # once more in a resumed run than in an uninterrupted one, and dropout would differ.
        generator = torch.Generator().manual_seed(self.config.seed)
        return DataLoader(
            data,
            batch_size=int(self.config.batch_size),
            sampler=sampler,
            num_workers=self.config.num_workers,
            generator=generator,
        )

    def keep_checkpoints(self, folder: Path, identity: Mapping[str, object]) -> None:
        """Keeps checkpoints from now on, and resumes from the last one if there is any."""
        shapes = {name: [*weight.shape] for name, weight in self.given.state_dict().items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"checkpoints: {folder}: {error.strerror}; name a folder that can be written") from None
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(0)  # an earlier run in this process may have left it elsewhere
        self.checkpoints = Checkpoints(
            folder,
            {
                **self.config.identity(),
                "processes": self.accelerator.num_processes,
                "model": digest(shapes),
                "train_data": probe(self.train_data),
                "validation_data": probe(self.validation_data),
                **identity,
            },
        )
        set_seed(self.config.seed, device_specific=True)  # the probes may have drawn random numbers
        if self.checkpoints.resume(self.accelerator):
            self.resumed_at_step = self.position.step

    def train(self) -> TrainingResult:
        position, main = self.position, self.accelerator.is_main_process
        self.checkpointed_at = time.monotonic()
        with ProgressLine(self.config.max_epochs * self.steps_per_epoch, main) as progress:
            if self.found:
                progress.console.print(self.found)
            while not position.finished:
                self._train_epoch(progress)
                self._finish_epoch(self._validate())
                progress.epoch(position.epochs[-1], position.step, position.best_loss, position.finished)
                self._write_report()
                self._checkpoint(due=position.finished)
            starved = position.meter.starved(self.config.num_workers)
            if starved and position.meter.seconds >= LINE_EVERY_S:
                progress.console.print(starved)
        self._load_best()
        if self.accelerator.num_processes > 1:
            leave_processes_at_exit()
        return TrainingResult(
            best_loss=position.best_loss,
            best_epoch=position.best_epoch,
            steps=position.step,
            epochs=tuple(Epoch(**epoch) for epoch in position.epochs),
            resumed_at_step=self.resumed_at_step,
            batch_size=int(self.config.batch_size),
            rows_per_s=position.meter.rows_per_s,
            data_share=position.meter.data_share,
            peak_memory_bytes=position.meter.peak_memory_bytes,
        )

    def _train_epoch(self, progress: ProgressLine) -> None:
        position, in_step = self.position, self.config.accumulation_steps
        self.order.set_epoch(position.epoch)
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(position.epoch)
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(position.epoch)
        batches = accelerate.skip_first_batches(self.batches, position.batch) if position.batch else self.batches
        self.model.train()
        losses: list[Tensor] = []  # of the batches of one step
        rows, in_epoch = 0, len(self.batches)
        for batch in position.meter.timed(batches):
            with self.accelerator.accumulate(self.model):
                loss = self.loss(self.model, batch)
                # accelerate divides by in_step, even in an epoch's last step, which may have fewer batches.
                in_this_step = min(in_step, in_epoch - position.batch // in_step * in_step)
                self.accelerator.backward(loss * (in_step / in_this_step))
                losses.append(loss.detach())
                position.batch += 1
                rows += rows_of(batch)
                if not self.accelerator.sync_gradients:
                    continue
                self._step(torch.stack(losses).mean(), rows * self.accelerator.num_processes)
                losses.clear()
                rows = 0
            progress.step(position.epoch, position.step, self._learning_rate())
            self._checkpoint()

    def _step(self, loss: Tensor, rows: int) -> None:
        position, config, accelerator = self.position, self.config, self.accelerator
        if position.step < self.warmup_steps:
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * (position.step + 1) / self.warmup_steps
        clip_norm = math.inf if config.clip_norm is None else config.clip_norm
        norm = torch.as_tensor(accelerator.clip_grad_norm_(self.model.parameters(), clip_norm))
        loss = accelerator.reduce(loss.float(), "mean") if accelerator.num_processes > 1 else loss
        loss_value, norm_value = torch.stack([loss.float(), norm.float().to(loss.device)]).tolist()
        # With fp16's loss scaling, an infinite gradient is normal: the step is skipped and the scale is halved.
        if not math.isfinite(loss_value) or (not math.isfinite(norm_value) and accelerator.scaler is None):
            raise self._diverged(f"loss is {loss_value:g}", norm_value)
        exploded = position.watch.see(position.step + 1, loss_value, norm_value)
        if exploded:
            raise self._diverged(exploded, norm_value, cure(config.clip_norm, position.watch.usual_norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average is not None:
            self.average.update_parameters(self.given)
        position.step += 1
        position.loss_sum += loss_value
        position.gradient_norm = norm_value
        position.meter.step(
            step=position.step,
            loss=loss_value,
            learning_rate=self._learning_rate(),
            gradient_norm=norm_value,
            rows=rows,
            memory_bytes=used_bytes(accelerator.device),
        )

    def _validate(self) -> float:
        """Mean validation loss over all rows. Raises TrainingDiverged if it is NaN or infinite."""
        found = mean_loss(self.loss, self._validated(), self.validation, self.accelerator)
        if not math.isfinite(found):
            raise self._diverged(f"validation loss is {found:g}", self.position.gradient_norm)
        return found

    def _finish_epoch(self, validation_loss: float) -> None:
        position, config = self.position, self.config
        epoch = Epoch(
            epoch=position.epoch,
            train_loss=position.loss_sum / self.steps_per_epoch,
            validation_loss=validation_loss,
            learning_rate=self._learning_rate(),
        )
        position.epochs.append(asdict(epoch))
        if position.step >= self.warmup_steps and config.plateau_patience is not None:
            self.plateau.step(validation_loss)
        if validation_loss < position.best_loss:
            position.best_loss, position.best_epoch = validation_loss, position.epoch
            position.best_weights = self._weights()
        stale = position.epoch - position.best_epoch
        position.epoch, position.batch, position.loss_sum = position.epoch + 1, 0, 0.0
        stopped = config.early_stopping_patience is not None and stale >= config.early_stopping_patience
        position.finished = stopped or position.epoch == config.max_epochs

    def _learning_rate(self) -> float:
        return float(self.raw_optimizer.param_groups[0]["lr"])

    def _validated(self) -> nn.Module:
        """The module whose weights are validated and kept. Not the one that DistributedDataParallel wraps: its forward
        waits for the other processes, which may have fewer batches."""
        return self.given if self.average is None else self.average.module

    def _weights(self) -> Weights:
        return {name: weight.detach().cpu().clone() for name, weight in self._validated().state_dict().items()}

    def _load_best(self) -> None:
        if self.position.best_weights:
            self.given.load_state_dict(self.position.best_weights)
        self.given.eval()

    def _diverged(self, what: str, norm: float, advice: str = NAN_ADVICE) -> TrainingDiverged:
        position = self.position
        self._load_best()
        kept = f"those of epoch {position.best_epoch + 1}" if position.best_weights else "those before this step"
        if self.checkpoints and self.accelerator.is_main_process:
            path = self.checkpoints.folder / "last_good.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside(path) as draft:
                save_model(self.given, str(draft))
            kept += f", in {path}"
        step, rate = position.step + 1, self._learning_rate()
        message = (
            f"training stopped at step {step}: {what}; learning rate {rate:.3g}, gradient norm {norm:.3g} "
            f"(step before: {position.gradient_norm:.3g}). Last good weights: {kept}. {advice}"
        )
        self._write_report(message)
        return TrainingDiverged(message, step=step, learning_rate=rate, gradient_norm=norm)

    def _write_report(self, failure: str = "") -> None:
        if self.report_path is None or not self.accelerator.is_main_process:
            return
        position, meter = self.position, self.position.meter
        notes = [each for each in (failure, self.found, meter.starved(self.config.num_workers)) if each]
        write_report(
            self.report_path,
            {
                "model": type(self.given).__name__,
                "device": str(self.accelerator.device),
                "processes": self.accelerator.num_processes,
                "mixed_precision": self.accelerator.mixed_precision,
                "settings": asdict(self.config),
                "epochs": position.epochs,
                "best_epoch": position.best_epoch,
                "steps": meter.curve,
                "steps_done": position.step,
                "steps_per_epoch": self.steps_per_epoch,
                "rows_per_s": meter.rows_per_s,
                "data_share": meter.data_share,
                "peak_memory_bytes": meter.peak_memory_bytes,
                "notes": notes,
            },
        )

    def _checkpoint(self, due: bool = False) -> None:
        if self.checkpoints is None:
            return
        due = due or time.monotonic() - self.checkpointed_at >= self.config.checkpoint_every_s
        if self.accelerator.num_processes > 1:  # clocks differ, so the first process decides
            due = bool(broadcast(torch.tensor([int(due)], device=self.accelerator.device), 0).item())
        if due:
            self.checkpoints.save(self.accelerator)
            self.checkpointed_at = time.monotonic()

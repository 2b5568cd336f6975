"""The training loop. The package docstring of `deepseek.training` has its contract and an example."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sized
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, gather_object, set_seed
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.utils.data import Dataset

from deepseek.checkpoints import Checkpoints, digest, probe
from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.spec.files.folders import beside
from deepseek.training.batch_size import fitting_batch
from deepseek.training.loader import EpochSampler, leaves_a_row, loader_of
from deepseek.training.memory import used_bytes
from deepseek.training.meter import LossWatch, cure
from deepseek.training.outcome import Epoch, Position, TrainingDiverged, TrainingResult
from deepseek.training.progress import LINE_EVERY_S, ProgressLine
from deepseek.training.report import write_report
from deepseek.training.switches import (
    enable_gradient_checkpointing,
    leave_processes_at_exit,
    make_accelerator,
    own_forward_afterwards,
    running_average,
)
from deepseek.training.ways import Data, LossFunction, Sharded, Weights, check_parallel, checked, copied, rows_of

if TYPE_CHECKING:
    from deepseek.training.pipeline import Pipeline


NAN_ADVICE = "Try a lower learning rate, and look for NaN or huge values in the data"


@torch.enable_grad()  # the caller's code may have turned gradients off, as for inference
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
    with own_forward_afterwards(model):
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
        self.given, self.train_data, self.validation_data = model, train_data, validation_data
        self.accelerator = make_accelerator(config)
        self.found = ""  # the result of batch_size="auto", in words
        self.config = config = self._with_batch_size(config, loss, checkpoints)
        self.report_path = None if report is None else Path(report)
        self.way = _way(self.accelerator, model, loss, config)
        device = self.accelerator.device
        self.average = running_average(model, config.ema_decay, device) if config.ema_decay else None
        self.raw_optimizer = torch.optim.AdamW(
            self.way.model.parameters(), lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
        )
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            self.raw_optimizer, patience=config.plateau_patience or 0, factor=config.plateau_factor, threshold=0
        )
        self.order = EpochSampler(len(cast(Sized, train_data)), config.seed)
        drop_last = self.way.drop_last or leaves_a_row(model, len(self.order), self.way.batch_rows)
        loader = loader_of(train_data, self.order, self.way.batch_rows, config, drop_last=drop_last)
        self.way.prepare(self.raw_optimizer, loader, validation_data)
        self.position = Position(watch=LossWatch(config.explosion_factor))
        self.accelerator.register_for_checkpointing(self.position, self.plateau, *filter(None, [self.average]))
        self.steps_per_epoch = math.ceil(len(self.way.train) / self.way.accumulation_steps)
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
        if config.parallel == "pipeline" and self.accelerator.num_processes > 1:
            raise InputError("TrainingConfig: batch_size: 'auto' measures whole models; set a number for a pipeline")
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
        position, way = self.position, self.way
        self.order.set_epoch(position.epoch)
        if hasattr(way.train, "set_epoch"):
            way.train.set_epoch(position.epoch)
        if hasattr(self.train_data, "set_epoch"):
            self.train_data.set_epoch(position.epoch)
        batches = accelerate.skip_first_batches(way.train, position.batch) if position.batch else way.train
        way.model.train()
        losses: list[Tensor] = []  # of the batches of one step
        rows, in_epoch, in_step = 0, len(way.train), way.accumulation_steps
        for batch in position.meter.timed(batches):
            with way.accumulating():
                losses.append(way.backward(batch, min(in_step, in_epoch - position.batch // in_step * in_step)))
                position.batch += 1
                rows += rows_of(batch)
                if not way.step_is_due:
                    continue
                self._step(torch.stack(losses).mean(), rows * way.rows_factor)
                losses.clear()
                rows = 0
            progress.step(position.epoch, position.step, self._learning_rate())
            self._checkpoint()

    def _step(self, loss: Tensor, rows: int) -> None:
        position, config, way = self.position, self.config, self.way
        if position.step < self.warmup_steps:
            for group in way.optimizer.param_groups:
                group["lr"] = config.learning_rate * (position.step + 1) / self.warmup_steps
        norm = way.clip(math.inf if config.clip_norm is None else config.clip_norm)
        loss = way.mean(loss)
        loss_value, norm_value = torch.stack([loss.float(), norm.float().to(loss.device)]).tolist()
        # With fp16's loss scaling, an infinite gradient is normal: the step is skipped and the scale is halved.
        if not math.isfinite(loss_value) or (not math.isfinite(norm_value) and self.accelerator.scaler is None):
            raise self._diverged(f"loss is {loss_value:g}", norm_value)
        exploded = position.watch.see(position.step + 1, loss_value, norm_value)
        if exploded:
            raise self._diverged(exploded, norm_value, cure(config.clip_norm, position.watch.usual_norm))
        way.optimizer.step()
        way.optimizer.zero_grad()
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
            memory_bytes=used_bytes(self.accelerator.device),
        )

    def _validate(self) -> float:
        """Mean validation loss over all rows. Raises TrainingDiverged if it is NaN or infinite."""
        found = self.way.validate(self.way.model if self.average is None else self.average.module)
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

    def _weights(self) -> Weights:
        return self.way.weights() if self.average is None else copied(self.average.module)

    def _load_best(self) -> None:
        self.way.load(self.position.best_weights or self.way.weights())
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
        self.accelerator.wait_for_everyone()  # the launcher stops all processes when the first of them ends
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


def _way(accelerator: Accelerator, model: nn.Module, loss: LossFunction, config: TrainingConfig) -> Data | Pipeline:
    if accelerator.num_processes == 1 or config.parallel == "data":
        return Data(accelerator, model, loss, config)
    check_parallel(accelerator, config)
    if config.parallel == "sharded":
        return Sharded(accelerator, model, loss, config)
    from deepseek.training.pipeline import Pipeline

    return Pipeline(accelerator, model, loss, config)

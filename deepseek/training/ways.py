"""How the processes of a run divide the work: rows (`Data`), or rows and training state (`Sharded`).

Contract: what the recipe asks of a way of training is `Way`; `deepseek.training.pipeline` is the third. All processes
see the same loss, gradient norm and validation loss, so that they decide alike: when to stop, what is best.
`weights()` gives the whole model's on every process. One process is `Data` with nobody to share with, whatever
`parallel` says.

    data       each process holds all of the model, gradients are averaged (DistributedDataParallel); where batches do
               not go round, accelerate repeats rows of the epoch's beginning
    sharded    each holds a share of weights, gradients and moments (FSDP2, `fully_shard`), layer by layer; the model
               that was given stays whole in RAM, and gets the best weights in the end
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset

from deepseek.config import TrainingConfig
from deepseek.spec import InputError

LossFunction = Callable[[nn.Module, Any], Tensor]
Weights = dict[str, Tensor]


def rows_of(batch: Any) -> int:
    """Rows of a batch: the first dimension of its first tensor; 1 where it has none."""
    try:
        return find_batch_size(batch) or 1
    except (TypeError, ValueError, IndexError):  # its first field is none: texts, say
        return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


class Way(Protocol):
    """What the recipe needs."""

    model: nn.Module
    optimizer: Any
    train: Any
    accumulation_steps: int
    """Batches of `train` that make a step."""
    batch_rows: int
    """Rows of such a batch."""
    drop_last: bool
    """Whether a last batch of fewer rows is left out of an epoch."""
    rows_factor: int
    """Rows of a step, over those that this process sees of it."""

    def prepare(self, optimizer: torch.optim.Optimizer, train: DataLoader[Any], validation: Dataset[Any]) -> None: ...
    def accumulating(self) -> contextlib.AbstractContextManager[Any]: ...
    def backward(self, batch: Any, batches: int) -> Tensor:
        """Loss of a batch, when its share of the gradients has been added; so many `batches` make this step."""
        ...

    @property
    def step_is_due(self) -> bool: ...
    def clip(self, max_norm: float) -> Tensor: ...
    def mean(self, loss: Tensor) -> Tensor:
        """Over the processes."""
        ...

    def validate(self, model: nn.Module) -> float: ...
    def weights(self) -> Weights: ...
    def load(self, weights: Weights) -> None:
        """Into the model that the user gave."""
        ...


class Data:
    """One process, or several that each go through rows of their own."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, loss: LossFunction, config: TrainingConfig) -> None:
        self.accelerator, self.given, self.loss, self.config = accelerator, model, loss, config
        self.accumulation_steps, self.rows_factor = config.accumulation_steps, accelerator.num_processes
        self.batch_rows, self.drop_last = int(config.batch_size), False
        self.model = model
        self.rows = 0  # to validate on

    def prepare(self, optimizer: torch.optim.Optimizer, train: DataLoader[Any], validation: Dataset[Any]) -> None:
        """Places model and loaders; from here on all processes take part in each call."""
        self.model, self.optimizer, self.train = self.accelerator.prepare(self.given, optimizer, train)
        self._prepare_validation(validation)

    def _prepare_validation(self, data: Dataset[Any]) -> None:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.rows = len(data)  # type: ignore[arg-type]
        mine = data if ranks == 1 else Subset(data, [*range(rank, self.rows, ranks)] or [0])
        generator = torch.Generator().manual_seed(self.config.seed)
        workers = self.config.num_workers
        loader: DataLoader[Any] = DataLoader(mine, batch_size=self.batch_rows, num_workers=workers, generator=generator)
        self.validation = self.accelerator.prepare(loader) if ranks == 1 else loader

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.accumulate(self.model)

    def backward(self, batch: Any, batches: int) -> Tensor:
        return self._add_gradients(self.loss(self.model, batch), batches)

    def _add_gradients(self, loss: Tensor, batches: int) -> Tensor:
        # accelerate divides by accumulation_steps, also in an epoch's last step, which may have fewer batches.
        self.accelerator.backward(loss * (self.accumulation_steps / batches))
        return loss.detach()

    @property
    def step_is_due(self) -> bool:
        return bool(self.accelerator.sync_gradients)

    def clip(self, max_norm: float) -> Tensor:
        norm = torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm))
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def mean(self, loss: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return loss
        return self.accelerator.reduce(loss.float(), "mean")

    def validate(self, model: nn.Module) -> float:
        """Mean validation loss over all rows, each counted once."""
        model.eval()
        loss_sum, rows = 0.0, 0
        with torch.no_grad():
            for batch, counted in self._validation_batches():
                value = self._validation_loss(model, batch)  # also where it does not count: see below
                loss_sum += value * counted if counted else 0.0
                rows += counted
        if self.accelerator.num_processes > 1:
            sums = torch.tensor([loss_sum, rows], device=self.accelerator.device)
            loss_sum, rows = self.accelerator.reduce(sums).tolist()
        return loss_sum / rows

    def _validation_loss(self, model: nn.Module, batch: Any) -> float:
        return float(self.loss(model, batch))

    def _validation_batches(self) -> Iterator[tuple[Any, int]]:
        """As many on each process: shards are gathered in every forward pass, so nobody may stay away."""
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        wanted = math.ceil(math.ceil(self.rows / ranks) / self.batch_rows)
        done, batch = 0, None
        for batch in self.validation:
            done += 1
            if ranks > 1:
                batch = send_to_device(batch, self.accelerator.device)
            yield batch, rows_of(batch) if rank < self.rows else 0
        while done < wanted:
            done += 1
            yield batch, 0

    def weights(self) -> Weights:
        state = self.accelerator.unwrap_model(self.model).state_dict()
        return {name: weight.detach().cpu().clone() for name, weight in state.items()}

    def load(self, weights: Weights) -> None:
        self.given.load_state_dict(weights)


class Sharded(Data):
    """Weights, gradients and moments divided over the processes."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, loss: LossFunction, config: TrainingConfig) -> None:
        super().__init__(accelerator, model, loss, config)
        self.model = shards(model, accelerator)  # before an optimizer is made of the parameters: they are others now

    def prepare(self, optimizer: torch.optim.Optimizer, train: DataLoader[Any], validation: Dataset[Any]) -> None:
        self.train = self.accelerator.prepare(train)
        self._prepare_validation(validation)
        self.optimizer = optimizer
        keep_in_shards(self.accelerator, self.model, optimizer)

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.accumulate()  # each batch's gradients are scattered at once

    def backward(self, batch: Any, batches: int) -> Tensor:
        with self.accelerator.autocast():
            loss = self.loss(self.model, batch)
        return self._add_gradients(loss, batches)

    def _validation_loss(self, model: nn.Module, batch: Any) -> float:
        with self.accelerator.autocast():
            return float(self.loss(model, batch))

    def weights(self) -> Weights:
        state = self.model.state_dict()
        whole = {name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in state.items()}
        return {name: weight.detach().cpu().clone() for name, weight in whole.items()}


def shards(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A copy of a model of which each process holds a part: layer by layer, and what is outside of layers together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    sharded = copy.deepcopy(model).to(accelerator.device)

    def each_layer(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(module, nn.ModuleList | nn.Sequential) and next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh)
            else:
                each_layer(child)

    each_layer(sharded)
    fully_shard(sharded, mesh=mesh)
    return sharded


def keep_in_shards(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Has accelerate's checkpoints hold each process's part of model and optimizer (torch.distributed.checkpoint)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter: stages have others each

    def state() -> dict[str, Any]:
        weights, moments = get_state_dict(model, optimizer, options=options)
        return {"model": weights, "optimizer": moments}

    def save(models: Any, weights: Any, folder: str) -> None:
        dcp.save(state(), checkpoint_id=str(Path(folder) / "shards"))

    def load(models: Any, folder: str) -> None:
        found = state()
        dcp.load(found, checkpoint_id=str(Path(folder) / "shards"))
        parts = {"model_state_dict": found["model"], "optim_state_dict": found["optimizer"]}
        set_state_dict(model, optimizer, options=options, **parts)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def check_parallel(accelerator: Accelerator, config: TrainingConfig) -> None:
    """Raises InputError for settings that this way of training does not have."""
    owner = f"TrainingConfig: parallel: {config.parallel!r}"
    if config.ema_decay is not None:
        raise InputError(f"{owner} keeps no running average; set ema_decay=None, or parallel='data'")
    if accelerator.mixed_precision == "fp16":
        raise InputError(f"{owner}: mixed_precision: seen 'fp16'; allowed: bf16, no (nothing scales the loss here)")

"""How the processes of a run divide the work: rows (`Data`), or rows and training state (`Sharded`).

Contract: `deepseek.training.pipeline.Pipeline` is the third way, with the same methods. All processes see the same
loss, gradient norm and validation loss, so they make the same decisions: when to stop, which weights are best.
`weights()` returns the weights of the whole model on every process. A single process always uses `Data`, whatever
`parallel` is.

    data       each process holds the whole model, gradients are averaged (DistributedDataParallel); if batches cannot
               be divided evenly, accelerate repeats rows from the beginning of the epoch
    sharded    each process holds a share of weights, gradients and moments (FSDP2, `fully_shard`), layer by layer; the
               given model stays whole in RAM, and gets the best weights at the end
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import find_batch_size, send_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset, Subset

from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.training.loader import stacked

LossFunction = Callable[[nn.Module, Any], Tensor]
Weights = dict[str, Tensor]


def checked(loss: LossFunction) -> LossFunction:
    """The same function; raises InputError unless it returns one number, with a gradient while training."""

    def call(model: nn.Module, batch: Any) -> Tensor:
        try:
            value: Any = loss(model, batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):  # torch.nn.functional.batch_norm
                raise
            raise InputError(
                f"batch_size: BatchNorm cannot train on a batch of {rows_of(batch)} row(s): {error}; use a larger "
                "batch_size, or fewer accumulation_steps"
            ) from None
        if not isinstance(value, Tensor):
            seen = type(value).__name__
        elif value.numel() != 1:
            seen = f"a tensor of shape {[*value.shape]}"
        elif torch.is_grad_enabled() and not value.requires_grad:
            seen = "a tensor without a gradient"
        else:
            return value
        raise InputError(f"loss(model, batch): seen {seen}; allowed: a tensor of one number, computed from the model")

    return call


def rows_of(batch: Any) -> int:
    """Rows of a batch: the first dimension of its first tensor, or 1 if it has no tensor."""
    try:
        return find_batch_size(batch) or 1
    except (TypeError, ValueError, IndexError):  # its first field is not a tensor, but strings, for example
        return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _whole(tensor: Tensor) -> Tensor:
    """A tensor with the shards of all processes, if it is divided."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def copied(model: nn.Module) -> Weights:
    """The weights of a model, copied to the CPU; those of all processes, if they are divided."""
    return {name: _whole(weight).detach().cpu().clone() for name, weight in model.state_dict().items()}


class Data:
    """One process, or several that each train on their own rows."""

    optimizer: Any
    train: Any
    accumulation_steps: int
    """Batches of `train` per optimizer step."""
    batch_rows: int
    """Rows per batch."""
    drop_last = False
    """Whether an epoch leaves out a last batch with fewer rows."""
    rows_factor: int
    """Rows of a step in all processes, divided by those in this process."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, loss: LossFunction, config: TrainingConfig) -> None:
        self.accelerator, self.given, self.loss, self.config = accelerator, model, loss, config
        self.accumulation_steps, self.rows_factor = config.accumulation_steps, accelerator.num_processes
        self.batch_rows = int(config.batch_size)
        self.model = model
        self.rows = 0  # validation rows

    def prepare(self, optimizer: torch.optim.Optimizer, train: DataLoader[Any], validation: Dataset[Any]) -> None:
        """Prepares model and loaders; from now on, all processes must take part in each call."""
        self.model, self.optimizer, self.train = self.accelerator.prepare(self.given, optimizer, train)
        self._prepare_validation(validation)

    def _prepare_validation(self, data: Dataset[Any]) -> None:
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        self.rows = len(data)  # type: ignore[arg-type]
        mine = data if ranks == 1 else Subset(data, [*range(rank, self.rows, ranks)] or [0])
        generator = torch.Generator().manual_seed(self.config.seed)
        workers = self.config.num_workers
        loader: DataLoader[Any] = DataLoader(
            mine, batch_size=self.batch_rows, num_workers=workers, generator=generator, collate_fn=stacked
        )
        self.validation = self.accelerator.prepare(loader) if ranks == 1 else loader

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return self.accelerator.accumulate(self.model)

    def backward(self, batch: Any, batches: int) -> Tensor:
        """Loss of a batch, whose gradients are added; `batches` is the number of batches in this step."""
        return self._add_gradients(self.loss(self.model, batch), batches)

    def _add_gradients(self, loss: Tensor, batches: int) -> Tensor:
        # accelerate divides by accumulation_steps, even in an epoch's last step, which may have fewer batches.
        self.accelerator.backward(loss * (self.accumulation_steps / batches))
        return loss.detach()

    @property
    def step_is_due(self) -> bool:
        return bool(self.accelerator.sync_gradients)

    def clip(self, max_norm: float) -> Tensor:
        return _whole(torch.as_tensor(self.accelerator.clip_grad_norm_(self.model.parameters(), max_norm)))

    def mean(self, loss: Tensor) -> Tensor:
        """Mean of a loss over the processes."""
        if self.accelerator.num_processes == 1:
            return loss
        return self.accelerator.reduce(loss.float(), "mean")

    def validate(self, model: nn.Module) -> float:
        """Mean validation loss over all rows, each counted once."""
        model.eval()
        loss_sum, rows = 0.0, 0
        with torch.no_grad():
            for batch, counted in self._validation_batches():
                value = self._validation_loss(model, batch)  # even if it does not count: see below
                loss_sum += value * counted if counted else 0.0
                rows += counted
        if self.accelerator.num_processes > 1:
            sums = torch.tensor([loss_sum, rows], device=self.accelerator.device)
            loss_sum, rows = self.accelerator.reduce(sums).tolist()
        return loss_sum / rows

    def _validation_loss(self, model: nn.Module, batch: Any) -> float:
        return float(self.loss(model, batch))

    def _validation_batches(self) -> Iterator[tuple[Any, int]]:
        """Equally many batches on each process: every forward pass gathers shards, so all processes must take part."""
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
        return copied(self.accelerator.unwrap_model(self.model))

    def load(self, weights: Weights) -> None:
        """Loads weights into the model that the user passed in."""
        self.given.load_state_dict(weights)


class Sharded(Data):
    """Weights, gradients and moments divided over the processes."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, loss: LossFunction, config: TrainingConfig) -> None:
        super().__init__(accelerator, model, loss, config)
        self.model = shards(model, accelerator)  # before the optimizer is made: the parameters are new objects

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
        return copied(self.model)


def shards(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """A sharded copy of a model: each layer is one unit, and everything outside layers is another."""
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
    check_tied(model, [sharded], "sharded")
    return sharded


def check_tied(whole: nn.Module, parts: Iterable[nn.Module], way: str) -> None:
    """Raises InputError if layers in different parts share a weight. Each part would train a copy of its own."""
    names = {name for part in parts for name, _ in part.named_parameters()}
    if copies := sorted(names - {name for name, _ in whole.named_parameters()}):
        raise InputError(
            f"TrainingConfig: parallel: {way!r}: {copies[0]} is also a weight of another layer, and each would train "
            "a copy of its own; set parallel='data', or give each layer its own weight"
        )


def keep_in_shards(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Makes accelerate's checkpoints hold each process's part of model and optimizer (torch.distributed.checkpoint)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

    options = StateDictOptions(flatten_optimizer_state_dict=True)  # by parameter: each stage has different ones

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
    """Raises InputError for settings that `config.parallel` does not support."""
    owner = f"TrainingConfig: parallel: {config.parallel!r}"
    if config.ema_decay is not None:
        raise InputError(f"{owner} supports no running average; set ema_decay=None, or parallel='data'")
    if accelerator.mixed_precision == "fp16":
        raise InputError(f"{owner}: mixed_precision: seen 'fp16'; allowed: bf16, no (loss scaling is not supported)")

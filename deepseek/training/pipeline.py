"""`parallel="pipeline"`: each process holds some layers, and micro-batches flow through them (1F1B).

Contract: the model is an `nn.Sequential`, or a Transformer with `padding_id=None`, or an `nn.Sequential` that contains
one. Its layers are cut into one part per process, with about equally many parameters. A step takes `accumulation_steps`
micro-batches of `batch_size` rows, at least one per process; an epoch leaves out rows that do not fill a step.

`loss(model, batch)` must be a mean over rows and call the model exactly once, with one tensor by position. The first
process takes the model's input from that call; the last process calls the loss with the model's output.
`torch.distributed.pipelining` does the scheduling and sending.
"""

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from deepseek.config import TrainingConfig
from deepseek.spec import InputError
from deepseek.training.ways import LossFunction, Weights, check_tied, copied, keep_in_shards, rows_of
from deepseek.transformer import Block, Transformer


class Pipeline:
    accumulation_steps = 1  # one batch contains all micro-batches of a step, which have equal sizes
    drop_last = True
    rows_factor = 1

    def __init__(self, accelerator: Accelerator, model: nn.Module, loss: LossFunction, config: TrainingConfig) -> None:
        self.accelerator, self.loss, self.config = accelerator, loss, config
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        if config.accumulation_steps < self.ranks:
            raise InputError(
                f"TrainingConfig: accumulation_steps: seen {config.accumulation_steps}; a pipeline of {self.ranks} "
                f"processes needs {self.ranks} micro-batches or more to keep them busy"
            )
        self.layers = as_layers(model)
        parts = [part(self.layers, rank, self.ranks) for rank in range(self.ranks)]
        check_tied(self.layers, parts, "pipeline")
        self.mine = parts[self.rank]
        self.model: nn.Module = _Stage(accelerator, self.mine).to(accelerator.device)
        stage = PipelineStage(self.model, self.rank, self.ranks, accelerator.device)
        self.schedule = Schedule1F1B(stage, n_microbatches=config.accumulation_steps, loss_fn=self._loss_of_rows)
        self.batch_rows = int(config.batch_size) * config.accumulation_steps
        self.batch: Any = None

    def prepare(self, optimizer: torch.optim.Optimizer, train: DataLoader[Any], validation: Dataset[Any]) -> None:
        """Sets up the loaders: every process iterates over all rows, but only some processes use their content."""
        rows = len(train.dataset)  # type: ignore[arg-type]
        if rows < self.batch_rows:
            raise InputError(f"train_data: seen {rows} rows; a step of this pipeline takes {self.batch_rows}")
        self.optimizer, self.train = optimizer, train
        self.validation: DataLoader[Any] = DataLoader(validation, batch_size=int(self.config.batch_size))
        keep_in_shards(self.accelerator, self.mine, optimizer)

    def accumulating(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    step_is_due = True

    def backward(self, batch: Any, batches: int) -> Tensor:
        self.batch = send_to_device(batch, self.accelerator.device)
        losses: list[Tensor] = []
        if self.rank == 0:
            self.schedule.step(*arguments(self.loss, self.batch), return_outputs=False)
        elif self.rank < self.ranks - 1:
            self.schedule.step(return_outputs=False)
        else:
            rows = torch.arange(rows_of(self.batch), device=self.accelerator.device)
            self.schedule.step(target=rows, losses=losses, return_outputs=False)
        return self._from_last(torch.stack(losses).mean() if losses else torch.zeros(()))

    def _loss_of_rows(self, output: Tensor, rows: Tensor) -> Tensor:
        of_batch = rows_of(self.batch)
        batch = tree_map_only(Tensor, lambda each: each[rows] if each.shape[:1] == (of_batch,) else each, self.batch)
        with self.accelerator.autocast():
            return self.loss(_FixedOutput(output), batch)

    def _from_last(self, value: Tensor) -> Tensor:
        value = value.detach().float().to(self.accelerator.device)
        dist.broadcast(value, src=self.ranks - 1)
        return value

    def clip(self, max_norm: float) -> Tensor:
        gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
        squares = [gradient.float().square().sum() for gradient in gradients]
        square = torch.stack(squares).sum() if squares else torch.zeros((), device=self.accelerator.device)
        dist.all_reduce(square)
        norm = square.sqrt()
        share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(share.to(gradient.dtype))
        return norm

    def mean(self, loss: Tensor) -> Tensor:
        return loss

    def validate(self, model: nn.Module) -> float:
        """Mean validation loss. Each batch passes through all processes; batches may differ in size."""
        model.eval()
        loss_sum, rows = 0.0, 0
        with torch.no_grad():
            for each in self.validation:
                batch = send_to_device(each, self.accelerator.device)
                received: list[Any] = [None]
                if self.rank == 0:
                    received = list(arguments(self.loss, batch))
                else:
                    dist.recv_object_list(received, self.rank - 1)
                output, value = model(received[0].to(self.accelerator.device)), torch.zeros(())
                if self.rank < self.ranks - 1:
                    dist.send_object_list([output.cpu()], self.rank + 1)
                else:
                    with self.accelerator.autocast():
                        value = self.loss(_FixedOutput(output).eval(), batch)
                size = rows_of(batch)
                loss_sum, rows = loss_sum + float(self._from_last(value)) * size, rows + size
        return loss_sum / rows

    def weights(self) -> Weights:
        parts: list[Any] = [None] * self.ranks
        dist.all_gather_object(parts, copied(self.mine))
        return {name: weight for each in parts for name, weight in each.items()}

    def load(self, weights: Weights) -> None:
        self.layers.load_state_dict(weights)


class _Stage(nn.Module):
    """The layers of one process; its output is fp32, also under autocast."""

    def __init__(self, accelerator: Accelerator, layers: nn.Sequential) -> None:
        super().__init__()
        self.layers, self._autocast = layers, accelerator.autocast

    def forward(self, *inputs: Tensor) -> Tensor:
        with self._autocast():
            found: Tensor = self.layers(*inputs)
        return found.float()


class _FixedOutput(nn.Module):
    """Stands in for the model, and returns a known output."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, *inputs: Any) -> Tensor:
        return self.output


class _Called(Exception):
    def __init__(self, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs


class _InputCapture(nn.Module):
    """Stands in for the model, and captures its input."""

    def forward(self, *inputs: Any, **named: Any) -> Tensor:
        if named or len(inputs) != 1 or not isinstance(inputs[0], Tensor):
            raise InputError("parallel='pipeline': the loss must call the model with one tensor, by position")
        raise _Called(inputs)


def arguments(loss: LossFunction, batch: Any) -> tuple[Any, ...]:
    """The arguments with which a loss calls the model. Raises InputError unless it does so with one tensor."""
    try:
        loss(_InputCapture(), batch)
    except _Called as call:
        return call.inputs
    raise InputError("parallel='pipeline': the loss must call the model that it is given")


class _Embedding(nn.Module):
    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = transformer.tokens, transformer.positions, transformer.dropout

    def forward(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.dropout(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
        return embedded


class _Layer(nn.Module):
    def __init__(self, block: Block, checkpointing: bool) -> None:
        super().__init__()
        self.block, self.checkpointing = block, checkpointing

    def forward(self, x: Tensor) -> Tensor:
        again = self.checkpointing and self.training
        found: Tensor = checkpoint(self.block, x, None, use_reentrant=False) if again else self.block(x, None)
        return found


def as_layers(model: nn.Module) -> nn.Sequential:
    """The layers in order, sharing the model's parameters. Raises InputError for a model without a known order."""
    if isinstance(model, Transformer) and model.config.padding_id is None:
        blocks = [_Layer(block, model.gradient_checkpointing) for block in model.blocks]  # type: ignore[arg-type]
        return nn.Sequential(_Embedding(model), *blocks, model.norm)
    if isinstance(model, nn.Sequential):
        parts = [as_layers(child) if isinstance(child, Transformer) else [child] for child in model]
        return nn.Sequential(*(layer for each in parts for layer in each))
    raise InputError(
        f"TrainingConfig: parallel: 'pipeline' needs an nn.Sequential, or a Transformer with padding_id=None (masks "
        f"are not passed on); seen {type(model).__name__}"
    )


def part(layers: nn.Sequential, rank: int, ranks: int) -> nn.Sequential:
    """The layers of one process, with their names in the whole model."""
    cuts = cut([sum(each.numel() for each in layer.parameters()) for layer in layers], ranks)
    return nn.Sequential(OrderedDict([*layers.named_children()][cuts[rank] : cuts[rank + 1]]))


def cut(sizes: Sequence[int], parts: int) -> list[int]:
    """Cut points, including both ends. Each part has at least one layer and a similar number of parameters."""
    heavy = [place for place, size in enumerate(sizes) if size]
    if len(heavy) < parts:
        layers = f"{len(heavy)} layers with parameters"
        raise InputError(f"TrainingConfig: parallel: 'pipeline': seen {layers}, too few for {parts} processes")
    ends, first, found = list(itertools.accumulate(sizes[place] for place in heavy)), 0, [0]
    for number in range(1, parts):
        goal = ends[-1] * number / parts
        nearest = min(range(len(ends)), key=lambda index: abs(ends[index] - goal)) + 1
        first = min(max(nearest, first + 1), len(heavy) - (parts - number))
        found.append(heavy[first])  # layers without parameters stay with the layer before them
    return [*found, len(sizes)]

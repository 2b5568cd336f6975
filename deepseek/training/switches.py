"""Set-up and tear-down of a run, by switches of `TrainingConfig`.

Before the first step: precision, running average, gradient checkpointing. After the last: the process group's end.
"""

import atexit
import contextlib
import importlib
import os
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, distributed, nn
from torch.optim.swa_utils import AveragedModel

from deepseek.config import TrainingConfig
from deepseek.spec import InputError


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Sets up mixed precision, accumulation and processes. Raises InputError for an unsupported precision."""
    precision: str = config.mixed_precision
    if precision == "auto":
        cuda = torch.cuda.is_available()
        precision = ("bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16") if cuda else "no"
    launched = "LOCAL_RANK" in os.environ
    if launched and distributed.is_available():
        # If imported later, its functions' defaults keep the process group alive, and its threads never end.
        importlib.import_module("torch.distributed.nn")
    # accelerate keeps the precision of a process's first run; a notebook may train in several.
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=config.accumulation_steps,
            # Without this, accelerate treats each process on a CPU as a separate run.
            cpu=launched and not torch.accelerator.is_available(),
        )
    except ValueError as error:  # fp16 without a GPU
        raise InputError(f"TrainingConfig: mixed_precision: seen {config.mixed_precision!r}; {error}") from None


@contextlib.contextmanager
def own_forward_afterwards(model: nn.Module) -> Iterator[None]:
    """Takes away the mixed precision that accelerate puts around the model's `forward`, also after an error.

    accelerate's `unwrap_model` would also remove decorators of the model's own.
    """
    own = {name: value for name, value in vars(model).items() if name == "forward"}
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            vars(model).pop(name, None)
        vars(model).update(own)


def leave_processes_at_exit() -> None:
    """Ends the process group before the interpreter exits. Call it only after success: failed ranks may be waiting.

    Otherwise, a thread of the group that releases a tensor while the interpreter exits kills a process that has already
    finished its work (pytorch/pytorch#190489).
    """
    atexit.unregister(_leave_processes)
    atexit.register(_leave_processes)


def _leave_processes() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        time.sleep(0.1)  # DTensor's caches keep the group of a sharded model; its threads need a moment to release it


def running_average(model: nn.Module, decay: float, device: torch.device) -> AveragedModel:
    """A copy of the model that averages its weights; with a faster decay at first, while they change a lot."""

    def follow(averaged: Tensor, current: Tensor, steps: Tensor | int) -> Tensor:
        done = float(steps)
        return torch.lerp(averaged, current, 1 - min(decay, (1 + done) / (10 + done)))

    return AveragedModel(model, device, avg_fn=follow)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Enables it by a module's `gradient_checkpointing` attribute, or by the method of Hugging Face models."""
    ours = [module for module in model.modules() if isinstance(getattr(module, "gradient_checkpointing", None), bool)]
    methods = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second is gone in version 6
    enable = next((found for name in methods if callable(found := getattr(model, name, None))), None)
    if enable is not None:
        enable()
    elif ours:
        for module in ours:
            module.gradient_checkpointing = True  # type: ignore[assignment]
    else:
        raise InputError(
            f"TrainingConfig: gradient_checkpointing: {type(model).__name__} has no module with a "
            "gradient_checkpointing switch; set it to False"
        )

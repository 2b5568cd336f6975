"""`deepseek measure-training`: measures the guide's claims about training and prints each result beside its claim.

Memory is counted tensor by tensor (`deepseek.sizing.model.live_memory`), so it is exact and independent of other
programs. Times are medians of alternating runs; they are shown, not judged. Needs no built model. Writes
`build/bench-training.json`. Exit codes: 0 all claims hold, 1 one does not.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

from deepseek.config import TransformerConfig
from deepseek.sizing import TrainingSetup, TransformerSize, largest_batch, training_memory
from deepseek.sizing.model.live_memory import LiveBytes
from deepseek.training import TrainingDiverged, train_model
from deepseek.training.batch_size import fitting_batch
from deepseek.training.memory import besides_bytes
from deepseek.transformer import Transformer
from tests.bench.claims import Row, conclude
from tests.bench.training_memory import DRAWS, drawn, peak_of_a_step, said, shape
from tests.test_training import settings
from tests.test_training_meter import explode

PAIRS = 7


def checkpointing() -> list[Row]:
    """Memory and time of twelve layers with and without checkpointing."""
    kept, peaks, models = dict[bool, int](), dict[bool, int](), dict[bool, Transformer]()
    ids = torch.ones(8, 128, dtype=torch.int64)
    for on in (False, True):
        models[on] = Transformer(shape()).train()
        models[on].gradient_checkpointing = on
        with LiveBytes() as live:
            live.watch(models[on].parameters())
            before = live.now
            out = models[on](ids)
            kept[on] = live.now - before
            out.square().mean().backward()
        peaks[on] = live.most

    def step(on: bool) -> None:
        models[on](ids).square().mean().backward()

    plain_s, checkpointed_s = _median_s([lambda: step(False), lambda: step(True)])
    saved, whole = 1 - kept[True] / kept[False], 1 - peaks[True] / peaks[False]
    figures = f"{saved:.0%} ({kept[False] / 2**20:.0f} to {kept[True] / 2**20:.0f} MiB)"
    return [
        Row(what="checkpointing, 12 layers: activations saved", asked="60 %", seen=figures, holds=saved >= 0.6),
        Row(what="    of the step's peak, weights and gradients included", asked="", seen=f"{whole:.0%}"),
        Row(what="    time", asked="+ 33 % (one more forward)", seen=f"{checkpointed_s / plain_s - 1:+.0%}"),
    ]


def accumulation() -> list[Row]:
    """Gradients of each step of 4 batches of 8 against one batch of 32; the epoch's last step has 8 rows."""
    found = [_gradients(size, steps) for size, steps in ((32, 1), (8, 4))]
    pairs = [*zip(*found, strict=True)]
    worst = max(float((one - two).norm() / one.norm().clamp(min=1e-12)) for one, two in pairs)
    what = "accumulated gradients, 4 x 8 against 32 rows, 72 in all"
    text = f"relative difference {worst:.1e}, the worst of 3 x {len(pairs) // 3} tensors"
    return [Row(what=what, asked="the same", seen=text, holds=worst < 1e-4)]


def _gradients(batch_size: int, accumulation_steps: int) -> list[Tensor]:
    """The gradients at each optimizer step of an epoch of 72 rows; the weights hardly change between steps."""
    torch.manual_seed(0)
    model = Transformer(shape(num_layers=4, embedding_dropout=0.0, attention_dropout=0.0, ffn_dropout=0.0))
    data, found = TensorDataset(torch.randint(1, 1000, (72, 64))), list[Tensor]()

    def keep(optimizer: torch.optim.Optimizer, *given: Any) -> None:
        each = (parameter.grad for group in optimizer.param_groups for parameter in group["params"])
        found.extend(gradient.clone() for gradient in each if gradient is not None)

    def loss(network: nn.Module, batch: Any) -> Tensor:
        return network(batch[0]).sin().mean()

    config = settings(
        batch_size=batch_size, accumulation_steps=accumulation_steps, max_epochs=1, learning_rate=1e-9, clip_norm=None
    )
    kept = register_optimizer_step_pre_hook(keep)
    try:
        train_model(model, data, data, loss, config)
    finally:
        kept.remove()
    return found


def prediction() -> list[Row]:
    """The planned peak memory against real steps of random sizes."""
    text, holds = said(drawn(DRAWS))
    what = f"peak memory of {DRAWS} configurations drawn at random, predicted"
    return [Row(what=what, asked="within 10 %", seen=text, holds=holds)]


def mixed_precision() -> list[Row]:
    """bf16 on this CPU: memory, time and validation loss."""
    config = shape(num_layers=3)
    setups = [TrainingSetup(batch=8, length=64, precision=name, platform="cpu") for name in ("fp32", "bf16")]
    peaks = [peak_of_a_step(TransformerSize(config=config), setup) for setup in setups]
    model, ids = Transformer(config).train(), torch.ones(8, 64, dtype=torch.int64)

    def step(low: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            value = model(ids).square().mean()
        value.backward()

    fp32_s, bf16_s = _median_s([lambda: step(False), lambda: step(True)])
    losses = _losses_by_precision()
    apart = abs(losses[1] / losses[0] - 1)
    return [
        Row(
            what="bf16 on this CPU: peak of a step",
            asked="less",
            seen=f"{peaks[1] / peaks[0] - 1:+.0%}",
            holds=peaks[1] < peaks[0],
        ),
        Row(what="    time of forward and backward", asked="less", seen=f"{bf16_s / fp32_s - 1:+.0%}"),
        Row(
            what="    best validation loss",
            asked="as fp32",
            seen=f"{losses[1]:.4f} against {losses[0]:.4f}",
            holds=apart < 0.05,
        ),
    ]


def _losses_by_precision() -> list[float]:
    """The best loss by precision, each in its own process: accelerate keeps its first precision."""
    code = (
        "import sys; from tests.test_training import *\n"
        "config = settings(max_epochs=20, mixed_precision=sys.argv[1])\n"
        "print(train_model(network(), points(), points(1), cross_entropy, config).best_loss)"
    )
    return [
        float(subprocess.run([sys.executable, "-c", code, name], check=True, capture_output=True, text=True).stdout)
        for name in ("no", "bf16")
    ]


def clipping() -> list[Row]:
    """A run in which 2 of 512 labels are broken, with and without clipping."""
    try:
        explode(None)
        caught = "not caught"
    except TrainingDiverged as error:
        caught = f"stopped at step {error.step}"
    _, cured = explode(1.0)
    return [
        Row(what="exploding loss, clip_norm=None", asked="diverges", seen=caught, holds=caught != "not caught"),
        Row(
            what="    the same with clip_norm=1",
            asked="cured",
            seen=f"validation loss {cured.best_loss:.3f}",
            holds=cured.best_loss < 0.3,
        ),
    ]


def batch_size() -> list[Row]:
    """`batch_size="auto"` in 512 MB against the plan's largest batch."""
    config, device = shape(num_layers=4), torch.device("cpu")
    model, room = Transformer(config), 512e6
    data = TensorDataset(torch.ones(4096, 64, dtype=torch.int64))

    def loss(each: nn.Module, batch: Any) -> Tensor:
        return each(batch[0]).square().mean()

    limit = (besides_bytes(device, model.parameters()) + room) / 0.8
    found = fitting_batch(model, data, loss, settings(), device, limit=limit)
    setup = TrainingSetup(batch=1, length=64, platform="cpu")

    def planned(size: int) -> float:
        memory = training_memory(TransformerSize(config=config), replace(setup, batch=size))
        return memory.peak_bytes - memory.context_bytes

    plan = largest_batch(planned, room)
    text = f"{found.batch_size} rows, the plan says {plan}"
    apart = abs(found.batch_size / plan - 1)
    return [Row(what='batch_size="auto" in 512 MB', asked="from 256 to 80 %", seen=text, holds=apart <= 0.1)]


def on_gpu() -> list[Row]:
    """bf16 and checkpointing on the GPU; no rows without one."""
    if not torch.cuda.is_available():
        return []
    return low_precision_and_checkpointing(torch.device("cuda"), shape(hidden_size=768), rows=32)


def low_precision_and_checkpointing(device: torch.device, config: TransformerConfig, rows: int) -> list[Row]:
    """Time and peak memory of forward and backward: plain in fp32, in bf16, and in fp32 with checkpointing."""
    model = Transformer(config).train().to(device)
    ids = torch.ones(rows, config.max_length, dtype=torch.int64, device=device)

    def step(low: bool, again: bool) -> None:
        model.gradient_checkpointing = again
        model.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            value = model(ids).square().mean()
        value.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def peak(low: bool, again: bool) -> int:
        with LiveBytes() as live:
            live.watch(model.parameters())
            step(low, again)
        return live.most

    sides = ((False, False), (True, False), (False, True))
    plain_s, low_s, again_s = _median_s([functools.partial(step, *side) for side in sides])
    plain, low, again = (peak(*side) for side in sides)
    where = f"on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'the CPU'}"
    return [
        Row(what=f"bf16 {where}: speed", asked="1.8 times", seen=f"{plain_s / low_s:.2f} times"),
        Row(what="    peak of a step", asked="less", seen=f"{low / plain - 1:+.0%}"),
        Row(what=f"checkpointing {where}: peak of a step", asked="- 60 %", seen=f"{again / plain - 1:+.0%}"),
        Row(what="    time", asked="+ 33 %", seen=f"{again_s / plain_s - 1:+.0%}"),
    ]


def _median_s(sides: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each side; the sides alternate."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(PAIRS + 1):
        for kept, side in zip(times, sides, strict=True):
            began = time.perf_counter()
            side()
            kept.append(time.perf_counter() - began)
    return [statistics.median(each[1:]) for each in times]  # the first allocates


PARTS: dict[str, Callable[[], list[Row]]] = {
    "checkpointing": checkpointing,
    "accumulation": accumulation,
    "prediction": prediction,
    "mixed-precision": mixed_precision,
    "clipping": clipping,
    "batch-size": batch_size,
    "gpu": on_gpu,
}


def main(options: argparse.Namespace) -> int:
    """Runs the measurements and prints the table."""
    torch.set_num_threads(1)  # other programs disturb one thread less
    log, claims = Console(stderr=True), list[Row]()
    for name in options.only or PARTS:
        with log.status(name):
            claims += PARTS[name]()
    return conclude(claims, "bench-training", asked="guide")

"""Measures the guide's claims about training in one run on this machine, and prints each result beside its claim.

Memory is counted tensor by tensor (`deepseek.sizing.model.live_memory`), so it is exact and independent of other
programs. Times are medians of alternating runs; they are shown, not judged. Needs no built model. Writes
`build/bench-training.json`. Exit codes: 0 all claims hold, 1 one does not.

Examples:
    python -m tests.bench.training
    python -m tests.bench.training --only checkpointing
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import TensorDataset

from deepseek.sizing import TrainingSetup, TransformerSize, largest_batch, training_memory
from deepseek.sizing.model.live_memory import LiveBytes
from deepseek.spec import Parser, build_dir, run_command
from deepseek.spec.files.folders import write_whole
from deepseek.training import TrainingDiverged, train_model
from deepseek.training.batch_size import fitting_batch
from deepseek.training.memory import besides_bytes
from deepseek.transformer import Transformer
from tests.bench.training_memory import DRAWS, drawn, grid, peak_of_a_step, said, shape
from tests.conftest import run_module
from tests.test_training import cross_entropy, network, points, settings
from tests.test_training_meter import explode
from tests.training_worker import config as shared_config
from tests.training_worker import network as shared_network
from tests.training_worker import train as train_alone

PAIRS = 7


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A line of the table."""

    what: str
    guide: str
    measured: str
    holds: bool | None = None
    """None: shown, not judged."""


def checkpointing() -> list[Claim]:
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
        Claim(what="checkpointing, 12 layers: activations saved", guide="60 %", measured=figures, holds=saved >= 0.6),
        Claim(what="    of the step's peak, weights and gradients included", guide="", measured=f"{whole:.0%}"),
        Claim(what="    time", guide="+ 33 % (one more forward)", measured=f"{checkpointed_s / plain_s - 1:+.0%}"),
    ]


def accumulation() -> list[Claim]:
    """Gradients of each step of 4 batches of 8 against one batch of 32; the epoch's last step has 8 rows."""
    found = [_gradients(size, steps) for size, steps in ((32, 1), (8, 4))]
    pairs = [*zip(*found, strict=True)]
    worst = max(float((one - two).norm() / one.norm().clamp(min=1e-12)) for one, two in pairs)
    what = "accumulated gradients, 4 x 8 against 32 rows, 72 in all"
    text = f"relative difference {worst:.1e}, the worst of 3 x {len(pairs) // 3} tensors"
    return [Claim(what=what, guide="the same", measured=text, holds=worst < 1e-4)]


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


def prediction() -> list[Claim]:
    """The planned peak memory against real steps, over a grid of sizes and over random sizes."""
    claims = []
    for what, peaks in (("of a grid of sizes", grid()), (f"of {DRAWS} configurations drawn at random", drawn())):
        text, holds = said(peaks)
        claims.append(Claim(what=f"peak memory {what}, predicted", guide="within 10 %", measured=text, holds=holds))
    return claims


def mixed_precision() -> list[Claim]:
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
        Claim(
            what="bf16 on this CPU: peak of a step",
            guide="less",
            measured=f"{peaks[1] / peaks[0] - 1:+.0%}",
            holds=peaks[1] < peaks[0],
        ),
        Claim(what="    time of forward and backward", guide="less", measured=f"{bf16_s / fp32_s - 1:+.0%}"),
        Claim(
            what="    best validation loss",
            guide="as fp32",
            measured=f"{losses[1]:.4f} against {losses[0]:.4f}",
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


def clipping() -> list[Claim]:
    """A run in which 2 of 512 labels are broken, with and without clipping."""
    try:
        explode(None)
        caught = "not caught"
    except TrainingDiverged as error:
        caught = f"stopped at step {error.step}"
    _, cured = explode(1.0)
    return [
        Claim(what="exploding loss, clip_norm=None", guide="diverges", measured=caught, holds=caught != "not caught"),
        Claim(
            what="    the same with clip_norm=1",
            guide="cured",
            measured=f"validation loss {cured.best_loss:.3f}",
            holds=cured.best_loss < 0.3,
        ),
    ]


def batch_size() -> list[Claim]:
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
    return [Claim(what='batch_size="auto" in 512 MB', guide="from 256 to 80 %", measured=text, holds=apart <= 0.1)]


def parallel() -> list[Claim]:
    """Two processes against one: the largest difference of an epoch's loss."""
    found = []
    for way in ("data", "sharded", "pipeline"):
        with tempfile.TemporaryDirectory() as folder:
            run_module(
                "cli", "launch-training", "--processes", "2", "tests/training_worker.py", "--", folder, way, "{}"
            )
            two = torch.load(Path(folder) / way / "done-0.pt", weights_only=False)["result"]["epochs"]
        one = train_alone(shared_network(), shared_config(way, 1), None).epochs
        pairs = zip(two, one, strict=True)
        worst = max(abs(each["validation_loss"] / alone.validation_loss - 1) for each, alone in pairs)
        text = f"validation loss apart by {worst:.1e} at most"
        found.append(Claim(what=f"{way}, 2 processes against one", guide="the same", measured=text, holds=worst < 1e-4))
    return found


def data_pipeline() -> list[Claim]:
    """The share of time spent on data, as the trainer reports it, with a loader slower than the model."""

    class Slow(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            time.sleep(0.002)
            return super().__getitem__(index)

    result = train_model(network(), Slow(*points().tensors), points(1), cross_entropy, settings(max_epochs=2))
    fed = train_model(network(), points(), points(1), cross_entropy, settings(max_epochs=2))
    text = f"{result.data_share:.0%} of the steps' time with 2 ms a row, {fed.data_share:.0%} without"
    return [Claim(what="waiting for data", guide="seen", measured=text, holds=result.data_share > 0.5)]


def _median_s(sides: list[Callable[[], object]]) -> list[float]:
    """Median seconds of each side; the sides alternate."""
    times: list[list[float]] = [[] for _ in sides]
    for _ in range(PAIRS + 1):
        for kept, side in zip(times, sides, strict=True):
            began = time.perf_counter()
            side()
            kept.append(time.perf_counter() - began)
    return [statistics.median(each[1:]) for each in times]  # the first allocates


PARTS: dict[str, Callable[[], list[Claim]]] = {
    "checkpointing": checkpointing,
    "accumulation": accumulation,
    "prediction": prediction,
    "mixed-precision": mixed_precision,
    "clipping": clipping,
    "batch-size": batch_size,
    "data-pipeline": data_pipeline,
    "parallel": parallel,
}


def main() -> int:
    """Runs the measurements and prints the table."""
    parser = Parser(__doc__, prog="python -m tests.bench.training")
    parser.add_argument("--only", choices=PARTS, action="append", help="only this part (may be repeated)")
    args = parser.parse_args()
    torch.set_num_threads(1)  # other programs disturb one thread less
    log, claims = Console(stderr=True), list[Claim]()
    for name in args.only or PARTS:
        with log.status(name):
            claims += PARTS[name]()
    write_whole(build_dir("bench-training.json"), json.dumps([asdict(claim) for claim in claims], indent=2) + "\n")
    table = Table("", "guide", "measured here", "holds", box=box.SIMPLE_HEAD)
    for claim in claims:
        held = "" if claim.holds is None else "yes" if claim.holds else "NO"
        table.add_row(claim.what, claim.guide, claim.measured, held)
    Console(width=max(Console().width, 140)).print(table)
    return int(any(claim.holds is False for claim in claims))


if __name__ == "__main__":
    run_command(main)

"""Compares the planned peak memory with that of real training steps, counted tensor by tensor.

Contract: `grid` has every combination of a few sizes; `drawn` has random configurations, from a fixed seed, of far wider
ranges: heads of 2 to 64, feed-forward layers of 1 to 8 widths, tied and untied logits, with and without dropout, padding
and accumulation. Both return predicted and measured bytes by name.

Examples:
    python -m tests.bench.training_memory --draws 200 --seed 7     # configurations that are not in the table
    python -m tests.bench.training_memory --chart docs/train/memory.svg
"""

from __future__ import annotations

import functools
import itertools
import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from deepseek.config import TransformerConfig
from deepseek.sizing import TrainingSetup, TransformerSize, training_memory
from deepseek.sizing.model.live_memory import LiveBytes
from deepseek.spec import Parser, run_command
from deepseek.spec.files.folders import write_whole
from deepseek.transformer import Transformer
from tests.bench.scatter import scatter_chart

ALLOWED = 0.1
DRAWS, SEED, MOST_BYTES = 40, 0, 300e6  # limit per configuration, so that drawing takes seconds
GRID: dict[str, tuple[Any, ...]] = {
    "num_layers": (2, 12),
    "hidden_size": (64, 192),
    "batch": (2, 8),
    "length": (32, 128),
    "checkpointing": (False, True),
    "precision": ("fp32", "bf16"),
}


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak bytes of one step, without the process's own memory."""

    planned: float
    measured: float
    at: str
    """The moment of the peak, according to the plan."""

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


def shape(**changes: Any) -> TransformerConfig:
    """A small Transformer's configuration, without the warning that it is small."""
    sizes = {"num_layers": 12, "hidden_size": 128, "num_attention_heads": 4, "vocab_size": 1000, "max_length": 256}
    sizes |= changes
    return TransformerConfig.of_any_size(**({"intermediate_size": 4 * sizes["hidden_size"]} | sizes))


def peak_of_a_step(size: TransformerSize, setup: TrainingSetup) -> int:
    """Peak bytes of a Transformer's step. The loss is the hidden states' mean square, or the logits' cross-entropy."""
    model = Transformer(size.config).train()
    model.gradient_checkpointing = setup.checkpointing
    weight = model.tokens.weight
    head = weight if size.head == "tied" else nn.Parameter(torch.randn(weight.shape)) if size.head == "untied" else None
    weights = [*model.parameters(), *([head] if head is not None and size.head == "untied" else [])]
    ids = torch.ones(setup.batch, setup.length, dtype=torch.int64)

    def loss() -> torch.Tensor:
        hidden = model(ids)
        if head is None:
            return hidden.square().mean()
        return nn.functional.cross_entropy(nn.functional.linear(hidden, head).flatten(0, 1), ids.flatten())

    return peak_of(loss, weights, setup)


def peak_of(loss: Callable[[], torch.Tensor], parameters: Iterable[torch.Tensor], setup: TrainingSetup) -> int:
    """Measured peak bytes of an optimizer step; two micro-batches need as much as more."""
    weights = list(parameters)
    optimizer = _optimizer(weights, setup)

    def step() -> None:
        for _ in range(min(2, setup.accumulation_steps)):
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.precision == "bf16"):
                value = loss()
            value.backward()
            del value
        optimizer.step()
        optimizer.zero_grad()

    step()  # creates the optimizer's state
    with LiveBytes() as live:
        state = [each for of in optimizer.state.values() for each in of.values() if isinstance(each, torch.Tensor)]
        live.watch([*weights, *state])
        step()
    return live.most


def _optimizer(weights: list[torch.Tensor], setup: TrainingSetup) -> torch.optim.Optimizer:
    if setup.optimizer == "adamw":
        return torch.optim.AdamW(weights, foreach=False)
    return torch.optim.SGD(weights, lr=1e-3, momentum=0.9 if setup.optimizer == "momentum" else 0.0)


def peak(size: TransformerSize, setup: TrainingSetup) -> Peak:
    """The planned and the measured peak."""
    planned = training_memory(size, setup)
    found = planned.peak_bytes - planned.context_bytes
    return Peak(planned=found, measured=float(peak_of_a_step(size, setup)), at=planned.peak_at)


@functools.cache
def grid() -> dict[str, Peak]:
    """Every combination of GRID."""
    found = {}
    for values in itertools.product(*GRID.values()):
        point = dict(zip(GRID, values, strict=True))
        config = shape(num_layers=point.pop("num_layers"), hidden_size=point.pop("hidden_size"))
        name = ", ".join(f"{name} {value}" for name, value in zip(GRID, values, strict=True))
        found[name] = peak(TransformerSize(config=config), TrainingSetup(platform="cpu", **point))
    return found


@functools.cache
def drawn(draws: int = DRAWS, seed: int = SEED) -> dict[str, Peak]:
    """The peaks of `draws` random configurations."""
    found, source = dict[str, Peak](), random.Random(seed)
    while len(found) < draws:
        sizes, setup, head = _draw(source)
        size = TransformerSize(config=shape(**sizes), head=head)
        if training_memory(size, setup).peak_bytes < MOST_BYTES:
            found[f"{len(found) + 1}: {_named(size, setup)}"] = peak(size, setup)
    return found


def _named(size: TransformerSize, setup: TrainingSetup) -> str:
    config = size.config
    dropouts = [config.embedding_dropout, config.attention_dropout, config.ffn_dropout]
    said = [
        f"{config.num_layers} layers {config.hidden_size} wide, {config.num_attention_heads} heads",
        f"feed-forward {config.intermediate_size} {config.activation}, {size.head} head of {config.vocab_size}",
        f"dropouts {dropouts}, {setup.batch} x {setup.length} tokens, {setup.precision} {setup.optimizer}",
    ]
    said += ["checkpointing"] * setup.checkpointing + ["accumulated"] * (setup.accumulation_steps > 1)
    return ", ".join(said)


def _draw(source: random.Random) -> tuple[dict[str, Any], TrainingSetup, Any]:
    pick = source.choice
    heads = pick((1, 2, 4, 8, 16))
    hidden = heads * pick((2, 4, 8, 16, 64))
    sizes = {
        "num_layers": pick((1, 2, 3, 6, 12, 24)),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": hidden * pick((1, 2, 4, 8)),
        "vocab_size": pick((50, 1000, 20_000)),
        "max_length": pick((512, 2048)),
        "padding_id": pick((0, None)),
        "causal": pick((False, True)),
        "activation": pick(("gelu", "relu", "silu")),
        "embedding_dropout": pick((0.0, 0.1)),
        "attention_dropout": pick((0.0, 0.1)),
        "ffn_dropout": pick((0.0, 0.2)),
    }
    setup = TrainingSetup(
        batch=pick((1, 2, 8)),
        length=pick((4, 32, 128, 512)),
        precision=pick(("fp32", "bf16")),
        checkpointing=pick((False, False, True)),
        accumulation_steps=pick((1, 1, 2)),
        optimizer=pick(("adamw", "adamw", "momentum", "sgd")),
        platform="cpu",
    )
    return sizes, setup, pick(("none", "none", "tied", "untied"))


def said(peaks: Mapping[str, Peak]) -> tuple[str, bool]:
    """The median and worst error as text, and whether all are within 10 %."""
    worst = max(peaks, key=lambda name: abs(peaks[name].error))
    median = statistics.median(abs(each.error) for each in peaks.values())
    within = sum(abs(each.error) <= ALLOWED for each in peaks.values())
    text = f"median {median:.1%}, {within} of {len(peaks)} within, worst {peaks[worst].error:+.1%} ({worst})"
    return text, within == len(peaks)


def chart() -> str:
    """A chart of the grid and the random configurations, as SVG."""
    of: dict[str, list[tuple[float, float]]] = {}
    for name, each in grid().items():
        group = "bf16" if "bf16" in name else "fp32"
        group += ", checkpointed" if "checkpointing True" in name else ""
        of.setdefault(group, []).append((each.measured / 2**20, each.planned / 2**20))
    of["drawn at random"] = [(each.measured / 2**20, each.planned / 2**20) for each in drawn().values()]
    title, y_label = "Peak memory of a training step", "predicted, MiB; band: 10 %"
    return scatter_chart(of, title=title, x_label="measured, MiB", y_label=y_label, band=ALLOWED)


def main() -> int:
    """Draws random configurations, and prints those whose prediction is off by more than 10 %."""
    parser = Parser(__doc__, prog="python -m tests.bench.training_memory")
    parser.add_argument("--draws", type=int, default=DRAWS, help="configurations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the drawing (default: %(default)s)")
    parser.add_argument("--chart", type=Path, help="draw the grid and the table's configurations into this SVG file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.chart:
        write_whole(args.chart, chart())
    found, console = drawn(args.draws, args.seed), Console(highlight=False, soft_wrap=True)
    for name, each in found.items():
        if abs(each.error) > ALLOWED:
            console.print(f"{each.error:+.1%} of {each.measured / 1e6:.1f} MB, at {each.at}: {name}")
    text, holds = said(found)
    console.print(text)
    return int(not holds)


if __name__ == "__main__":
    run_command(main)

"""Compares the planned peak memory with that of real training steps, counted tensor by tensor.

Contract: `drawn` has random configurations, from a fixed seed: heads of 2 to 64, feed-forward layers of 1 to 8 widths,
tied and untied logits, with and without dropout, padding and accumulation.

Example:
    python -m tests.bench.training_memory --draws 200 --seed 7
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepseek.config import TransformerConfig
from deepseek.sizing import TrainingSetup, TransformerSize, training_memory
from deepseek.sizing.model.live_memory import LiveBytes
from deepseek.spec.command import exit_code
from deepseek.transformer import Transformer

ALLOWED = 0.1
DRAWS, SEED, MOST_BYTES = 40, 0, 300e6  # limit per configuration, so that drawing takes seconds


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak bytes of one step, without the process's own memory."""

    size: TransformerSize
    setup: TrainingSetup
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
    measured = float(peak_of_a_step(size, setup))
    return Peak(size=size, setup=setup, planned=found, measured=measured, at=planned.peak_at)


def drawn(draws: int, seed: int = SEED) -> list[Peak]:
    """The peaks of `draws` random configurations."""
    found, source = list[Peak](), random.Random(seed)
    while len(found) < draws:
        sizes, setup, head = _draw(source)
        size = TransformerSize(config=shape(**sizes), head=head)
        if training_memory(size, setup).peak_bytes < MOST_BYTES:
            found.append(peak(size, setup))
    return found


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


def said(peaks: Sequence[Peak]) -> tuple[str, bool]:
    """The median and worst error as text, and whether all are within 10 %."""
    errors = [each.error for each in peaks]
    within = sum(abs(error) <= ALLOWED for error in errors)
    median, worst = statistics.median(map(abs, errors)), max(errors, key=abs)
    return f"median {median:.1%}, {within} of {len(peaks)} within, worst {worst:+.1%}", within == len(peaks)


def main() -> int:
    """Draws random configurations, and prints those whose prediction is off by more than 10 %."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.training_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--draws", type=int, default=DRAWS, help="configurations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the drawing (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = drawn(args.draws, args.seed)
    for each in found:
        if abs(each.error) > ALLOWED:
            print(f"{each.error:+.1%}: {each}")
    text, holds = said(found)
    print(text)
    return int(not holds)


if __name__ == "__main__":
    sys.exit(exit_code(main))

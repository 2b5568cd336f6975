"""Two linear layers of which the sum of the input picks one: what torch.cond is for."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


class Branch(nn.Module):
    """The branches read a value from outside, and each has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(32, 32)
        self.up = nn.Linear(32, 32)
        self.down = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, lambda y: self.up(y), lambda y: self.down(y).relu(), (self.before(x),))


def load() -> nn.Module:
    torch.manual_seed(0)
    return Branch()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng({"calibration": 0, "evaluation": 1}[split])
    for _ in range(16):
        yield {"x": random.standard_normal((1, 32)).astype(np.float32)}

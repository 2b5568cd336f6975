"""An image classifier with fixed random weights, and images made of smooth noise."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


class Classifier(nn.Module):
    """Two convolutions, a pooled feature vector, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU()
        )
        self.head = nn.Linear(32, 10)

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.body(pixels).mean((2, 3))  # (B, 32)
        return self.head(features), features


def load() -> nn.Module:
    torch.manual_seed(0)
    return Classifier()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng({"calibration": 0, "evaluation": 1}[split])
    for _ in range(8):
        coarse = random.standard_normal((4, 3, 8, 8)).astype(np.float32)
        yield {"pixels": coarse.repeat(4, axis=2).repeat(4, axis=3)}

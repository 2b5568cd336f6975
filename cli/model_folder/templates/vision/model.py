"""An image classifier. Replace the module, the weights and the images with yours; keep the names of the functions."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

CLASSES, SIZE = 10, 64
SEEDS = {"calibration": 1, "evaluation": 2}


class Classifier(nn.Module):
    """Three convolutions and a linear head. forward() takes the inputs of deploy.toml, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, CLASSES)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(pixels).mean((2, 3)))  # (B, CLASSES)


def load() -> nn.Module:
    """The module with its weights, on the CPU. Yours may read a checkpoint: `load_state_dict(torch.load(...))`."""
    torch.manual_seed(0)
    return Classifier().eval()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    """Real inputs, one row each: "calibration" sets the int8 ranges, "evaluation" is for evaluate(); no overlap."""
    random = np.random.default_rng(SEEDS[split])
    for _ in range(64):
        coarse = random.random((1, 3, 8, 8), np.float32)
        yield {"pixels": coarse.repeat(SIZE // 8, axis=2).repeat(SIZE // 8, axis=3)}


def evaluate(predict: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Optional: your own metric. `predict` runs the model in one precision; compare its outputs with your labels.

    Return one value a row where you can: the build then knows how sure it is of a loss. A single number works too.

    These images have no labels, so the classes that the fp32 module predicts stand in for them.
    """
    module = load()
    right = [
        predict(sample)["scores"].argmax() == module(torch.from_numpy(sample["pixels"])).argmax().item()
        for sample in samples("evaluation")
    ]
    return {"accuracy": np.array(right)}


def fingerprint() -> str:
    """Optional: identifies the data read from outside this folder, so that results can be cached."""
    return "random images"

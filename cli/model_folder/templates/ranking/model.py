"""A two-tower ranker. Replace the module, the weights and the requests with yours; keep the names of the functions."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn

USERS, ITEMS, FEATURES, WIDTH, MOST = 100, 1000, 16, 64, 200
SEEDS = {"calibration": 1, "evaluation": 2}


class TwoTower(nn.Module):
    """A vector for the user and one per item; a score is their dot product. forward() takes deploy.toml's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(USERS, WIDTH)
        self.items = nn.Embedding(ITEMS, WIDTH)
        self.user_tower = nn.Sequential(nn.Linear(WIDTH + FEATURES, 128), nn.ReLU(), nn.Linear(128, WIDTH))
        self.item_tower = nn.Sequential(nn.Linear(WIDTH, 128), nn.ReLU(), nn.Linear(128, WIDTH))

    def forward(self, user_id: torch.Tensor, user_features: torch.Tensor, item_ids: torch.Tensor) -> torch.Tensor:
        user = self.user_tower(torch.cat([self.users(user_id), user_features], dim=-1))  # (B, WIDTH)
        items = self.item_tower(self.items(item_ids))  # (B, N, WIDTH)
        return torch.einsum("bd,bnd->bn", user, items)  # (B, N)


def load() -> nn.Module:
    """The module with its weights, on the CPU. Yours may read a checkpoint: `load_state_dict(torch.load(...))`."""
    torch.manual_seed(0)
    return TwoTower().eval()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    """Real inputs, one row each: "calibration" sets the int8 ranges, "evaluation" is for evaluate(); no overlap."""
    random = np.random.default_rng(SEEDS[split])
    for _ in range(64):
        count = int(random.integers(2, MOST + 1))
        yield {
            "user_id": random.integers(0, USERS, 1),
            "user_features": random.standard_normal((1, FEATURES)).astype(np.float32),
            "item_ids": random.permutation(ITEMS)[None, :count],
        }


def evaluate(predict: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Optional: your own metric. `predict` runs the model in one precision; compare its outputs with your labels.

    Return one value a row where you can: the build then knows how sure it is of a loss. A single number works too.

    These requests have no clicks, so the best item of the fp32 module stands in for the clicked one.
    """
    module = load()
    right = []
    for sample in samples("evaluation"):
        wanted = module(*map(torch.from_numpy, sample.values())).argmax().item()
        right.append(predict(sample)["scores"].argmax() == wanted)
    return {"top1": np.array(right)}


def fingerprint() -> str:
    """Optional: identifies the data read from outside this folder, so that results can be cached."""
    return "random requests"

"""A two-tower ranker with fixed random weights; forward returns a dataclass, as models of `transformers` do."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


@dataclasses.dataclass
class Ranking:
    """By name, in an order that is not deploy.toml's, and with more than is served."""

    best: torch.Tensor
    scores: torch.Tensor
    user: torch.Tensor


class TwoTower(nn.Module):
    """Users and items in one space; a score is a dot product."""

    def __init__(self) -> None:
        super().__init__()
        self.users = nn.Embedding(50, 32)
        self.items = nn.Embedding(400, 32)
        self.user_tower = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32))
        self.item_tower = nn.Sequential(nn.Linear(33, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(
        self,
        user_id: torch.Tensor,
        user_features: torch.Tensor,
        weekday: torch.Tensor,
        item_ids: torch.Tensor,
        is_new: torch.Tensor,
    ) -> Ranking:
        user = self.user_tower(torch.cat([self.users(user_id), user_features.float()], dim=-1))  # (B, 32)
        items = self.item_tower(torch.cat([self.items(item_ids), is_new.unsqueeze(-1).float()], dim=-1))  # (B, N, 32)
        scores = torch.einsum("bd,bnd->bn", user, items)
        return Ranking(best=scores.argmax(-1), scores=scores, user=user)


def load() -> nn.Module:
    torch.manual_seed(0)
    return TwoTower()


def samples(split: str) -> Iterator[dict[str, np.ndarray]]:
    random = np.random.default_rng({"calibration": 0, "evaluation": 1}[split])
    for _ in range(16):
        count = int(random.integers(2, 61))
        yield {
            "user_id": random.integers(0, 50, 1),
            "user_features": random.standard_normal((1, 16)).astype(np.float16),
            "weekday": random.integers(0, 7, 1).astype(np.uint8),
            "item_ids": random.permutation(400)[None, :count].astype(np.int32),
            "is_new": random.random((1, count)) < 0.1,
        }

"""How much memory tensors take at once, counted while operations run.

Contract: needs torch. `LiveBytes` counts tensors, on any device and to the byte: the most that lay there at once while
it was on. It sees each operation, so it slows a step down and is for a trial, not for training. What a kernel takes
and gives back within itself is not seen.

Examples:
    with LiveBytes() as live:
        live.watch(model.parameters())
        loss(model, batch).backward()
    live.most
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The most bytes of storages that were alive at once, of those made meanwhile or given."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Counts what was there before, too."""
        for tensor in tensors:
            if tensor.layout is not torch.strided:  # a sparse one has no storage of its own
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.most = max(self.most, self.now)

    def _gone(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.watch(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out

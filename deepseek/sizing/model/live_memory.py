"""Measures the peak memory of tensors while operations run.

Contract: needs torch. `LiveBytes` counts the bytes of tensors that exist at once, exactly and on any device. It
intercepts each operation, which is slow: use it for trials, not for training. It does not see the temporary memory of
a kernel.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class LiveBytes(TorchDispatchMode):
    """Peak bytes of live storages, among those created inside the block or passed to `watch`."""

    def __init__(self) -> None:
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = self.most = 0

    def watch(self, tensors: Iterable[Tensor]) -> None:
        """Also counts tensors that existed before."""
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
        self.watch(tensors_in(out))
        return out

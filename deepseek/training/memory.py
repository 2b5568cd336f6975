"""How much memory a step takes, and how much there is.

Contract: `LiveBytes` counts tensors, on any device and to the byte: the most that lay there at once while it was on.
It sees each operation, so it slows a step down and is for a trial, not for training. `limit_bytes` is what this
process may fill: of its GPU, or its share of the machine (of its container, where that has less).

Examples:
    with LiveBytes() as live:
        live.watch(model.parameters())
        loss(model, batch).backward()
    live.most, limit_bytes(torch.device("cpu"))
"""

from __future__ import annotations

import os
import resource
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, version 1


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


def limit_bytes(device: torch.device) -> float:
    """Memory that this process may have: its GPU's, or an equal share of this machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(float(soft))
    for path in CGROUP_LIMITS:
        try:
            limits.append(float(Path(path).read_text()))
        except (OSError, ValueError):  # another system; "max"
            continue
    return min(limits) / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def used_bytes(device: torch.device) -> int:
    """What this process has now; of a GPU the most that its tensors ever had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not a Linux: the most that it ever had
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def besides_bytes(device: torch.device, held: Iterable[Tensor]) -> float:
    """What the process has beside tensors: interpreter and libraries, or a CUDA context and other processes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free - torch.cuda.memory_reserved(device))
    return max(0.0, used_bytes(device) - sum(tensor.nbytes for tensor in held))

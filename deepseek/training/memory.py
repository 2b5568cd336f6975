"""How much memory this process may use, and how much it uses.

Contract: `limit_bytes` is the memory of its GPU, or its share of the machine's or the container's memory, whichever is
less. `deepseek.sizing.model.live_memory` measures a step tensor by tensor.
"""

import os
import resource
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from deepseek.spec.machine.cpu import memory_bytes


def limit_bytes(device: torch.device) -> float:
    """Memory that this process may use: its GPU's, or an equal share of this machine's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[1])
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_bytes() if soft == resource.RLIM_INFINITY else min(memory_bytes(), soft)
    return limit / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def used_bytes(device: torch.device) -> int:
    """Memory that this process uses now; on a GPU, the peak of its tensors so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def besides_bytes(device: torch.device, held: Iterable[Tensor]) -> float:
    """Memory outside tensors: interpreter and libraries, or a CUDA context and other processes on the GPU."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return float(total - free - torch.cuda.memory_reserved(device))
    return max(0.0, used_bytes(device) - sum(tensor.nbytes for tensor in held))

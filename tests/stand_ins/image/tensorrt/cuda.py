# mypy: ignore-errors
"""Makes the CUDA calls of torch that the project uses work on the CPU; `torch.cuda.is_available()` stays false."""

import contextlib
import time


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


class Event:
    def __init__(self, enable_timing=False):
        self.at_s = 0.0

    def record(self, stream=None):
        self.at_s = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        """Milliseconds."""
        return 1000 * (end.at_s - self.at_s)


def install():
    """Replaces them, if torch is installed."""
    try:
        import torch
    except ImportError:
        return
    empty, to = torch.empty, torch.Tensor.to

    def on_cpu(where):
        return "cpu" if str(where).startswith("cuda") else where

    torch.cuda.Stream, torch.cuda.Event, torch.cuda.current_stream = Stream, Event, Stream
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.empty = lambda *shape, device=None, **rest: empty(*shape, device=on_cpu(device), **rest)
    # A copy, as to another device: the caller's array stays its own.
    torch.Tensor.to = lambda self, *where, **rest: to(
        self.clone() if "cuda" in where else self, *map(on_cpu, where), **rest
    )
    torch.Tensor.pin_memory = lambda self: self.clone()

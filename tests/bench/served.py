"""Served throughput over raw ONNX Runtime, and dynamic batching on over off."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

from deepseek.spec import TunedBatching
from serving.embedded import EmbeddedServer
from tests.bench.setting import Bench, on


def served(bench: Bench) -> None:
    """Served throughput over raw ONNX Runtime's best.

    Both sides on the same cores. First the load generator has the last core to itself, so that what
    is missing is the server's; then it shares them all, as in a demo on a small machine.
    """
    every = sorted(os.sched_getaffinity(0))
    apart = (every[:-1] or every, every[-1:])
    served_over_raw(bench, "encoder", *apart, "load generator on a core of its own", "goal: at least 0.97")
    served_over_raw(bench, "encoder", every, every, "load generator on the same cores")
    served_over_raw(bench, "recommender", every, every, "load generator on the same cores")


def served_over_raw(
    bench: Bench, name: str, server_cores: list[int], load_cores: list[int], how: str, goal: str = ""
) -> None:
    """One row of `served`."""

    def served(server: EmbeddedServer) -> float:
        with on(load_cores):
            return bench.served_throughput(server, name, users=32)

    with on(server_cores):
        raw = bench.raw_throughput(name)
        with bench.server(bench.repository(name)) as server:
            ratios = []
            for pair in range(bench.pairs):
                sides: list[Callable[[], float]] = [raw, functools.partial(served, server)]
                first = pair % 2  # who goes first changes from pair to pair
                values = {first: sides[first](), 1 - first: sides[1 - first]()}
                ratios.append(values[1] / values[0])
    bench.record(f"served over raw ONNX Runtime, {name}, {how}", ratios, goal)


def batching(bench: Bench) -> None:
    """Dynamic batching on over off, 32 requests in flight."""
    for name in ("encoder", "recommender"):
        alone = bench.publish(f"unbatched-{name}", name, "fp32", TunedBatching(max_batch=1))
        ratios = []
        with bench.server(bench.repository(name)) as on_server, bench.server(alone) as off_server:
            for _ in range(bench.pairs):
                batched = bench.served_throughput(on_server, name, users=32)
                ratios.append(batched / bench.served_throughput(off_server, name, users=32))
        bench.record(f"dynamic batching on over off, {name}", ratios)

"""Served throughput over raw ONNX Runtime's, and dynamic batching on over off."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

from deepseek.spec import TunedBatching
from serving.embedded.launcher import EmbeddedServer
from tests.bench.results import Goal
from tests.bench.setting import Bench, on

USERS = 32
LABEL = f"served over raw ONNX Runtime, {USERS} requests in flight"
APART = "load generator on its own core"
TOGETHER = "load generator on the same cores"


def served(bench: Bench) -> None:
    """Served throughput over raw ONNX Runtime's best.

    Both sides use the same cores. First the load generator has the last core to itself, so that the difference is the
    server's; then it shares all cores, as in a demo on a small machine.
    """
    every, apart = every_core(), generator_apart()
    encoder, recommender = bench.repository("encoder"), bench.repository("recommender")
    goal = Goal(least=0.97)
    bench.record(f"{LABEL}, encoder, {APART}", served_over_raw(bench, "encoder", encoder, *apart), goal)
    bench.record(f"{LABEL}, encoder, {TOGETHER}", served_over_raw(bench, "encoder", encoder, every, every))
    bench.record(f"{LABEL}, recommender, {TOGETHER}", served_over_raw(bench, "recommender", recommender, every, every))


def every_core() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def generator_apart() -> tuple[list[int], list[int]]:
    """The cores of the server, and of the load generator: the last core, if there are several."""
    every = every_core()
    return every[:-1] or every, every[-1:]


def served_over_raw(
    bench: Bench,
    name: str,
    repository: Path,
    server_cores: list[int],
    load_cores: list[int],
    *,
    pairs: int = 0,
    without: tuple[str, ...] = (),
) -> list[float]:
    """Ratios of alternating pairs. Raw ONNX Runtime has the server's cores, and its best setting on them.

    `without` names ONNX Runtime's optimizers to disable on the raw side.
    """

    def served(server: EmbeddedServer) -> float:
        with on(load_cores):
            return bench.served_throughput(server, name, USERS)

    with on(server_cores):
        raw = bench.raw_throughput(name, without)
        with bench.server(repository) as server:
            ratios = []
            for pair in range(pairs or bench.pairs):
                sides: list[Callable[[], float]] = [raw, functools.partial(served, server)]
                first = pair % 2  # the side that runs first alternates
                values = {first: sides[first](), 1 - first: sides[1 - first]()}
                ratios.append(values[1] / values[0])
    return ratios


def batching(bench: Bench) -> None:
    """Dynamic batching on over off, 32 requests in flight."""
    for name in ("encoder", "recommender"):
        alone = bench.publish(f"unbatched-{name}", name, "fp32", TunedBatching(max_batch=1))
        ratios = []
        with bench.server(bench.repository(name)) as on_server, bench.server(alone) as off_server:
            for _ in range(bench.pairs):
                batched = bench.served_throughput(on_server, name, users=USERS)
                ratios.append(batched / bench.served_throughput(off_server, name, users=USERS))
        bench.record(f"dynamic batching on over off, {name}", ratios)

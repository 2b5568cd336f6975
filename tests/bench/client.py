"""This project's client against bare tritonclient and perf_analyzer: latency, requests per core, shared memory."""

from __future__ import annotations

import asyncio
import functools
import os
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from deepseek_client import AsyncInferenceClient, InferenceClient
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.grpc import aio as triton_grpc_aio
from tritonclient.http import aio as triton_http_aio

from export.rows import Row
from tests.add_one import replace_in, write_add_one
from tests.bench.setting import Bench, on, seconds
from tests.failing_servers import url_of

MODEL = "recommender"
TASKS = 16  # asynchronous calls in flight
CALLS = 2000  # asynchronous calls per side
LARGE = 1_000_000  # 8 MB each way: (1, 2, LARGE) float32
Call = Callable[[], Awaitable[object]]


def client(bench: Bench) -> None:
    """p50 of sequential calls over bare tritonclient's, and over perf_analyzer's with one user."""
    row = bench.rows[MODEL][0]
    with bench.server(bench.repository(MODEL)) as server:
        for protocol, kind in (("grpc", triton_grpc), ("http", triton_http)):
            bare = _bare(kind, url_of(server, protocol), row)
            with InferenceClient(url_of(server, protocol), protocol) as ours:  # type: ignore[arg-type]
                own = functools.partial(ours.infer, MODEL, row)
                ratios = [_p50_s(own) / _p50_s(bare) for _ in range(bench.pairs(12))]
                bench.record(f"client p50 over tritonclient: {protocol}", ratios)
                peer = functools.partial(bench.peer_figures, server, MODEL, protocol, 1)
                ratios = [_p50_s(own) * 1e6 / peer()["p50_us"] for _ in range(bench.pairs(3))]
                bench.record(f"client p50 over perf_analyzer: {protocol}", ratios)


def client_async(bench: Bench) -> None:
    """Asynchronous requests per second of one core over bare tritonclient's: 16 in flight, the client on one core.

    The rate is per second of the client's CPU time, so the server's speed does not count. The server has the other
    cores, if there are any.
    """
    every = sorted(os.sched_getaffinity(0))
    repository = bench.folder / "repository-small"
    if not repository.exists():
        write_add_one(repository, "small")
    inputs = {"x": np.zeros((1, 2, 50), np.float32)}
    with on(every[:-1] or every), bench.server(repository) as server, on(every[-1:]):
        for protocol in ("grpc", "http"):
            ratios = asyncio.run(_async_ratios(url_of(server, protocol), protocol, inputs, bench.pairs(6)))
            bench.record(f"client asyncio requests/s over tritonclient: {protocol}", ratios)


def client_memory(bench: Bench) -> None:
    """p50 of a large tensor through shared memory over p50 through the socket."""
    repository = bench.folder / "repository-large"
    if not repository.exists():
        write_add_one(repository, "large")
        replace_in(repository / "large" / "config.pbtxt", "[2, -1]", f"[2, {LARGE}]")
    inputs = {"x": np.zeros((1, 2, LARGE), np.float32)}
    with bench.server(repository) as server:
        for protocol in ("grpc", "http"):
            url = url_of(server, protocol)
            shared: Any = InferenceClient(url, protocol, shared_memory=True)
            with shared, InferenceClient(url, protocol) as plain:
                ratios = []
                for _ in range(bench.pairs(12)):
                    through_memory = _p50_s(functools.partial(shared.infer, "large", inputs), calls=20)
                    ratios.append(through_memory / _p50_s(functools.partial(plain.infer, "large", inputs), calls=20))
            bench.record(f"client shared memory over socket: {protocol}", ratios)


def _p50_s(call: Callable[[], object], calls: int = 200) -> float:
    return statistics.median(seconds(call) for _ in range(calls))


async def _async_ratios(url: str, protocol: str, inputs: Row, pairs: int) -> list[float]:
    ratios = []
    if protocol == "grpc":
        bare: Any = triton_grpc_aio.InferenceServerClient(url)
    else:
        bare = triton_http_aio.InferenceServerClient(url, conn_limit=TASKS)
    kind = triton_grpc if protocol == "grpc" else triton_http

    async def call_bare() -> object:
        return (await bare.infer("small", _tensors(kind, inputs))).as_numpy("y")

    async with AsyncInferenceClient(url, protocol) as ours:  # type: ignore[arg-type]
        for pair in range(pairs):
            sides: list[Call] = [functools.partial(ours.infer, "small", inputs), call_bare]
            first = pair % 2  # the side that runs first alternates
            rates = {side: await _requests_per_cpu_s(sides[side]) for side in (first, 1 - first)}
            ratios.append(rates[0] / rates[1])
    await bare.close()
    return ratios


async def _requests_per_cpu_s(call: Call) -> float:
    async def user() -> None:
        for _ in range(CALLS // TASKS):
            await call()

    await call()
    start_s = time.process_time()
    await asyncio.gather(*(user() for _ in range(TASKS)))
    return CALLS / (time.process_time() - start_s)


def _tensors(kind: Any, inputs: Row) -> list[Any]:
    found = []
    for name, array in inputs.items():
        found.append(kind.InferInput(name, array.shape, "INT64" if array.dtype == np.int64 else "FP32"))
        found[-1].set_data_from_numpy(array)
    return found


def _bare(kind: Any, url: str, row: Row) -> Callable[[], object]:
    client = kind.InferenceServerClient(url)

    def call() -> object:
        result = client.infer(MODEL, _tensors(kind, row))
        return result.as_numpy("items"), result.as_numpy("scores")

    return call

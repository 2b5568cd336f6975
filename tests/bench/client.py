"""Our client beside bare tritonclient and perf_analyzer: latency, what one core carries, shared memory."""

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

from export.artifact import Row
from serving.embedded import EmbeddedServer
from tests.bench.setting import Bench, on, seconds
from tests.conftest import write_add_one

MODEL = "recommender"
TASKS = 16  # in flight, asynchronous
CALLS = 2000  # of a side, asynchronous
LARGE = 1_000_000  # 8 MB each way: (1, 2, LARGE) float32
Call = Callable[[], Awaitable[object]]
MakeBare = Callable[[EmbeddedServer, Row], tuple[Any, Call]]


def client(bench: Bench) -> None:
    """p50 of our client over bare tritonclient's, one call after the other, and over perf_analyzer's with one user."""
    row = bench.rows[MODEL][0]
    with bench.server(bench.repository(MODEL)) as server:
        for protocol, bare in (("grpc", _bare_grpc(server, row)), ("http", _bare_http(server, row))):
            with InferenceClient(_url(server, protocol), protocol) as ours:  # type: ignore[arg-type]
                own = functools.partial(ours.infer, MODEL, row)
                ratios = [_p50_s(own) / _p50_s(bare) for _ in range(max(10, bench.pairs))]
                bench.record(f"client p50 over bare tritonclient, {protocol}", ratios, "goal: at most 1.1")
                peer = functools.partial(bench.peer_figures, server, MODEL, protocol, 1)
                ratios = [_p50_s(own) * 1e6 / peer()["p50_us"] for _ in range(max(3, bench.pairs // 4))]
                bench.record(f"client p50 over perf_analyzer's, one user, {protocol}", ratios)


def client_async(bench: Bench) -> None:
    """Requests that one core carries, asynchronous, over bare tritonclient's: 16 in flight, the client on one core.

    By the client's CPU time, so that the server's speed does not count: on a core of its own a client is limited by
    nothing else. The server has the other cores, where there are any.
    """
    every = sorted(os.sched_getaffinity(0))
    repository = bench.folder / "repository-small"
    if not repository.exists():
        write_add_one(repository, "small")
    inputs = {"x": np.zeros((1, 2, 50), np.float32)}
    with on(every[:-1] or every), bench.server(repository) as server, on(every[-1:]):
        for protocol, bare in (("grpc", _bare_grpc_aio), ("http", _bare_http_aio)):
            ratios = asyncio.run(_async_ratios(server, protocol, bare, inputs, max(5, bench.pairs // 2)))
            bench.record(f"async client's requests on one core over bare tritonclient's, {protocol}", ratios)


def client_memory(bench: Bench) -> None:
    """p50 of a large tensor through shared memory over the same through the socket."""
    repository = bench.folder / "repository-large"
    if not repository.exists():
        write_add_one(repository, "large")
        config = repository / "large" / "config.pbtxt"
        config.write_text(config.read_text().replace("[2, -1]", f"[2, {LARGE}]"))
    inputs = {"x": np.zeros((1, 2, LARGE), np.float32)}
    with bench.server(repository) as server:
        for protocol in ("grpc", "http"):
            url = _url(server, protocol)
            shared: Any = InferenceClient(url, protocol, shared_memory=True)
            with shared, InferenceClient(url, protocol) as plain:
                ratios = []
                for _ in range(bench.pairs):
                    through_memory = _p50_s(functools.partial(shared.infer, "large", inputs), calls=20)
                    ratios.append(through_memory / _p50_s(functools.partial(plain.infer, "large", inputs), calls=20))
            bench.record(f"8 MB each way through shared memory over the socket, p50, {protocol}", ratios)


def _url(server: EmbeddedServer, protocol: str) -> str:
    return server.grpc_url if protocol == "grpc" else server.http_url


def _p50_s(call: Callable[[], object], calls: int = 200) -> float:
    return statistics.median(seconds(call) for _ in range(calls))


async def _async_ratios(
    server: EmbeddedServer, protocol: str, make_bare: MakeBare, inputs: Row, pairs: int
) -> list[float]:
    ratios = []
    bare, call_bare = make_bare(server, inputs)
    async with AsyncInferenceClient(_url(server, protocol), protocol) as ours:  # type: ignore[arg-type]
        for pair in range(pairs):
            sides: list[Call] = [functools.partial(ours.infer, "small", inputs), call_bare]
            first = pair % 2  # who goes first changes from pair to pair
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


def _tensor(kind: Any, inputs: Row) -> Any:
    ((name, array),) = inputs.items()
    tensor = kind.InferInput(name, array.shape, "INT64" if array.dtype == np.int64 else "FP32")
    tensor.set_data_from_numpy(array)
    return tensor


def _bare_grpc(server: EmbeddedServer, row: Row) -> Callable[[], object]:
    client = triton_grpc.InferenceServerClient(server.grpc_url)

    def call() -> object:
        result = client.infer(MODEL, [_tensor(triton_grpc, row)])
        return result.as_numpy("items"), result.as_numpy("scores")

    return call


def _bare_http(server: EmbeddedServer, row: Row) -> Callable[[], object]:
    client = triton_http.InferenceServerClient(server.http_url)

    def call() -> object:
        result = client.infer(MODEL, [_tensor(triton_http, row)])
        return result.as_numpy("items"), result.as_numpy("scores")

    return call


def _bare_grpc_aio(server: EmbeddedServer, inputs: Row) -> tuple[Any, Call]:
    client = triton_grpc_aio.InferenceServerClient(server.grpc_url)

    async def call() -> object:
        return (await client.infer("small", [_tensor(triton_grpc, inputs)])).as_numpy("y")

    return client, call


def _bare_http_aio(server: EmbeddedServer, inputs: Row) -> tuple[Any, Call]:
    client = triton_http_aio.InferenceServerClient(server.http_url, conn_limit=TASKS)

    async def call() -> object:
        return (await client.infer("small", [_tensor(triton_http, inputs)])).as_numpy("y")

    return client, call

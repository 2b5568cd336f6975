"""One load for every server of the text benchmark: a closed loop, or Poisson arrivals with the latency from the plan.

Contract: a `Sender` opens connections and gives a function that sends request number n and returns its answer, or None if
it was refused. Latency counts from the intended send. A request that fails counts as TIMEOUT_S.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, NamedTuple

import numpy as np
from deepseek_client import AsyncInferenceClient, InferenceError

WARM_UP_S = 1.0  # of load before the clock starts
TIMEOUT_S = 30.0  # long enough that no server still computes for a caller that left
Send = Callable[[int], Awaitable[Any]]
Sender = Callable[[], AbstractAsyncContextManager[Send]]


class Load(NamedTuple):
    """The result of a load, after the warm-up."""

    answered_per_s: float
    failed: float
    """Share of the requests."""
    p99_ms: float
    answered_p99_ms: float = math.nan
    """Without those that failed."""

    def __str__(self) -> str:
        return f"{self.answered_per_s:.1f}/s, p99 of those answered {self.answered_p99_ms:.0f} ms, {self.failed:.1%} failed"


def http(url: str, bodies: Sequence[object], headers: str = "Content-Type: application/json") -> Sender:
    """Sends the bodies, bytes or JSON, in turn, one at a time on each kept-alive connection."""
    address, _, path = url.removeprefix("http://").partition("/")
    head = f"POST /{path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\nContent-Length: "
    contents = [body if isinstance(body, bytes) else json.dumps(body).encode() for body in bodies]
    requests = [f"{head}{len(content)}\r\n\r\n".encode() + content for content in contents]

    @asynccontextmanager
    async def connected() -> AsyncIterator[Send]:
        idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

        async def send(number: int) -> bytes | None:
            reader, writer = idle.pop() if idle else await asyncio.open_connection(*address.split(":"))
            try:
                writer.write(requests[number % len(requests)])
                answer = await reader.readuntil(b"\r\n\r\n")
                body = await _body(reader, answer)
            except BaseException:
                writer.close()
                raise
            idle.append((reader, writer))
            return body if answer.split(maxsplit=2)[1] == b"200" else None

        try:
            yield send
        finally:
            for _, writer in idle:
                writer.close()

    return connected


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body of an answer, by its length or in chunks."""
    if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", head):
        return await reader.readexactly(int(length[1]))
    if not re.search(rb"(?i)\r\ntransfer-encoding: *chunked", head):
        raise EOFError(f"neither a length nor chunks: {head!r}")
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(chunks)


def grpc(url: str, model: str, texts: Sequence[str], output: str) -> Sender:
    """Sends the texts over KServe v2, with this project's client."""

    @asynccontextmanager
    async def connected() -> AsyncIterator[Send]:
        async with AsyncInferenceClient(url, "grpc", retries=0, timeout_s=TIMEOUT_S) as client:

            async def send(number: int) -> Any:
                inputs = {"text": [texts[number % len(texts)]]}
                return (await client.infer(model, inputs, outputs=[output]))[output]

            yield send

    return connected


async def closed_loop(sender: Sender, users: int, seconds: float) -> Load:
    """Each user sends its next request when the last one is answered."""
    numbers = itertools.count()
    start_s = time.perf_counter() + WARM_UP_S
    latencies: list[float] = []

    async def user(send: Send) -> None:
        while (sent_s := time.perf_counter()) < start_s + seconds:
            latency_s = await _latency_s(send, next(numbers), sent_s)
            if start_s <= time.perf_counter() < start_s + seconds:
                latencies.append(latency_s)

    async with sender() as send:
        await asyncio.gather(*(user(send) for _ in range(users)))
    return _load(latencies, seconds)


async def poisson(sender: Sender, rate_rps: float, seconds: float, seed: int) -> Load:
    """The arrivals depend on rate and seed only."""
    count = int((WARM_UP_S + seconds) * rate_rps)
    planned_s = np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, count)).tolist()
    latencies: list[float] = []
    async with sender() as send, asyncio.TaskGroup() as sending:
        start_s = time.perf_counter()

        async def one(number: int, offset_s: float) -> None:
            latency_s = await _latency_s(send, number, start_s + offset_s)
            if offset_s >= WARM_UP_S:
                latencies.append(latency_s)

        for number, offset_s in enumerate(planned_s):
            await asyncio.sleep(max(0.0, start_s + offset_s - time.perf_counter()))
            sending.create_task(one(number, offset_s))
    return _load(latencies, seconds)


async def _latency_s(send: Send, number: int, intended_s: float) -> float:
    try:
        async with asyncio.timeout(TIMEOUT_S):
            answer = await send(number)
    except (OSError, EOFError, InferenceError):  # also the timeout
        answer = None
    return TIMEOUT_S if answer is None else time.perf_counter() - intended_s


def _load(latencies: list[float], seconds: float) -> Load:
    answered = [latency_s for latency_s in latencies if latency_s != TIMEOUT_S]
    return Load(
        answered_per_s=len(answered) / seconds,
        failed=1 - len(answered) / max(1, len(latencies)),
        p99_ms=_p99_ms(latencies),
        answered_p99_ms=_p99_ms(answered),
    )


def _p99_ms(latencies: list[float]) -> float:
    return 1000 * float(np.percentile(latencies or [TIMEOUT_S], 99, method="higher"))

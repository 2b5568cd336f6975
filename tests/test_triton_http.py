"""The connections to Triton, against a server that answers what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from deepseek_client import ConnectionLost, DeadlineExceeded, InferenceError, ServerBusy, ServerError, Unreachable

from serving.openai.triton_http import TritonHttp
from tests.gateway import free_port

OUTPUT = b'{"name": "v", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}}'
HEADER = b'{"model_version": "3", "outputs": [' + OUTPUT + b"]}"
BODY = HEADER + np.array([1.5, -2], "<f4").tobytes()
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nInference-Header-Content-Length: %d\r\n\r\n" % (
    len(BODY),
    len(HEADER),
)
BUSY = b'{"error":"Exceeds maximum queue size"}'
Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def triton(*answers: Answer) -> AsyncIterator[tuple[TritonHttp, list[asyncio.StreamWriter]]]:
    """Connections to a server that gives each request the next answer; and the server's side of them."""
    left, connections = iter(answers), []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):  # a small request arrives in one piece
                await next(left)(writer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    made = TritonHttp("127.0.0.1:{1}".format(*server.sockets[0].getsockname()))
    try:
        yield made, connections
    finally:
        made.close()
        for writer in connections:
            writer.close()
        server.close()


def says(*pieces: bytes) -> Answer:
    async def answer(writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)

    return answer


async def close(writer: asyncio.StreamWriter) -> None:
    writer.close()


async def infer(made: TritonHttp, timeout_s: float = 60) -> Any:
    version, outputs = await made.infer("m", ["a"], ["v"], timeout_s=timeout_s, parameters={})
    assert version == "3"
    return outputs["v"].tolist()


async def test_an_answer_may_come_in_pieces_and_its_connection_is_used_again() -> None:
    pieces = [ANSWER[:20], ANSWER[20:-2], ANSWER[-2:] + BODY[:9], BODY[9:]]
    async with triton(says(*pieces), says(ANSWER + BODY)) as (made, connections):
        assert [await infer(made), await infer(made)] == [[[1.5, -2.0]]] * 2
        assert len(connections) == 1


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (says(b"HTTP/1.1 503 x\r\nContent-Length: %d\r\n\r\n" % len(BUSY) + BUSY), ServerBusy, "maximum queue size"),
        (says(b"HTTP/1.1 500 x\r\nContent-Length: 3\r\n\r\nno!"), ServerError, "status 500"),
        (says(ANSWER.replace(b"200", b"\xff") + BODY), ServerError, "not HTTP/1.1"),
        (says(b"HTTP/1.1 200 OK\r\n\r\n"), ServerError, "not HTTP/1.1 with a Content-Length"),
        (says(ANSWER + BODY + b"x"), ServerError, "not HTTP/1.1"),
        (says((ANSWER + BODY).replace(b"[1, 2]", b"[2, 1]")), ServerError, "2 rows for 1 texts"),
        (close, ConnectionLost, "before the answer was complete"),
    ],
)
async def test_the_next_call_works_after_an_unusable_answer(
    answer: Answer, kind: type[InferenceError], message: str
) -> None:
    async with triton(answer, says(ANSWER + BODY)) as (made, _):
        with pytest.raises(kind, match=message):
            await infer(made)
        assert await infer(made) == [[1.5, -2.0]]


async def test_a_late_answer_is_an_error_and_closes_the_connection() -> None:
    async with triton(says(), says(ANSWER + BODY)) as (made, connections):
        with pytest.raises(DeadlineExceeded, match=r"within 0\.05 s"):
            await infer(made, 0.05)
        await asyncio.wait_for(connections[0].wait_closed(), 60)
        assert await infer(made) == [[1.5, -2.0]]


async def test_a_cancelled_call_closes_its_connection() -> None:
    called = asyncio.Event()

    async def wait(_: asyncio.StreamWriter) -> None:
        called.set()

    async with triton(wait) as (made, connections):
        call = asyncio.create_task(infer(made))
        await asyncio.wait_for(called.wait(), 60)
        call.cancel()
        await asyncio.wait_for(connections[0].wait_closed(), 60)


async def test_a_server_that_closed_an_idle_connection_gets_a_new_one() -> None:
    async with triton(says(ANSWER + BODY), says(ANSWER + BODY)) as (made, connections):
        await infer(made)
        connections[0].close()
        await connections[0].wait_closed()
        while not made._idle[0].lost:
            await asyncio.sleep(0.01)
        assert await infer(made) == [[1.5, -2.0]]


def test_without_a_server_it_is_unreachable() -> None:
    with pytest.raises(Unreachable, match="does not listen"):
        asyncio.run(infer(TritonHttp(f"127.0.0.1:{free_port()}")))

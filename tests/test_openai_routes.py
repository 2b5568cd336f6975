"""OpenAI's routes in this process, with a stand-in for Triton: memory, bulk requests, callers that disconnect."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import deepseek_client
import numpy as np
import pytest
from aiohttp import ClientError, ClientSession
from deepseek_client import BULK, InferenceError
from deepseek_client.metadata import TensorMetadata

from serving.observe.dashboard import dashboard
from serving.openai import __main__ as openai_process
from serving.openai import routes
from serving.openai.errors import ApiError, from_client
from serving.openai.inference import vectors_of
from serving.openai.metrics import Metrics
from serving.openai.openapi import Route
from serving.openai.recommenders import Recommenders
from serving.openai.routes import Routes
from serving.openai.text_models import TextModel
from tests.test_stack import TEXT


class StandIn:
    """Stands in for the connections to Triton: notes each call, and answers once it is released."""

    def __init__(self, numbers: int = 1) -> None:
        self.numbers = numbers  # of a vector
        self.calls: list[tuple[list[str], Any]] = []  # texts and parameters
        self.released, self.cancelled = asyncio.Event(), asyncio.Event()

    async def infer(self, _: str, texts: list[str], *__: Any, parameters: Any, **___: Any) -> tuple[str, dict]:
        self.calls.append((texts, parameters))
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        vectors = np.ones((len(texts), self.numbers), np.float32)
        return "1", {"embedding": vectors, "tokens": np.ones((len(texts), 1), np.int32)}


SMALL = TextModel(name="m", output="embedding", size=1, max_batch=2, parts_at_once=1, max_tokens=8, max_bytes=8)
LARGE = replace(SMALL, size=384, max_batch=2048)


@asynccontextmanager
async def in_front_of(triton: Any, model: TextModel, metrics: Metrics | None = None) -> AsyncIterator[str]:
    """The routes for one model, in this loop: host and port."""

    class Models:
        async def chosen(self, *_: Any, **__: Any) -> TextModel:
            return model

        async def all(self) -> list[TextModel]:
            return []

    recommenders = Recommenders(None, Path("nowhere"))  # type: ignore[arg-type]
    runner = Routes(Models(), triton, metrics or Metrics(), recommenders).runner(1)  # type: ignore[arg-type]
    await runner.setup()
    await openai_process.listen(runner, socket.create_server(("127.0.0.1", 0)))
    yield "127.0.0.1:{1}".format(*runner.addresses[0])
    await runner.cleanup()


async def embed(address: str, texts: list[str], **sent: Any) -> tuple[int, Any]:
    """Status and answer."""
    data = BytesIO(json.dumps({"model": "m", "input": texts}).encode())
    url = f"http://{address}/v1/embeddings"
    async with ClientSession() as session, session.post(url, data=data, **sent) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize(
    ("pairs", "outputs", "taken", "needed"),
    [
        (False, {"logits": (-1, 3), "tokens": (-1, 1)}, None, "but has no float output embedding [batch, size]"),
        (False, {"score": (-1, 1), "embedding": (-1, 8)}, "embedding", ""),
        (False, {"pooled": (-1, 8), "tokens": (-1, 1)}, "pooled", ""),
        (False, {"pooled": (-1, 8), "logits": (-1, 2)}, "pooled", ""),
        (False, {"pooled": (-1, 8), "mean": (-1, 8)}, None, "but has no float output embedding [batch, size]"),
        (False, {"embedding": (-1, -1, 8)}, None, "but has no float output embedding [batch, size]"),
        (True, {"logits": (-1, 1), "tokens": (-1, 1)}, "logits", ""),
        (True, {"logits": (-1, 3)}, None, "but does not have one float output [batch, 1]"),
    ],
)
def test_the_scores_of_a_classifier_are_no_vectors(
    pairs: bool, outputs: dict[str, tuple[int, ...]], taken: str | None, needed: str
) -> None:
    settings = json.dumps({"pairs": pairs, "max_tokens": 8, "max_bytes": 8})
    tensors = tuple(
        TensorMetadata(name=name, datatype="INT32" if name == "tokens" else "FP32", shape=shape)
        for name, shape in outputs.items()
    )
    metadata = deepseek_client.ModelMetadata(
        name="m", versions=(), platform="", inputs=(), outputs=tensors, max_batch_size=4, parameters={"text": settings}
    )
    if taken:
        assert TextModel.of(metadata).output == taken
        return
    with pytest.raises(ApiError, match=rf"{re.escape(needed)}; outputs are .*; call it over KServe v2"):
        TextModel.of(metadata)


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/", "/recommenders"])
async def test_head_is_answered_as_get_without_the_body(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uptime monitors and load balancers send it."""
    monkeypatch.setattr("serving.openai.recommenders.model_folders", lambda _: [])
    async with in_front_of(StandIn(), SMALL) as address, ClientSession() as session:
        async with session.get(f"http://{address}{path}") as answer:
            expected = (answer.status, answer.headers["Content-Type"])
        async with session.head(f"http://{address}{path}") as answer:
            assert (answer.status, answer.headers["Content-Type"], await answer.read()) == (*expected, b"")
            assert int(answer.headers["Content-Length"]) > 0
        assert expected[0] == 200


@pytest.mark.parametrize("chunked", [None, True])
async def test_an_answer_larger_than_all_the_room_is_computed_if_it_is_alone(chunked: bool | None) -> None:
    triton = StandIn()
    triton.released.set()
    async with in_front_of(triton, replace(LARGE, size=1_000_000)) as address:
        assert (await embed(address, ["a"] * 2048, chunked=chunked))[0] == 200


async def test_large_answers_are_refused_beyond_the_memory_they_may_take() -> None:
    """2048 vectors of 384 numbers count as 48 MiB, so four fill the 192, with nothing left for the bodies."""
    triton = StandIn()

    async def started(count: int) -> None:
        while len(triton.calls) < count:
            await asyncio.sleep(0.01)

    async with in_front_of(triton, LARGE) as address:
        asked = [asyncio.create_task(embed(address, ["a"] * 2048)) for _ in range(3)]
        await started(3)
        refused = await embed(address, ["a"] * 2048)
        asked.append(asyncio.create_task(embed(address, ["a"])))
        await started(4)
        triton.released.set()
        answers = [refused, *(await asyncio.gather(*asked)), await embed(address, ["a"] * 2048)]
    assert [status for status, _ in answers] == [429, 200, 200, 200, 200, 200]


async def test_bodies_of_unknown_size_count_as_they_are_once_they_arrived() -> None:
    triton = StandIn()
    async with in_front_of(triton, SMALL) as address:
        asked = [asyncio.create_task(embed(address, ["a"], chunked=True)) for _ in range(32)]
        while len(triton.calls) < 32 and not any(each.done() for each in asked):
            await asyncio.sleep(0.01)
        triton.released.set()
        assert [status for status, _ in await asyncio.gather(*asked)] == [200] * 32


async def test_an_encoding_counts_in_any_case() -> None:
    triton = StandIn()
    triton.released.set()
    async with in_front_of(triton, SMALL) as address:
        status, _ = await embed(address, ["a"], headers={"Content-Encoding": "Identity"})
    assert status == 200


async def test_a_header_makes_a_request_bulk() -> None:
    """It then waits behind others, in parts of the batch that Triton prefers."""
    triton = StandIn()
    triton.released.set()
    async with in_front_of(triton, replace(SMALL, preferred_batch=1)) as address:
        for headers in ({}, {"X-Priority": "Online"}, {"X-Priority": "Bulk"}, {"X-Priority": "1"}):
            _, refused = await embed(address, ["a", "b"], headers=headers)
    assert triton.calls == [*[(["a", "b"], {})] * 2, (["a"], BULK), (["b"], BULK)]
    assert refused["error"]["message"] == 'X-Priority: seen "1"; allowed: online or bulk'


class Refusing:
    """Stands in for a Triton that refuses every list of texts once, and answers the number in each text."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []

    async def infer(self, _: str, texts: list[str], *__: Any, **___: Any) -> tuple[str, dict]:
        self.sent.append(texts)
        if self.sent.count(texts) == 1:
            raise deepseek_client.ServerBusy("full")
        numbers = np.array([[int(text)] for text in texts])
        return "1", {"embedding": numbers, "tokens": numbers}


async def test_a_refused_part_of_a_long_list_is_sent_again() -> None:
    triton: Any = Refusing()
    vectors, tokens = await vectors_of(triton, Metrics(), SMALL, list("123"))
    assert vectors.tolist() == [[1], [2], [3]]
    assert tokens.tolist() == [1, 2, 3]
    with pytest.raises(ApiError, match="overloaded: full"):  # one batch: the caller decides
        await vectors_of(triton, Metrics(), SMALL, list("45"))


class Switching:
    """Stands in for a Triton that loads version 2, with larger vectors, after its second answer."""

    def __init__(self) -> None:
        self.sent: list[list[str]] = []

    async def infer(self, _: str, texts: list[str], *__: Any, **___: Any) -> tuple[str, dict]:
        self.sent.append(texts)
        version = 1 if len(self.sent) <= 2 else 2
        vectors = np.full((len(texts), version), version, np.float32)
        return str(version), {"embedding": vectors, "tokens": np.array([[int(text)] for text in texts])}


async def test_one_version_answers_a_whole_list() -> None:
    """Vectors of two versions may differ in size, and cannot be compared."""
    triton: Any = Switching()
    vectors, tokens = await vectors_of(triton, Metrics(), SMALL, list("123456"))
    assert vectors.tolist() == [[2, 2]] * 6
    assert tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert triton.sent == [["1", "2"], ["3", "4"], ["5", "6"], ["1", "2"], ["3", "4"]]


async def test_a_call_is_cancelled_when_its_caller_disconnects() -> None:
    triton, metrics = StandIn(), Metrics()
    async with in_front_of(triton, SMALL, metrics) as address:
        asked = asyncio.create_task(embed(address, ["a"]))
        while not triton.calls:
            await asyncio.sleep(0.01)
        asked.cancel()
        await asyncio.wait_for(triton.cancelled.wait(), 60)
    assert 'openai_requests_total{route="/v1/embeddings",status="499"} 1\n' in metrics.text()


async def test_a_caller_that_leaves_while_its_answer_is_sent_is_no_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    send = routes._sent

    async def left(request: Any, answer: Any) -> Any:
        request.transport.close()
        return await send(request, answer)

    monkeypatch.setattr(routes, "_sent", left)

    triton, metrics = StandIn(), Metrics()
    triton.released.set()
    async with in_front_of(triton, SMALL, metrics) as address:
        with pytest.raises(ClientError):
            await embed(address, ["a"])
    assert 'openai_requests_total{route="/v1/embeddings",status="499"} 1\n' in metrics.text()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("/v1/embeddings", {"model": "m", "input": ["a"] * 2048}),
        ("/rerank", {"query": "a", "texts": ["a" * 4000] * 2000, "return_text": True}),
    ],
)
async def test_a_caller_that_takes_no_answer_is_disconnected(
    route: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its answer counts towards the memory for good, and all callers are refused."""
    monkeypatch.setattr(openai_process, "SEND_S", 0.5)

    triton, metrics = StandIn(numbers=4096), Metrics()
    triton.released.set()
    async with asyncio.timeout(60), in_front_of(triton, replace(LARGE, max_bytes=4000), metrics) as address:
        _, writer = await asyncio.open_connection(*address.split(":"))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        body = json.dumps(fields).encode()
        writer.write(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (route.encode(), len(body)) + body)
        while 'status="499"' not in metrics.text():
            await asyncio.sleep(0.05)
        assert (await embed(address, ["a"]))[0] == 200
        writer.close()


@pytest.mark.parametrize("path", [b"/v1/embeddings", b"/recommenders/m"])
async def test_a_body_that_does_not_arrive_is_408(path: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "READ_S", 0.1)

    async with in_front_of(StandIn(), SMALL) as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(b"POST %b HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{" % path)
        assert b" 408 " in await asyncio.wait_for(reader.readline(), 60)
        writer.close()


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("Authorization: Bearer " + "x" * 9000, "Got more than 8190 bytes"),
        ("Content-Length: secret", "Invalid character in Content-Length"),
    ],
)
async def test_a_malformed_request_is_a_400_that_repeats_no_header(
    header: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with in_front_of(StandIn(), SMALL) as address:
        reader, writer = await asyncio.open_connection(*address.split(":"))
        writer.write(f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
    assert head.split()[1] == b"400"
    assert json.loads(body)["error"]["message"] == f"the request is not valid HTTP: {reason}"
    assert caplog.records == []


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (deepseek_client.InvalidInput("x"), 400),
        (deepseek_client.ModelNotFound("x"), 404),
        (deepseek_client.ServerBusy("x", 1.5), 429),
        (deepseek_client.ServerError("x"), 500),
        (deepseek_client.ModelNotReady("x"), 503),
        (deepseek_client.Unreachable("x"), 503),
        (deepseek_client.ConnectionLost("x"), 503),
        (deepseek_client.DeadlineExceeded("x"), 504),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_of_a_call_has_its_status(error: InferenceError, status: int) -> None:
    found = from_client(error, "sentence")
    assert found.status == status
    assert found.retry_after_s == {429: 2, 503: 1}.get(status, 0)


@pytest.mark.parametrize("route", [each for each in Routes(None, None, Metrics())._routes if each.body], ids=str)  # type: ignore[arg-type]
def test_the_gateway_and_the_dashboard_know_each_route(route: Route) -> None:
    gateway = Path("docker/gateway/nginx.conf").read_text()
    patterns = re.findall(r"\^/\(v1/\S*?\)(?=\)? \{)", gateway)  # the location, and the errors of nginx itself
    assert len(patterns) == 2
    assert all(re.match(pattern, route.path) for pattern in patterns), f"docker/gateway/nginx.conf: {patterns}"
    assert gateway.count(str(route)) == 2, "docker/gateway/nginx.conf: the map $api, and the message `no such route`"
    assert route.path in json.dumps(dashboard([replace(TEXT, text_bytes=1)])), "serving/observe/dashboard.py: _openai"

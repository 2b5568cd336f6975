"""The load of the text benchmark: closed and open loop, refusals, and a real endpoint over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.bench.peers import load
from tests.bench.peers.load import Send, Sender, closed_loop, http, poisson
from tests.fake_endpoint import FakeEndpoint


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "WARM_UP_S", 0.0)


def sender_of(send: Send) -> Sender:
    @asynccontextmanager
    async def connected() -> AsyncIterator[Send]:
        yield send

    return connected


def test_an_open_loop_sends_by_the_plan_and_counts_from_it() -> None:
    sent, all_sent = [], asyncio.Event()

    async def send(number: int) -> str:
        sent.append(number)
        if len(sent) == 50:
            all_sent.set()
        await all_sent.wait()  # a sender that waits for answers would wait for ever
        return "answer"

    found = asyncio.run(poisson(sender_of(send), rate_rps=100, seconds=0.5, seed=0))
    assert sent == list(range(50))
    assert found.failed == 0
    assert found.answered_per_s == 100
    assert found.p99_ms > 100  # the first waited for the last


def test_a_refused_request_counts_as_the_timeout() -> None:
    async def send(number: int) -> str | None:
        await asyncio.sleep(0)
        return None if number % 2 else "answer"

    found = asyncio.run(poisson(sender_of(send), rate_rps=200, seconds=0.2, seed=0))
    assert found.failed == 0.5
    assert found.answered_per_s == 100
    assert found.p99_ms == 1000 * load.TIMEOUT_S


def test_a_closed_loop_has_one_request_of_each_user_in_flight() -> None:
    flying, most = 0, 0

    async def send(number: int) -> str:
        nonlocal flying, most
        flying += 1
        most = max(most, flying)
        await asyncio.sleep(0.001)
        flying -= 1
        return "answer"

    asyncio.run(closed_loop(sender_of(send), users=4, seconds=0.2))
    assert (flying, most) == (0, 4)


def test_the_load_speaks_http_and_sees_refusals() -> None:
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [1.0]}]}
    with FakeEndpoint(refuse_every=2) as endpoint:
        sender = http(f"http://{endpoint.http_url}/v2/models/any/infer", [body])
        found = asyncio.run(poisson(sender, rate_rps=100, seconds=0.4, seed=0))
    assert found.failed == 0.5

"""Retries, the retry budget and hedging, with servers that fail, ask to wait or are slow."""

from __future__ import annotations

import contextlib
import email.utils
import math
import time
from collections.abc import Sequence
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import (
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    InferenceClient,
    InferenceError,
    InvalidInput,
    ModelNotReady,
    PreparedRequest,
    ServerBusy,
    Unreachable,
)
from deepseek_client.concurrency import run
from deepseek_client.resilience.replicas import Replica, Replicas
from deepseek_client.resilience.retry import Retrier
from deepseek_client.resilience.retry_budget import RESERVE, RetryBudget
from deepseek_client.statistics import Counters
from deepseek_client.transport import Deadline

from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import (
    MakeRelays,
    X,
    answering,
    client_of,
    grpc_answering,
    options_of,
    prepared,
    refuse,
    status,
)


def test_the_budget_is_a_share_of_the_calls_of_the_last_seconds() -> None:
    now_s = 100.0
    budget = RetryBudget(0.1, lambda: now_s)
    assert [budget.take() for _ in range(RESERVE + 1)] == [True] * RESERVE + [False]
    for _ in range(50):
        budget.count_call()
    assert [budget.take() for _ in range(6)] == [True] * 5 + [False]
    now_s += 9
    assert not budget.take()
    now_s += 1
    assert [budget.take() for _ in range(RESERVE + 1)] == [True] * RESERVE + [False]


class Instant:
    """Concurrency that does not wait but records the waits."""

    def __init__(self, retrier: list[Retrier], close_at: float = math.inf) -> None:
        self.slept: list[float] = []
        self._retrier, self._close_at = retrier, close_at

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if seconds >= self._close_at:
            self._retrier[0].close()

    def spawn(self, background: Any) -> bool:
        """Starts no probe."""
        return True

    async def race(self, first: Any, second: Any, after_s: float) -> str:
        hedge = second()
        return f"hedged after {after_s:g} s" if hedge else await first(None)


class Both(Instant):
    """Makes both attempts of a hedged call, one after the other."""

    async def race(self, first: Any, second: Any, after_s: float) -> str:
        hedge = second()
        try:
            return await first(None)
        except InferenceError as error:
            with contextlib.suppress(InferenceError):
                return await hedge(None)
            raise error


def retrier_of(
    urls: tuple[str, ...],
    counters: Counters,
    close_at: float = math.inf,
    kind: type[Instant] = Instant,
    **options: Any,
) -> tuple[Retrier, Instant]:
    made: list[Retrier] = []
    instant: Any = kind(made, close_at)
    transport: Any = None
    replicas = Replicas([Replica(url, transport, None) for url in urls], instant)
    made.append(Retrier(options_of(urls=urls, **options), instant, replicas, counters))
    return made[0], instant


def attempts(
    errors: Sequence[InferenceError],
    servers: int = 1,
    close_at: float = math.inf,
    timeout_s: float = 60,
    **options: Any,
) -> tuple[list[str], list[float], Any, Counters]:
    """Makes a call whose attempts fail with these errors, then succeed.

    Returns the addresses tried, the waits in seconds, the answer or error, and the counters.
    """
    left, tried, counters = list(errors), list[str](), Counters()

    async def attempt(replica: Replica, cancel: Any) -> str:
        tried.append(replica.url)
        if left:
            raise left.pop(0)
        return "answer"

    urls = tuple(f"h{number}:1" for number in range(servers))
    retrier, instant = retrier_of(urls, counters, close_at, **options)
    try:
        repeatable = options.get("idempotent", False)
        ended: Any = run(retrier.call(attempt, Deadline(timeout_s), "m", repeatable=repeatable))
    except InferenceError as error:
        ended = error
    return tried, instant.slept, ended, counters


async def answered(replica: Replica, cancel: Any) -> str:
    """An attempt that succeeds."""
    return "answer"


BUSY, LOST, GONE = ServerBusy("full"), ConnectionLost("cut"), Unreachable("refused")
LATER = ServerBusy("full", 5.0)


@pytest.mark.parametrize(
    ("errors", "options", "waits"),
    [
        pytest.param([], {}, [], id="an answer"),
        pytest.param([BUSY, ModelNotReady("loading")], {}, [0.05, 0.1], id="refusals"),
        pytest.param([GONE] * 8, {"retries": 8}, [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0], id="up to 2 s"),
        pytest.param([LATER, LATER], {}, [5.05, 5.1], id="Retry-After on top"),
        pytest.param([LOST, BUSY], {"idempotent": True}, [0.05, 0.1], id="lost, idempotent"),
    ],
)
def test_requests_that_did_not_run_are_retried_with_doubling_waits(
    monkeypatch: pytest.MonkeyPatch, errors: list, options: dict, waits: list[float]
) -> None:
    monkeypatch.setattr("random.uniform", lambda least, most: most - least)
    tried, slept, ended, counters = attempts(errors, **options)
    assert (len(tried), ended) == (len(errors) + 1, "answer")
    assert slept == pytest.approx(waits)
    assert counters.of("m").statistics().retries == len(errors)


@pytest.mark.parametrize(
    ("errors", "options", "tries"),
    [
        pytest.param([BUSY] * 9, {}, 4, id="as many as retries"),
        pytest.param([BUSY], {"retries": 0}, 1, id="no retries"),
        pytest.param([LOST], {}, 1, id="may have run"),
        pytest.param([DeadlineExceeded("late")], {"idempotent": True}, 1, id="no time"),
        pytest.param([InvalidInput("no")], {"idempotent": True}, 1, id="would fail again"),
        pytest.param([ServerBusy("full", 61.0)], {}, 1, id="a wait beyond the deadline"),
        pytest.param([BUSY] * 99, {"retries": 99, "retry_budget": 0.0}, 1 + RESERVE, id="the budget"),
        pytest.param([BUSY] * 40, {"retries": 30, "retry_budget": None}, 31, id="no budget"),
        pytest.param([GONE] * 40, {"retries": 30, "retry_budget": 0.0, "timeout_s": 1e6}, 31, id="outside the budget"),
        pytest.param([BUSY] * 9, {"close_at": 0.1}, 2, id="closed while waiting"),
    ],
)
def test_the_number_of_attempts_is_limited(
    monkeypatch: pytest.MonkeyPatch, errors: list, options: dict, tries: int
) -> None:
    monkeypatch.setattr("random.uniform", lambda least, most: most - least)
    tried, _, ended, counters = attempts(errors, **options)
    assert len(tried) == tries
    assert ended is errors[tries - 1]
    assert counters.of("m").statistics().denied == (options.get("retry_budget") == 0.0 and errors[0] is BUSY)


def test_an_untried_server_is_tried_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda least, most: most - least)
    tried, slept, ended, _ = attempts([BUSY, BUSY, BUSY], servers=2)
    assert set(tried[:2]) == {"h0:1", "h1:1"}
    assert (len(tried), slept, ended) == (4, [0.1, 0.2], "answer")
    tried, _, ended, _ = attempts([BUSY, BUSY], servers=2, timeout_s=1e-9)  # no time is left for the other server
    assert (len(tried), ended) == (1, BUSY)


def test_a_retry_waits_if_a_hedge_has_tried_the_other_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda least, most: most - least)
    left = [BUSY] * 4

    async def attempt(replica: Replica, cancel: Any) -> str:
        if left:
            raise left.pop()
        return "answer"

    options: dict[str, Any] = {"idempotent": True, "hedge_after_ms": 5, "retry_budget": None}
    retrier, instant = retrier_of(("h:1", "h:2"), Counters(), kind=Both, **options)
    assert run(retrier.call(attempt, Deadline(60), "m", hedged=True)) == "answer"
    assert instant.slept == pytest.approx([0.05, 0.1])


def test_hedges_stay_within_the_budget_and_end_with_the_client() -> None:
    def call() -> str:
        return run(retrier.call(answered, Deadline(60), "m", hedged=True))

    counters = Counters()
    retrier, _ = retrier_of(("h:1",), counters, idempotent=True, hedge_after_ms=5, retry_budget=0.0)
    assert [call() for _ in range(RESERVE + 1)] == ["hedged after 0.005 s"] * RESERVE + ["answer"]
    told = counters.of("m").statistics()
    assert (told.hedges, told.hedges_won, told.denied) == (RESERVE, 0, 1)
    retrier, _ = retrier_of(("h:1",), counters, idempotent=True, hedge_after_ms=5)
    retrier.close()
    assert call() == "answer"


@pytest.mark.parametrize(("timeout_s", "after_s"), [(60, 15), (1e-9, 0)])
def test_a_percentile_of_few_calls_is_a_share_of_the_time_left(timeout_s: float, after_s: float) -> None:
    retrier, _ = retrier_of(("h:1",), Counters(), idempotent=True, hedge_after_ms="p90")
    said = run(retrier.call(answered, Deadline(timeout_s), "m", hedged=True))
    found_s = float(said.removeprefix("hedged after ").removesuffix(" s"))
    assert found_s == pytest.approx(after_s, abs=0.1)
    assert found_s >= 0


def refusal(url: str, protocol: Any, request: PreparedRequest, timeout_s: float) -> ServerBusy:
    with InferenceClient(url, protocol, retries=1) as client, pytest.raises(ServerBusy) as caught:
        client.send(request, timeout_s=timeout_s)
    return caught.value


def test_retry_after_delays_the_retry(server: EmbeddedServer) -> None:
    """If the delay exceeds the deadline, the error is raised at once."""
    date = email.utils.formatdate(time.time() + 3600, usegmt=True)
    http = [answering(status(f"503 Busy\r\nRetry-After: {when}")) for when in ("3600", date)]
    said: list[dict[str, str]] = [{"retry_after": "3600"}, {"grpc_retry_pushback_ms": "3600000"}]
    grpcs = [grpc_answering(refuse(grpc.StatusCode.UNAVAILABLE, "shedding load", **each)) for each in said]
    for protocol, failing in (("http", http), ("grpc", grpcs)):
        for each in failing:
            with each as (url, seen):
                error = refusal(url, protocol, prepared(server, protocol), 1800)
            assert len(seen) == 1
            assert error.retry_after_s is not None
            assert 1800 < error.retry_after_s <= 3600
            assert protocol == "grpc" or "asks to wait" in str(error)


ENVOY = "upstream connect error or disconnect/reset before headers. reset reason: connection termination"
RESTRICTED = "This protocol is restricted, expecting header 'triton-grpc-protocol-key'"
FULL, NOT_SENT = '{"error": "Exceeds maximum queue size"}', '{"error": "try again", "unsent": true}'


@pytest.mark.parametrize(
    ("line", "body", "tries"),
    [
        pytest.param("503 Service Unavailable", ENVOY, 1, id="a proxy's page"),
        pytest.param("503 Service Unavailable\r\nRetry-After: 0", ENVOY, 1, id="a time to wait proves nothing"),
        pytest.param("503 Service Unavailable", '{"error": "upstream is not ready"}', 1, id="a proxy's word"),
        pytest.param("503 Service Unavailable", 9000 * "[", 1, id="nested"),
        pytest.param("503 Service Unavailable", FULL, 3, id="Triton's queue"),
        pytest.param("503 Service Unavailable", NOT_SENT, 3, id="the gateway's mark"),
        pytest.param("429 Too Many Requests", ENVOY, 3, id="a rate limit"),
    ],
)
def test_an_inference_is_repeated_after_503_only_if_it_did_not_run(
    server: EmbeddedServer, line: str, body: str, tries: int
) -> None:
    request = prepared(server, "http")
    for idempotent in (False, True):
        with (
            answering(status(line, body)) as (url, seen),
            InferenceClient(url, "http", retries=2, idempotent=idempotent) as client,
            pytest.raises(ServerBusy),
        ):
            client.send(request)
        assert len(seen) == (3 if idempotent else tries)


@pytest.mark.parametrize(
    ("code", "details", "trailing", "expected", "tries", "idempotent"),
    [
        ("UNAVAILABLE", "failed to connect to all addresses; last error: x", {}, ConnectionLost, 1, False),
        ("UNAVAILABLE", "the upstream is not ready", {}, ConnectionLost, 1, False),
        ("UNAVAILABLE", "overloaded", {"retry_after": "0"}, ServerBusy, 1, False),
        ("UNAVAILABLE", "Exceeds maximum queue size", {}, ServerBusy, 3, False),
        ("UNAVAILABLE", "try again", {"grpc_retry_pushback_ms": "1"}, ServerBusy, 3, False),
        ("UNAVAILABLE", RESTRICTED, {}, AccessDenied, 1, False),
        ("CANCELLED", "CANCELLED", {}, ConnectionLost, 3, True),
        ("CANCELLED", "CANCELLED", {}, ConnectionLost, 1, False),  # by Triton, when its exit time-out is over
    ],
)
def test_an_inference_is_repeated_over_grpc_only_if_it_did_not_run(
    server: EmbeddedServer, code: str, details: str, trailing: dict, expected: type, tries: int, idempotent: bool
) -> None:
    refusing = grpc_answering(refuse(grpc.StatusCode[code], details, **trailing))
    with (
        refusing as (url, seen),
        InferenceClient(url, retries=2, idempotent=idempotent) as client,
        pytest.raises(expected),
    ):
        client.send(prepared(server, "grpc"))
    assert len(seen) == tries


# Hedging. A slow replica answers only after the deadline of a call that waits for it.


def test_a_percentile_hedges_after_enough_calls(relays: MakeRelays) -> None:
    slow, fast = relays("http", 2)
    settings: dict[str, Any] = {"idempotent": True, "hedge_after_ms": "p90", "retry_budget": None, "timeout_s": 20}
    with client_of([slow, fast], "http", **settings) as client:
        request = client.prepare("add_one", {"x": X})
        for _ in range(99):
            client.send(request)
        assert client.statistics().models["add_one"].hedges == 0
        client.send(request)
        slow.delay_s = 60.0
        for _ in range(4):
            client.send(request)
        assert client.statistics().models["add_one"].hedges_won >= 2


def test_a_hedge_still_answers_if_the_first_attempt_breaks(server: EmbeddedServer, relays: MakeRelays) -> None:
    (other,) = relays("http", 1)
    other.delay_s = 0.2

    def break_once_hedged(connection: Any) -> None:
        pieces = other.pieces
        for _ in range(6000):
            if other.pieces > pieces:
                return
            time.sleep(0.01)

    with answering(break_once_hedged) as (breaks, _):
        settings: dict[str, Any] = {"idempotent": True, "hedge_after_ms": 50, "retries": 0, "timeout_s": 60}
        with client_of([breaks, other.url], "http", **settings) as client:
            for _ in range(2):  # one of the two calls starts at the replica that breaks
                np.testing.assert_array_equal(client.send(prepared(server, "http"))["y"], X + 1)
            assert client.statistics().models["add_one"].hedges >= 1

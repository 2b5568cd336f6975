"""The asynchronous client: the same face and errors as the blocking one, on one loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ssl
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from deepseek_client import (
    AsyncInferenceClient,
    ConnectionLost,
    DeadlineExceeded,
    InvalidInput,
    ModelNotFound,
    ServerBusy,
    Unreachable,
)

from serving.embedded import EmbeddedServer
from tests.failing_servers import Relay, answering, half_an_answer, make_certificate, mute, status, trickle

X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
both = pytest.mark.parametrize("protocol", ["http", "grpc"])
Result = TypeVar("Result")


def using(
    server: EmbeddedServer | str,
    protocol: str,
    use: Callable[[AsyncInferenceClient], Awaitable[Result]],
    **settings: Any,
) -> Result:
    """The result of `use` with a client of the server, or of an address."""

    async def main() -> Result:
        default = server if isinstance(server, str) else server.http_url if protocol == "http" else server.grpc_url
        async with AsyncInferenceClient(default, protocol, **settings) as client:  # type: ignore[arg-type]
            return await use(client)

    return asyncio.run(main())


def relay_to(server: EmbeddedServer, protocol: str, tls: ssl.SSLContext | None = None) -> Relay:
    return Relay((server.address, server.http_port if protocol == "http" else server.grpc_port), tls)


@both
def test_its_calls_are_those_of_the_blocking_client_awaited(server: EmbeddedServer, protocol: str) -> None:
    async def use(client: AsyncInferenceClient) -> None:
        assert await client.ready()
        assert not await client.ready("absent")
        assert (await client.metadata("add_one")).max_batch_size == 8
        outputs = await client.infer("add_one", {"x": X}, outputs=["y"], version="1", request_id="7")
        np.testing.assert_array_equal(outputs["y"], X + 1)
        request = await client.prepare("add_one", {"x": X})
        np.testing.assert_array_equal((await client.send(request))["y"], X + 1)

    using(server, protocol, use)


@both
def test_many_tasks_share_a_client(server: EmbeddedServer, protocol: str) -> None:
    async def use(client: AsyncInferenceClient) -> list[dict[str, np.ndarray]]:
        return await asyncio.gather(*(client.infer("add_one", {"x": X + k}) for k in range(60)))

    for k, answer in enumerate(using(server, protocol, use)):
        np.testing.assert_array_equal(answer["y"], X + k + 1)


@both
def test_calls_that_a_failed_gather_left_behind_leave_no_connection(server: EmbeddedServer, protocol: str) -> None:
    relay = relay_to(server, protocol)

    async def main() -> None:
        async with AsyncInferenceClient(relay.url, protocol, idempotent=True) as client:  # type: ignore[arg-type]
            await client.metadata("slow")
            left = [asyncio.ensure_future(client.infer("slow", {"x": X})) for _ in range(2)]
            with pytest.raises(ModelNotFound):
                await asyncio.gather(*left, client.infer("absent", {"x": X}))
        await asyncio.wait(left)  # they end, one way or the other, after the client was closed
        assert not [each for each in left if each.exception() and not isinstance(each.exception(), ConnectionLost)]
        await asyncio.sleep(0)  # an aborted transport is closed in the loop's next turn

    asyncio.run(main())
    gc.collect()  # a transport that is still open warns, and warnings are errors
    relay.close()


@both
def test_calls_one_after_the_other_share_a_connection(server: EmbeddedServer, protocol: str) -> None:
    relay = relay_to(server, protocol)

    async def use(client: AsyncInferenceClient) -> None:
        for _ in range(10):
            await client.infer("add_one", {"x": X})

    using(relay.url, protocol, use)
    relay.close()
    assert relay.accepted == 1


@both
def test_large_tensors_pass(server: EmbeddedServer, protocol: str) -> None:
    x = np.random.default_rng(0).random((2, 2, 1_000_000), np.float32)  # 16 MB
    outputs = using(server, protocol, lambda client: client.infer("add_one", {"x": x}))
    np.testing.assert_array_equal(outputs["y"], x + 1)


@both
def test_a_server_that_never_answers_costs_no_more_than_the_deadline(protocol: str) -> None:
    with answering(mute) as (url, _):
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"within timeout_s=0\.3"):
            using(url, protocol, lambda client: client.metadata("m"), timeout_s=0.3, retries=5)
        assert time.monotonic() - start < 1


def test_a_server_that_trickles_bytes_costs_no_more_than_the_deadline() -> None:
    with answering(trickle) as (url, _):
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            using(url, "http", lambda client: client.ready(), timeout_s=0.3)
    assert time.monotonic() - start < 2


@both
def test_a_cancelled_call_leaves_a_client_that_works(server: EmbeddedServer, protocol: str) -> None:
    async def use(client: AsyncInferenceClient) -> np.ndarray:
        await client.metadata("slow")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.infer("slow", {"x": X}), 0.05)
        return (await client.infer("add_one", {"x": X}))["y"]

    np.testing.assert_array_equal(using(server, protocol, use), X + 1)


@both
def test_a_server_that_comes_back_is_found_within_seconds(server: EmbeddedServer, protocol: str) -> None:
    relay = relay_to(server, protocol)

    async def use(client: AsyncInferenceClient) -> np.ndarray:
        await client.infer("add_one", {"x": X})
        relay.close()
        threading.Timer(0.5, relay.reopen).start()
        return (await client.infer("add_one", {"x": X}))["y"]

    np.testing.assert_array_equal(using(relay.url, protocol, use, retries=50, idempotent=True), X + 1)
    relay.close()


@both
@pytest.mark.parametrize("idempotent", [False, True], ids=["once", "idempotent"])
def test_a_lost_connection_is_retried_only_where_that_does_no_harm(
    server: EmbeddedServer, protocol: str, idempotent: bool
) -> None:
    relay = relay_to(server, protocol)

    async def use(client: AsyncInferenceClient) -> np.ndarray:
        await client.metadata("slow")
        threading.Timer(0.1, relay.cut).start()
        return (await client.infer("slow", {"x": X}))["y"]

    with contextlib.nullcontext() if idempotent else pytest.raises(ConnectionLost):
        np.testing.assert_array_equal(using(relay.url, protocol, use, idempotent=idempotent, retries=10), X + 1)
    relay.close()


@both
def test_an_idle_connection_that_was_closed_is_replaced(server: EmbeddedServer, protocol: str) -> None:
    relay = relay_to(server, protocol)

    async def use(client: AsyncInferenceClient) -> np.ndarray:
        await client.infer("add_one", {"x": X})
        relay.cut()
        await asyncio.sleep(0.1)
        return (await client.infer("add_one", {"x": X}))["y"]

    np.testing.assert_array_equal(using(relay.url, protocol, use, retries=0), X + 1)
    relay.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(status("400 Bad Request"), InvalidInput, id="400"),
        pytest.param(status("404 Not Found"), ModelNotFound, id="404"),
        pytest.param(status("503 Service Unavailable"), ServerBusy, id="503"),
        pytest.param(half_an_answer, ConnectionLost, id="cut off"),
    ],
)
def test_its_errors_are_those_of_the_tree(answer: Callable, expected: type) -> None:
    with answering(answer) as (url, _), pytest.raises(expected):
        using(url, "http", lambda client: client.metadata("m"), retries=0)


@both
def test_nobody_there_is_unreachable(protocol: str) -> None:
    with pytest.raises(Unreachable, match="Connection refused"):
        using("127.0.0.1:9", protocol, lambda client: client.ready(), retries=0)


@both
def test_it_speaks_tls_and_checks_whom_it_speaks_to(server: EmbeddedServer, protocol: str, tmp_path: Path) -> None:
    ca_cert, context = make_certificate(tmp_path)
    relay = relay_to(server, protocol, context)

    async def use(client: AsyncInferenceClient) -> np.ndarray:
        return (await client.infer("add_one", {"x": X}))["y"]

    np.testing.assert_array_equal(using(relay.url, protocol, use, ca_cert=ca_cert, api_key="k"), X + 1)
    with pytest.raises(Unreachable):  # the certificate is of localhost, not of this address
        using(f"127.0.0.1:{relay.port}", protocol, use, ca_cert=ca_cert, retries=0, timeout_s=3)
    relay.close()


def test_a_client_that_is_closed_while_it_connects_leaves_no_connection() -> None:
    ended = asyncio.Event()

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            await reader.read()
        writer.close()
        ended.set()

    async def main() -> None:
        async with await asyncio.start_server(hold, "127.0.0.1", 0) as listener:
            client = AsyncInferenceClient(f"127.0.0.1:{listener.sockets[0].getsockname()[1]}", timeout_s=60)
            call = asyncio.ensure_future(client.ready())
            await asyncio.sleep(0)
            await client.close()
            with pytest.raises(ConnectionLost, match="the client was closed"):
                await asyncio.wait_for(call, 20)
            await asyncio.wait_for(ended.wait(), 20)

    asyncio.run(main())


def test_a_closed_client_says_so(server: EmbeddedServer) -> None:
    async def use(client: AsyncInferenceClient) -> None:
        await client.close()
        await client.ready()

    with pytest.raises(RuntimeError, match="is closed"):
        using(server, "http", use)

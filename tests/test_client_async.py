"""The asynchronous client: concurrent and cancelled tasks, and tasks that outlive the client."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import numpy as np
import pytest
from deepseek_client import AsyncInferenceClient, ConnectionLost, ModelNotFound, ServerBusy, Unreachable
from deepseek_client.grpc.channel import AsyncChannel, BlockingChannel, Channel

from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import Relay, X, answering, mute, protocols, url_of


@protocols
async def test_a_cancelled_task_does_not_disturb_the_others(server: EmbeddedServer, protocol: Any) -> None:
    async with AsyncInferenceClient(url_of(server, protocol), protocol) as client:
        await client.metadata("slow")
        cancelled = asyncio.ensure_future(client.infer("slow", {"x": X}, timeout_s=60))
        await asyncio.sleep(0.05)
        cancelled.cancel()
        answers = await asyncio.gather(*(client.infer("add_one", {"x": X + k}) for k in range(60)))
        for k, answer in enumerate(answers):
            np.testing.assert_array_equal(answer["y"], X + k + 1)
        with pytest.raises(asyncio.CancelledError):
            await cancelled


@protocols
def test_calls_left_by_a_failed_gather_leave_no_connection(server: EmbeddedServer, protocol: Any) -> None:
    relay = Relay.to(server, protocol)

    async def main() -> None:
        async with AsyncInferenceClient(relay.url, protocol, idempotent=True) as client:
            await client.metadata("slow")
            left = [asyncio.ensure_future(client.infer("slow", {"x": X})) for _ in range(2)]
            with pytest.raises(ModelNotFound):
                await asyncio.gather(*left, client.infer("absent", {"x": X}))
        await asyncio.wait(left)  # they end, with or without an error, after the client was closed
        allowed = (type(None), ConnectionLost, ServerBusy)  # busy: calls of another test may still be in the queue
        assert [each for each in left if not isinstance(each.exception(), allowed)] == []
        await asyncio.sleep(0)  # the loop closes an aborted transport in its next iteration

    asyncio.run(main())
    gc.collect()  # an open transport raises a warning, and warnings are errors
    relay.close()


@pytest.mark.parametrize("kind", [BlockingChannel, AsyncChannel])
async def test_a_call_that_meets_a_closed_channel_is_a_lost_connection(kind: type[Channel]) -> None:
    channel = kind("127.0.0.1:9", None, 1000)  # type: ignore[call-arg]
    await channel.close()
    with pytest.raises(ConnectionLost, match="the client was closed"):
        await channel.call("ServerReady", b"", 60, (), None)


def test_a_client_refuses_another_loop() -> None:
    client = AsyncInferenceClient("127.0.0.1:9", "http", retries=0)
    with pytest.raises(Unreachable):
        asyncio.run(client.ready())
    with pytest.raises(RuntimeError, match="another asyncio loop"):
        asyncio.run(client.ready())
    asyncio.run(client.close())


async def test_closing_the_client_ends_a_grpc_call_in_flight() -> None:
    with answering(mute) as (url, seen):
        client = AsyncInferenceClient(url, timeout_s=600)
        call = asyncio.ensure_future(client.ready())
        while not seen:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(ConnectionLost, match="the client was closed"):
            await asyncio.wait_for(call, 60)

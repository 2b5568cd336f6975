"""What the gateway answers if a server is down or breaks, and that the client retries only requests that did not run."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import grpc
import numpy as np
import pytest
from deepseek_client import ConnectionLost, InferenceClient, ModelNotReady, ServerBusy

from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import Relay, X, answering, dropping, grpc_answering, prepared, refuse, status
from tests.gateway import INFER, SERVICE, Gateway, json_body, limits_of
from tests.waiting import wait_for

Protocol = Literal["http", "grpc"]
both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@dataclass(frozen=True, kw_only=True)
class Breakable:
    """A gateway in front of relays to a real Triton, over HTTP and gRPC."""

    gateway: Gateway
    relays: dict[str, Relay]
    server: EmbeddedServer

    def client(self, protocol: Protocol, **settings: Any) -> InferenceClient:
        """A client with the patience that a busy machine needs."""
        return self.gateway.client(protocol, timeout_s=120, **settings)

    def statuses(self, count: int) -> list[tuple[int, str]]:
        """Statuses of the inferences so far; waits for `count` lines, since each is logged after its answer."""
        wait_for(lambda: len(self.gateway.lines(api="infer")) >= count)
        return [(line["status"], line["grpc_status"]) for line in self.gateway.lines(api="infer")]


@pytest.fixture
def breakable(closed: EmbeddedServer, tmp_path: Path) -> Iterator[Breakable]:
    """A gateway whose relays both work at first."""
    relays = {protocol: Relay.to(closed, protocol) for protocol in ("http", "grpc")}
    with Gateway(tmp_path, limits_of(closed, tmp_path), *(relay.url for relay in relays.values())) as gateway:
        yield Breakable(gateway=gateway, relays=relays, server=closed)
    for relay in relays.values():
        relay.close()


@both
def test_a_call_while_the_server_is_down_is_tried_again_by_any_client(breakable: Breakable, protocol: Protocol) -> None:
    request, relay = prepared(breakable.server, protocol), breakable.relays[protocol]
    relay.close()
    with breakable.client(protocol, retries=2) as client, pytest.raises(ServerBusy, match="is not available"):
        client.send(request)
    down = (503, "") if protocol == "http" else (200, "14")
    assert breakable.statuses(3) == [down] * 3
    threading.Timer(0.5, relay.reopen).start()
    with breakable.client(protocol, retries=1000) as client:
        np.testing.assert_array_equal(client.send(request)["y"], X + 1)


@both
def test_a_call_that_may_have_run_is_tried_again_by_an_idempotent_client_alone(
    breakable: Breakable, protocol: Protocol
) -> None:
    request, relay = prepared(breakable.server, protocol), breakable.relays[protocol]
    relay.delay_s = 30
    lost: list[ConnectionLost] = []

    def call() -> None:
        with breakable.client(protocol) as client, pytest.raises(ConnectionLost, match="may have run") as caught:
            client.send(request)
        lost.append(caught.value)

    caller = threading.Thread(target=call)
    caller.start()
    wait_for(lambda: relay.pieces > 0)  # of the request have reached the server
    relay.close()  # the second attempt, of gRPC, finds nobody
    caller.join()
    assert lost
    assert breakable.statuses(1) == [(502, "") if protocol == "http" else (200, "14")]
    relay.delay_s = 0
    threading.Timer(0.5, relay.reopen).start()
    with breakable.client(protocol, retries=1000, idempotent=True) as client:
        np.testing.assert_array_equal(client.send(request)["y"], X + 1)


@pytest.mark.parametrize("where", ["a host that takes no connection", "a name of nobody"])
def test_a_failed_connection_counts_as_not_sent(closed: EmbeddedServer, where: str, tmp_path: Path) -> None:
    with dropping() as full:
        address = "nobody.invalid:9" if "name" in where else full
        with Gateway(tmp_path, limits_of(closed, tmp_path), address, address) as gateway:
            for protocol in ("http", "grpc"):
                with (
                    gateway.client(protocol, timeout_s=120, retries=0) as client,
                    pytest.raises(ServerBusy, match="is not available"),
                ):
                    client.send(prepared(closed, protocol))


def test_requests_for_a_model_that_is_being_reloaded_count_as_unserved(closed: EmbeddedServer, tmp_path: Path) -> None:
    """Triton itself answers NOT_FOUND, as for an unknown model."""
    said = "Request for unknown model: 'add_one' has no available versions"
    with (
        answering(status("404 Not Found", f'{{"error":"{said}"}}')) as (http, _),
        grpc_answering(refuse(grpc.StatusCode.NOT_FOUND, said)) as (over_grpc, seen),
        Gateway(tmp_path, limits_of(closed, tmp_path), http, over_grpc) as gateway,
    ):
        assert gateway.http("POST", INFER, body=json_body())[0] == 404
        assert gateway.grpc_status(f"{SERVICE}/ModelInfer") == "UNAVAILABLE"
        for protocol in ("http", "grpc"):
            with gateway.client(protocol, retries=1) as client, pytest.raises(ModelNotReady):
                client.send(prepared(closed, protocol))
        assert len(seen) == 3  # the client tries again
        unserved = [
            f'gateway_requests_total{{protocol="{protocol}",api="infer",model="",status="{status}"}}'
            for protocol, status in (("http", 503), ("grpc", 14))
        ]
        wait_for(lambda: [gateway.metrics().get(series) for series in unserved] == [3, 3])

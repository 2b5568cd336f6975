"""The gateway's ports without TLS: callers on its machine need no key, and get the same allow-list plus statistics."""

from __future__ import annotations

import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tritonclient.grpc
from deepseek_client import InferenceClient
from tritonclient.utils import InferenceServerException

from loadtests.load.server_statistics import fetch
from serving.embedded.launcher import EmbeddedServer
from tests.gateway import INFER, Gateway, json_body, limits_of

ROW = {"x": np.zeros((1, 2, 3), np.float32)}


def status(url: str, body: bytes | None = None, **headers: str) -> int:
    """The status of a plain HTTP request."""
    request = urllib.request.Request(f"http://{url}", body, headers)
    try:
        return int(urllib.request.urlopen(request, timeout=60).status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_machine_itself_infers_and_reads_statistics_without_tls_and_key(
    gateway: Gateway, protocol: Literal["http", "grpc"]
) -> None:
    url = gateway.local_http if protocol == "http" else gateway.local_grpc
    with InferenceClient(url, protocol) as client:
        assert client.infer("add_one", ROW)["y"].sum() == 6
    assert fetch(url, protocol, "add_one")
    assert gateway.lines(caller="local")


def test_the_statistics_of_all_models_are_not_counted_for_a_model_named_stats(gateway: Gateway) -> None:
    assert status(f"{gateway.local_http}/v2/models/stats") == 200
    assert gateway.lines(path="/v2/models/stats")[0]["model"] == ""
    assert not [name for name in gateway.metrics() if 'model="stats"' in name]


@pytest.mark.parametrize("path", [INFER, "/v1/embeddings"])
@pytest.mark.parametrize("header", [{"Origin": "https://shop.example"}, {"Host": "shop.example:8000"}])
def test_a_web_page_in_a_browser_on_the_machine_needs_a_key(
    gateway: Gateway, header: dict[str, str], path: str
) -> None:
    assert status(f"{gateway.local_http}{path}", json_body(), **header) == 401


@pytest.mark.parametrize(
    "path", ["/v2/repository/index", "/v2/logging", "/v2/models/add_one/load", "/metrics", "/v2/x/../logging"]
)
def test_everything_else_stays_closed(gateway: Gateway, path: str) -> None:
    assert status(f"{gateway.local_http}{path}") == 403
    assert status(f"{gateway.local_http}{path}", b"{}") == 403
    with tritonclient.grpc.InferenceServerClient(gateway.local_grpc) as client, pytest.raises(InferenceServerException):
        client.get_model_repository_index()


def test_no_rate_limits_the_machine_itself_and_another_address_needs_a_key(
    closed: EmbeddedServer, tmp_path: Path
) -> None:
    slowest, count = re.subn(r"(\$default_rate_rps) \d+", r"\1 1", limits_of(closed, tmp_path))
    assert count == 1
    with Gateway(tmp_path, slowest, closed.http_url, closed.grpc_url, local="0.0.0.0") as gateway:
        port = gateway.local_http.partition(":")[2]
        for _ in range(50):
            assert status(f"127.0.0.1:{port}/v2/health/ready") == 200
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(("192.0.2.1", 9))  # sends nothing; tells which address this machine calls from
            except OSError:
                pytest.skip("this machine has no address but loopback")
            address = probe.getsockname()[0]
        assert status(f"{address}:{port}/v2/health/ready", Host="localhost") == 401


def test_without_local_ports_the_gateway_does_not_listen_there(closed: EmbeddedServer, tmp_path: Path) -> None:
    with Gateway.in_front_of(closed, tmp_path, local="") as gateway, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", int(gateway.local_http.partition(":")[2])), timeout=5)

"""The client behind a gateway: headers, keys, TLS, refusals."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
import hpack
import numpy as np
import pytest
from deepseek_client import (
    AccessDenied,
    InferenceClient,
    InvalidInput,
    ModelNotFound,
    PreparedRequest,
    ServerBusy,
    Unreachable,
)
from deepseek_client.cli.main import main
from deepseek_client.options import check_headers, system_authorities

from loadtests.load.wire.frames import END_HEADERS, END_STREAM, HEAD, HEADERS, SETTINGS
from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import (
    Kind,
    Relay,
    X,
    answering,
    grpc_answering,
    kinds,
    make_certificate,
    mute,
    protocols,
    refusing,
    status,
    url_of,
)

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@kinds
@protocols
def test_headers_and_the_request_id_are_sent(server: EmbeddedServer, protocol: str, kind: Kind) -> None:
    with kind(url_of(server, protocol), protocol) as client:
        request = client.prepare("add_one", {"x": X}, request_id="order-7")
        headers = {"Traceparent": TRACE, "X-Shop": "a b"}
        np.testing.assert_array_equal(client.send(request, headers=headers)["y"], X + 1)  # a real server accepts them
    failing = refusing(protocol, "400 Bad Request", grpc.StatusCode.INVALID_ARGUMENT, "no")
    with failing as (url, seen), kind(url, protocol) as client, pytest.raises(InvalidInput):
        client.send(request, headers=headers)
    if protocol == "http":
        assert f"\r\nTraceparent: {TRACE}\r\nX-Shop: a b\r\nx-request-id: order-7\r\n".encode() in seen[0]
        assert b'{"id": "order-7"' in seen[0]
    else:
        assert seen[0].items() >= {"traceparent": TRACE, "x-shop": "a b", "x-request-id": "order-7"}.items()


@pytest.mark.parametrize(
    ("headers", "says"),
    [
        ({"traceparent": "0af7651916cd43dd8448eb211c80319c"}, "it must be version-trace-parent"),
        ({"a": "b\r\nHost: c"}, "printable ASCII text in one line"),
        ({"a: b\r\nc": "d"}, "cannot be a name"),
        ({1: "a"}, "1 cannot be a name"),
        ({"Content-Length": "0"}, "written by the client itself"),
        ({"grpc-timeout": "1S"}, "cannot be a name"),
        ({"a": ""}, "printable ASCII"),
    ],
)
def test_headers_that_cannot_be_sent_are_refused(headers: dict, says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        check_headers(headers)


@pytest.mark.parametrize(
    ("status_code", "expected"), [(401, AccessDenied), (403, AccessDenied), (404, ModelNotFound), (429, ServerBusy)]
)
def test_a_gateways_page_over_grpc_is_the_same_error_as_over_http(status_code: int, expected: type) -> None:
    block = hpack.Encoder().encode([(":status", str(status_code)), ("retry-after", "7")])
    page = HEAD.pack(0, len(block), HEADERS, END_HEADERS | END_STREAM, 1) + block

    def answer(connection: socket.socket) -> None:
        connection.sendall(HEAD.pack(0, 0, SETTINGS, 0, 0))
        asked = b""
        while bytes((HEADERS, END_HEADERS, 0, 0, 0, 1)) not in asked:  # the first stream
            asked += connection.recv(65536)
        connection.sendall(page)
        mute(connection)

    with answering(answer) as (url, _), InferenceClient(url, retries=0) as client, pytest.raises(expected) as refused:
        client.metadata("m")
    assert getattr(refused.value, "retry_after_s", None) is None  # gRPC drops the headers of such a page


def test_headers_that_grpc_cannot_take_are_not_sent_again() -> None:
    request = PreparedRequest(model="m", version="", request_id="", outputs=(), parts=(), tensors=())
    with grpc_answering(lambda *_: b"") as (url, _), InferenceClient(url) as client:
        with pytest.raises(InvalidInput, match="metadata size exceeds"):
            client.send(request, headers={"a": "b" * 20_000})
        assert client.statistics().models["m"].retries == 0


@protocols
def test_statistics_of_a_model_that_the_server_does_not_have(protocol: Any) -> None:
    reason = "requested model 'm' is not available"
    failing = refusing(protocol, "400 Bad Request", grpc.StatusCode.INVALID_ARGUMENT, reason)
    with failing as (url, _), InferenceClient(url, protocol) as client, pytest.raises(ModelNotFound, match=reason):
        client.model_statistics("m")


# TLS


def test_a_grpc_server_without_tls_is_named() -> None:
    plain = grpc_answering(lambda *_: b"")
    refused = pytest.raises(Unreachable, match="it speaks no TLS")
    with plain as (url, _), InferenceClient(url, tls=True, retries=0) as client, refused:
        client.ready()


def test_a_port_with_tls_is_named_if_the_grpc_client_uses_none() -> None:
    refused = pytest.raises(Unreachable, match="for TLS pass ca_cert=")
    gateway = answering(status("400 Bad Request", "this port needs https://"))
    with gateway as (url, _), InferenceClient(url, retries=0) as client, refused:
        client.ready()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for localhost under a comment, and a server's TLS context with it."""
    ca_cert, context = make_certificate(tmp_path_factory.mktemp("tls"))
    ca_cert.write_text(f"# Főtanúsítvány\n{ca_cert.read_text()}", encoding="utf-8")
    return ca_cert, context


@kinds
@protocols
def test_tls_trusts_the_given_authority_and_the_host_of_its_certificate(
    protocol: str, kind: Kind, server: EmbeddedServer, certificate: tuple[Path, ssl.SSLContext], tmp_path: Path
) -> None:
    ca_cert, context = certificate
    relay = Relay.to(server, protocol, context)
    with kind(relay.url, protocol, ca_cert=ca_cert, api_key="secret") as client:
        for _ in range(3):  # over a reused connection
            np.testing.assert_array_equal(client.infer("add_one", {"x": X})["y"], X + 1)
    other_ca, _ = make_certificate(tmp_path)
    url = f"127.0.0.1:{relay.port}"  # the certificate is for localhost
    for address, trusted, why in (
        (url, ca_cert, r"IP address mismatch|Hostname Verification"),
        (relay.url, other_ca, r"is not trusted \(self.signed certificate\)"),
        (relay.url, None, r"is not trusted"),
    ):
        with (
            kind(address, protocol, tls=True, ca_cert=trusted, retries=0, timeout_s=30) as client,
            pytest.raises(Unreachable, match=why) as refused,
        ):
            client.ready()
        assert str(refused.value).startswith(f"the certificate of {address} is not trusted (")
    relay.close()


@kinds
@protocols
def test_tls_without_a_given_authority_trusts_those_of_the_system(
    protocol: str,
    kind: Kind,
    server: EmbeddedServer,
    certificate: tuple[Path, ssl.SSLContext],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ca_cert, context = certificate
    monkeypatch.setenv("SSL_CERT_FILE", str(ca_cert))
    monkeypatch.delenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", raising=False)
    relay = Relay.to(server, protocol, context)
    with kind(relay.url, protocol, tls=True) as client:
        assert client.ready("add_one")
    relay.close()


def test_grpcs_own_variable_replaces_the_systems_authorities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", "roots.pem")
    assert system_authorities() is None


def test_the_command_line_sends_the_environments_key_only_over_tls(
    certificate: tuple[Path, ssl.SSLContext], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ca_cert, context = certificate
    monkeypatch.setenv("DEEPSEEK_API_KEY", "from-the-environment")
    with answering(status("200 OK")) as (url, seen):
        relay = Relay(("127.0.0.1", int(url.split(":")[1])), tls=context)
        arguments = ["ready", "--protocol", "http", "--url", relay.url, "--ca-cert", str(ca_cert)]
        assert main(arguments) == 0
        (tmp_path / "key").write_text("from-a-file\n")
        assert main([*arguments, "--api-key-file", str(tmp_path / "key")]) == 0
        relay.close()
        assert main(["ready", "--protocol", "http", "--url", url]) == 0  # no TLS: not sent
    keys = [line for piece in seen for line in piece.split(b"\r\n") if line.startswith(b"Authorization")]
    assert keys == [b"Authorization: Bearer from-the-environment", b"Authorization: Bearer from-a-file"]

"""Servers that fail in known ways, for tests of the client: each a few lines over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest
from deepseek_client import AsyncInferenceClient, InferenceClient, PreparedRequest
from deepseek_client.options import ClientOptions

from serving.embedded.launcher import EmbeddedServer
from tests.fake_endpoint import FakeEndpoint


def end(*connections: socket.socket) -> None:
    """Shuts the connections down; their users close them."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class Relay:
    """A TCP relay to the server that can lose its connections, stall or be slow; it terminates TLS if `tls` is given."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
        self.target, self.tls = target, tls
        self.open: list[socket.socket] = []
        self.accepted = self.pieces = 0  # connections, and pieces of requests: one per small HTTP request
        self.delay_s = 0.0  # added to answers
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"localhost:{self.port}" if tls else f"127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    @classmethod
    def to(cls, server: EmbeddedServer, protocol: str, tls: ssl.SSLContext | None = None) -> Self:
        """A relay to the server's port for this protocol."""
        return cls((server.address, server.http_port if protocol == "http" else server.grpc_port), tls)

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                self.accepted += 1
                try:
                    near = self.tls.wrap_socket(near, server_side=True) if self.tls else near
                    far = socket.create_connection(self.target)
                except OSError:  # no handshake, or the server is gone
                    near.close()
                    continue
                self.open += [near, far]
                threading.Thread(target=self.pump, args=(near, far), daemon=True).start()

    def pump(self, near: socket.socket, far: socket.socket) -> None:
        """Relays both directions on one thread, which also closes both sockets.

        OpenSSL writes its last alert to the descriptor's number, even if another file has that number by then.
        """
        with near, far, contextlib.suppress(OSError):
            while True:
                held = isinstance(near, ssl.SSLSocket) and near.pending()  # read from the socket, not yet from TLS
                for source in [near] if held else select.select([near, far], [], [])[0]:
                    if not (data := source.recv(65536)):
                        return
                    self.pieces += source is near
                    time.sleep(self.delay_s if source is far and self.pieces else 0)  # not the greeting of gRPC
                    (far if source is near else near).sendall(data)

    def cut(self) -> None:
        """Drops the connections; still accepts new ones."""
        end(*self.open)
        self.open.clear()

    def close(self) -> None:
        """Drops the connections and refuses new ones."""
        end(self.listener)
        self.listener.close()
        self.cut()

    def reopen(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()


def options_of(**changes: Any) -> ClientOptions:
    """A client's options, by default the client's own."""
    parameters = inspect.signature(InferenceClient).parameters.values()
    return ClientOptions(**{each.name: each.default for each in parameters if each.name != "url"} | changes)


@contextlib.contextmanager
def accepting(serve: Callable[[socket.socket], Any]) -> Iterator[str]:
    """A socket server that calls `serve` with each connection, on a thread of its own. Yields its URL."""
    connections: list[socket.socket] = []

    def handle(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            serve(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(listener.accept()[0])
                threading.Thread(target=handle, args=connections[-1:], daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        end(listener, *connections)
    thread.join(5)


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], Any]) -> Iterator[tuple[str, list[bytes]]]:
    """A socket server that reads a request's head and body, then calls `answer`. Yields its URL and what it read."""
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        if request := connection.recv(65536):  # otherwise opened and never used
            seen.append(request)
            answer(connection)

    with accepting(serve) as url:
        yield url, seen


@contextlib.contextmanager
def dropping() -> Iterator[str]:
    """An address that drops connection requests: its backlog is full. Yields its URL."""
    with socket.socket() as listener, contextlib.ExitStack() as full:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):
            waiting = full.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def status(line: str, body: str = "{}") -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return lambda connection: connection.sendall((head + body).encode())


def mute(connection: socket.socket) -> None:
    """Sends nothing until the other end closes."""
    with contextlib.suppress(OSError):
        while connection.recv(65536):
            pass


def only_once(connection: socket.socket) -> None:
    """Answers once and closes at the next request, as nginx may while it reloads."""
    y = {"name": "y", "datatype": "FP32", "shape": X.shape, "data": X.tolist()}
    body = json.dumps({"outputs": [y]}).encode()
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    connection.recv(65536)


@contextlib.contextmanager
def grpc_answering(
    answer: Callable[[bytes, grpc.ServicerContext], bytes], *methods: str, metadata: bytes = b""
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A gRPC server that answers these methods, or all, with `answer`. Yields its URL and the metadata of each call.

    With `metadata`, that is the answer of ModelMetadata.
    """
    seen: list[dict[str, Any]] = []

    class Answering(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            seen.append(dict(details.invocation_metadata))
            method = details.method.rpartition("/")[2]
            if metadata and method == "ModelMetadata":
                return grpc.unary_unary_rpc_method_handler(lambda request, context: metadata)
            return grpc.unary_unary_rpc_method_handler(answer) if method in (methods or [method]) else None

    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, [Answering()], options=[("grpc.max_send_message_length", -1)])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", seen
        server.stop(None).wait()


def refuse(code: grpc.StatusCode, details: str, **trailing: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """An `answer` for `grpc_answering`: every call ends with this status and trailing metadata."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata([(name.replace("_", "-"), value) for name, value in trailing.items()])
        context.abort(code, details)
        return b""

    return answer


def refusing(protocol: str, line: str, code: grpc.StatusCode, reason: str) -> Any:
    """A server of this protocol that answers each call with this status, and says why."""
    if protocol == "http":
        return answering(status(line, json.dumps({"error": reason})))
    return grpc_answering(refuse(code, reason))


def sign_itself(key: Path, certificate: Path, names: Sequence[str]) -> None:
    """Makes a self-signed certificate for these names, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed; it makes the certificate")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=shop"
    named = ["-addext", "subjectAltName=" + ",".join(f"DNS:{name}" for name in names)] if names else []
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*command.split(), *named, *files], check=True, capture_output=True)


def make_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate for localhost, and a server's TLS context with it."""
    sign_itself(folder / "key", folder / "ca.crt", ["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return folder / "ca.crt", context


class Awaited:
    """AsyncInferenceClient with the blocking calls of InferenceClient; its loop runs in a thread."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._client = AsyncInferenceClient(*arguments, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.statistics = self._client.statistics

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)
        return lambda *arguments, **options: self._run(call(*arguments, **options))

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._run(asyncio.sleep(0))  # the loop closes an aborted transport in its next iteration
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


Client = InferenceClient | Awaited
Kind = Callable[..., Client]  # one of the two
protocols = pytest.mark.parametrize("protocol", ["http", "grpc"])
kinds = pytest.mark.parametrize("kind", [InferenceClient, Awaited], ids=["threads", "asyncio"])
X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
MakeRelays = Callable[[str, int], list[Relay]]  # the type of the fixture `relays`: protocol, count


def client_of(
    relays: Sequence[Relay | str], protocol: str, kind: Callable[..., Any] = InferenceClient, **settings: Any
) -> Any:
    return kind([relay if isinstance(relay, str) else relay.url for relay in relays], protocol, **settings)


def url_of(server: EmbeddedServer | FakeEndpoint, protocol: str) -> str:
    return server.http_url if protocol == "http" else server.grpc_url


def prepared(server: EmbeddedServer, protocol: str, model: str = "add_one") -> PreparedRequest:
    with InferenceClient(url_of(server, protocol), protocol) as client:  # type: ignore[arg-type]
        return client.prepare(model, {"x": X})

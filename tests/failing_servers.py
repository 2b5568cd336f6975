"""Servers that fail in stated ways, for the tests of the client: each a few lines over a real socket."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import InferenceClient, PreparedRequest

from serving.embedded import EmbeddedServer


def end(*connections: socket.socket) -> None:
    """Nothing more comes or goes; who uses them closes them."""
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class Relay:
    """A TCP relay to the server, ending TLS where `tls` is given, that can lose its connections, stall or be slow."""

    def __init__(self, target: tuple[str, int], tls: ssl.SSLContext | None = None) -> None:
        self.target, self.tls = target, tls
        self.open: list[socket.socket] = []
        self.accepted = self.pieces = 0  # connections, and pieces of requests: of HTTP and small ones, requests
        self.delay_s = 0.0  # of answers
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"localhost:{self.port}" if tls else f"127.0.0.1:{self.port}"
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                self.accepted += 1
                with contextlib.suppress(ssl.SSLError):
                    near = self.tls.wrap_socket(near, server_side=True) if self.tls else near
                    far = socket.create_connection(self.target)
                    self.open += [near, far]
                    threading.Thread(target=self.pump, args=(near, far), daemon=True).start()

    def pump(self, near: socket.socket, far: socket.socket) -> None:
        """Both ways on one thread, which alone closes them: OpenSSL writes its last alert to the file's number, whatever
        file has that number by then.
        """
        with near, far, contextlib.suppress(OSError):
            while True:
                held = isinstance(near, ssl.SSLSocket) and near.pending()  # read from the socket, not yet from TLS
                for source in [near] if held else select.select([near, far], [], [])[0]:
                    if not (data := source.recv(65536)):
                        return
                    self.pieces += source is near
                    time.sleep(self.delay_s if source is far else 0)
                    (far if source is near else near).sendall(data)

    def cut(self) -> None:
        """Loses the connections; new ones are still taken."""
        end(*self.open)
        self.open.clear()

    def close(self) -> None:
        """Refuses new connections, too."""
        end(self.listener)
        self.listener.close()
        self.cut()

    def reopen(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=(self.listener,), daemon=True).start()


@contextlib.contextmanager
def answering(answer: Callable[[socket.socket], Any]) -> Iterator[tuple[str, list[bytes]]]:
    """A socket server that reads a request's head and its body, then does `answer`; its URL and what it read."""
    seen: list[bytes] = []

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if request := connection.recv(65536):  # else one that was opened and never used
                seen.append(request)
                answer(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def status(line: str, body: str = "{}") -> Callable[[socket.socket], None]:
    head = f"HTTP/1.1 {line}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return lambda connection: connection.sendall((head + body).encode())


def mute(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.settimeout(1)
        while connection.recv(65536):
            pass


def trickle(connection: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nX-Patience: " + 60 * b"z":
        connection.sendall(bytes([byte]))
        time.sleep(0.05)


def half_an_answer(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nonly this")


def only_once(connection: socket.socket) -> None:
    """Answers, and closes at the next request, as nginx may where it reads its files again."""
    connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n{"outputs": []}')
    connection.recv(65536)


@contextlib.contextmanager
def grpc_answering(
    answer: Callable[[bytes, grpc.ServicerContext], bytes],
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A gRPC server whose every method is `answer`; its URL and the metadata of each call."""
    seen: list[dict[str, Any]] = []

    class Everything(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
            seen.append(dict(details.invocation_metadata))
            return grpc.unary_unary_rpc_method_handler(answer)

    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool, [Everything()])
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield f"127.0.0.1:{port}", seen
        server.stop(None).wait()


def refuse(code: grpc.StatusCode, details: str, **trailing: str) -> Callable[[bytes, grpc.ServicerContext], bytes]:
    """What `grpc_answering` takes: every call ends with this status and these trailing metadata."""

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        context.set_trailing_metadata([(name.replace("_", "-"), value) for name, value in trailing.items()])
        context.abort(code, details)
        return b""

    return answer


def make_certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A self-signed certificate of localhost, and a server's TLS with it."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key -out ca.crt -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*command.split(), *names], cwd=folder, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.crt", folder / "key")
    context.set_alpn_protocols(["h2", "http/1.1"])
    return folder / "ca.crt", context


X = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
MakeRelays = Callable[[str, int], list[Relay]]  # of the fixture `relays`: protocol, how many


def client_of(relays: list[Relay] | list[str], protocol: str, **settings: Any) -> InferenceClient:
    urls = [relay if isinstance(relay, str) else relay.url for relay in relays]
    return InferenceClient(urls, protocol, **settings)  # type: ignore[arg-type]


def prepared(server: EmbeddedServer, protocol: str, model: str = "add_one") -> PreparedRequest:
    url = server.http_url if protocol == "http" else server.grpc_url
    with InferenceClient(url, protocol) as client:  # type: ignore[arg-type]
        return client.prepare(model, {"x": X})

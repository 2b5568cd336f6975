"""A gateway for tests: docker/gateway in front of a Triton on loopback, without Docker, and raw HTTP to attack it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
import urllib.request
import warnings
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Self

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from deepseek_client import InferenceClient

from deepseek.spec.processes.children import free_ports
from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import served_models
from serving.stack.api_keys import new_key
from serving.stack.gateway_folder import ensure_folder
from serving.stack.gateway_limits import limits

INFER = "/v2/models/add_one/infer"
SERVICE = "/inference.GRPCInferenceService"
NJS = Path("/usr/lib/nginx/modules/ngx_http_js_module.so")


def skip_without_nginx() -> None:
    """Skips the test if nginx with njs, or openssl, is missing."""
    if not (shutil.which("nginx") and shutil.which("openssl") and NJS.is_file()):
        pytest.skip(
            "the gateway's programs are not installed: apt-get install nginx-light libnginx-mod-http-js openssl"
        )


def free_port() -> int:
    return free_ports(1)[0]


def mounting() -> list[str]:
    """The command prefix that allows mounts; skips the test if mounts are not allowed."""
    command = ["unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"])]
    tried = subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounting is not allowed here: {tried.stderr.strip()}")
    return command


class Gateway:
    """Runs gateway.sh in `folder`, in front of the Triton at the given `host:port`s, until `stop` or a `with` block ends.

    `local` is the address of its ports without TLS; "" closes them. With `room_mib` its files, such as large bodies, are
    in a memory file system of that size, as in a container. `openai` is the process of the OpenAI routes;
    `program` is the folder of gateway.sh, which looks for changes every `watch_s`.
    """

    def __init__(
        self,
        folder: Path,
        limits: str,
        http: str,
        grpc_: str,
        *,
        openai: str = "127.0.0.1:9",
        room_mib: int | None = None,
        local: str = "127.0.0.1",
        program: Path = Path("docker/gateway"),
        watch_s: float = 0.2,
    ) -> None:
        skip_without_nginx()
        self.folder = folder / "gateway"
        self.port, self.internal_port, *ports = free_ports(4)
        self.local_http, self.local_grpc = (f"{local}:{port}" for port in ports)
        self.log_path = folder / "gateway.log"
        ensure_folder(self.folder, [])
        (self.folder / "limits.conf").write_text(limits)
        self.key = new_key(self.folder, "shop", rate_rps=100_000)
        settings = {
            "FOLDER": self.folder,
            "RUN_FOLDER": folder / "run",
            "LISTEN": f"127.0.0.1:{self.port}",
            "LOCAL_PORTS": "8000,8001" if local else "0",
            "LOCAL_LISTEN": f"{self.local_http} {self.local_grpc}",
            "INTERNAL_LISTEN": f"127.0.0.1:{self.internal_port}",
            "TRITON_HTTP": http,
            "TRITON_GRPC": grpc_,
            "TRITON_OPENAI": openai,
            "WATCH_S": watch_s,
        }
        command = [str(program / "gateway.sh")]
        if room_mib is not None:
            (folder / "run").mkdir()
            mount = f'mount -t tmpfs -o size={room_mib}m tmpfs "$RUN_FOLDER"'
            command = [*mounting(), "bash", "-c", f"{mount} && exec {command[0]}"]
        self._log: IO[bytes] = self.log_path.open("wb")
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **{name: str(value) for name, value in settings.items()}},
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        self._wait_until_up()

    @classmethod
    def in_front_of(cls, server: EmbeddedServer, folder: Path, **settings: Any) -> Self:
        """A gateway in front of a running server, with the limits of its repository."""
        return cls(folder, limits_of(server, folder), server.http_url, server.grpc_url, **settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        status = self.stop()
        assert error or status == 0

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            # With TLS, because a bare connection to a free port may meet itself. Python leaves the socket open if the
            # connection was reset before the handshake, as nginx does when it ends its check of the configuration.
            with warnings.catch_warnings(action="ignore", category=ResourceWarning), contextlib.suppress(OSError):
                return self.connect().close()
            time.sleep(0.05)
        raise AssertionError(self.log_path.read_text())

    def stop(self) -> int:
        """Stops the gateway after its requests have finished; returns the exit code."""
        self.process.terminate()
        status = self.process.wait(60)
        self._log.close()
        return status

    def add_key(self, name: str, **settings: Any) -> str:
        return new_key(self.folder, name, **settings)

    def lines(self, **fields: Any) -> list[dict[str, Any]]:
        """Lines of the access log with these fields; waits for the first, which is written after the answer."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            lines = [json.loads(line) for line in self.log_path.read_text().splitlines() if line.endswith("}")]
            if found := [line for line in lines if fields.items() <= line.items()]:
                return found
            time.sleep(0.02)
        raise AssertionError(f"no line with {fields}")

    def metrics(self) -> dict[str, float]:
        return series_of(f"http://127.0.0.1:{self.internal_port}/metrics")

    def connect(self, *protocols: str, version: ssl.TLSVersion | None = None) -> ssl.SSLSocket:
        """A TLS connection that trusts only the gateway's authority."""
        context = ssl.create_default_context(cafile=str(self.folder / "ca.crt"))
        context.set_alpn_protocols(list(protocols) or ["http/1.1"])
        if version is not None:
            context.minimum_version = context.maximum_version = version
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        return context.wrap_socket(plain, server_hostname="localhost")

    def send(self, request: bytes) -> tuple[int, bytes]:
        """Sends raw bytes; returns the status (0: no answer) and all bytes received until the connection closed."""
        answer = b""
        with self.connect() as connection:
            with contextlib.suppress(OSError):  # refused and closed before all was sent
                connection.sendall(request)
            with contextlib.suppress(OSError):
                while part := connection.recv(65536):
                    answer += part
        return (int(answer.split(b" ", 2)[1]) if answer else 0), answer

    def http(
        self, method: str, target: str, *headers: str, body: bytes = b"", key: str | None = None
    ) -> tuple[int, bytes]:
        """Sends one HTTP/1.1 request with an unchanged target; `key` "" sends no key."""
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
        if key != "":
            lines.append(f"Authorization: Bearer {self.key if key is None else key}")
        if body or method == "POST":
            lines.append(f"Content-Length: {len(body)}")
        return self.send("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def client(self, protocol: str, **settings: Any) -> InferenceClient:
        access = {"ca_cert": str(self.folder / "ca.crt"), "api_key": self.key, **settings}
        return InferenceClient(f"localhost:{self.port}", protocol, **access)  # type: ignore[arg-type]

    def grpc_client(self) -> triton.InferenceServerClient:
        """Bare tritonclient over gRPC; its calls take `headers`."""
        return triton.InferenceServerClient(
            f"localhost:{self.port}", ssl=True, root_certificates=str(self.folder / "ca.crt")
        )

    def grpc_status(self, path: str, *, key: str | None = None, metadata: tuple[tuple[str, str], ...] = ()) -> str:
        """The status name of an empty call of any method."""
        credentials = grpc.ssl_channel_credentials((self.folder / "ca.crt").read_bytes())
        with grpc.secure_channel(f"localhost:{self.port}", credentials) as channel:
            sent = (("authorization", f"Bearer {self.key if key is None else key}"),) if key != "" else ()
            try:
                channel.unary_unary(path, lambda _: b"", lambda got: got)(b"", metadata=sent + metadata, timeout=60)
            except grpc.RpcError as error:
                return error.code().name
        return "OK"


def limits_of(server: EmbeddedServer, folder: Path, **changed: Any) -> str:
    """`limits.conf` for a server's repository, with changed properties of its models; `folder` has no deploy.toml."""
    return limits([replace(model, **changed) for model in served_models(server.repository, folder)])


def series_of(url: str) -> dict[str, float]:
    """The value of each series of a program's metrics."""
    with urllib.request.urlopen(url, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] not in ("", "#"))}


def authorized(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def grpc_input(rows: int = 1, columns: int = 3) -> list[triton.InferInput]:
    tensor = triton.InferInput("x", [rows, 2, columns], "FP32")
    tensor.set_data_from_numpy(np.zeros((rows, 2, columns), np.float32))
    return [tensor]


def json_body(rows: int = 1, columns: int = 3) -> bytes:
    data = [0.5] * (rows * 2 * columns)
    return json.dumps(
        {"inputs": [{"name": "x", "shape": [rows, 2, columns], "datatype": "FP32", "data": data}]}
    ).encode()

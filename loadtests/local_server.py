"""A server over a model repository, as another process of this machine, up inside a `with` block.

Contract: the command is a template with {repository}, {http_port}, {grpc_port} and {metrics_port}; ports are free ones.
The server ends with the block, and with this process, however that ends. What it printed is in `<folder>/server.log`,
and the embedded server's own log beside it.

Example:
    with local_server(EMBEDDED, repository, folder, protocol="grpc", model="recommender") as server:
        server.url      # 127.0.0.1:45123
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import InputError
from deepseek.spec.children import ends_with_us

# The server of the target onnxruntime; {names} are filled in. Nothing is in flight when it is told to stop.
EMBEDDED = (
    f"{shlex.quote(sys.executable)} -m serving.embedded --repository {{repository}} --http-port {{http_port}} "
    "--grpc-port {grpc_port} --metrics-port {metrics_port} --exit-timeout-s 1"
)
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
_ROOT = str(Path(__file__).resolve().parent.parent)


class NotServed(Exception):
    """What cannot be published or does not start; the reason is one line."""


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_words(self) -> str:
        """Why it ended, where it did."""
        status = self.process.poll()
        if status is None:
            return ""
        return last_line(self.log.read_text(errors="replace")) or f"ended with status {status}"


@contextmanager
def local_server(
    command: str, repository: Path, folder: Path, *, protocol: Literal["grpc", "http"], model: str
) -> Iterator[LocalServer]:
    """Serves `repository`; NotServed in one line where it does not start, InputError where `command` is no template."""
    ports = dict(zip(("http_port", "grpc_port", "metrics_port"), _free_ports(3), strict=True))
    url = f"127.0.0.1:{ports['grpc_port' if protocol == 'grpc' else 'http_port']}"
    with _process(command, repository, folder, ports) as process:
        server = LocalServer(url=url, process=process, log=folder / "server.log")
        _wait_until_ready(server, protocol, model)
        yield server


@contextmanager
def _process(command: str, repository: Path, folder: Path, ports: dict[str, int]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        words = [part.format(repository=repository.resolve(), **ports) for part in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        allowed = "{repository}, {http_port}, {grpc_port}, {metrics_port}"
        raise InputError(f"--server {command!r}: {error!r}; the fields are {allowed}") from None
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                words,
                env=our_environment(BUILD=str(folder)),  # Triton's own log goes there, too
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it
                preexec_fn=ends_with_us(),
            )
        except OSError as error:
            raise InputError(f"--server: {words[0]} cannot be started: {error.strerror}") from None
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_ready(server: LocalServer, protocol: Literal["grpc", "http"], model: str) -> None:
    ends_at = time.monotonic() + START_TIMEOUT_S
    with InferenceClient(server.url, protocol, timeout_s=2, retries=0) as client:
        while time.monotonic() < ends_at:
            if server.process.poll() is not None:
                raise NotServed(server.last_words)
            with suppress(InferenceError):
                if client.ready(model):
                    return
            time.sleep(0.1)
    raise NotServed(f"not ready within {START_TIMEOUT_S:g} s")


def our_environment(**more: str) -> dict[str, str]:
    """In which our own modules are found from anywhere."""
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def _free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def last_line(text: str) -> str:
    """Of what a command of ours said before it ended: its reason."""
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""

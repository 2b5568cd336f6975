"""Runs a server over a model repository, as a child process, for the length of a `with` block.

Contract: the command is a template with {repository}, {http_port}, {grpc_port} and {metrics_port}; the ports are free
ones. The server ends with the block, and also if this process is killed. Its output is in `<folder>/server.log`; the
embedded server writes its own log beside it.

Example:
    with local_server(EMBEDDED, repository, folder, protocol="grpc", model="recommender") as server:
        server.url      # 127.0.0.1:45123
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import InputError, SloSpec
from deepseek.spec.children import ends_with_us
from deepseek.spec.files.folders import let_all_read
from loadtests.load.child_process import free_ports, our_environment
from loadtests.load.endpoint import inputs_of
from loadtests.results.settings import LoadSettings
from loadtests.slo.slo_demands import timeout_for

# The server of the target onnxruntime; {names} are filled in. It exits fast: no request is in flight at its stop.
EMBEDDED = (
    f"{shlex.quote(sys.executable)} -m cli serve --repository {{repository}} --http-port {{http_port}} "
    "--grpc-port {grpc_port} --metrics-port {metrics_port} --openai-port {openai_port} --exit-timeout-s 1"
)
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


class NotServed(InputError):
    """The server does not start; the reason is one line."""


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_words(self) -> str:
        """Why the server ended; empty while it runs."""
        status = self.process.poll()
        if status is None:
            return ""
        return last_line(self.log.read_text(errors="replace")) or f"ended with status {status}"


def settings_of_local(options: argparse.Namespace, slo: SloSpec) -> LoadSettings:
    """The settings that all loads on such servers share; URL, rate and length are set later."""
    return LoadSettings(
        model=options.model,
        models=str(options.models),
        target=options.target,
        protocol=options.protocol,
        url="",
        inputs=options.inputs or inputs_of(options.model),
        warmup_s=options.warmup_s,
        priority=options.priority,
        timeout_s=timeout_for(options.timeout_s, slo),
    )


@contextmanager
def local_server(
    command: str, repository: Path, folder: Path, *, protocol: Literal["grpc", "http"], model: str
) -> Iterator[LocalServer]:
    """Serves `repository`; NotServed if the server does not start, InputError if `command` is not a valid template."""
    ports = dict(zip(("http_port", "grpc_port", "metrics_port", "openai_port"), free_ports(4), strict=True))
    url = f"127.0.0.1:{ports['grpc_port' if protocol == 'grpc' else 'http_port']}"
    process = _started(command, repository, folder, ports)
    try:
        server = LocalServer(url=url, process=process, log=folder / "server.log")
        _wait_until_ready(server, protocol, model)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _started(command: str, repository: Path, folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    try:
        words = [part.format(repository=repository.resolve(), **ports) for part in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        allowed = "{repository}, {http_port}, {grpc_port}, {metrics_port}"
        raise InputError(f"--server {command!r}: {error!r}; the allowed fields are {allowed}") from None
    folder.mkdir(parents=True, exist_ok=True)
    let_all_read(repository)
    try:
        with (folder / "server.log").open("wb") as log:
            return subprocess.Popen(
                words,
                env=our_environment(DEEPSEEK_BUILD=str(folder)),  # Triton's own log goes there, too
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server
                preexec_fn=ends_with_us(),
            )
    except OSError as error:
        raise InputError(f"--server: {words[0]} cannot be started: {error.strerror}") from None


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


def last_line(text: str) -> str:
    """The last line of a command's output, without "error: ": why it ended."""
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""

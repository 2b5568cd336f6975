"""Runs a server over a model repository, as a child process, for the length of a `with` block.

Contract: the command is a template with {repository}, {http_port}, {grpc_port}, {metrics_port} and {openai_port}; the
ports are free ones. The server ends with the block, and also if this process is killed. Its output is in
`<folder>/server.log`; the embedded server writes its own log beside it.

Example:
    with local_server(EMBEDDED, repository, folder, settings) as server:
        server.settings.url      # 127.0.0.1:45123
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.children import ends_with_us, free_ports, last_line, our_environment
from deepseek.spec.files.folders import let_all_read
from loadtests.load.settings_from_options import inputs_of
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
    settings: LoadSettings
    """Those given, with the addresses of this server."""
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def last_words(self) -> str:
        """Why the server ended; empty while it runs."""
        status = self.process.poll()
        if status is None:
            return ""
        return last_line(self.log.read_text(errors="replace")) or f"ended with status {status}"


def settings_of_local(options: argparse.Namespace, spec: DeploymentSpec, command: str) -> LoadSettings:
    """The settings that all loads on such servers share; addresses, rate and length are set later."""
    if options.route and spec.text is None:
        raise InputError(f"--route {options.route}: deploy.toml of {spec.name} has no [text]; leave --route out")
    if options.route and "{openai_port}" not in command:
        raise InputError(f"--route {options.route}: the server's command has no {{openai_port}}; give one: --server")
    return LoadSettings(
        model=options.model,
        models=str(options.models),
        target=options.target,
        protocol=options.protocol,
        url="",
        route=options.route,
        inputs=options.inputs or inputs_of(options.model),
        warmup_s=options.warmup_s,
        priority=options.priority,
        timeout_s=timeout_for(options.timeout_s, spec.slo),
    )


@contextmanager
def local_server(command: str, repository: Path, folder: Path, settings: LoadSettings) -> Iterator[LocalServer]:
    """Serves `repository`; NotServed if the server does not start, InputError if `command` is not a valid template."""
    ports = dict(zip(("http_port", "grpc_port", "metrics_port", "openai_port"), free_ports(4), strict=True))
    url = f"127.0.0.1:{ports['grpc_port' if settings.protocol == 'grpc' else 'http_port']}"
    route = settings.route and f"127.0.0.1:{ports['openai_port']}{settings.route}"
    process = _started(command, repository, folder, ports)
    try:
        server = LocalServer(
            settings=replace(settings, url=url, route=route), process=process, log=folder / "server.log"
        )
        _wait_until_ready(server)
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
        allowed = "{repository}, {http_port}, {grpc_port}, {metrics_port}, {openai_port}"
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


def _wait_until_ready(server: LocalServer) -> None:
    settings, ends_at = server.settings, time.monotonic() + START_TIMEOUT_S
    host, _, port = settings.place.partition(":")
    with InferenceClient(settings.url, settings.protocol, timeout_s=2, retries=0) as client:
        while time.monotonic() < ends_at:
            if server.process.poll() is not None:
                raise NotServed(server.last_words)
            with suppress(InferenceError, OSError):
                if client.ready(settings.model):
                    socket.create_connection((host, int(port)), 2).close()  # the routes open after the model
                    return
            time.sleep(0.1)
    raise NotServed(f"not ready within {START_TIMEOUT_S:g} s")

"""Runs a server over a model repository, as a child process, for the length of a `with` block.

Contract: the command is a template with {repository}, {http_port}, {grpc_port}, {metrics_port} and {openai_port}; the
ports are free ones of 127.0.0.1. The server and its own children end with the block; the server also ends if this
process is killed.

Example:
    with child_server("deepseek serve --repository {repository} ...", repository, log, ready=answers) as server:
        server.grpc_url      # 127.0.0.1:45123
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deepseek.spec.command import InputError
from deepseek.spec.files.folders import let_all_read
from deepseek.spec.processes.children import ends_with_us, free_ports, last_line, our_environment

PORTS = ("http_port", "grpc_port", "metrics_port", "openai_port")
STOP_TIMEOUT_S = 60.0


class NotServed(InputError):
    """The server does not start; the reason is one line."""


@dataclass(frozen=True, kw_only=True)
class ChildServer:
    process: subprocess.Popen[bytes]
    log: Path
    """Its output."""
    http_url: str
    """host:port, as the other addresses."""
    grpc_url: str
    openai_url: str

    @property
    def last_words(self) -> str:
        """Why the server ended; empty while it runs."""
        status = self.process.poll()
        if status is None:
            return ""
        return last_line(self.log.read_text(errors="replace")) or f"ended with status {status}"


@contextmanager
def child_server(
    command: str,
    repository: Path,
    log: Path,
    *,
    ready: Callable[[ChildServer], bool],
    timeout_s: float,
    limit: str = "",
    **environment: str,
) -> Iterator[ChildServer]:
    """Serves `repository`, with the variables in `environment`, from when it is `ready`.

    Raises NotServed if the server ends or is not ready within `timeout_s`, which `limit` explains, and InputError if
    `command` is not a valid template.
    """
    ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
    process = _started(command, repository, log, ports, environment)
    try:
        urls = {f"{name}_url": f"127.0.0.1:{ports[f'{name}_port']}" for name in ("http", "grpc", "openai")}
        server = ChildServer(process=process, log=log, **urls)
        _wait_until_ready(server, ready, timeout_s, limit)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _started(
    command: str, repository: Path, log: Path, ports: dict[str, int], environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    try:
        words = [part.format(repository=repository.resolve(), **ports) for part in shlex.split(command)]
    except (KeyError, IndexError, ValueError) as error:
        allowed = ", ".join(f"{{{name}}}" for name in ("repository", *PORTS))
        raise InputError(f"--server {command!r}: {error!r}; the allowed fields are {allowed}") from None
    log.parent.mkdir(parents=True, exist_ok=True)
    let_all_read(repository)
    try:
        with log.open("wb") as file:
            return subprocess.Popen(
                words,
                env=our_environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server
                preexec_fn=ends_with_us(),
            )
    except OSError as error:
        raise InputError(f"--server: {words[0]} cannot be started: {error.strerror}") from None


def _wait_until_ready(server: ChildServer, ready: Callable[[ChildServer], bool], timeout_s: float, limit: str) -> None:
    ends_at = time.monotonic() + timeout_s
    while not ready(server):
        if reason := server.last_words:
            raise NotServed(reason)
        if time.monotonic() > ends_at:
            raise NotServed(f"not ready within {timeout_s:g} s{limit}")
        time.sleep(0.1)

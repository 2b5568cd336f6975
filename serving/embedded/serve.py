"""The command `serve`: runs the embedded Triton, a real `tritonserver` without Docker or a GPU.

Contract: serves a repository until Ctrl-C or SIGTERM, or while a command runs (`serving.embedded.launcher`). Exit
codes: the command's own, else 0; 1 the server ended by itself, or no version of a model can be served; 2 bad input.
Errors are one line.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack

from deepseek.spec import GateFailed, InputError
from deepseek.spec.children import ends_with_us
from serving.embedded.flags import trace_flags
from serving.embedded.launcher import EmbeddedServer, check_repository
from serving.embedded.openai_process import OpenAIProcess, missing_packages, takes_names, takes_texts
from serving.embedded.triton_log import failure

__all__ = ["EmbeddedServer", "check_repository", "main"]


class _Routes:
    """The OpenAI routes and the page: started when a model needs them, at the start or, with --poll-s, later."""

    def __init__(self, start: Callable[[], OpenAIProcess | None], poll_s: float | None, *, required: bool) -> None:
        """`required`: whether the server may not start without them."""
        self._start, self._poll_s = start, poll_s
        self._looked_s, self._said = time.monotonic(), ""
        self.process: OpenAIProcess | None = None
        try:
            self.process = start()
        except InputError as error:
            if required:
                raise
            _say(f"warning   no page to try the models: {error}")

    def look(self) -> str | None:
        """The reason if the process failed. Starts it if a model needs it by now."""
        if self.process:
            return self.process.look()
        if self._poll_s is not None and time.monotonic() - self._looked_s >= self._poll_s:
            self._looked_s = time.monotonic()
            try:
                self.process = self._start()
                said = f"OpenAI    {self.process.url}" if self.process else ""
            except InputError as error:  # the port is in use, or a configuration cannot be read: the server goes on
                said = f"warning   no OpenAI routes: {error}"
            if said and said != self._said:
                _say(said)
            self._said = said
        return None


def _serve(server: EmbeddedServer, command: list[str], routes: _Routes | None = None) -> int:
    """Prints the endpoints; waits for Ctrl-C, or runs `command` and returns its exit status."""
    print(f"serving   {', '.join(server.models)} from {server.repository}")
    for finding in server.notes:
        print(f"warning   {finding}")
    print(f"HTTP      http://{server.http_url}/v2")
    print(f"gRPC      {server.grpc_url}")
    if routes and routes.process:
        if takes_texts(server.repository):
            print(f"OpenAI    {routes.process.url}")
        print(f"page      {routes.process.url.removesuffix('v1')}")
    print(f"metrics   {server.metrics_url}")
    print(f"log       {server.log_path}")
    if not command:
        print("Ctrl-C stops it.", flush=True)
    sys.stdout.flush()
    ports = {"HTTP": server.http_port, "GRPC": server.grpc_port, "METRICS": server.metrics_port}
    if routes and routes.process:
        ports["OPENAI"] = routes.process.port
    told = {f"DEEPSEEK_{name}_PORT": str(port) for name, port in ports.items()}  # with the free ports that 0 picked
    child = _started(command, {**os.environ, **told}) if command else None
    try:
        while child is None or child.poll() is None:
            if server.failure or server.poll() is not None:
                raise GateFailed(server.failure or failure(server.log_path, server.poll() or 0))
            if routes and (reason := routes.look()):
                raise GateFailed(reason)
            time.sleep(0.1)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            child.wait()


def _routes(options: argparse.Namespace, server: EmbeddedServer, running: ExitStack) -> _Routes:
    """The OpenAI routes and the page, which end with `running`."""
    may_have_page = not (options.behind_gateway or options.command)

    def start() -> OpenAIProcess | None:
        if not (takes_texts(server.repository) or (may_have_page and takes_names(server.repository))):
            return None
        process = OpenAIProcess(
            server.repository,
            address=server.address,
            port=options.openai_port,
            http_port=server.http_port,
            say=_say,
        )
        return running.enter_context(process)

    takes_text = takes_texts(server.repository)
    if (finding := missing_packages()) and takes_text:
        print(f"warning   {finding}")
    return _Routes((lambda: None) if finding else start, options.poll_s, required=takes_text)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=environment, preexec_fn=ends_with_us())
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run while serving: {error.strerror}") from None


def main(options: argparse.Namespace) -> int:
    if options.profile and options.trace_url:
        raise InputError("--profile writes traces to files, --trace-url sends them: give only one (TRACE_URL=)")
    for name in ("timeout_s", "poll_s", "exit_timeout_s"):
        if (value := getattr(options, name)) is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be more than 0")
    if options.command and shutil.which(options.command[0]) is None:
        raise InputError(f"{options.command[0]}: no such command to run while serving; see deepseek serve --help")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    server = EmbeddedServer(
        options.repository,
        http_port=options.http_port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        address=options.address,
        timeout_s=options.timeout_s,
        poll_s=options.poll_s,
        profile=options.profile,
        echo_log=options.echo_log,
        behind_gateway=options.behind_gateway,
        exit_timeout_s=options.exit_timeout_s,
        flags=tuple(trace_flags(options.trace_url, options.trace_every)),
    )
    with server, ExitStack() as running:  # the routes end before the server
        try:
            return _serve(server, options.command, _routes(options, server, running))
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # make and timeout send it twice; Ctrl-C still forces
            print("stopping", file=sys.stderr)
            return 0 if not options.command else 130

"""The command `serve`: runs the embedded Triton, a real `tritonserver` without Docker or a GPU.

Contract: serves a repository until Ctrl-C or SIGTERM, or while a command runs (`serving.embedded.launcher`). Exit
codes: the command's own, else 0; 1 the server ended by itself, or no version of a model can be served; 2 bad input.
Errors are one line.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

from deepseek.spec import TEXT, GateFailed, InputError
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.machine.open_files import allow_open_files
from deepseek.spec.processes.children import ends_with_us
from deepseek.spec.vocabulary import VOCABULARY
from serving.embedded.flags import trace_flags
from serving.embedded.launcher import EmbeddedServer, say
from serving.embedded.openai_process import OpenAIProcess, missing_packages, takes


class _Routes:
    """The OpenAI routes and the page, which end with `running`. With --poll-s they also start later.

    They start if a model takes texts, and for the page alone if one takes names of items.
    """

    def __init__(self, options: argparse.Namespace, server: EmbeddedServer, running: ExitStack) -> None:
        self._options, self._server, self._running = options, server, running
        self._looked_s, self._said = time.monotonic(), ""
        self._has_page = not (options.behind_gateway or options.command)
        self.process: OpenAIProcess | None = None
        self._missing = missing_packages()
        if self._missing and self._needed():
            print(f"warning   {self._missing}")
        try:
            self._start()
        except InputError as error:
            if self._takes_texts():
                raise
            self._say_once(f"warning   no page to try the models: {error}")

    def _takes_texts(self) -> bool:
        return takes(self._server.served, TEXT)

    def _needed(self) -> bool:
        return self._takes_texts() or (self._has_page and takes(self._server.served, VOCABULARY))

    def _start(self) -> None:
        if self._missing or not self._needed():
            return
        process = OpenAIProcess(
            self._server.repository,
            address=self._server.address,
            port=self._options.openai_port,
            http_port=self._server.http_port,
            say=say,
        )
        self.process = self._running.enter_context(process)

    def look(self) -> str | None:
        """The reason if the process failed that texts need. Starts it if a model needs it by now."""
        if self.process:
            reason = self.process.look()
            if reason is None or self._takes_texts():
                return reason
            self._say_once(f"warning   no page to try the models: {reason}")
            self.process, self._has_page = None, False
        poll_s = self._options.poll_s
        if poll_s is not None and time.monotonic() - self._looked_s >= poll_s:
            self._looked_s = time.monotonic()
            try:
                self._start()
            except InputError as error:  # the port is in use: the server continues
                what = "OpenAI routes" if self._takes_texts() else "page to try the models"
                self._say_once(f"warning   no {what}: {error}")
            if self.process:
                url = self.process.url
                self._say_once(f"OpenAI    {url}" if self._takes_texts() else f"page      {url.removesuffix('v1')}")
        return None

    def _say_once(self, line: str) -> None:
        if line != self._said:
            say(line)
        self._said = line


def _serve(server: EmbeddedServer, command: list[str], routes: _Routes | None = None) -> int:
    """Prints the endpoints; waits for Ctrl-C, or runs `command` and returns its exit status."""
    _announce(server, routes)
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
            if server.failure:
                raise GateFailed(server.failure)
            if routes and (reason := routes.look()):
                raise GateFailed(reason)
            time.sleep(0.1)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            child.wait()


def _announce(server: EmbeddedServer, routes: _Routes | None) -> None:
    """Prints what is served, and where."""
    print(f"serving   {', '.join(server.models)} from {server.repository}")
    for finding in server.notes:
        print(f"warning   {finding}")
    print(f"HTTP      http://{server.http_url}/v2")
    print(f"gRPC      {server.grpc_url}")
    if routes and routes.process:
        if takes(server.served, TEXT):
            print(f"OpenAI    {routes.process.url}")
        print(f"page      {routes.process.url.removesuffix('v1')}")
    print(f"metrics   {server.metrics_url}")
    print(f"log       {server.log_path}")


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=environment, preexec_fn=ends_with_us())
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run while serving: {error.strerror}") from None


def main(options: argparse.Namespace) -> int:
    if options.profile and options.trace_url:
        raise InputError("--profile writes traces to files, --trace-url sends them: give only one (TRACE_URL=)")
    if options.command and shutil.which(options.command[0]) is None:
        raise InputError(f"{options.command[0]}: no such command to run while serving; see deepseek serve --help")
    end_at_sigterm()
    allow_open_files()
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
        preloads=not options.no_preload,
    )
    with ExitStack() as running:  # the routes end before the server
        try:
            running.enter_context(server)
            return _serve(server, options.command, _Routes(options, server, running))
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # also after Ctrl-C, which still forces
            print("stopping", file=sys.stderr)
            return 0 if not options.command else 130

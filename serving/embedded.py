"""The embedded Triton: a real `tritonserver` with no Docker and no GPU.

Contract: serves a repository until Ctrl-C or SIGTERM, or while a command runs; `serving.launcher` has what it does for
that. Exit codes: that of the command, else 0; 1 where the server ended by itself or no version of a model can be
served; 2 where it cannot start for what the user gave it; errors are one line.

Examples:
    python -m serving.embedded                                 # serve model_repository/ until Ctrl-C
    python -m serving.embedded --repository /models --http-port 9000 --grpc-port 9001 --metrics-port 9002
    python -m serving.embedded --poll-s 2                      # follow new versions; a bad one changes nothing
    python -m serving.embedded -- make infer loadtest          # serve while a command runs, then stop
    python -m serving.embedded --profile /tmp/profile          # traces and operator times land there (make profile)
    python -m serving.embedded --trace-url http://127.0.0.1:4318/v1/traces     # spans to an OpenTelemetry collector
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from deepseek.spec import GateFailed, InputError, Parser, run_command
from deepseek.spec.children import ends_with_us
from serving.flags import add_trace_arguments, trace_flags
from serving.launcher import EmbeddedServer, check_repository
from serving.triton_log import failure

__all__ = ["EmbeddedServer", "check_repository", "main"]


@contextlib.contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the with block as Ctrl-C does."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _serve(server: EmbeddedServer, command: list[str]) -> int:
    """Prints the endpoints; waits for Ctrl-C, or runs `command` and returns its exit status."""
    print(f"serving   {', '.join(server.models)} from {server.repository}")
    for finding in server.notes:
        print(f"warning   {finding}")
    print(f"HTTP      http://{server.http_url}/v2")
    print(f"gRPC      {server.grpc_url}")
    print(f"metrics   {server.metrics_url}")
    print(f"log       {server.log_path}")
    if not command:
        print("Ctrl-C stops it.", flush=True)
    sys.stdout.flush()
    ports = {"HTTP_PORT": server.http_port, "GRPC_PORT": server.grpc_port, "METRICS_PORT": server.metrics_port}
    told = {name: str(port) for name, port in ports.items()}  # those that 0 picked are not on the command's line
    child = _started(command, {**os.environ, **told}) if command else None
    try:
        while child is None or child.poll() is None:
            if server.failure or server.poll() is not None:
                raise GateFailed(server.failure or failure(server.log_path, server.poll() or 0))
            time.sleep(0.1)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            child.wait()


def _started(command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, env=environment, preexec_fn=ends_with_us())
    except OSError as error:
        raise InputError(f"{command[0]}: cannot be run while serving: {error.strerror}") from None


def main() -> int:
    """Serves a repository until it is told to stop."""
    parser = Parser(__doc__, prog="python -m serving.embedded")
    parser.add_argument("--repository", default="model_repository", help="model repository (default: %(default)s)")
    parser.add_argument("--address", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=int, default=8000, help="0 picks a free one (default: %(default)s)")
    parser.add_argument("--grpc-port", type=int, default=8001, help="(default: %(default)s)")
    parser.add_argument("--metrics-port", type=int, default=8002, help="(default: %(default)s)")
    parser.add_argument(
        "--timeout-s", type=float, default=120, help="longest wait for readiness (default: %(default)s)"
    )
    parser.add_argument("--poll-s", type=int, help="look for new model versions every so many seconds")
    parser.add_argument("--profile", metavar="FOLDER", help="write request traces and operator times there")
    parser.add_argument("--echo-log", action="store_true", help="the server's own log to standard output")
    parser.add_argument(
        "--behind-gateway", action="store_true", help="close what is not inference, metadata or readiness"
    )
    parser.add_argument("--exit-timeout-s", type=int, help="for requests in flight when it is told to stop")
    add_trace_arguments(parser)
    parser.add_argument("command", nargs="*", help="run this while serving, then stop with its exit status")
    args = parser.parse_args()
    if args.profile and args.trace_url:
        raise InputError("--profile writes traces to files, --trace-url sends them: take one of them (TRACE_URL=)")
    for name in ("timeout_s", "poll_s", "exit_timeout_s"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be more than 0")
    if args.command and shutil.which(args.command[0]) is None:
        raise InputError(
            f"{args.command[0]}: no such command to run while serving; see python -m serving.embedded --help"
        )
    with (
        _signals_as_interrupt(),
        EmbeddedServer(
            args.repository,
            http_port=args.http_port,
            grpc_port=args.grpc_port,
            metrics_port=args.metrics_port,
            address=args.address,
            timeout_s=args.timeout_s,
            poll_s=args.poll_s,
            profile=args.profile,
            echo_log=args.echo_log,
            behind_gateway=args.behind_gateway,
            exit_timeout_s=args.exit_timeout_s,
            flags=tuple(trace_flags(args.trace_url, args.trace_every)),
        ) as server,
    ):
        try:
            return _serve(server, args.command)
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # make and timeout send it twice; Ctrl-C still forces
            print("stopping", file=sys.stderr)
            return 0 if not args.command else 130


if __name__ == "__main__":
    run_command(main)

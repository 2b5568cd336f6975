"""The embedded Triton: a real `tritonserver` with no Docker and no GPU.

The wheel `nvidia-pytriton` ships the server and its Python backend; this module lays out the backend
directory that the server wants, starts it, waits until it is ready and stops it. Nothing of what it
started outlives it: not after Ctrl-C, SIGTERM, nor a kill of this process.

Contract: `EmbeddedServer` is a context manager over a model repository; errors are one line. Triton sees only what
`serving.view` has approved: a version that is damaged or does not fit its configuration is refused in one line, and an
older good one is served.

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
import ctypes
import importlib.metadata
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO

from deepseek.spec import InputError, Parser, run_command
from serving.flags import (
    ADMIN_HEADER,
    CLOSED,
    CONTROL,
    EXIT_TIMEOUT_S,
    GATEWAY_EXIT_TIMEOUT_S,
    Endpoints,
    add_trace_arguments,
    admin_key,
    server_flags,
    trace_flags,
)
from serving.repository import Finding, models_in
from serving.view import ApprovedView, Change

WHEEL = "nvidia-pytriton"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class EmbeddedServer:
    """A real Triton over `repository`, up inside the `with` block.

    Ports are bound on `address`; 0 picks a free one, and the attributes hold what was picked. The
    server's own log is at `log_path`; with `echo_log` it goes to standard output, and only that of the start is kept.
    `behind_gateway` closes what no caller of an endpoint needs, and gives requests in flight longer when it stops.
    `profile` is a folder for what tells where a request's time goes: Triton's
    traces, `trace.json.<n>`, once a client turns them on (trace level TIMESTAMPS), and on stopping the operator
    times of ONNX Runtime, `onnxruntime-<instance>.<start in ns since 1970>.json`.

    Raises:
        InputError: port in use, wheel missing, a repository that cannot be served, a model that does
            not load (with Triton's reason), or not ready within `timeout_s`.
        GateFailed: a model of which no version can be served.
    """

    def __init__(
        self,
        repository: str | Path,
        *,
        http_port: int = 8000,
        grpc_port: int = 8001,
        metrics_port: int = 8002,
        address: str = "127.0.0.1",
        timeout_s: float = 120,
        poll_s: int | None = None,
        log_path: str | Path | None = None,
        profile: str | Path | None = None,
        echo_log: bool = False,
        behind_gateway: bool = False,
        exit_timeout_s: int | None = None,
        flags: tuple[str, ...] = (),
    ) -> None:
        self.repository = Path(repository)
        self.address = address
        ports = _free_ports(address, {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port})
        self.http_port, self.grpc_port, self.metrics_port = ports
        self.timeout_s = timeout_s
        self.log_path = Path(log_path or Path(os.environ.get("BUILD", "build")) / "serving" / "triton.log")
        self._poll_s = poll_s
        self._echo_log = echo_log
        self._exit_timeout_s = exit_timeout_s or (GATEWAY_EXIT_TIMEOUT_S if behind_gateway else EXIT_TIMEOUT_S)
        self._restricted = CLOSED if behind_gateway else CONTROL if poll_s is not None else ()
        self._key = admin_key()  # model control is ours alone
        self._profile = None if profile is None else Path(profile).absolute()
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._view: ApprovedView | None = None
        self._watcher: threading.Thread | None = None
        self._echo: threading.Thread | None = None
        self._started = threading.Event()
        self._stopping = threading.Event()

    @property
    def http_url(self) -> str:
        """`host:port` of the HTTP endpoint."""
        return f"{self.address}:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        """`host:port` of the gRPC endpoint."""
        return f"{self.address}:{self.grpc_port}"

    @property
    def metrics_url(self) -> str:
        """Where Prometheus scrapes."""
        return f"http://{self.address}:{self.metrics_port}/metrics"

    @property
    def notes(self) -> list[Finding]:
        """What is served unchecked, and what of the repository is left out."""
        return self._view.notes if self._view else []

    def __enter__(self) -> EmbeddedServer:
        try:
            self._start()
            self._wait_until_ready()
            self._started.set()
            if self._poll_s is not None:
                self._watcher = threading.Thread(target=self._watch, args=(self._poll_s,), daemon=True)
                self._watcher.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        models = check_repository(self.repository)
        server, libraries, backend, stub = _parts()
        # Short and private: the path goes on the stub's command line, the prefix into /dev/shm.
        self._scratch = Path(tempfile.mkdtemp(prefix="embedded-triton-"))
        self._view = ApprovedView(self.repository, self._scratch / "models", _say)
        self._view.fill()
        _assemble_backend(self._scratch / "backends" / "python", backend, stub)
        environment = _environment(libraries, self._scratch)
        if self._profile is not None:
            self._profile.mkdir(parents=True, exist_ok=True)
            environment["ONNXRUNTIME_PROFILE"] = str(self._profile)
        command = [str(server), *self._server_flags()]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            log.write(f"{' '.join(command)}\n".encode())
            log.flush()
            parent = os.getpid()
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # stubs orphaned by a crash become ours to reap
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._echo_log else log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, and the group is ours to end
                preexec_fn=lambda: _die_with_parent(parent),
            )
        if self._process.stdout is not None:
            self._echo = threading.Thread(target=self._copy_log, args=(self._process.stdout,), daemon=True)
            self._echo.start()
        self._models = models

    def _copy_log(self, lines: IO[bytes]) -> None:
        """The server's log to standard output; to the file only until it is up, so that the file does not grow."""
        with lines, self.log_path.open("ab") as log:
            for line in lines:
                with contextlib.suppress(OSError):  # whoever read it has gone: the server goes on
                    sys.stdout.buffer.write(line)
                    sys.stdout.buffer.flush()
                if not self._started.is_set():
                    log.write(line)
                    log.flush()

    def _server_flags(self) -> list[str]:
        assert self._scratch is not None
        endpoints = Endpoints(
            address=self.address, http_port=self.http_port, grpc_port=self.grpc_port, metrics_port=self.metrics_port
        )
        flags = server_flags(
            self._scratch / "models",
            endpoints,
            restricted=self._restricted,
            key=self._key,
            # Not Triton's own polling: what is loaded is decided here, and a failure has its reason in the answer.
            explicit_control=self._poll_s is not None,
            exit_timeout_s=self._exit_timeout_s,
        )
        flags += [
            f"--backend-directory={self._scratch / 'backends'}",
            # Each server has its own region names, so that two never meet and leftovers can be removed.
            f"--backend-config=python,shm-region-prefix-name={self._scratch.name}",
        ]
        if self._profile is not None:
            # A file a trace: with a frequency of 0, for all of them at the end, this server writes none.
            flags += ["--trace-config=mode=triton", "--trace-config=level=OFF", "--trace-config=rate=1"]
            flags += [f"--trace-config=triton,file={self._profile / 'trace.json'}"]
            flags += ["--trace-config=triton,log-frequency=1"]
        return [*flags, *self._flags]

    def _watch(self, poll_s: float) -> None:
        """Follows the repository until the server stops."""
        assert self._view is not None
        while not self._stopping.wait(poll_s):
            for change in self._view.changes():
                reason = self._control(change)
                if reason and not self._stopping.is_set():
                    self._view.take_back(change, reason)

    def _control(self, change: Change) -> str | None:
        """Has Triton load or unload a model; returns its reason where it did not."""
        url = f"http://{self.http_url}/v2/repository/models/{change.model}/{change.action}"
        request = urllib.request.Request(url, b"{}", {ADMIN_HEADER: self._key}, method="POST")
        try:
            urllib.request.urlopen(request, timeout=self.timeout_s).close()
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            with contextlib.suppress(ValueError, KeyError, TypeError):
                text = json.loads(text)["error"]
            return self._as_seen(text.partition("\n\nAt:")[0])  # a Python model's own reason, without its stack
        except OSError as error:
            return str(error)
        return None

    def _as_seen(self, text: str) -> str:
        """Triton's words about its view, in those of the repository, in one line."""
        view = str(self._view.folder) if self._view else ""
        return " ".join(text.replace(view, str(self.repository)).split()) if view else text

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise InputError(self._as_seen(_failure(self.log_path, self._process.returncode)))
            with contextlib.suppress(OSError):
                url = f"http://{self.http_url}/v2/health/ready"
                if urllib.request.urlopen(url, timeout=1).status == 200:
                    return
            time.sleep(0.05)
        raise InputError(
            f"Triton was not ready within {self.timeout_s:g} s; "
            f"{self._as_seen(_load_failures(self.log_path)) or 'it is still loading'}; "
            f"see {self.log_path} or give it longer with --timeout-s"
        )

    def poll(self) -> int | None:
        """The exit status of a server that ended by itself, None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Lets requests in flight finish, ends the server and its stubs, removes what it laid out."""
        self._stopping.set()
        if self._process is not None:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self._exit_timeout_s + 5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # stubs too, whatever became of the server
            self._process.wait()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-self._process.pid, 0):  # stubs that the server left to us
                    pass
            if self._echo is not None:
                self._echo.join()  # ends with the last process that wrote to it
                self._echo = None
            self._process = None
        if self._watcher is not None:
            self._watcher.join()  # a call to the server that has just ended fails at once
            self._watcher = None
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            for region in Path("/dev/shm").glob(f"{self._scratch.name}*"):
                region.unlink(missing_ok=True)
            self._scratch = None


def check_repository(repository: Path) -> list[str]:
    """Names of the models in `repository`; raises InputError where the embedded server cannot serve it."""
    configs = [model / "config.pbtxt" for model in models_in(repository)]
    for config in configs:
        named = dict(re.findall(r'^\s*(backend|platform)\s*:\s*"([^"]*)"', config.read_text(), re.MULTILINE))
        backend = named.get("backend") or named.get("platform", "python")
        if backend != "python":
            raise InputError(
                f"{config}: this server has no {backend} backend: the embedded Triton has only python; "
                "docker compose up serves it on a machine with a GPU; or rebuild with: make engine TARGET=onnxruntime"
            )
    return [config.parent.name for config in configs]


def _parts() -> tuple[Path, Path, Path, Path]:
    """Server binary, libraries, Python backend and this interpreter's stub, out of the wheel."""
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"{WHEEL} is not installed; install it with: pip install --no-deps {WHEEL}") from None
    root = Path(str(wheel.locate_file("")))
    triton = root / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        have = sorted((path.parent.name for path in stub.parent.parent.glob("*/*")), key=lambda v: int(v[2:]))
        raise InputError(f"{WHEEL} {wheel.version} has no stub for Python {version}; it has {', '.join(have)}")
    return triton / "bin" / "tritonserver", root / "nvidia_pytriton.libs", triton / "backends" / "python", stub


def _assemble_backend(folder: Path, backend: Path, stub: Path) -> None:
    folder.mkdir(parents=True)
    for path in backend.iterdir():
        if path.is_file():
            (folder / path.name).symlink_to(path)
    shutil.copy2(stub, folder / stub.name)  # a copy: the server finds the backend's folder from its path
    (folder / stub.name).chmod(0o755)


def _environment(libraries: Path, scratch: Path) -> dict[str, str]:
    """The server's environment: the wheel's libraries, and this interpreter for the stubs."""
    search = [str(libraries), sysconfig.get_config_var("LIBDIR") or ""]
    bundled = next(libraries.glob(f"libpython3-*.{sys.version_info.minor}.so.1.0"), None)
    system = _libpython()
    if bundled is not None and system is not None:
        # The 3.13 stub is linked to the wheel's own libpython, whose standard library is not ours:
        # under that name it is to find the interpreter's.
        (scratch / "libpython").mkdir()
        (scratch / "libpython" / bundled.name).symlink_to(system)
        search.insert(0, str(scratch / "libpython"))
    environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, search))}
    # The stub takes its prefix, and so its site-packages, from the first python3 on PATH.
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment.get('PATH', '')}"
    environment.pop("PYTHONHOME", None)
    return environment


def _libpython() -> Path | None:
    """This interpreter's shared library."""
    name = sysconfig.get_config_var("INSTSONAME") or ""
    folders = [sysconfig.get_config_var("LIBDIR"), f"/usr/lib/{sysconfig.get_config_var('MULTIARCH')}", "/usr/lib"]
    return next((path for folder in folders if folder and (path := Path(folder) / name).is_file()), None)


def _die_with_parent(parent: int) -> None:
    """In the child: SIGTERM when the launcher dies, however it dies."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _free_ports(address: str, wanted: dict[str, int]) -> list[int]:
    """The ports asked for, free ones in place of 0. All are held until all are known to be free."""
    with contextlib.ExitStack() as stack:
        ports = []
        for name, port in wanted.items():
            held = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Triton: TIME_WAIT is no obstacle
            try:
                held.bind((address, port))
                held.listen()
            except (OSError, OverflowError) as error:
                raise InputError(
                    f"{name} port {address}:{port} cannot be used ({error}); "
                    f"choose another, e.g. {name.upper()}_PORT={port + 1000 if 0 < port < 60000 else 9000}"
                ) from None
            ports.append(held.getsockname()[1])
        return ports


def _load_failures(log_path: Path) -> str:
    """Triton's own reason for each model that did not load, in one line."""
    log = log_path.read_text(errors="replace")
    line_end = r'"?\n(?=[IWE]\d{4}|\+|$)'
    found = re.finditer(rf"(?:failed to (?:load|stat|poll)|Poll failed for)\b(.*?){line_end}", log, re.DOTALL)
    # A Python model's own reason, without its stack.
    reasons = {" ".join(match[1].partition(r"\n\nAt:")[0].split()) for match in found}
    syntax = re.findall(r"Error parsing text-format [\w.]+: (.*)", log)  # of a config.pbtxt, said before its failure
    failures = [f"failed to load {reason}" for reason in sorted(reasons) if "all models" not in reason]
    return "; ".join([*failures, *syntax])


def _failure(log_path: Path, status: int) -> str:
    """Why the server ended before it was ready, and what to do."""
    reason = _load_failures(log_path)
    if reason:
        return f"{reason}; rebuild the model with make engine, or take its folder out of the repository"
    lines = log_path.read_text(errors="replace").strip().splitlines()
    errors = [
        re.sub(r"^\[libprotobuf ERROR [^]]*\] ", "", line)
        for line in lines
        if re.match(r"error|\[libprotobuf ERROR", line)
    ]
    return f"tritonserver ended with status {status}: {'; '.join(errors) or 'no reason given'} (log: {log_path})"


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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _serve(server: EmbeddedServer, command: list[str]) -> int:
    """Prints the endpoints; waits for Ctrl-C, or runs `command` and returns its exit status."""
    print(f"serving   {', '.join(server._models)} from {server.repository}")
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
    child = subprocess.Popen(command, env={**os.environ, **told}) if command else None
    try:
        while child is None or child.poll() is None:
            if server.poll() is not None:
                raise InputError(_failure(server.log_path, server.poll() or 0))
            time.sleep(0.1)
        return child.returncode if child.returncode >= 0 else 128 - child.returncode
    finally:
        if child is not None and child.poll() is None:
            child.terminate()
            child.wait()


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
            print("stopping", file=sys.stderr)
            return 0 if not args.command else 130


if __name__ == "__main__":
    run_command(main)

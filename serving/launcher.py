"""The embedded Triton as an object: started, watched and stopped by a `with` block.

The wheel `nvidia-pytriton` ships the server and its Python backend (`serving.wheel`); this module starts it over a
repository, waits until it is ready and stops it. Nothing of what it started outlives it: not after Ctrl-C, SIGTERM,
nor a kill of this process.

Contract: Triton sees only what `serving.view` has approved: a version that is damaged or does not fit its configuration
is refused in one line, and an older good one is served. A model of which a process died is loaded anew
(`serving.caretaker`); where that does not help, the server ends, and `failure` says why.

Example:
    with EmbeddedServer("model_repository", http_port=0, grpc_port=0, metrics_port=0) as server:
        print(server.grpc_url)
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO

from deepseek.spec import GateFailed, InputError
from deepseek.spec.children import ends_with_us
from serving.caretaker import Caretaker
from serving.control import ModelControl, is_ready
from serving.flags import (
    CLOSED,
    CONTROL,
    EXIT_TIMEOUT_S,
    GATEWAY_EXIT_TIMEOUT_S,
    Endpoints,
    admin_key,
    server_flags,
)
from serving.ports import HeldPorts
from serving.repository import Finding, models_in
from serving.stubs import LOOK_S, StubWatch
from serving.triton_log import KILLED, CrashWatch, failure, load_failures
from serving.view import ApprovedView
from serving.wakeup import MISSING, library, preload
from serving.wheel import assemble_backend, environment, parts

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# Is told the server, if it comes to one, and waits for our end, however it comes; then for the server's, which is told
# of it; then ends what is left: a stub of 2.51 that waits for a word of a server that has gone does so for ever.
# $1: seconds, $2: what was laid out.
_AFTER_US = """
read -r server && read -r _
if [ -n "$server" ]; then
    while kill -0 "$server" && [ "$1" -gt 0 ]; do sleep 1; set -- $(($1 - 1)) "$2"; done
    kill -KILL -- "-$server"
fi
rm -rf -- "$2" "/dev/shm/${2##*/}"*
"""
_LIBC = ctypes.CDLL(None, use_errno=True)


class EmbeddedServer:
    """A real Triton over `repository`, up inside the `with` block.

    Ports are bound on `address`; 0 picks a free one, and the attributes hold what was picked. The server's own log is
    at `log_path` (`$BUILD/serving/triton-<HTTP port>.log`); with `echo_log` it goes to standard output, and only that
    of the start is kept.
    `behind_gateway` closes what no caller of an endpoint needs, and gives requests in flight longer when it stops.
    `profile` is a folder for what tells where a request's time goes: Triton's
    traces, `trace.json.<n>`, once a client turns them on (trace level TIMESTAMPS), and on stopping the operator
    times of ONNX Runtime, `onnxruntime-<instance>.<start in ns since 1970>.json`.

    Raises:
        InputError: port in use, wheel missing, a repository that cannot be served, a model that does
            not load (with Triton's reason), or not ready within `timeout_s`.
        GateFailed: a model of which no version can be served, or whose process was killed while it loaded.
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
        self._ports = HeldPorts(address, {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port})
        self.address = self._ports.address
        self.http_port, self.grpc_port, self.metrics_port = (
            self._ports.numbers[name] for name in ("HTTP", "gRPC", "metrics")
        )
        self.timeout_s = timeout_s
        # One a server: what a crash leaves in a log is taken for the server's own.
        default_log = Path(os.environ.get("BUILD", "build")) / "serving" / f"triton-{self.http_port}.log"
        self.log_path = Path(log_path or default_log)
        self.models: list[str] = []
        self._poll_s = poll_s
        self._echo_log = echo_log
        self._exit_timeout_s = exit_timeout_s or (GATEWAY_EXIT_TIMEOUT_S if behind_gateway else EXIT_TIMEOUT_S)
        self._restricted = CLOSED if behind_gateway else CONTROL
        self._key = admin_key()  # model control is ours alone
        self._control = ModelControl(self.http_url, self._key, timeout_s)
        self._profile = None if profile is None else Path(profile).absolute()
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None
        self._scratch: Path | None = None
        self._view: ApprovedView | None = None
        self._stubs: StubWatch | None = None
        self._caretaker: Caretaker | None = None
        self._echo: threading.Thread | None = None
        self._without: list[Finding] = []
        self._crashed = CrashWatch(self.log_path)
        self._started = threading.Event()

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
    def failure(self) -> str | None:
        """Why it ended by its own decision."""
        return self._caretaker.failure if self._caretaker else None

    @property
    def notes(self) -> list[Finding]:
        """What is served unchecked, what of the repository is left out, and what this machine lacks."""
        return [*(self._view.notes if self._view else []), *self._without]

    def __enter__(self) -> EmbeddedServer:
        try:
            self._start()
            self._wait_until_ready()
            self._ports.release()
            self._started.set()
            self._look_after()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _start(self) -> None:
        self.models = check_repository(self.repository)
        server, libraries, backend, stub = parts()
        # Short and private: the path goes on the stub's command line, the prefix into /dev/shm.
        self._scratch = Path(tempfile.mkdtemp(prefix="embedded-triton-"))
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", _AFTER_US, "after", str(self._exit_timeout_s + 5), str(self._scratch)],
            stdin=subprocess.PIPE,  # which closes when we end
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._view = ApprovedView(self.repository, self._scratch / "models", _say)
        self._view.fill()
        assemble_backend(self._scratch / "backends" / "python", backend, stub)
        variables = environment(libraries, self._scratch)
        if wakeup := library():
            variables["LD_PRELOAD"] = preload(wakeup, self._scratch, variables.get("LD_PRELOAD", ""))
        else:
            self._without = [MISSING]
        if self._profile is not None:
            self._profile.mkdir(parents=True, exist_ok=True)
            variables["ONNXRUNTIME_PROFILE"] = str(self._profile)
        command = [str(server), *self._server_flags()]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as log:
            if self.log_path.is_file():
                self.log_path.chmod(0o600)  # one that was there
            log.write(f"{' '.join(command)}\n".replace(self._key, "<secret>").encode())
            log.flush()
            _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # stubs orphaned by a crash become ours to reap
            self._process = subprocess.Popen(
                command,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE if self._echo_log else log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, and the group is ours to end
                preexec_fn=ends_with_us(),
            )
        assert self._guard.stdin is not None
        self._guard.stdin.write(f"{self._process.pid}\n".encode())
        self._guard.stdin.flush()
        if self._process.stdout is not None:
            self._echo = threading.Thread(target=self._copy_log, args=(self._process.stdout,), daemon=True)
            self._echo.start()
        self._stubs = StubWatch(self._process.pid, self._view.folder, self._control)

    def _copy_log(self, lines: IO[bytes]) -> None:
        """The server's log to standard output; to the file only until it is up, so that the file does not grow."""
        with lines, self.log_path.open("ab") as log:
            for line in lines:
                self._crashed.read(line)
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
            explicit_control=True,
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

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        assert self._stubs is not None
        began_s = looked_s = time.monotonic()
        with self._stubs.loading():
            while time.monotonic() - began_s < self.timeout_s:
                if self._process.poll() is not None:
                    raise self._start_failure(self._process.returncode)
                if is_ready(self.http_url):
                    return
                if time.monotonic() - looked_s >= LOOK_S:
                    looked_s = time.monotonic()
                    self._stubs.look()
                    if what := self._stubs.stuck():
                        raise GateFailed(f"{what} while its model loaded; start the server again")
                time.sleep(0.05)
        raise InputError(
            f"Triton was not ready within {self.timeout_s:g} s; "
            f"{self._as_seen(load_failures(self.log_path)) or 'it is still loading'}; "
            f"see {self.log_path} or give it longer with --timeout-s"
        )

    def _start_failure(self, status: int) -> InputError | GateFailed:
        reason = self._as_seen(load_failures(self.log_path)).rstrip(".")
        if KILLED in reason:
            return GateFailed(f"{reason}; its process was killed: does it need more memory than there is?")
        return InputError(self._as_seen(failure(self.log_path, status)))

    def _as_seen(self, text: str) -> str:
        """Triton's words about its view, in those of the repository, in one line."""
        view = str(self._view.folder) if self._view else ""
        return " ".join(text.replace(view, str(self.repository)).split()) if view else text

    def _look_after(self) -> None:
        assert self._process is not None
        assert self._stubs is not None
        assert self._view is not None
        self._caretaker = Caretaker(
            self._process,
            stubs=self._stubs,
            control=self._control,
            view=self._view,
            crashed=self._crashed,
            as_seen=self._as_seen,
            say=_say,
            drain_s=self._exit_timeout_s,
        )
        self._caretaker.start(self._poll_s)

    def poll(self) -> int | None:
        """The exit status of a server that ended by itself, None while it runs."""
        return None if self._process is None else self._process.poll()

    def stop(self) -> None:
        """Lets requests in flight finish, ends the server and its stubs, removes what it laid out."""
        self._ports.release()
        if self._caretaker is not None:
            self._caretaker.prepare_to_stop()
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
        if self._caretaker is not None:
            self._caretaker.stop()  # a call to the server that has just ended fails at once
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            for region in Path("/dev/shm").glob(f"{self._scratch.name}*"):
                region.unlink(missing_ok=True)
            self._scratch = None
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None


def check_repository(repository: Path) -> list[str]:
    """Names of the models in `repository`; raises InputError where the embedded server cannot serve it."""
    configs = [model / "config.pbtxt" for model in models_in(repository)]
    for config in configs:
        text = config.read_text(errors="replace")  # what cannot be read is told by who checks the model
        named = dict(re.findall(r'^\s*(backend|platform)\s*:\s*"([^"]*)"', text, re.MULTILINE))
        backend = named.get("backend") or named.get("platform", "python")
        if backend != "python":
            raise InputError(
                f"{config}: this server has no {backend} backend: the embedded Triton has only python; "
                "docker compose up serves it on a machine with a GPU; or rebuild with: make engine TARGET=onnxruntime"
            )
    return [config.parent.name for config in configs]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

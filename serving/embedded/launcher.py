"""The embedded Triton as an object: started, supervised and stopped by a `with` block.

The wheel `nvidia-pytriton` ships the server and its Python backend (`serving.embedded.wheel`). This module starts the
server over a repository, waits until it is ready and stops it. Nothing of it outlives this process
(`serving.embedded.server_process`).

Contract: Triton sees only versions that `serving.embedded.verified_repository` verified. A version that is damaged or
does not fit its configuration is refused in one line, and an older intact one is served. A model that lost a process is
reloaded (`serving.embedded.supervisor`); if that does not help, the server ends and `failure` says why.

Example:
    with EmbeddedServer("model_repository", http_port=0, grpc_port=0, metrics_port=0) as server:
        print(server.grpc_url)
"""

import contextlib
import re
import sys
import time
from pathlib import Path

from deepseek.spec import GateFailed, InputError, build_dir
from serving.embedded.flags import (
    CLOSED,
    CONTROL,
    EXIT_TIMEOUT_S,
    GATEWAY_EXIT_TIMEOUT_S,
    admin_key,
    server_flags,
)
from serving.embedded.model_control import ModelControl, is_ready
from serving.embedded.ports import ReservedPorts
from serving.embedded.preloaded_fixes import MISSING, library, preload
from serving.embedded.server_process import ServerProcess
from serving.embedded.stub_processes import StubMonitor
from serving.embedded.supervisor import Supervisor
from serving.embedded.triton_log import CRASHES, KILLED, failure, how_it_ended, load_failures
from serving.embedded.verified_repository import VerifiedRepository
from serving.embedded.wheel import assemble_backend, environment, parts
from serving.repository.checks import Finding, engines_behind, models_in


class EmbeddedServer:
    """A real Triton over `repository`, running inside the `with` block.

    Ports are bound on `address`; 0 picks a free port, which the attributes then hold. `poll_s`: seconds between checks
    of the repository for changes; None: changes are ignored. The server's log is at `log_path`
    (`$DEEPSEEK_BUILD/serving/triton-<port>.log`); `echo_log` sends it to standard output and keeps only the start-up
    part in the file. `behind_gateway` closes every API that callers do not need and gives requests in flight more time
    at shutdown. `preloads`: whether Triton gets the library of `preloaded_fixes.py`. `profile` is a folder for Triton's
    traces, `trace.json.<n>`, once a client turns them on (trace level TIMESTAMPS), and at shutdown for ONNX Runtime's
    operator times, `onnxruntime-<instance>.<start in ns since 1970>.json`.

    Raises:
        InputError: port in use, wheel missing, a repository that cannot be served, a model that does
            not load (with Triton's reason), or not ready within `timeout_s`.
        GateFailed: no version of a model can be served, or a model's process was killed while it loaded.
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
        poll_s: float | None = None,
        log_path: str | Path | None = None,
        profile: str | Path | None = None,
        echo_log: bool = False,
        behind_gateway: bool = False,
        exit_timeout_s: int | None = None,
        flags: tuple[str, ...] = (),
        preloads: bool = True,
    ) -> None:
        self.repository = Path(repository)
        self._ports = ReservedPorts(address, {"HTTP": http_port, "gRPC": grpc_port, "metrics": metrics_port})
        self.address = self._ports.address
        self.http_port, self.grpc_port, self.metrics_port = (
            self._ports.numbers[name] for name in ("HTTP", "gRPC", "metrics")
        )
        self.http_url, self.grpc_url = (f"{self.address}:{port}" for port in (self.http_port, self.grpc_port))
        self.metrics_url = f"http://{self.address}:{self.metrics_port}/metrics"
        # One log per server: a crash found in the log must be this server's.
        default_log = build_dir("serving") / f"triton-{self.http_port}.log"
        self.log_path = Path(log_path or default_log)
        self.timeout_s = timeout_s
        self.models: list[str] = []
        self._poll_s, self._echo_log, self._flags = poll_s, echo_log, flags
        self.exit_timeout_s = exit_timeout_s or (GATEWAY_EXIT_TIMEOUT_S if behind_gateway else EXIT_TIMEOUT_S)
        self._restricted = CLOSED if behind_gateway else CONTROL
        self._key = admin_key()  # only this process may load and unload models
        self._control = ModelControl(self.http_url, self._key, timeout_s)
        self._profile = None if profile is None else Path(profile).absolute()
        self._process: ServerProcess | None = None
        self._verified: VerifiedRepository | None = None
        self._supervisor: Supervisor | None = None
        self._preloads = preloads
        self._missing: list[Finding] = []

    @property
    def pid(self) -> int:
        assert self._process is not None
        assert self._process.popen is not None
        return self._process.popen.pid

    @property
    def served(self) -> Path:
        """The folder that Triton reads: each model with the versions that it serves, and their configuration."""
        assert self._verified is not None
        return self._verified.folder

    @property
    def failure(self) -> str | None:
        """Why the running server ended, by itself or by the supervisor; None while it runs."""
        if self._supervisor and self._supervisor.failure:
            return self._supervisor.failure
        status = self.poll()
        return None if status is None else f"tritonserver {how_it_ended(status)} (log: {self.log_path})"

    @property
    def notes(self) -> list[Finding]:
        """Warnings: models served unchecked, folders that are ignored, and what this machine lacks."""
        return [*(self._verified.notes if self._verified else []), *self._missing]

    def __enter__(self) -> "EmbeddedServer":
        try:
            self.models = check_repository(self.repository)
            stubs = self._started()
            self._ports.release()
            self._supervise(stubs)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _started(self, *, again: bool = True) -> StubMonitor:
        """Starts a server until it is ready, and `again` if it crashes, as Triton 2.51 may while the cores are busy."""
        stubs = self._start()
        if (status := self._wait_until_ready(stubs)) is None:
            return stubs
        if not (again and -status in CRASHES):
            raise self._start_failure(status)
        say(f"died      tritonserver {how_it_ended(status)} while it started; starting it again")
        self._end_process()
        return self._started(again=False)

    def _start(self) -> StubMonitor:
        server, libraries, backend, stub = parts()
        self._process = ServerProcess(self.log_path, exit_timeout_s=self.exit_timeout_s, echo_log=self._echo_log)
        scratch = self._process.scratch
        self._verified = VerifiedRepository(self.repository, scratch / "models", say)
        self._verified.fill()
        assemble_backend(scratch / "backends" / "python", backend, stub)
        variables = environment(libraries, scratch)
        if self._preloads and (fixes := library()):
            variables["LD_PRELOAD"] = preload(fixes, scratch, variables.get("LD_PRELOAD", ""))
        elif self._preloads:
            self._missing = [MISSING]
        if self._profile is not None:
            self._profile.mkdir(parents=True, exist_ok=True)
            variables["ONNXRUNTIME_PROFILE"] = str(self._profile)
        popen = self._process.start([str(server), *self._server_flags(scratch)], variables, secret=self._key)
        return StubMonitor(popen.pid, self._verified.folder, self._control)

    def _server_flags(self, scratch: Path) -> list[str]:
        flags = server_flags(
            scratch / "models",
            address=self.address,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=self.metrics_port,
            restricted=self._restricted,
            key=self._key,
            # Instead of Triton's own polling: this process decides what is loaded, and gets the reason of a failure.
            explicit_control=True,
            exit_timeout_s=self.exit_timeout_s,
        )
        flags += [
            f"--backend-directory={scratch / 'backends'}",
            # Each server has its own region names, so that two never collide and leftovers can be removed.
            f"--backend-config=python,shm-region-prefix-name={scratch.name}",
        ]
        if self._poll_s is not None:
            # Else the server is not ready while any version loads, and for good after one did not load.
            flags.append("--strict-readiness=false")
        if self._profile is not None:
            # One file per trace: with a frequency of 0 (one file at the end) this version writes none.
            flags += ["--trace-config=mode=triton", "--trace-config=level=OFF", "--trace-config=rate=1"]
            flags += [f"--trace-config=triton,file={self._profile / 'trace.json'}"]
            flags += ["--trace-config=triton,log-frequency=1"]
        return [*flags, *self._flags]

    def _wait_until_ready(self, stubs: StubMonitor) -> int | None:
        """None once the server is ready, or its exit status if it ended. Raises InputError after `timeout_s`."""
        began_s = time.monotonic()
        while time.monotonic() - began_s < self.timeout_s:
            if (status := self.poll()) is not None:
                return status
            if is_ready(self.http_url):
                stubs.list_all()
                return None
            time.sleep(0.05)
        raise InputError(
            f"Triton was not ready within {self.timeout_s:g} s; "
            f"{self._in_repository_words(load_failures(self.log_path)) or 'it is still loading'}; "
            f"see {self.log_path} or give it longer with --timeout-s"
        )

    def _start_failure(self, status: int) -> InputError | GateFailed:
        reason = self._in_repository_words(load_failures(self.log_path)).rstrip(".")
        if KILLED in reason:
            return GateFailed(
                f"{reason}; its process crashed or was killed, perhaps for want of memory; see {self.log_path}"
            )
        return InputError(self._in_repository_words(failure(self.log_path, status)))

    def _in_repository_words(self, text: str) -> str:
        """Triton's message in one line, with the repository's paths in place of the verified copy's."""
        copy = str(self._verified.folder) if self._verified else ""
        return " ".join(text.replace(copy, str(self.repository)).split()) if copy else text

    def _supervise(self, stubs: StubMonitor) -> None:
        assert self._process is not None
        assert self._process.popen is not None
        assert self._verified is not None
        self._process.ready.set()
        self._supervisor = Supervisor(
            self._process.popen,
            stubs=stubs,
            control=self._control,
            verified=self._verified,
            crashed=self._process.crashed,
            reworded=self._in_repository_words,
            say=say,
            drain_s=self.exit_timeout_s,
        )
        self._supervisor.start(self._poll_s)

    def poll(self) -> int | None:
        """The exit status of a server that ended by itself; None while it runs."""
        return self._process.poll() if self._process else None

    def stop(self) -> None:
        """Lets requests in flight finish, ends the server and its stubs, removes its files."""
        self._ports.release()
        if self._supervisor is not None:
            self._supervisor.prepare_to_stop()
        if self._process is not None:
            self._process.end()
        if self._supervisor is not None:
            self._supervisor.stop()  # after the server has ended, so that its pending calls fail at once
        self._end_process()

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process.remove_files()
            self._process = None


def check_repository(repository: Path) -> list[str]:
    """Names of the models in `repository`; raises InputError if the embedded server cannot serve them."""
    models = models_in(repository)
    configs = [model / "config.pbtxt" for model in models]
    with contextlib.suppress(InputError):  # the model's check reports unreadable files
        configs += [engine / "config.pbtxt" for model in models for engine in engines_behind(model)]
    for config in filter(Path.is_file, configs):
        text = config.read_text(errors="replace")
        named = dict(re.findall(r'^\s*(backend|platform)\s*:\s*"([^"]*)"', text, re.MULTILINE))
        backend = named.get("backend") or named.get("platform", "python")
        if backend not in ("python", "ensemble"):
            raise InputError(
                f"{config}: this server has no {backend} backend: the embedded Triton has only python; "
                "docker compose up serves it on a machine with a GPU; or rebuild with: make engine "
                f"MODEL={config.relative_to(repository).parts[0]} TARGET=onnxruntime"
            )
    return [model.name for model in models]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

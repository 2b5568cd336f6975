"""Shared parts of the experiments: the models, the service, and the rows of the table.

Contract: the server is `deepseek serve` with the flags of the stack, as a child process, behind the gateway of
`docker/gateway`. It keeps its ports over restarts. Both end with this process. No process is started with a
`preexec_fn`: a process that is forked while gRPC's threads run may crash.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar

import numpy as np
import psutil
from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec, InvalidMeasurement
from loadtests.load.background_load import BackgroundLoad, Stream
from loadtests.load.child_process import our_environment
from loadtests.load.inputs import read_inputs
from loadtests.load.request_log import RequestLog
from loadtests.results.schedule import segments_of
from loadtests.results.settings import LoadSettings
from serving.repository.served_models import served_models
from serving.stack.gateway_limits import limits
from tests.gateway import Gateway, free_port, skip_without_nginx

T = TypeVar("T")
READY_S = 600.0  # how long a start may take on a busy machine
ENDS_S = 40.0
MIB = 2**20
LONGEST_S = 3600.0  # duration of a load by users, which is stopped earlier
LATEST_MS = 50.0  # limit on the p99 of the send lag
MOST_MEMORY = 8 * 2**30  # address space of each process of the server


@dataclass(frozen=True, kw_only=True)
class Row:
    what: str
    asked: str = ""
    seen: str
    holds: bool | None = None
    """None: shown, not judged."""


def grown_row(grown_mib: float, before_mib: float, *, most_mib: float) -> Row:
    return Row(
        what="    memory",
        asked=f"{most_mib:g} MiB more at most",
        seen=f"{grown_mib:+.0f} MiB on {before_mib:.0f}",
        holds=grown_mib <= most_mib,
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """A served model with its real inputs."""

    spec: DeploymentSpec
    inputs: Path

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def p99_ms(self) -> float:
        """The SLO's p99; 1 s if it has none."""
        return self.spec.slo.p99_ms or 1000.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    folder: Path
    repository: Path
    models: Path
    """Folder of model folders."""
    model: Model
    """The model that is broken."""
    other: Model
    """The model that stays intact; also the one that is overloaded, since the load generator can exceed its capacity."""
    overload_s: int = 60
    soak_s: int = 1800
    requests: int = 10_000
    """Malformed requests, over all ways."""
    watch_s: float = 5.0
    """How long to observe before and after a fault."""
    shared: Service | None = None
    """A service that the experiments share; None: each starts its own."""

    @contextlib.contextmanager
    def service(self, name: str) -> Iterator[Service]:
        if self.shared is not None:
            yield self.shared
            return
        with Service(self.folder / name, self.repository, self.models) as running:
            yield running

    def stream(
        self,
        service: Service,
        way: Way,
        shape: str | None,
        model: Model | None = None,
        *,
        users: int | None = None,
        timeout_s: float = 5.0,
        name: str | None = None,
        **client: Any,
    ) -> Stream:
        """A load on one way: a shape, or users who send back to back."""
        chosen = model or self.model
        protocol: Literal["grpc", "http"] = "grpc" if way.startswith("grpc") else "http"
        ca_cert = None
        url = service.grpc_url if protocol == "grpc" else service.http_url
        if way.endswith("gateway"):
            url = f"localhost:{service.gateway.port}"
            ca_cert = str(service.gateway.folder / "ca.crt")
        settings = LoadSettings(
            model=chosen.name, models=str(self.models), target="onnxruntime", protocol=protocol, url=url,
            inputs=str(chosen.inputs), shape=shape, users=users, warmup_s=0.0, timeout_s=timeout_s, ca_cert=ca_cert,
            duration_s=sum(each.duration_s for each in segments_of(shape)) if shape else LONGEST_S,
        )  # fmt: skip
        return Stream(name=name or f"{way} {chosen.name}", settings=settings, **client)

    def patient(self, service: Service, way: Way, shape: str) -> Stream:
        """A load whose client retries until a restarted server is back."""
        return self.stream(service, way, shape, timeout_s=600.0, retries=10_000, retry_budget=None, idempotent=True)

    def load(self, service: Service, streams: list[Stream]) -> BackgroundLoad:
        """The streams as one background load, with the gateway's key."""
        return BackgroundLoad(streams, {"DEEPSEEK_API_KEY": service.gateway.key})


Way = Literal["grpc", "http", "grpc by gateway", "http by gateway"]
WAYS: tuple[Way, ...] = ("grpc", "http", "grpc by gateway", "http by gateway")


class Service:
    """The server and the gateway; they run inside the `with` block."""

    def __init__(self, folder: Path, repository: Path, models: Path) -> None:
        self.folder, self.repository, self._models = folder, repository, models
        self.ports = {name: free_port() for name in ("http", "grpc", "metrics")}
        self.http_url, self.grpc_url = (f"127.0.0.1:{self.ports[name]}" for name in ("http", "grpc"))
        # A malformed request can make Triton allocate until the kernel kills some process. With a limit Triton ends first.
        self._bound = ["prlimit", f"--as={MOST_MEMORY}", "setpriv", "--pdeathsig", "TERM"]
        self._process: subprocess.Popen[bytes] | None = None
        self.gateway: Gateway

    def __enter__(self) -> Self:
        skip_without_nginx()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
            text = limits(served_models(self.repository, self._models))
            self.gateway = Gateway(self.folder, text, self.http_url, self.grpc_url)
            self._put_the_gateway_first()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.gateway.stop()
        self.end()

    def _put_the_gateway_first(self) -> None:
        """Gives the gateway priority, if allowed (root, or `ulimit -r`), as its CPU share in the stack does.

        Without it the gateway would wait for a core behind the models and the load generator, and answer late.
        """
        gateway = psutil.Process(self.gateway.process.pid)
        for each in (gateway, *gateway.children(recursive=True)):  # later workers inherit it
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.sched_setscheduler(each.pid, os.SCHED_RR, os.sched_param(1))

    def start(self) -> float:
        """Starts the server; returns the seconds until every model was ready."""
        flags = [each for name, port in self.ports.items() for each in (f"--{name}-port", str(port))]
        command = [sys.executable, "-m", "cli", "serve", "--repository", str(self.repository), *flags]
        # setpriv instead of a preexec_fn: no Python runs between fork and exec. The server ends with this process.
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._bound, *command, "--behind-gateway", "--exit-timeout-s", "3"],
                env=our_environment(DEEPSEEK_BUILD=str(self.folder)),
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        began_s = time.monotonic()
        names = [path.parent.name for path in self.repository.glob("*/config.pbtxt")]
        with InferenceClient(self.http_url, "http", timeout_s=2, retries=0) as client:
            while not self._is_ready(client, names):
                if self._process.poll() is not None or time.monotonic() > began_s + READY_S:
                    raise InvalidMeasurement(f"the server did not start: {self.last_words}")
                time.sleep(0.02)
        return time.monotonic() - began_s

    def _is_ready(self, client: InferenceClient, names: list[str]) -> bool:
        try:
            return all(client.ready(name) for name in names)
        except InferenceError:
            return False

    @property
    def last_words(self) -> str:
        lines = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stops the launcher and waits until all its processes have ended."""
        if self._process is None:
            return
        self._process.send_signal(how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(ENDS_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def kill(self) -> None:
        """Kills Triton, as the kernel does when memory is short; waits until its launcher has ended too."""
        self.triton.kill()
        assert self._process is not None
        self._process.wait(ENDS_S)
        self._process = None

    def wait_for_the_end(self) -> None:
        """Waits until the launcher of an ended server has ended too."""
        if self._process is not None and not any(name_of(each) == "tritonserver" for each in self._descendants()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_S)

    def bring_back(self) -> None:
        """Starts the server again if it has ended, as a container's restart policy does."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    @property
    def triton(self) -> psutil.Process:
        """The server's process. Raises InvalidMeasurement if it has ended."""
        for each in self._descendants():
            if name_of(each) == "tritonserver":
                return each
        raise InvalidMeasurement(f"the server has ended: {self.last_words}")

    def _descendants(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        nobody: list[psutil.Process] = []
        found = _ask(partial(_children, self._process.pid), nobody)
        return [each for each in found if _ask(each.status, psutil.STATUS_ZOMBIE) != psutil.STATUS_ZOMBIE]

    def processes(self) -> list[psutil.Process]:
        """The processes of the server and the gateway, without the launchers."""
        nginx = psutil.Process(self.gateway.process.pid).children(recursive=True)
        return [*self._descendants(), *(each for each in nginx if name_of(each) == "nginx")]

    def memory_mib(self) -> float:
        return sum(self.memory_of_each_mib().values())

    def memory_of_each_mib(self) -> dict[str, float]:
        """The memory of Triton, the models' processes and the gateway."""
        found = dict.fromkeys(("Triton", "models", "gateway"), 0.0)
        for each in self.processes():
            name = name_of(each)
            place = "gateway" if name == "nginx" else "Triton" if name == "tritonserver" else "models"
            found[place] += _ask(partial(_own_bytes, each), 0) / MIB
        return found

    @contextlib.contextmanager
    def client(self) -> Iterator[InferenceClient]:
        """An HTTP client of the server itself, without retries."""
        with InferenceClient(self.http_url, "http", timeout_s=10, retries=0) as client:
            yield client


def _ask(question: Callable[[], T], ended: T) -> T:
    """The answer of a process; `ended` if it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return question()
    return ended


def _children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def name_of(process: psutil.Process) -> str:
    """The process's name; "" if it has just ended."""
    return _ask(process.name, "")


def _own_bytes(process: psutil.Process) -> int:
    """Memory not shared with other processes: counted shares would grow when other readers of the same files end."""
    try:
        return process.memory_full_info().uss
    except psutil.AccessDenied:  # another user's process
        return process.memory_info().rss


class MemoryWatch:
    """Samples a service's memory every `every_s` seconds inside the `with` block: MiB by place, in `samples`."""

    def __init__(self, service: Service, every_s: float = 1.0) -> None:
        self._service, self._every_s = service, every_s
        self.samples: list[dict[str, float]] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def _run(self) -> None:
        while True:
            self.samples.append(self._service.memory_of_each_mib())
            if self._stopping.wait(self._every_s):
                return

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()

    @property
    def most_mib(self) -> float:
        return max(sum(each.values()) for each in self.samples)


def first_row(model: Model) -> dict[str, np.ndarray]:
    return read_inputs(model.inputs)[0]


def counted(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def lost(streams: dict[str, RequestLog]) -> int:
    """Requests that were not answered, over all streams."""
    return sum(len(each.failed) for each in streams.values())


def told(streams: dict[str, RequestLog]) -> str:
    """The failures of each stream with a reason for each kind; "" if there are none."""
    failed = {name: each for name, each in streams.items() if each.errors}
    return "".join(
        f"; {name}: {counted(each.errors)} ({'; '.join(each.messages)[:200]})" for name, each in failed.items()
    )


def check_lag(log: RequestLog) -> None:
    """Raises InvalidMeasurement if the load was sent late."""
    if not (lag_ms := log.lag_ms(99)) <= LATEST_MS or log.errors["dropped"]:
        raise InvalidMeasurement(
            f"requests left late: p99 {lag_ms:.0f} ms, allowed {LATEST_MS:g} ms; use a less busy machine"
        )

"""What the experiments share: the models, the service that they break, and what was asked and seen.

Contract: the server is `python -m serving.embedded` with the flags of the stack, in a process of its own, on ports that
stay its own over restarts; before it is the gateway of `docker/gateway`. Both end with this process. No process is started
with a `preexec_fn`: one that is forked while gRPC's threads run may crash.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import psutil
import pytest
from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec, InvalidMeasurement
from loadtests.inputs import read_inputs
from loadtests.local_server import our_environment
from serving.served import served_models
from serving.stack import limits
from tests.bench.failure.load import Answers, Stream
from tests.gateway import Gateway, free_port, skip_without_nginx

READY_S = 120.0
ENDS_S = 40.0
MIB = 2**20
MOST_MEMORY = 8 * 2**30  # of addresses, of each process of the server


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table."""

    what: str
    asked: str = ""
    seen: str
    holds: bool | None = None
    """None: shown, not judged."""


def grown_row(grown_mib: float, before_mib: float, *, most_mib: float) -> Row:
    """The row about the service's memory."""
    return Row(
        what="    memory",
        asked=f"{most_mib:g} MiB more at most",
        seen=f"{grown_mib:+.0f} MiB on {before_mib:.0f}",
        holds=grown_mib <= most_mib,
    )


@dataclass(frozen=True, kw_only=True)
class Model:
    """One that is served, with its real inputs."""

    spec: DeploymentSpec
    inputs: Path

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def p99_ms(self) -> float:
        """Of the SLO; 1 s where it names none."""
        return self.spec.slo.p99_ms or 1000.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an experiment works with, and how much of it."""

    folder: Path
    repository: Path
    models: Path
    """Folder of model folders."""
    model: Model
    """What is broken."""
    other: Model
    """What nothing is done to; and what is overloaded, since the load generator is no match for it."""
    overload_s: int = 60
    soak_s: int = 1800
    requests: int = 10_000
    """Malformed ones, over all ways."""
    connections: int = 1000
    """Half-open ones, on each way."""
    watch_s: float = 5.0
    """How long is looked before and after something is done."""
    shared: Service | None = None
    """What experiments that need nothing of their own work on, in place of a service each."""

    @contextlib.contextmanager
    def service(self, name: str, **settings: Any) -> Iterator[Service]:
        """A server and a gateway over the repository, or over another one, for one experiment."""
        if self.shared is not None and not settings:
            yield self.shared
            return
        repository = settings.pop("repository", self.repository)
        with Service(self.folder / name, repository, self.models, **settings) as running:
            yield running

    def stream(self, service: Service, way: Way, shape: str, model: Model | None = None, **settings: Any) -> Stream:
        """A load on one way."""
        chosen = model or self.model
        protocol: Literal["grpc", "http"] = "grpc" if way.startswith("grpc") else "http"
        access: dict[str, Any] = {}
        url = service.grpc_url if protocol == "grpc" else service.http_url
        if way.endswith("gateway"):
            url = f"localhost:{service.gateway.port}"
            access = {"ca_cert": str(service.gateway.folder / "ca.crt"), "api_key": service.gateway.key}
        settings = {"name": f"{way} {chosen.name}", "shape": shape, "inputs": str(chosen.inputs), **access, **settings}
        return Stream(url=url, protocol=protocol, model=chosen.name, **settings)


Way = Literal["grpc", "http", "grpc by gateway", "http by gateway"]
WAYS: tuple[Way, ...] = ("grpc", "http", "grpc by gateway", "http by gateway")


class Service:
    """The server and the gateway, up inside the `with` block."""

    def __init__(
        self, folder: Path, repository: Path, models: Path, *, poll_s: int | None = None, **environment: str
    ) -> None:
        self.folder, self.repository, self._models = folder, repository, models
        self.ports = {name: free_port() for name in ("http", "grpc", "metrics")}
        self.http_url, self.grpc_url = (f"127.0.0.1:{self.ports[name]}" for name in ("http", "grpc"))
        self._poll = [] if poll_s is None else ["--poll-s", str(poll_s)]
        # Triton fills the memory that a malformed request asks for until the kernel ends something: it is to end at once.
        self._bound = ["prlimit", f"--as={MOST_MEMORY}", "setpriv", "--pdeathsig", "TERM"]
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self.gateway: Gateway
        self.crowd_key: str

    def __enter__(self) -> Self:
        skip_without_nginx()
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
            text = limits(served_models(self.repository, self._models))
            with pytest.MonkeyPatch.context() as patch:
                for name, value in self._environment.items():
                    patch.setenv(name, value)
                self.gateway = Gateway(self.folder, text, self.http_url, self.grpc_url)
            self._put_the_gateway_first()
            # Who misbehaves has a key of its own: a key is held to a number of requests at a time.
            self.crowd_key = self.gateway.add_key("crowd", rate_rps=100_000)
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
        """Where that is allowed (root, or a `ulimit -r`): in the stack its share of the cores is larger than Triton's.

        Here it would wait for them behind the models and the load generator: all of its answers would be late.
        """
        gateway = psutil.Process(self.gateway.process.pid)
        for each in (gateway, *gateway.children(recursive=True)):  # workers that are started later inherit it
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.sched_setscheduler(each.pid, os.SCHED_RR, os.sched_param(1))

    def start(self) -> float:
        """Starts the server; how many seconds it took until every model was ready."""
        flags = [each for name, port in self.ports.items() for each in (f"--{name}-port", str(port))]
        command = [sys.executable, "-m", "serving.embedded", "--repository", str(self.repository), *flags, *self._poll]
        # setpriv in place of a preexec_fn: nothing of ours runs between fork and exec. It ends with this process.
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._bound, *command, "--behind-gateway", "--exit-timeout-s", "3"],
                env=our_environment(BUILD=str(self.folder), **self._environment),
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
        """The last line that the launcher printed."""
        lines = (self.folder / "server.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def end(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Tells the launcher to end, and waits until all of it has."""
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
        """Kills Triton outright, as the kernel does where memory is short; waits until its launcher has ended, too."""
        self.triton.kill()
        assert self._process is not None
        self._process.wait(ENDS_S)
        self._process = None

    def wait_for_the_end(self) -> None:
        """Until the launcher has noticed that its server is gone."""
        if self._process is not None and not any(name_of(each) == "tritonserver" for each in self._descendants()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDS_S)

    def bring_back(self) -> None:
        """Starts it again where it has ended, as a container's restart policy does."""
        if self._process is None or self._process.poll() is not None:
            self.start()

    @property
    def triton(self) -> psutil.Process:
        """The server's process; InvalidMeasurement where there is none."""
        for each in self._descendants():
            if name_of(each) == "tritonserver":
                return each
        raise InvalidMeasurement(f"the server has ended: {self.last_words}")

    def stubs(self, model: str = "") -> list[psutil.Process]:
        """Processes that run models, or one model."""
        return [each for each in self._descendants() if "stub" in name_of(each) and f"/{model}" in _command(each)]

    def _descendants(self) -> list[psutil.Process]:
        """Those that live."""
        try:
            found = psutil.Process(self._process.pid).children(recursive=True) if self._process else []
        except psutil.NoSuchProcess:
            return []
        return [each for each in found if _lives(each)]

    def processes(self) -> list[psutil.Process]:
        """Of the server and the gateway, the launchers left out."""
        nginx = psutil.Process(self.gateway.process.pid).children(recursive=True)
        return [*self._descendants(), *(each for each in nginx if name_of(each) == "nginx")]

    def memory_mib(self) -> float:
        """Of all of them, what they share counted once."""
        return sum(self.memory_of_each_mib().values())

    def memory_of_each_mib(self) -> dict[str, float]:
        """Of Triton, the models' processes and the gateway."""
        found = dict.fromkeys(("Triton", "models", "gateway"), 0.0)
        for each in self.processes():
            name = name_of(each)
            place = "gateway" if name == "nginx" else "Triton" if name == "tritonserver" else "models"
            found[place] += _own_bytes(each) / MIB
        return found

    def descriptors(self) -> int:
        """Files and connections that they have open."""
        return sum(_descriptors(each) for each in self.processes())

    @contextlib.contextmanager
    def client(self) -> Iterator[InferenceClient]:
        """A client over HTTP, straight to the server, that tries nothing twice."""
        with InferenceClient(self.http_url, "http", timeout_s=10, retries=0) as client:
            yield client


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def name_of(process: psutil.Process) -> str:
    """Its name, none where it has just ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        return " ".join(process.cmdline())
    return ""


def _descriptors(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.num_fds()
    return 0


def _own_bytes(process: psutil.Process) -> int:
    """What it has written: its share of files' pages would grow as other programs that read them end."""
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Pss")}
        return (kib["Pss_Anon"] + kib["Pss_Shmem"]) * 1024
    except PermissionError:  # another user's
        return process.memory_info().rss
    except (OSError, psutil.NoSuchProcess):
        return 0


class MemoryWatch:
    """Looks at a service's memory every so often, inside the `with` block; MiB by place in `samples`."""

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
    """A real input."""
    return read_inputs(model.inputs)[0]


def counted(kinds: dict[str, int]) -> str:
    """Failures by kind, in words."""
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "none"


def lost(streams: dict[str, Answers]) -> int:
    """Requests that were not answered, over all streams."""
    return sum(len(each.failed) for each in streams.values())


def told(streams: dict[str, Answers]) -> str:
    """What failed on which stream, and a reason for each kind; empty where nothing did."""
    failed = {name: each for name, each in streams.items() if each.kinds}
    return "".join(
        f"; {name}: {counted(each.kinds)} ({'; '.join(each.messages.values())[:200]})" for name, each in failed.items()
    )

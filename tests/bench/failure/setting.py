"""Shared parts of the experiments: the models, the service and the loads.

Contract: the embedded server has the flags of the stack, behind the gateway of `docker/gateway`. Both end with this
process.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import psutil

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement
from deepseek.spec.processes.children import free_ports
from loadtests.load.background_load import BackgroundLoad, Stream
from loadtests.load.inputs import read_rows
from loadtests.load.request_log import RequestLog
from loadtests.results.schedule import segments_of
from loadtests.results.settings import LoadSettings
from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import served_models
from serving.stack.gateway_limits import limits
from tests.failing_servers import url_of
from tests.gateway import Gateway, skip_without_nginx

READY_S = 600.0  # how long a start may take on a busy machine
MIB = 2**20
LONGEST_S = 3600.0  # duration of a load by users, which is stopped earlier


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
        url = url_of(service.server, protocol)
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
    """The embedded server and the gateway, inside the `with` block. A server that is started again keeps its ports."""

    server: EmbeddedServer
    gateway: Gateway

    def __init__(self, folder: Path, repository: Path, models: Path) -> None:
        self.folder, self.repository, self._models = folder, repository, models
        self._ports: dict[str, Any] = dict(zip(("http_port", "grpc_port", "metrics_port"), free_ports(3), strict=True))

    def __enter__(self) -> Self:
        skip_without_nginx()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.start()
        with ExitStack() as undo:  # of what started, if the rest fails
            undo.callback(self.end)
            text = limits(served_models(self.repository, self._models))
            self.gateway = Gateway(self.folder, text, self.server.http_url, self.server.grpc_url)
            undo.callback(self.gateway.stop)
            self._put_the_gateway_first()
            undo.pop_all()
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
        began_s = time.monotonic()
        try:
            self.server = EmbeddedServer(
                self.repository,
                **self._ports,
                timeout_s=READY_S,
                log_path=self.folder / "server.log",
                behind_gateway=True,
                exit_timeout_s=3,
            ).__enter__()
        except (InputError, GateFailed) as error:
            raise InvalidMeasurement(f"the server did not start: {error}") from None
        return time.monotonic() - began_s

    def end(self) -> None:
        self.server.stop()

    def kill(self) -> None:
        """Kills Triton, as the kernel does when memory is short."""
        os.kill(self.server.pid, signal.SIGKILL)
        self.server.stop()

    def processes(self) -> dict[int, tuple[str, float]]:
        """By pid the place of each process, "Triton", "models" or "gateway", and its memory in MiB."""
        found = {}
        for root, name in ((self.server.pid, "Triton"), (self.gateway.process.pid, "gateway")):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                for each in (psutil.Process(root), *psutil.Process(root).children(recursive=True)):
                    place = "models" if name == "Triton" and each.pid != root else name
                    found[each.pid] = place, _own_bytes(each) / MIB
        return found

    def memory_mib(self) -> dict[str, float]:
        """The memory of Triton, the models' processes and the gateway."""
        found = dict.fromkeys(("Triton", "models", "gateway"), 0.0)
        for place, mib in self.processes().values():
            found[place] += mib
        return found


def _own_bytes(process: psutil.Process) -> int:
    """Memory not shared with other processes: counted shares would grow when other readers of the same files end."""
    try:
        return process.memory_full_info().uss
    except psutil.AccessDenied:  # another user's process
        return process.memory_info().rss


@contextlib.contextmanager
def watched_memory(service: Service, every_s: float = 1.0) -> Iterator[list[dict[str, float]]]:
    """Samples of the service's memory, MiB by place, taken inside the `with` block."""
    samples, stopping = list[dict[str, float]](), threading.Event()

    def sample() -> None:
        samples.append(service.memory_mib())
        while not stopping.wait(every_s):
            samples.append(service.memory_mib())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        stopping.set()
        thread.join()


def first_row(model: Model) -> dict[str, np.ndarray]:
    return next(iter(read_rows(model.inputs).values()))


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

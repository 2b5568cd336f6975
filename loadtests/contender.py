"""A setting as it is served: published into a repository of its own, a real server over it, real load on it.

Contract: publishing and serving are other processes (`python -m export.to_triton`, `python -m serving.embedded` or
another command), so that what is measured is what is deployed. A server ends with its `with` block, and with this
process, however that ends.

Example:
    with contender(setting, place, "a") as served:
        served.throughput_rps(users=32, duration_s=6)
        served.try_rate(120).outcome        # "holds"
"""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from deepseek_client import InferenceClient, InferenceError
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, Precision, PublishedManifest, TunedFile
from loadtests import run as runner
from loadtests.results import Settings
from loadtests.slo import generator_problems
from loadtests.trial import Trial, Trials, keep, seconds_needed
from loadtests.tuning import Setting

# The server of the target onnxruntime; {names} are filled in.
EMBEDDED = (
    f"{shlex.quote(sys.executable)} -m serving.embedded --repository {{repository}} --http-port {{http_port}} "
    "--grpc-port {grpc_port} --metrics-port {metrics_port}"
)
START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
_ROOT = str(Path(__file__).resolve().parent.parent)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


class NotServed(Exception):
    """A setting that cannot be published or does not start; the reason is one line."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how contenders are served and loaded; the same for all of one search."""

    spec: DeploymentSpec
    """With the target's SLO in place, without tuned values."""
    settings: Settings
    """Of every load, but for its URL, rate and length."""
    precision: Precision | None
    """None: what `export.compare` chose."""
    server: str
    """Command with {repository}, {http_port}, {grpc_port} and {metrics_port}."""
    folder: Path
    least_s: float
    """Of a trial; longer where the SLO's percentiles need more samples."""
    console: Console


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A setting that is being served."""

    setting: Setting
    trials: Trials
    manifest: PublishedManifest
    least_s: float
    machine: dict[str, Any] = field(default_factory=dict)
    """The load generator's, known after the first load."""

    def throughput_rps(self, users: int, duration_s: float) -> float:
        """Answers/s in a closed loop."""
        settings = replace(self.trials.settings, users=users, rate_rps=None, duration_s=duration_s)
        run = runner.measure(settings, self.trials.spec, self.trials.served, self.trials.console)
        run = keep(run, self.trials.folder)
        self.machine.update(run.machine)
        if problems := generator_problems(run, self.trials.spec.slo):
            self.trials.console.print(f"note: closed loop of {users}: {problems[0]}")
        return run.window.throughput_rps

    def try_rate(self, rate_rps: float, seed: int = 0, *, phase: Literal["bisect", "confirm"] = "bisect") -> Trial:
        """One open-loop run, judged."""
        needed_s = seconds_needed(self.trials.spec.slo, rate_rps)
        return self.trials(rate_rps, phase, float(math.ceil(max(self.least_s, needed_s))), seed)

    def trial_s(self, rate_rps: float) -> float:
        """About how long `try_rate` takes, warm-up and start of the generator included."""
        return max(self.least_s, seconds_needed(self.trials.spec.slo, rate_rps)) + self.trials.settings.warmup_s + 3


@contextmanager
def contender(setting: Setting, place: Place, name: str) -> Iterator[Contender]:
    """Publishes a setting and serves it while the block runs; NotServed where that does not work."""
    folder = place.folder / name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        manifest = publish(setting, place, folder)
        ports = dict(zip(("http_port", "grpc_port", "metrics_port"), _free_ports(3), strict=True))
        url = f"127.0.0.1:{ports['grpc_port' if place.settings.protocol == 'grpc' else 'http_port']}"
        settings = replace(place.settings, url=url)
        with _server(place, folder, ports) as process:
            _wait_until_ready(process, settings, folder / "server.log")
            served = runner.check(replace(settings, rate_rps=None, users=1), place.spec)
            trials = Trials(
                spec=place.spec, settings=settings, served=served, folder=place.folder / "runs", console=place.console
            )
            yield Contender(setting=setting, trials=trials, manifest=manifest, least_s=place.least_s)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def publish(setting: Setting, place: Place, folder: Path) -> PublishedManifest:
    """Makes `folder/repository` as `make engine` would with these tuned values; returns the manifest of its engine."""
    settings, tuned = place.settings, folder / "tuned.toml"
    folder.mkdir(parents=True, exist_ok=True)
    TunedFile(targets={settings.target: setting.tuned()}).write(tuned)
    command = [sys.executable, "-m", "export.to_triton", "--model", settings.model, "--models", settings.models]
    command += ["--target", settings.target, "--tuned", str(tuned), "--repository", str(folder / "repository")]
    command += ["--precision", place.precision] if place.precision else []
    run = subprocess.run(command, capture_output=True, text=True, env=_environment())
    if run.returncode:
        raise NotServed(_last_line(run.stderr) or f"export.to_triton ended with status {run.returncode}")
    return PublishedManifest.load(folder / "repository" / settings.model / "1" / "manifest.json")


@contextmanager
def _server(place: Place, folder: Path, ports: dict[str, int]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        command = [
            part.format(repository=(folder / "repository").resolve(), **ports) for part in shlex.split(place.server)
        ]
    except (KeyError, IndexError, ValueError) as error:
        allowed = "{repository}, {http_port}, {grpc_port}, {metrics_port}"
        raise InputError(f"--server {place.server!r}: {error!r}; the fields are {allowed}") from None
    parent = os.getpid()
    with (folder / "server.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                command,
                env=_environment(BUILD=str(folder)),  # Triton's own log goes there, too
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone, and we end it
                preexec_fn=lambda: _die_with_parent(parent),
            )
        except OSError as error:
            raise InputError(f"--server: {command[0]} cannot be started: {error.strerror}") from None
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _die_with_parent(parent: int) -> None:
    """In the child: SIGTERM when this process ends, however it ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


def _wait_until_ready(process: subprocess.Popen[bytes], settings: Settings, log: Path) -> None:
    ends_at = time.monotonic() + START_TIMEOUT_S
    with InferenceClient(settings.url, settings.protocol, timeout_s=2, retries=0) as client:
        while time.monotonic() < ends_at:
            if process.poll() is not None:
                raise NotServed(_last_line(log.read_text(errors="replace")) or f"ended with {process.returncode}")
            with suppress(InferenceError):
                if client.ready(settings.model):
                    return
            time.sleep(0.1)
    raise NotServed(f"not ready within {START_TIMEOUT_S:g} s")


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [_ROOT, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


def _free_ports(count: int) -> list[int]:
    """Ports that are free now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else ""

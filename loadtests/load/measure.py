"""Runs Locust over one or several loads, shows the progress, and saves the measurements.

Contract: a run appears atomically, and Locust and its workers always end with the call. Callers run `preflight` first.
On other machines `work_for` sends a share of the same loads.
"""

import importlib.metadata
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
from deepseek_client import ModelMetadata
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deepseek.spec import DeploymentSpec, InvalidMeasurement
from deepseek.spec.machine.cpu import memory_bytes, this_cpu
from deepseek.spec.processes.children import free_ports, our_environment
from loadtests.load.replay import plan_file
from loadtests.load.task_metric import of_served
from loadtests.load.workers.recorder import rows_file
from loadtests.results.run import Run, new_run, publish, runs_folder
from loadtests.results.settings import LONGEST_PREPARATION_S, LoadSettings
from loadtests.slo.slo_demands import in_flight_for

LOCUSTFILE = Path(__file__).parents[1] / "locustfile.py"
MASTER_PORT = 5557  # Locust's default
WORKERS_WAIT_S = 300  # for the workers on other machines to start
MASTER_WAIT_S = 300  # of such a worker
START_S = 3.5  # about what the processes take to start, for each run
LOCUST = (sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE), "--loglevel", "WARNING")


@dataclass(frozen=True, kw_only=True)
class ModelLoad:
    settings: LoadSettings
    spec: DeploymentSpec
    served: ModelMetadata
    plan: np.ndarray | None = None
    """Of a replay: an array of `replay.PLAN`."""


def measure(
    settings: LoadSettings, spec: DeploymentSpec, served: ModelMetadata, console: Console, folder: Path | None = None
) -> Run:
    """`measure_together` for the load of one model."""
    return measure_together([ModelLoad(settings=settings, spec=spec, served=served)], console, folder=folder)[0]


def measure_together(
    loads: Sequence[ModelLoad],
    console: Console,
    *,
    folder: Path | None = None,
    web_port: int | None = None,
    remote: bool = False,
    and_then: Callable[[list[Run]], None] | None = None,
) -> list[Run]:
    """Runs Locust over the loads and saves one run for each, all with the same name.

    The runs go into `folder`, or into the load tests of their models, where `deepseek verdict` judges the latest. With
    `remote` no workers are started: the call waits for that number of `work_for` on other machines. `and_then` is
    called while Locust's page is still open.
    """
    loads = [_fitted(load) for load in loads]
    with ExitStack() as stack:
        drafts = [stack.enter_context(new_run(folder or runs_folder(load.settings.model))) for load in loads]
        measured, started_at = _locust_measures(stack, loads, drafts[0], console, web_port, remote)
        if measured["generator"]["workers_lost"]:
            print((drafts[0] / "locust.log").read_text(), end="", file=sys.stderr)
        for load, draft, part in zip(loads, drafts, measured["parts"], strict=True):
            rows_file(drafts[0], load.settings.model).rename(draft / "seconds.jsonl")
            rows = (draft / "seconds.jsonl").read_bytes().count(b"\n")
            data = {"started_at": started_at, "generator": measured["generator"], "rows": rows, **_facts(load, part)}
            (draft / "run.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
        for leftover in ("settings.json", "measured.json", "locust.log"):
            (drafts[0] / leftover).unlink()
        for load in loads:
            plan_file(drafts[0], load.settings.model).unlink(missing_ok=True)
        runs = [Run.load(folder) for folder in publish(*drafts)]
        if and_then is not None:
            and_then(runs)
        return runs


def _fitted(load: ModelLoad) -> ModelLoad:
    """The load with a limit on the requests in flight."""
    most = load.settings.max_in_flight or in_flight_for(load.settings, load.spec.slo)
    return replace(load, settings=replace(load.settings, max_in_flight=most))


def _facts(load: ModelLoad, part: dict[str, Any]) -> dict[str, Any]:
    """The facts about a load that its run keeps, beside the generator's health."""
    settings, served = load.settings, load.served
    return {
        "settings": asdict(settings),
        "machine": _machine(),
        "quality": of_served(settings.model, load.spec.precision.metric, served, settings.protocol, settings.target),
        "lengths": part["lengths"],
        "server": {
            "version": served.versions[-1] if served.versions else "",
            "parameters": dict(served.parameters),
            "statistics": part["server"],
        },
    }


def _locust_measures(
    stack: ExitStack, loads: Sequence[ModelLoad], folder: Path, console: Console, web_port: int | None, remote: bool
) -> tuple[dict[str, Any], str]:
    """Locust's measurements and its start time; Locust's page stays open until the stack closes."""
    path, log, measured = folder / "settings.json", folder / "locust.log", folder / "measured.json"
    _write_settings(loads, path)
    log_file = stack.enter_context(log.open("w"))
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    settings = loads[0].settings
    users = sum(load.settings.users or 1 for load in loads)
    process = stack.enter_context(_locust(settings, users, path, log_file, web_port, remote))
    _show_progress(process, settings, console)
    if not measured.is_file():
        status = process.wait()
        print(log.read_text(), end="", file=sys.stderr)
        raise InvalidMeasurement(f"the load generator ended early with status {status}; nothing was saved")
    if web_port is None:
        process.wait()
    return json.loads(measured.read_text()), started_at


@contextmanager
def _locust(
    settings: LoadSettings, users: int, path: Path, log: IO[str], web_port: int | None, remote: bool
) -> Iterator[subprocess.Popen[str]]:
    """Locust over the settings file; it always ends with the block."""
    waiting = str(max(users, settings.workers))
    planning_s = sum(segment.arrivals for segment in settings.segments) / 1e6  # upper bound for the preparation
    planning_s += LONGEST_PREPARATION_S
    longest_s = math.ceil(planning_s + settings.warmup_s + settings.duration_s + 2 * settings.timeout_s + 10)
    command = [*LOCUST, "--settings", str(path)]
    command += ["--users", waiting, "--spawn-rate", waiting, "--run-time", f"{longest_s}s"]  # the locustfile ends it
    if web_port is None:
        command += ["--headless", "--only-summary"]
    else:
        command += ["--autostart", "--web-host", "127.0.0.1", "--web-port", str(web_port)]
    if remote:
        command += ["--master", "--master-bind-port", str(MASTER_PORT), "--expect-workers", str(settings.workers)]
        command += ["--expect-workers-max-wait", str(WORKERS_WAIT_S)]
    elif settings.workers > 1:
        port = str(free_ports(1)[0])
        command += ["--processes", str(settings.workers), "--master-bind-host", "127.0.0.1"]
        command += ["--master-bind-port", port, "--master-port", port, "--expect-workers-max-wait", "30"]
    process = subprocess.Popen(
        command,
        env=_locusts_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C reaches only this process, which then stops Locust
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(3)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the workers too
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def work_for(master: str, loads: Sequence[ModelLoad]) -> int:
    """Sends a share of the loads for a master on another machine with the same loads; returns Locust's exit status."""
    _await_master(master)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "settings.json"
        _write_settings([_fitted(load) for load in loads], path)
        command = [*LOCUST, "--settings", str(path), "--worker"]
        command += ["--master-host", master, "--master-port", str(MASTER_PORT)]
        return subprocess.run(command, env=_locusts_environment(), stdin=subprocess.DEVNULL).returncode


def _locusts_environment() -> dict[str, str]:
    """Without the user's own variables of Locust, such as LOCUST_MODE_MASTER, which would change or stop the load."""
    others = {name: value for name, value in our_environment().items() if not name.startswith("LOCUST_")}
    return {**others, "LOCUST_PARENT": str(os.getpid())}


def _await_master(host: str) -> None:
    """Waits until the master listens, since Locust waits in silence; InvalidMeasurement if it never does."""
    place, why = f"{host}:{MASTER_PORT}", ""
    give_up_at = time.monotonic() + MASTER_WAIT_S
    while time.monotonic() < give_up_at:
        try:
            socket.create_connection((host, MASTER_PORT), timeout=5).close()
            return
        except OSError as error:
            if not why:
                print(f"waiting for the master at {place}", file=sys.stderr)
            why = error.strerror or str(error)
        time.sleep(1)
    raise InvalidMeasurement(f"no master at {place} after {MASTER_WAIT_S} s ({why}); start it, or correct --worker-of")


def _write_settings(loads: Sequence[ModelLoad], path: Path) -> None:
    path.write_text(json.dumps([asdict(load.settings) for load in loads]), encoding="utf-8")
    for load in loads:
        if load.plan is not None:
            np.save(plan_file(path.parent, load.settings.model), load.plan)


def _show_progress(process: subprocess.Popen[str], settings: LoadSettings, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    assert process.stdout is not None
    shown = console.file.isatty()  # rich's own `is_terminal` is also true for a log with FORCE_COLOR=1, as in CI
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        bar = progress.add_task("starting", total=settings.warmup_s + settings.duration_s, now="")
        for line in process.stdout:
            if not line.startswith("{"):
                continue  # Locust's summary
            said = json.loads(line)
            if "finished" in said:
                return
            if "unprepared" in said:
                raise InvalidMeasurement(f"the load generator could not be prepared: {said['unprepared']}")
            if "stopped" in said:
                raise InvalidMeasurement(
                    "stopped on Locust's page before its end; nothing was saved: wait until it finishes, or measure "
                    "for less time (--duration-s, DURATION_S=)"
                )
            if "unwritten" in said:
                raise OSError(*said["unwritten"])
            progress.update(
                bar,
                description="warming up" if said["second"] <= 0 else "measuring",
                completed=settings.warmup_s + said["second"],
                now=f"{said['completed']}/s, {said['failed']} failed, {said['in_flight']} in flight",
            )


def _machine() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for name in ("locust", "grpcio", "tritonclient"):
        versions[name] = importlib.metadata.version(name)
    cpu = this_cpu()
    return {
        "cpu": cpu.model,
        "cores": cpu.cores,
        "memory_gib": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }

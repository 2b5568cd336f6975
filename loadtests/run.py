"""Runs one load test against a model that is being served, and saves what was measured.

Everything is checked before any load: the spec, the settings, the inputs file, that the server answers,
has the model ready and accepts the inputs. Then Locust runs `loadtests/locustfile.py`, and the run takes
its place under `build/<model>/loadtests/`, whole or not at all. Judging is `loadtests.slo`'s, drawing
`loadtests.report`'s.

Open loop (--rate or --shape; by default at each rate that the spec's SLO names): requests leave on a fixed
schedule, whatever the server does. Closed loop (--users): each user waits for its answer, so a slow server is
asked less.

Exit codes: 0 the measurement is valid, whatever it found; 2 wrong input; 3 the generator was not healthy.

Examples:
    python -m loadtests.run                                             # gRPC at 127.0.0.1:8001, the SLO's rate
    python -m loadtests.run --protocol http --url 127.0.0.1:8000 --rate 200 --duration-s 60
    python -m loadtests.run --shape "50x30, 500x5, 50x30"               # a spike; 10-200x60 is a ramp
    python -m loadtests.run --users 4 --duration-s 10                   # to set beside perf_analyzer
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, get_args

import psutil
from deepseek_client import InferenceClient, InferenceError, ModelMetadata
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from deepseek.spec import (
    DeploymentSpec,
    InputError,
    InvalidMeasurement,
    Parser,
    Target,
    add_model_arguments,
    build_dir,
    run_command,
)
from loadtests import server_statistics, slo
from loadtests.inputs import read_inputs
from loadtests.quality import of_served
from loadtests.results import Run, Settings, new_run, publish
from loadtests.schedule import segments_of

LOCUSTFILE = Path(__file__).with_name("locustfile.py")
DEFAULT_PORTS = {"grpc": 8001, "http": 8000}
MOST_REQUESTS = 10_000_000  # a slip of the hand rather than a plan; a day at 100/s is 8.6 million


def check(settings: Settings, spec: DeploymentSpec) -> ModelMetadata:
    """Everything that can be known to be wrong before any load; returns what the server says of the model."""
    _check_numbers(settings)
    rows = read_inputs(Path(settings.inputs))
    if rows[0].keys() != spec.inputs.keys():
        raise InputError(f"{settings.inputs}: holds {_listed(rows[0])}, deploy.toml has {_listed(spec.inputs)}")
    try:
        with InferenceClient(settings.url, settings.protocol, timeout_s=settings.timeout_s, retries=0) as client:
            if not client.ready():
                raise InputError(f"the server at {settings.url} is not ready; wait for it, or see its log")
            if not client.ready(settings.model):
                raise InputError(f"{settings.model} is not ready at {settings.url}; is it in the model repository?")
            served = client.metadata(settings.model)
            for row in rows:
                client.prepare(settings.model, row)
            client.infer(settings.model, rows[0])
    except InferenceError as error:
        raise InputError(str(error)) from None
    return served


def _check_numbers(settings: Settings) -> None:
    if [settings.rate_rps, settings.shape, settings.users].count(None) != 2:
        raise InputError(
            "give --rate or --shape (open loop) or --users (closed loop), one of them; slo.rate_rps is the default rate"
        )
    for name in ("rate_rps", "users", "duration_s", "timeout_s", "max_in_flight", "workers"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name.removesuffix('_rps').replace('_', '-')} {value:g}: it must be more than 0")
    if settings.duration_s % 1:  # a second is what counts are kept by
        raise InputError(f"--duration-s {settings.duration_s:g}: it must be a whole number")
    if not 0 <= settings.warmup_s < math.inf:
        raise InputError(f"--warmup-s {settings.warmup_s:g}: it must be 0 or more")
    if settings.open_loop:
        planned = sum(segment.arrivals for segment in settings.segments)
        if not 1 <= planned <= MOST_REQUESTS:
            what = f"--rate {settings.rate_rps:g} for {settings.duration_s:g} s"
            raise InputError(
                f"{what if settings.shape is None else f'--shape {settings.shape}'} plans {planned} requests; "
                f"1 to {MOST_REQUESTS} are possible"
            )
    elif settings.users is not None and settings.users < settings.workers:
        raise InputError(f"--users {settings.users} for --workers {settings.workers}: each worker needs one or more")
    elif settings.users is not None and settings.users > settings.max_in_flight:
        raise InputError(f"--users {settings.users}: at most {settings.max_in_flight}; --max-in-flight raises it")


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"


def measure(
    settings: Settings,
    spec: DeploymentSpec,
    served: ModelMetadata,
    console: Console,
    *,
    web_port: int | None = None,
    and_then: Callable[[Run], None] | None = None,
) -> Run:
    """Runs Locust over the settings and saves the run; `and_then` is called while Locust's page is still there."""
    with new_run(settings.model) as draft:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        path = draft / "settings.json"
        path.write_text(json.dumps(asdict(settings)), encoding="utf-8")
        log = draft / "locust.log"
        with log.open("w") as log_file, _locust(settings, path, log_file, web_port) as process:
            _show_progress(process, settings, console)
            measured = draft / "measured.json"
            if not measured.is_file():
                status = process.wait()
                print(log.read_text(), end="", file=sys.stderr)
                raise InvalidMeasurement(f"the load generator ended early, with status {status}; nothing was saved")
            if web_port is None:
                process.wait()
            data = {
                "settings": asdict(settings),
                "started_at": started_at,
                **json.loads(measured.read_text()),
                "machine": _machine(),
                "quality": of_served(spec.name, spec.precision.metric, served, settings.protocol, settings.target),
            }
            version = served.versions[-1] if served.versions else ""
            data["server"] = {"version": version, "parameters": dict(served.parameters), "statistics": data["server"]}
            (draft / "run.json").write_text(json.dumps(data, indent=2), encoding="utf-8")
            for leftover in (path, measured, log):
                leftover.unlink()
            run = Run.load(publish(draft))
            if and_then is not None:
                and_then(run)
            return run


@contextmanager
def _locust(settings: Settings, path: Path, log: IO[str], web_port: int | None) -> Iterator[subprocess.Popen[str]]:
    """Locust over the settings file; ended, whatever happens, when the block ends."""
    users = str(max(settings.users or 1, settings.workers))
    longest_s = math.ceil(settings.warmup_s + settings.duration_s + 2 * settings.timeout_s + 10)
    command = [sys.executable, "-m", "locust", "--locustfile", str(LOCUSTFILE)]
    command += ["--users", users, "--spawn-rate", users, "--run-time", f"{longest_s}s"]  # the file ends it earlier
    command += ["--loglevel", "WARNING", "--settings", str(path)]
    if web_port is None:
        command += ["--headless", "--only-summary"]
    else:
        command += ["--autostart", "--web-host", "127.0.0.1", "--web-port", str(web_port)]
    if settings.workers > 1:
        port = str(_free_port())
        command += ["--processes", str(settings.workers), "--master-bind-host", "127.0.0.1"]
        command += ["--master-bind-port", port, "--master-port", port, "--expect-workers-max-wait", "30"]
    root = str(LOCUSTFILE.parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,  # Ctrl-C reaches us alone, and we end it
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


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _show_progress(process: subprocess.Popen[str], settings: Settings, console: Console) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[now]}"))
    assert process.stdout is not None
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=settings.warmup_s + settings.duration_s, now="")
        for line in process.stdout:
            if not line.startswith("{"):
                continue  # Locust's own summary
            said = json.loads(line)
            if "finished" in said:
                return
            progress.update(
                bar,
                description="warming up" if said["second"] <= 0 else "measuring",
                completed=settings.warmup_s + said["second"],
                now=f"{said['completed']}/s, {said['failed']} failed, {said['in_flight']} in flight",
            )


def _machine() -> dict[str, Any]:
    """Where the generator ran, and with what."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    versions = {"python": platform.python_version()}
    for name in ("locust", "grpcio", "tritonclient"):
        versions[name] = importlib.metadata.version(name)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()}",
        "versions": versions,
    }


def summary(run: Run) -> dict[str, Any]:
    """The figures of a run, as `--json` prints them; a latency that only failures reached is null."""
    latency = {}
    for kind in ("intended", "service") if run.settings.open_loop else ("service",):
        found = run.window.latency(kind)
        figures = {f"p{percent:g}_ms": found.percentile_ms(percent) for percent in (50, 95, 99, 99.9)}
        latency[kind] = {name: value if math.isfinite(value) else None for name, value in figures.items()}
    return {
        "run": str(run.folder),
        "planned": run.window.planned,
        "answered": run.window.ok,
        "errors": dict(run.window.errors),
        "throughput_rps": run.window.throughput_rps,
        "latency": latency,
        "generator": {**run.generator, "attempted_share": run.window.attempted_share},
        "server": run.server,
    }


def described(settings: Settings) -> str:
    """What is measured, in a line."""
    loop = f"open loop at {settings.shape or f'{settings.rate_rps:g}'}/s"
    if not settings.open_loop:
        loop = f"closed loop, {settings.users} users"
    seconds = f"{settings.warmup_s:g} s of warm-up and {settings.duration_s:g} s"
    return f"{settings.model} over {settings.protocol} at {settings.url}, {loop}, {seconds}"


def _print(run: Run, console: Console) -> None:
    window = run.window
    counts = f"{window.planned} requests, {window.ok} answered, {window.failed} failed"
    console.print(f"{counts}; {window.throughput_rps:.1f} answers/s")
    for kind, figures in summary(run)["latency"].items():
        shown = ", ".join(f"{name[:-3]} {'never' if ms is None else f'{ms:.2f} ms'}" for name, ms in figures.items())
        console.print(f"{kind} latency: {shown}")
    statistics = run.server["statistics"]
    if means := server_statistics.means_ms(statistics):
        shown = ", ".join(f"{name.replace('_', ' ')} {mean:.2f} ms" for name, mean in means.items())
        batch, refused = server_statistics.mean_batch(statistics), statistics["fail"]["count"]
        console.print(f"in the server: {shown}; mean batch {batch:.2f}; {refused} rejected or failed")
    console.print(f"run: {run.folder}", soft_wrap=True)


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m loadtests.run")
    add_model_arguments(parser)
    parser.add_argument(
        "--target", choices=get_args(Target), default="onnxruntime", help="what runs the graph (default: %(default)s)"
    )
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--url", help="host:port (default: 127.0.0.1, port 8001 for grpc, 8000 for http)")
    parser.add_argument("--rate", type=float, help="requests/s, open loop (default: each rate that the SLO names)")
    parser.add_argument("--shape", help='rates that change: RATExSECONDS or RATE-RATExSECONDS, as "50x30, 50-200x60"')
    parser.add_argument("--users", type=int, help="closed loop: so many users, each back to back")
    parser.add_argument("--duration-s", type=float, default=20, help="measured seconds (default: %(default)s)")
    parser.add_argument("--warmup-s", type=float, default=5, help="seconds of load before them (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=5, help="deadline of a request (default: %(default)s)")
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default: %(default)s)")
    parser.add_argument(
        "--max-in-flight", type=int, default=512, help="more unanswered requests are dropped (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that send; -1: one a core (default: 1)")
    parser.add_argument("--web", type=int, metavar="PORT", help="show Locust's own page there while it runs and after")
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    return parser.parse_args()


def _settings(args: argparse.Namespace, spec: DeploymentSpec) -> Settings:
    rate, shape, duration_s = args.rate, args.shape, args.duration_s
    if (args.rate, args.shape, args.users) == (None, None, None) and (asked := slo.rates(spec.slo)):
        rate = asked[0] if len(asked) == 1 else None
        shape = None if rate else ", ".join(f"{each:g}x{duration_s:g}" for each in asked)
    if shape is not None:
        duration_s = sum(segment.duration_s for segment in segments_of(shape))
    return Settings(
        model=args.model,
        models=args.models,
        target=args.target,
        protocol=args.protocol,
        url=args.url or f"127.0.0.1:{DEFAULT_PORTS[args.protocol]}",
        inputs=args.inputs or str(build_dir(args.model) / "evaluation.npz"),
        rate_rps=rate,
        shape=shape,
        users=args.users,
        arrivals=args.arrivals,
        seed=args.seed,
        warmup_s=args.warmup_s,
        duration_s=duration_s,
        timeout_s=args.timeout_s,
        max_in_flight=args.max_in_flight,
        workers=len(os.sched_getaffinity(0)) if args.workers == -1 else args.workers,
    )


def main() -> int:
    """Checks, measures, saves, prints."""
    args = _parse()
    spec = DeploymentSpec.of_model(args.model, args.models).for_target(args.target)
    settings = _settings(args, spec)
    served = check(settings, spec)
    console = Console(stderr=True)
    for warning in slo.too_short(settings, spec.slo):
        console.print(f"note: {warning}")
    console.print(described(settings))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: cleanly
    if args.web is not None:
        console.print(f"Locust's page: http://127.0.0.1:{args.web}")

    def show(run: Run) -> None:
        if args.json:
            print(json.dumps(summary(run), indent=2), flush=True)
        else:
            _print(run, Console())
        if args.web is not None:
            console.print("the page stays until Ctrl-C")
            with suppress(KeyboardInterrupt):
                signal.pause()

    run = measure(settings, spec, served, console, web_port=args.web, and_then=show)
    problems = slo.generator_problems(run, spec.slo)
    if problems:
        raise InvalidMeasurement(f"{run.folder}: {'; '.join(problems)}")
    return 0


if __name__ == "__main__":
    run_command(main)

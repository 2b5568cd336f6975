"""Runs one load test against a model that is being served, and saves what was measured.

Everything is checked before any load (`loadtests.check`): the spec, the settings, the inputs file, that the server
answers, has the model ready and accepts the inputs. Then Locust runs `loadtests/locustfile.py`
(`loadtests.measure`), and the run takes its place under `build/<model>/loadtests/`, whole or not at all. Judging is
`loadtests.slo`'s, drawing `loadtests.report`'s.

Open loop (--rate or --shape; by default at each rate that the spec's SLO names): requests leave on a fixed
schedule, whatever the server does. Closed loop (--users): each user waits for its answer, so a slow server is
asked less. Mixed traffic (--mix): several models at once, a run each, see `loadtests.mix`. From several machines:
one with --remote-workers plans, counts and saves; so many others, with the same flags and --worker-of that one, send.

Exit codes: 0 the measurement is valid, whatever it found; 2 wrong input; 3 the generator was not healthy.

Examples:
    python -m loadtests.run                                             # gRPC at 127.0.0.1:8001, the SLO's rate
    python -m loadtests.run --protocol http --url 127.0.0.1:8000 --rate 200 --duration-s 60
    python -m loadtests.run --shape "50x30, 500x5, 50x30"               # a spike; 10-200x60 is a ramp
    python -m loadtests.run --users 4 --duration-s 10                   # to set beside perf_analyzer
    python -m loadtests.run --mix recommender:3,minilm:1 --rate 120     # 90/s and 30/s
    python -m loadtests.run --url triton:8001 --rate 5000 --remote-workers 4            # here, and on four machines:
    python -m loadtests.run --url triton:8001 --rate 5000 --remote-workers 4 --worker-of here.example.com
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import socket
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, Parser, SloSpec, run_command
from loadtests import limits, server_statistics, slo
from loadtests.check import check, check_duration
from loadtests.endpoint import add_endpoint_arguments, endpoint_of, inputs_of
from loadtests.measure import Load, measure_together, work_for
from loadtests.mix import Mix, models_of
from loadtests.results import Distribution, Run, Settings
from loadtests.schedule import segments_of


def summary(run: Run) -> dict[str, Any]:
    """The figures of a run, as `--json` prints them; a latency that only failures reached is null."""
    latency = {}
    for kind in ("intended", "service") if run.settings.open_loop else ("service",):
        found = run.window.latency(kind)
        latency[kind] = _figures(found)
    return {
        "run": str(run.folder),
        "planned": run.window.planned,
        "answered": run.window.ok,
        "errors": dict(run.window.errors),
        "throughput_rps": run.window.throughput_rps,
        "latency": latency,
        "lengths": {
            length: {"planned": found.planned, "errors": dict(found.errors), **_figures(found.latency(run.judged))}
            for length, found in run.lengths.items()
        },
        "generator": {
            **run.generator,
            "attempted_share": run.window.attempted_share,
            "lag": _figures(run.window.latency("lag")) if run.settings.open_loop else None,
        },
        "server": run.server,
    }


def _figures(found: Distribution) -> dict[str, float | None]:
    figures = {f"p{percent:g}_ms": found.percentile_ms(percent) for percent in (50, 95, 99, 99.9)}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def described(settings: Settings) -> str:
    """What is measured, in a line."""
    if settings.open_loop:
        loop = f"open loop at {settings.shape if settings.rate_rps is None else f'{settings.rate_rps:g}'}/s"
    else:
        loop = f"closed loop, {settings.users} users"
    seconds = f"{settings.warmup_s:g} s of warm-up and {settings.duration_s:g} s"
    return f"{settings.model} over {settings.protocol} at {settings.url}, {loop}, {seconds}"


def _print(run: Run, console: Console) -> None:
    window = run.window
    if run.settings.mix:
        console.print(run.settings.model, style="bold")
    counts = f"{window.planned} requests, {window.ok} answered, {window.failed} failed"
    console.print(f"{counts}; {window.throughput_rps:.1f} answers/s")
    for kind, figures in summary(run)["latency"].items():
        shown = ", ".join(f"{name[:-3]} {'never' if ms is None else f'{ms:.2f} ms'}" for name, ms in figures.items())
        console.print(f"{kind} latency: {shown}")
    if run.lengths:
        console.print(_lengths_table(run))
    statistics = run.server["statistics"]
    if means := server_statistics.means_ms(statistics):
        shown = ", ".join(f"{name.replace('_', ' ')} {mean:.2f} ms" for name, mean in means.items())
        batch, failed = server_statistics.mean_batch(statistics), statistics["fail"]["count"]
        console.print(f"in the server: {shown}; mean batch {batch:.2f}; {failed} failed, as Triton counts")
    console.print(f"run: {run.folder}", soft_wrap=True)


def _lengths_table(run: Run) -> Table:
    """What requests of each length took."""
    table = Table("inputs of", "requests", "failed", "p50", "p95", "p99", title=f"{run.judged} latency by length")
    for length, found in run.lengths.items():
        latency = found.latency(run.judged)
        # Of fewer requests than 1 in 1 - p the percentile would be the slowest alone.
        told = {p: latency.percentile_ms(p) if latency.total * (100 - p) >= 100 else math.nan for p in (50, 95, 99)}
        shown = [slo.formatted("ms", value) for value in told.values()]
        table.add_row(length, str(found.planned), str(found.failed), *shown)
    return table


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m loadtests.run")
    add_endpoint_arguments(parser)
    parser.add_argument("--rate", type=float, help="requests/s, open loop (default: each rate that the SLO names)")
    parser.add_argument("--shape", help='rates that change: RATExSECONDS or RATE-RATExSECONDS, as "50x30, 50-200x60"')
    parser.add_argument("--users", type=int, help="closed loop: so many users, each back to back")
    parser.add_argument("--mix", help="several models at once, with weights of their rates: recommender:3,minilm:1")
    parser.add_argument("--duration-s", type=float, default=30, help="measured seconds (default: %(default)s)")
    parser.add_argument("--warmup-s", type=float, default=5, help="seconds of load before them (default: %(default)s)")
    limits.add_timeout_argument(parser)
    parser.add_argument("--arrivals", choices=("poisson", "constant"), default="poisson", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals (default: %(default)s)")
    parser.add_argument(
        "--max-in-flight", type=int, help="a worker drops more unanswered requests (default: 512, or as the SLO needs)"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that send; -1: one a core (default: 1)")
    parser.add_argument("--remote-workers", type=int, help="so many workers on other machines send (port 5557)")
    parser.add_argument("--worker-of", metavar="HOST", help="be one of them: send for the master there")
    parser.add_argument("--web", type=int, metavar="PORT", help="show Locust's own page there while it runs and after")
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args()
    if args.remote_workers is not None and args.remote_workers < 1:
        raise InputError(f"--remote-workers {args.remote_workers}: it must be 1 or more")
    if args.worker_of and args.remote_workers is None:
        raise InputError("--worker-of takes the master's own flags, --remote-workers among them")
    if args.remote_workers is not None:
        args.workers = args.remote_workers
    if args.web is not None:
        _check_port(args.web)
    return args


def _check_port(port: int) -> None:
    """InputError where Locust's page could not be there."""
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", port))
    except OverflowError:
        raise InputError(f"--web {port}: it must be a port, 1 to 65535") from None
    except OSError as error:
        raise InputError(f"--web {port}: {error.strerror}; give the page another port") from None


def _settings(args: argparse.Namespace, model: str, rate: float | None, shape: str | None, *slos: SloSpec) -> Settings:
    """As the command line has them, of one model or of a mix as a whole."""
    duration_s = args.duration_s
    if shape is not None:
        duration_s = sum(segment.duration_s for segment in segments_of(shape))
    own = {"rate_rps": rate, "shape": shape, "users": args.users, "seed": args.seed, "duration_s": duration_s}
    return Settings(model=model, inputs=args.inputs or inputs_of(model), **own, **endpoint_of(args, *slos))


def _of_one(args: argparse.Namespace, spec: DeploymentSpec) -> Settings:
    """By default at each rate that the SLO names."""
    rate, shape = args.rate, args.shape
    if (rate, shape, args.users) == (None, None, None) and (asked := limits.rates(spec.slo)):
        rate = asked[0] if len(asked) == 1 else None
        check_duration(args.duration_s)
        shape = None if rate else ", ".join(f"{each:.15g}x{args.duration_s:.0f}" for each in asked)
    return _settings(args, args.model, rate, shape, spec.slo)


def _of_mix(args: argparse.Namespace, specs: dict[str, DeploymentSpec]) -> list[Settings]:
    """By default at the least rate that gives each model what its SLO names."""
    if args.inputs is not None:
        raise InputError("--inputs is of one model; each of a --mix has its own, build/<model>/evaluation.npz")
    mix = Mix.parse(args.mix, {model: spec.slo.rate_rps for model, spec in specs.items()})
    rate = args.rate
    if (rate, args.shape, args.users) == (None, None, None):
        rate = mix.least_rate_rps
    if rate is not None and not 0 < rate < math.inf:  # of the whole, not of a part
        raise InputError(f"--rate {rate:g}: it must be more than 0")
    whole = _settings(args, next(iter(specs)), rate, args.shape, *(spec.slo for spec in specs.values()))
    return mix.parts(whole, {model: inputs_of(model) for model in specs})


def _loads(args: argparse.Namespace) -> list[Load]:
    """What is to be sent, checked."""
    models = models_of(args.mix) if args.mix else [args.model]
    specs = {model: DeploymentSpec.of_model(model, args.models).for_target(args.target) for model in models}
    parts = _of_mix(args, specs) if args.mix else [_of_one(args, specs[args.model])]
    return [Load(settings=each, spec=specs[each.model], served=check(each, specs[each.model])) for each in parts]


def main() -> int:
    """Checks, measures, saves, prints."""
    args = _parse()
    loads = _loads(args)
    console = Console(stderr=True, markup=False)
    for load in loads:
        for warning in limits.too_short(load.settings, load.spec.slo):
            console.print(f"note: {load.settings.model}: {warning}" if args.mix else f"note: {warning}")
        console.print(described(load.settings))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: cleanly
    if args.worker_of:
        return work_for(args.worker_of, loads)
    if args.web is not None:
        console.print(f"Locust's page: http://127.0.0.1:{args.web}")

    def show(runs: list[Run]) -> None:
        if args.json:
            found = [summary(run) for run in runs]
            print(json.dumps({"mix": args.mix, "runs": found} if args.mix else found[0], indent=2), flush=True)
        else:
            for run in runs:
                _print(run, Console(markup=False))

    def show_beside_page(runs: list[Run]) -> None:
        with suppress(KeyboardInterrupt):  # the runs are saved, so that it only ends the page
            show(runs)
            console.print("the page stays until Ctrl-C")
            signal.pause()

    and_then = show if args.web is None else show_beside_page
    runs = measure_together(
        loads, console, web_port=args.web, remote=args.remote_workers is not None, and_then=and_then
    )
    problems = {
        str(run.folder): found
        for run, load in zip(runs, loads, strict=True)
        if (found := slo.generator_problems(run, load.spec.slo))
    }
    if problems:
        raise InvalidMeasurement("; ".join(f"{folder}: {'; '.join(found)}" for folder, found in problems.items()))
    return 0


if __name__ == "__main__":
    run_command(main)

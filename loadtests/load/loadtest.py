"""Runs one load test, or a mix, against a running server and saves the measurements.

Contract: `preflight` reports mistakes before any load. A run appears atomically under `build/<model>/loadtests/`.
`loadtests.slo.verdict` judges it, `loadtests.report` draws it.
"""

import argparse
import json
import math
import signal
import socket
import sys
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, SloSpec
from deepseek.spec.command import end_at_sigterm
from loadtests.load.inputs import count_rows
from loadtests.load.measure import ModelLoad, measure_together, work_for
from loadtests.load.preflight import check
from loadtests.load.replay import replay_of, rows_in, with_replay
from loadtests.load.settings_from_options import inputs_of, settings_fields
from loadtests.load.traffic_file import read_traffic
from loadtests.load.until_decided import measure_until_decided, planned_looks
from loadtests.percentiles import SUMMARY
from loadtests.results.mixes import Mix, models_of
from loadtests.results.run import Run
from loadtests.results.schedule import segments_of
from loadtests.results.settings import LoadSettings
from loadtests.results.stretch import Distribution, read_percentile, shown_percentile
from loadtests.slo import slo_demands as limits
from loadtests.slo.generator_health import generator_problems
from loadtests.slo.time_split import mean_batch, means_ms, padding_share

ALONE = ("mix", "remote_workers", "worker_of", "web", "replay")  # options that do not go with --until-decided
TIMES = ("rate", "shape", "users", "arrivals", "duration_s")  # options that do not go with --replay
OPEN_LOOP = ("arrivals", "priority")  # options that do not go with --users


def summary(run: Run) -> dict[str, Any]:
    """The figures of a run, as `--json` prints them.

    A percentile is null if it falls on a failed request, or if the requests are too few for it.
    """
    return {
        "run": str(run.folder),
        "planned": run.window.planned,
        "answered": run.window.ok,
        "errors": dict(run.window.errors),
        "messages": run.window.messages,
        "throughput_rps": run.window.throughput_rps,
        "tokens_per_s": run.tokens_per_s,
        "latency": {kind: _figures(run.window.latency(kind)) for kind in run.latencies},
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
    figures = {f"p{percent:g}_ms": read_percentile(found, percent) for percent in SUMMARY}
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def described(settings: LoadSettings) -> str:
    seconds = f"{settings.warmup_s:g} s of warm-up and {settings.duration_s:g} s"
    names = ", names of items" if settings.names else ""
    return f"{settings.model} over {settings.over} at {settings.place}{names}, {settings.load}, {seconds}"


def show(run: Run, console: Console) -> None:
    """Prints the figures of a run."""
    window = run.window
    if run.settings.mix:
        console.print(run.settings.model, style="bold")
    kinds = ", ".join(f"{count} {kind}" for kind, count in window.errors.most_common())
    counts = f"{window.planned} requests, {window.ok} answered, {window.failed} failed{kinds and f' ({kinds})'}"
    tokens = f", {run.tokens_per_s:.0f} tokens/s" if run.tokens_per_s else ""
    console.print(f"{counts}; {window.throughput_rps:.1f} answers/s{tokens}")
    for kind, message in window.messages.items():
        console.print(f"{kind}, for example: {message}", soft_wrap=True)
    for kind in run.latencies:
        latency = window.latency(kind)
        shown = ", ".join(f"p{percent:g} {shown_percentile(latency, percent)}" for percent in SUMMARY)
        console.print(f"{kind} latency: {shown}")
    if run.lengths:
        console.print(_lengths_table(run))
    statistics = run.server["statistics"]
    if means := means_ms(statistics):
        shown = ", ".join(f"{name.replace('_', ' ')} {mean:.2f} ms" for name, mean in means.items())
        batch, failed = mean_batch(statistics), statistics["fail"]["count"]
        padding = f"; padding of texts {share:.2f}" if (share := padding_share(statistics)) else ""
        console.print(f"in the server: {shown}; mean batch {batch:.2f}{padding}; {failed} failed, as Triton counts")
    console.print(f"run: {run.folder}", soft_wrap=True)


def _lengths_table(run: Run) -> Table:
    table = Table(
        "inputs of",
        "requests",
        "failed",
        *(f"p{percent:g}" for percent in SUMMARY),
        title=f"{run.judged} latency by length",
    )
    for length, found in run.lengths.items():
        latency = found.latency(run.judged)
        shown = [shown_percentile(latency, percent) for percent in SUMMARY]
        table.add_row(length, str(found.planned), str(found.failed), *shown)
    return table


def _check(args: argparse.Namespace) -> None:
    if args.worker_of and args.remote_workers is None:
        raise InputError("--worker-of: repeat all flags of the master, including --remote-workers")
    if args.remote_workers is not None:
        if "workers" in args.given:
            raise InputError("--workers: not with --remote-workers, which are one process each; leave one of them out")
        args.workers = args.remote_workers
    if args.until_decided and (
        other := next((name for name in ALONE if getattr(args, name) not in (None, False)), None)
    ):
        raise InputError(f"--until-decided: not with --{other.replace('_', '-')}; leave one of them out")
    if args.replay is None and "speed" in args.given:
        raise InputError(f"--speed {args.speed:g}: only for --replay; give a file of recorded traffic, or leave it out")
    if args.replay is not None and (other := next((name for name in TIMES if name in args.given), None)):
        raise InputError(f"--{other.replace('_', '-')}: not with --replay, which has its own times; leave one out")
    if args.shape is not None and "duration_s" in args.given:
        raise InputError("--duration-s: not with --shape, which has its own seconds; leave one of them out")
    if args.users is not None and (
        other := next((name for name in OPEN_LOOP if name in args.given and getattr(args, name)), None)
    ):
        raise InputError(f"--{other}: not with --users, who send again after each answer; leave one of them out")
    if not args.until_decided and "max_s" in args.given:
        raise InputError(f"--max-s {args.max_s:g}: only for --until-decided; add it, or leave --max-s out (BUDGET_S=)")
    if args.mix and (other := next((name for name in ("inputs", "route") if getattr(args, name) is not None), None)):
        raise InputError(f"--{other}: not with --mix, whose models each use build/<model>/evaluation.npz; leave it out")
    if args.web:
        _check_port(args.web_port)


def _check_port(port: int) -> None:
    """Raises InputError if Locust's page cannot listen on the port."""
    try:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(("127.0.0.1", port))
    except OSError as error:
        raise InputError(f"--web-port {port}: {error.strerror}; choose another port for the page") from None


def _settings(
    args: argparse.Namespace, model: str, rate: float | None, shape: str | None, *slos: SloSpec
) -> LoadSettings:
    """The settings of the command line, for one model or a whole mix."""
    duration_s = args.duration_s
    if shape is not None:
        duration_s = sum(segment.duration_s for segment in segments_of(shape))
    own: dict[str, Any] = {"rate_rps": rate, "shape": shape, "users": args.users, "seed": args.seed}
    own["duration_s"] = duration_s
    if not args.tls and not args.ca_cert:  # a gateway does not pass the metrics on
        own["metrics"] = f"{args.url.rpartition(':')[0]}:{args.metrics_port}"
    return LoadSettings(model=model, inputs=args.inputs or inputs_of(model), **own, **settings_fields(args, *slos))


def _of_one(args: argparse.Namespace, spec: DeploymentSpec) -> LoadSettings:
    """The settings for one model; by default at each rate that the SLO names."""
    rate, shape = args.rate, args.shape
    if (rate, shape, args.users) == (None, None, None) and (asked := limits.rates(spec.slo)):
        rate = asked[0] if len(asked) == 1 else None
        shape = None if rate else ", ".join(f"{each:.15g}x{args.duration_s:.0f}" for each in asked)
    return _settings(args, args.model, rate, shape, spec.slo)


def _of_mix(args: argparse.Namespace, specs: dict[str, DeploymentSpec]) -> list[LoadSettings]:
    """The settings of a mix's models; by default at the lowest rate that gives each model the rate of its SLO."""
    mix = Mix.parse(args.mix, {model: spec.slo.rate_rps for model, spec in specs.items()})
    rate = args.rate
    if (rate, args.shape, args.users) == (None, None, None):
        rate = mix.least_rate_rps
    whole = _settings(args, next(iter(specs)), rate, args.shape, *(spec.slo for spec in specs.values()))
    return mix.parts(whole, {model: inputs_of(model) for model in specs})


def _of_replay(args: argparse.Namespace, specs: dict[str, DeploymentSpec]) -> list[ModelLoad]:
    """The checked loads of recorded traffic, one for each model of it."""
    if args.mix and ":" in args.mix:
        raise InputError(f"--mix {args.mix}: a replay has its own shares; name only the models: {','.join(specs)}")
    inputs = {model: args.inputs or inputs_of(model) for model in specs}
    traffic = read_traffic(args.replay, {model: count_rows(Path(file)) for model, file in inputs.items()})
    whole = _settings(args, next(iter(specs)), None, None, *(spec.slo for spec in specs.values()))
    mix = "".join(args.mix.split()) if args.mix else None
    loads = []
    for place, (model, spec) in enumerate(specs.items()):
        own = replace(whole, model=model, inputs=inputs[model], seed=whole.seed + place, mix=mix)
        settings = with_replay(own, traffic, args.speed)
        plan = replay_of(traffic, settings, spec)
        loads.append(ModelLoad(settings=settings, spec=spec, served=check(settings, spec, rows_in(plan)), plan=plan))
    return loads


def _loads(args: argparse.Namespace) -> list[ModelLoad]:
    models = models_of(args.mix) if args.mix else [args.model]
    specs = {model: DeploymentSpec.of_model(model, args.models).for_target(args.target) for model in models}
    if args.replay is not None:
        return _of_replay(args, specs)
    parts = _of_mix(args, specs) if args.mix else [_of_one(args, specs[args.model])]
    return [ModelLoad(settings=each, spec=specs[each.model], served=check(each, specs[each.model])) for each in parts]


def main(args: argparse.Namespace) -> int:
    _check(args)
    loads = _loads(args)
    console = Console(stderr=True, markup=False)
    _announce(args, loads, console)
    end_at_sigterm()
    if args.worker_of:
        return work_for(args.worker_of, loads)
    if args.until_decided:
        runs = [measure_until_decided(loads[0], console, budget_s=args.max_s)]
        _show_all(args, runs)
    else:
        runs = measure_together(
            loads,
            console,
            web_port=args.web_port if args.web else None,
            remote=args.remote_workers is not None,
            and_then=partial(_show_beside_page if args.web else _show_all, args),
        )
    return _checked(runs, loads)


def _announce(args: argparse.Namespace, loads: list[ModelLoad], console: Console) -> None:
    """Says what will be measured, and what it is too short for."""
    if args.until_decided:
        first = loads[0].settings
        seconds = [f"{lengths * first.duration_s:g}" for lengths in planned_looks(first, args.max_s)]
        console.print(f"until decided: looks after {', '.join(seconds)} s")
    for load in loads:
        for warning in () if args.until_decided else limits.too_short(load.settings, load.spec.slo):
            whose = f"{load.settings.model}: " if args.mix else ""
            console.print(f"note: {whose}{warning}", soft_wrap=True)
        console.print(described(load.settings), soft_wrap=True)
    if args.web and not args.worker_of:
        console.print(f"Locust's page: http://127.0.0.1:{args.web_port}")


def _show_all(args: argparse.Namespace, runs: list[Run]) -> None:
    if args.json:
        found = [summary(run) for run in runs]
        print(json.dumps({"mix": args.mix, "runs": found} if args.mix else found[0], indent=2), flush=True)
    else:
        for run in runs:
            show(run, Console(markup=False))


def _show_beside_page(args: argparse.Namespace, runs: list[Run]) -> None:
    with suppress(KeyboardInterrupt):  # the runs are saved: Ctrl-C only closes the page
        _show_all(args, runs)
        print("Locust's page stays open until Ctrl-C", file=sys.stderr, flush=True)
        signal.pause()


def _checked(runs: list[Run], loads: list[ModelLoad]) -> int:
    """0 if the runs are valid; else InvalidMeasurement."""
    problems = {
        str(run.folder): found
        for run, load in zip(runs, loads, strict=True)
        if (found := generator_problems(run, load.spec.slo))
    }
    if problems:
        raise InvalidMeasurement("; ".join(f"{folder}: {'; '.join(found)}" for folder, found in problems.items()))
    return 0

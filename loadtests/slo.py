"""Judges a saved run against the SLO of `deploy.toml`.

Contract: reads files only, so that a run can be judged again later, or against another SLO. Failed
requests (errors, time-outs, drops) count as slower than any limit, but for a mean, which is of the answered
ones. A percentile is claimed only from enough samples: with fewer than ln(0.01) / ln(p) requests, none beyond
the limit would not yet mean, with 99 % confidence, that the percentile holds (p99: 459, p95: 90, p50: 7).

Exit codes: 0 every objective holds; 1 one is violated; 2 wrong input; 3 nothing can be concluded: no or
too few samples, a rate that was never offered, or a generator that was itself too slow.

Examples:
    python -m loadtests.slo                                     # the latest run of the recommender
    python -m loadtests.slo --mix recommender:3,minilm:1        # every model of the latest such mix, and all together
    python -m loadtests.slo --run build/recommender/loadtests/2026-11-25T12-55-13.042Z --json
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deepseek.spec import (
    DeploymentSpec,
    InputError,
    Objective,
    Parser,
    Relation,
    SloSpec,
    Target,
    add_model_arguments,
    run_command,
)
from loadtests.limits import largest_limit_s, largest_share, rate_of, samples_needed, samples_to_bound
from loadtests.mix import runs_of
from loadtests.results import NO_FILE, NO_PORT, Distribution, Run, Stretch, latest_run
from loadtests.server_statistics import Split

LEAST_ATTEMPTED = 0.99  # of the planned requests, taken up in time
# How late requests were sent: p99 of it, of the SLO's largest limit; and what a line on latency reads, of its limit.
LARGEST_LAG = 0.05
MOST_CPU = 0.90  # of one core, for the thread that sends
OWN_LIMITS = {
    NO_FILE: "requests found no file for a connection on the generator's machine: raise its ulimit -n, or "
    "send from more workers (WORKERS=)",
    NO_PORT: "requests found no local port for a connection on the generator's machine: widen its "
    "net.ipv4.ip_local_port_range, or send from several machines (--remote-workers)",
}
# A rate is held within the 1 % that the generator itself may lose.
RATE_TOLERANCE = 0.01

Status = Literal["holds", "violated", "inconclusive"]
Verdict = Literal["holds", "violated", "inconclusive", "invalid"]
EXIT_CODES: dict[Verdict, int] = {"holds": 0, "violated": 1, "inconclusive": 3, "invalid": 3}


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One objective, judged."""

    name: str
    """With the rate that it was judged at, where the run had several."""
    kind: str
    """"ms", "error_rate", "throughput" or "quality": the unit of limit and seen."""
    relation: Relation
    limit: float
    seen: float
    status: Status
    margin: float
    """What is left of the limit, as a share of it; negative where it is violated."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What a run says of an SLO."""

    verdict: Verdict
    objectives: tuple[Judged, ...]
    problems: tuple[str, ...]
    """Why the measurement is invalid."""
    notes: tuple[str, ...]


def generator_problems(run: Run, slo: SloSpec) -> list[str]:
    """Why this run says more about the load generator than about the server; empty where it does not."""
    problems = []
    if lost := run.generator.get("workers_lost"):
        problems.append(f"{lost} of {run.generator['workers']} workers were lost, and with them what they counted")
    if run.window.unsent:
        problems.append(f"{run.window.unsent} of {run.window.planned} planned requests were never sent")
    problems += _lateness(run, slo)
    thread_cpu = run.generator.get("thread_cpu", 0)
    if thread_cpu > MOST_CPU:
        problems.append(f"the generator's thread was {thread_cpu:.0%} busy, at most {MOST_CPU:.0%} is allowed")
    if problems:
        allow = "" if run.generator.get("precedence") else ", or let it have real-time priority (root, or ulimit -r 1)"
        problems.append(f"lower the rate, or give the generator a machine with free cores{allow}")
    return problems + [
        f"{run.window.errors[kind]} {why}" for kind, why in OWN_LIMITS.items() if run.window.errors[kind]
    ]


def _lateness(run: Run, slo: SloSpec) -> list[str]:
    """Where requests left late: over the whole window, or over a part that is judged and that the whole would hide."""
    judged: dict[float | None, list[Objective]] = {None: []}
    for line in slo.all_objectives():
        if line.kind != "quality":
            judged.setdefault(rate_of(line, run.settings, slo), []).append(line)
    whole, *parts = (list(_late_at(run, rate, lines, largest_limit_s(slo) * 1000)) for rate, lines in judged.items())
    return whole or [problem for part in parts for problem in part]


def _late_at(run: Run, rate: float | None, lines: list[Objective], largest_ms: float) -> Iterator[str]:
    """Of what was planned at a rate (None: in the whole window): too little taken up, or late enough to show."""
    stretch = run.window if rate is None else run.at_rate(rate)
    if stretch is None or not run.settings.open_loop:
        return
    at = "" if rate is None else f" at {rate:g}/s"
    if stretch.attempted_share < LEAST_ATTEMPTED:
        yield (
            f"the generator took up {stretch.attempted_share:.1%} of the planned requests{at} in time, "
            f"{LEAST_ATTEMPTED:.0%} is needed"
        )
    lag = stretch.latency("lag")
    bounds = [("p99", lag.percentile_ms(99), largest_ms)] if largest_ms else []
    bounds += [
        (line.measure.removesuffix("_ms"), _read(lag, line), line.limit)
        for line in lines
        if line.kind == "ms" and not _holds_anyway(run, stretch, line)
    ]
    for figure, lag_ms, limit_ms in bounds:
        if lag_ms > LARGEST_LAG * limit_ms:
            yield (
                f"the generator sent late{at}: {figure} of the lag is {lag_ms:.2f} ms, "
                f"at most {LARGEST_LAG:.0%} of the SLO's {limit_ms:g} ms is allowed "
                f"(its machine was busy for {run.generator.get('machine_cpu', 0):.0%} of the time)"
            )
            return


def _holds_anyway(run: Run, stretch: Stretch, line: Objective) -> bool:
    """Whether a maximum or a mean holds with the lag in it: intended latency contains that, so it would without."""
    return line.percent is None and run.judged == "intended" and line.holds(_read(stretch.latency("intended"), line))


def _read(latency: Distribution, line: Objective) -> float:
    """The figure in ms that a line is about; inf where failures reach it, which a mean leaves out."""
    if line.percent is not None:
        return latency.percentile_ms(line.percent)
    if latency.failed and (line.measure == "max_ms" or latency.failed == latency.total):
        return math.inf
    return latency.mean_ms if line.measure == "mean_ms" else latency.max_ms


def judge(run: Run, slo: SloSpec, *, alone: bool = True) -> Judgement:
    """The verdict on a saved run; not `alone` beside those on the other models of its mix."""
    problems = generator_problems(run, slo)
    if not run.window.planned:
        problems.insert(0, "no request was measured")
    objectives = tuple(_judged(run, slo)) if run.window.planned else ()
    if problems:  # the figures stay to be seen, nothing is concluded from them
        objectives = tuple(replace(objective, status="inconclusive") for objective in objectives)
    statuses = {objective.status for objective in objectives}
    verdict: Verdict = "holds"
    if problems:
        verdict = "invalid"
    elif "violated" in statuses:
        verdict = "violated"
    elif "inconclusive" in statuses:
        verdict = "inconclusive"
    return Judgement(
        verdict=verdict, objectives=objectives, problems=tuple(problems), notes=tuple(_notes(run, slo, alone))
    )


def _judged(run: Run, slo: SloSpec) -> Iterator[Judged]:
    for line in slo.all_objectives():
        if line.kind == "quality":
            yield _judged_quality(run, line)
            continue
        rate = rate_of(line, run.settings, slo)
        stretch = run.window if rate is None else run.at_rate(rate)
        if stretch is None:
            judged = _unmeasured(run, replace(line, rate_rps=rate))
        else:
            judged = _judged_load(run, stretch, line, _given_up(stretch, slo))
        yield judged if rate is None else replace(judged, name=f"{line.name} @ {rate:g} rps")


def _given_up(stretch: Stretch, slo: SloSpec) -> int:
    """Requests that the run did not wait for as long as this SLO allows some: it was made for another."""
    return stretch.errors["DeadlineExceeded"] if largest_limit_s(slo) > stretch.settings.timeout_s else 0


def _verdict(line: Objective, seen: float, note: str = "", conclusive: bool = True, **changes: Any) -> Judged:
    """The objective with what was seen; `conclusive` is false where that proves nothing."""
    status: Status = "inconclusive" if not conclusive else "holds" if line.holds(seen) else "violated"
    upper = line.relation[0] == "<"
    share = seen / line.limit if line.limit else math.inf if seen else 1.0
    margin = 1 - share if upper else share - 1
    facts: dict[str, Any] = {"limit": line.limit, "status": status, "margin": margin, "note": note}
    return Judged(name=line.name, kind=line.kind, relation=line.relation, seen=seen, **facts | changes)


def _unmeasured(run: Run, line: Objective) -> Judged:
    offered = ", ".join(f"{rate:g}" for rate in run.rates_rps)
    note = f"measured at {offered}/s" if offered else "no steady rate was measured"
    return _verdict(line, math.nan, f"{note}; make loadtest RATE={line.rate_rps:g}", conclusive=False)


def _judged_load(run: Run, stretch: Stretch, line: Objective, given_up: int) -> Judged:
    if line.kind == "throughput":
        return _judged_throughput(run, stretch, line, given_up)
    if line.kind == "error_rate":
        return _judged_errors(run, stretch, line, given_up)
    latency, timeout_ms = stretch.latency(run.judged), run.settings.timeout_s * 1000
    seen = _read(latency, line)
    needed = 1 if line.percent is None else samples_needed(line.percent)
    note = "" if latency.total >= needed else f"{latency.total} requests, {needed} needed"
    left_out = line.measure == "mean_ms" and line.holds(seen)
    if given_up and (left_out or (math.isinf(seen) and line.limit > timeout_ms)):
        return _verdict(line, seen, note or _cut_off(run, given_up), conclusive=False)
    if math.isinf(seen):
        note = note or f"{stretch.failed / stretch.planned:.1%} of the requests were not answered"
    return _verdict(line, seen, note, conclusive=latency.total >= needed)


def _cut_off(run: Run, given_up: int) -> str:
    return f"{given_up} requests were given up after {run.settings.timeout_s:g} s, which the SLO allows: measure again"


def _judged_errors(run: Run, stretch: Stretch, line: Objective, given_up: int) -> Judged:
    failed, planned = stretch.failed, stretch.planned
    if not planned:
        return _verdict(line, math.nan, conclusive=False)
    seen = failed / planned
    margin: dict[str, Any] = {} if line.limit else {"margin": -seen}
    if not line.holds(seen) and line.holds((failed - given_up) / planned):
        return _verdict(line, seen, _cut_off(run, given_up), conclusive=False, **margin)
    notes = [f"{count} {kind}" for kind, count in stretch.errors.most_common()]
    if line.holds(seen) and 0 < 1 - line.limit < 1 and planned < (needed := samples_to_bound(line.limit)):
        told = f"under {100 * largest_share(failed, planned):.2g}%"
        notes.append(f"{failed} of {planned}: tells no more than {told}, {needed} are needed for {line.limit * 100:g}%")
    return _verdict(line, seen, ", ".join(notes), **margin)


def _judged_throughput(run: Run, stretch: Stretch, line: Objective, given_up: int) -> Judged:
    seen, users = stretch.throughput_rps, run.settings.users
    offered = None if users is not None else stretch.planned / stretch.duration_s
    enough = line.limit * (1 - RATE_TOLERANCE)
    if seen >= enough:
        return _verdict(line, seen, status="holds")
    if offered is not None and offered < enough:
        return _verdict(line, seen, f"only {offered:g}/s was offered", conclusive=False)
    if users is not None:
        note = f"{users} users wait for their answers; more of them may reach it"
        return _verdict(line, seen, note, conclusive=False)
    if seen + given_up / stretch.duration_s >= enough:
        return _verdict(line, seen, _cut_off(run, given_up), conclusive=False)
    return _verdict(line, seen)


def _judged_quality(run: Run, line: Objective) -> Judged:
    """By what was known of the served model when the run was made."""
    found = run.quality.get(line.measure)
    if found is None:
        return _verdict(line, math.nan, "not measured for what is served; make compare", conclusive=False)
    limit = line.limit * found["baseline"] if line.of_baseline else line.limit
    note = f"{found['source']}; fp32 PyTorch {found['baseline']:.4f}"
    return _verdict(replace(line, limit=limit), found["seen"], note)


def _notes(run: Run, slo: SloSpec, alone: bool) -> Iterator[str]:
    if not run.settings.open_loop:
        yield (
            "closed loop: the latency is service latency, and while the server stalls nobody asks it, "
            "so that stalls hardly count (coordinated omission); RATE= measures what users would see"
        )
    if run.settings.mix and alone:
        yield f"one of the mix {run.settings.mix}; all of it is judged by: make verdict MIX={run.settings.mix}"
    if run.settings.open_loop and slo.rate_rps is not None and run.rates_rps and min(run.rates_rps) > slo.rate_rps:
        yield f"measured at {min(run.rates_rps):g}/s, more than the {slo.rate_rps:g}/s that the SLO asks for"


def as_json(run: Run, judgement: Judgement) -> dict[str, Any]:
    """For machines; a latency that only failures reached is null."""
    data: dict[str, Any] = {"run": str(run.folder), **asdict(judgement)}
    for objective in data["objectives"]:
        for name in ("seen", "margin"):
            objective[name] = objective[name] if math.isfinite(objective[name]) else None
    split = Split.of_run(run)
    return {**data, "where_time_goes_ms": split and {**split.parts, "outside": split.outside, "late": split.late}}


def formatted(kind: str, value: float) -> str:
    """A figure of an objective with its unit."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    if kind == "ms":
        return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms"
    return {"throughput": f"{value:.1f}/s", "quality": f"{value:.4f}"}.get(kind, f"{value:.3%}")


SIGNS: dict[Relation, str] = {"<": "<", "<=": "≤", ">": ">", ">=": "≥"}
STYLES = {"holds": "green", "violated": "red", "inconclusive": "yellow", "invalid": "yellow"}


def _print(run: Run, judgement: Judgement, console: Console) -> None:
    noted = any(each.note for each in judgement.objectives)
    table = Table("objective", "limit", "seen", "margin", "", *[""] * noted)
    for each in judgement.objectives:
        margin = f"{each.margin:+.0%}" if math.isfinite(each.margin) else ""
        status = Text(each.status, STYLES[each.status])
        limit = f"{SIGNS[each.relation]} {formatted(each.kind, each.limit)}"
        table.add_row(each.name, limit, formatted(each.kind, each.seen), margin, status, *[each.note] * noted)
    console.print(table)
    for line in (*judgement.problems, *judgement.notes):
        console.print(line)
    if split := Split.of_run(run):
        console.print(split.sentence)
    console.print(_headed(judgement.verdict, str(run.folder)), soft_wrap=True)


def _headed(verdict: Verdict, what: str) -> Text:
    """A verdict, and of what it is."""
    return Text.assemble((verdict, f"{STYLES[verdict]} bold"), f"  {what}")


def load(args: Any) -> tuple[Run, SloSpec]:
    """The run that the command line names, and the SLO to judge it by."""
    spec = DeploymentSpec.of_model(args.model, args.models)
    run = Run.load(args.run or latest_run(args.model))
    if run.settings.model != args.model:
        raise InputError(f"{run.folder}: a run of {run.settings.model}, not of {args.model}; give --model")
    return run, spec.for_target(args.target or run.settings.target).slo


def load_mix(args: Any) -> list[tuple[Run, SloSpec]]:
    """The runs that the command line names, each with the SLO of its model."""
    runs = runs_of(args.mix, args.run)
    specs = [DeploymentSpec.of_model(run.settings.model, args.models) for run in runs]
    return [(run, of.for_target(args.target or run.settings.target).slo) for run, of in zip(runs, specs, strict=True)]


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """Of several models: what is violated is violated, whatever cannot be said of another."""
    order: tuple[Verdict, ...] = ("violated", "invalid", "inconclusive", "holds")
    return min(verdicts, key=order.index)


def add_run_arguments(parser: Parser) -> None:
    """--model, --models, --run, --target, as every command over a saved run takes them."""
    add_model_arguments(parser)
    parser.add_argument("--run", help="the run's folder (default: the latest complete one of the model)")
    parser.add_argument("--target", choices=get_args(Target), help="judge by this target's SLO (default: the run's)")


def main() -> int:
    """Judges one run, or the runs of a mix, and prints the verdict."""
    parser = Parser(__doc__, prog="python -m loadtests.slo")
    add_run_arguments(parser)
    parser.add_argument("--mix", help="judge all models of a mixed load, as loadtests.run had it")
    parser.add_argument("--json", action="store_true", help="print the verdict as JSON")
    args = parser.parse_args()
    runs = load_mix(args) if args.mix else [load(args)]
    judged = [(run, judge(run, slo, alone=not args.mix)) for run, slo in runs]
    verdict = overall(judgement.verdict for _, judgement in judged)
    if args.json:
        found = {run.settings.model: as_json(run, judgement) for run, judgement in judged}
        told = {"verdict": verdict, "models": found} if args.mix else next(iter(found.values()))
        print(json.dumps(told, indent=2))
        return EXIT_CODES[verdict]
    console = Console(width=max(Console().width, 100), markup=False)
    for run, judgement in judged:
        if args.mix:
            console.print(run.settings.model, style="bold")
        _print(run, judgement, console)
    if args.mix:
        console.print(_headed(verdict, f"the mix {args.mix} as a whole"))
    return EXIT_CODES[verdict]


if __name__ == "__main__":
    run_command(main)

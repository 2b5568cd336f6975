"""Judges a saved run against the SLO of `deploy.toml`.

Contract: reads files only, so that a run can be judged again later, or against another SLO. Failed
requests (errors, time-outs, drops) count as slower than any limit. A percentile is claimed only from
enough samples: with fewer than ln(0.01) / ln(p) requests, none beyond the limit would not yet mean, with
99 % confidence, that the percentile holds (p99: 459, p95: 90, p50: 7).

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
from loadtests.limits import own_rate, samples_needed
from loadtests.mix import runs_of
from loadtests.results import Run, Stretch, latest_run
from loadtests.server_statistics import Split

LEAST_ATTEMPTED = 0.99  # of the planned requests, taken up in time
# How late requests were sent: p99 of it, of the SLO's largest limit; and at each percentile of the SLO, of its limit.
LARGEST_LAG = 0.05
MOST_CPU = 0.90  # of one core, for the thread that sends
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
    if run.window.attempted_share < LEAST_ATTEMPTED:
        problems.append(
            f"the generator took up {run.window.attempted_share:.1%} of the planned requests in time, "
            f"{LEAST_ATTEMPTED:.0%} is needed"
        )
    problems += _lateness(run, slo)
    thread_cpu = run.generator.get("thread_cpu", 0)
    if thread_cpu > MOST_CPU:
        problems.append(f"the generator's thread was {thread_cpu:.0%} busy, at most {MOST_CPU:.0%} is allowed")
    if problems:
        allow = "" if run.generator.get("precedence") else ", or let it have real-time priority (root, or ulimit -r 1)"
        problems.append(f"lower the rate, or give the generator a machine with free cores{allow}")
    return problems


def _lateness(run: Run, slo: SloSpec) -> Iterator[str]:
    """Where requests were sent so late that it shows in a latency that is judged."""
    lines = [line for line in slo.all_objectives() if line.kind == "ms"]
    if not run.settings.open_loop or not lines:
        return
    lag = run.window.latency("lag")
    bounds = [(99.0, max(line.limit for line in lines))]
    bounds += [(line.percent, line.limit) for line in lines if line.percent is not None]
    for percent, limit in bounds:
        if (lag_ms := lag.percentile_ms(percent)) > LARGEST_LAG * limit:
            yield (
                f"the generator sent late: p{percent:g} of the lag is {lag_ms:.2f} ms, "
                f"at most {LARGEST_LAG:.0%} of the SLO's {limit:g} ms is allowed "
                f"(its machine was busy for {run.generator.get('machine_cpu', 0):.0%} of the time)"
            )
            return


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
    own = own_rate(run.settings, slo)
    for line in slo.all_objectives():
        if line.kind == "quality":
            yield _judged_quality(run, line)
            continue
        rate = line.rate_rps or own
        stretch = run.window if rate is None else run.at_rate(rate)
        judged = _unmeasured(run, replace(line, rate_rps=rate)) if stretch is None else _judged_load(run, stretch, line)
        yield judged if rate is None else replace(judged, name=f"{line.name} @ {rate:g} rps")


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


def _judged_load(run: Run, stretch: Stretch, line: Objective) -> Judged:
    if line.kind == "throughput":
        return _judged_throughput(run, stretch, line)
    if line.kind == "error_rate":
        seen = stretch.failed / stretch.planned if stretch.planned else math.nan
        note = ", ".join(f"{count} {kind}" for kind, count in stretch.errors.most_common())
        margin = {} if line.limit else {"margin": -seen}
        return _verdict(line, seen, note, conclusive=stretch.planned > 0, **margin)
    latency = stretch.latency(run.judged)
    if line.percent is None:
        failed = stretch.failed > 0  # slower than any limit
        seen = math.inf if failed else latency.mean_ms if line.measure == "mean_ms" else latency.max_ms
        needed = 1
    else:
        seen, needed = latency.percentile_ms(line.percent), samples_needed(line.percent)
    note = "" if latency.total >= needed else f"{latency.total} requests, {needed} needed"
    given_up, timeout_s = stretch.errors["DeadlineExceeded"], run.settings.timeout_s
    if math.isinf(seen) and given_up and line.limit > timeout_s * 1000:  # the run was made for another SLO
        note = note or f"{given_up} requests were given up after {timeout_s:g} s, which the SLO allows: measure again"
        return _verdict(line, seen, note, conclusive=False)
    if math.isinf(seen):
        note = note or f"{stretch.failed / stretch.planned:.1%} of the requests were not answered"
    return _verdict(line, seen, note, conclusive=latency.total >= needed)


def _judged_throughput(run: Run, stretch: Stretch, line: Objective) -> Judged:
    seen, users = stretch.throughput_rps, run.settings.users
    offered = None if users is not None else stretch.planned / stretch.duration_s
    if seen >= line.limit * (1 - RATE_TOLERANCE):
        return _verdict(line, seen, status="holds")
    if offered is not None and offered < line.limit * (1 - RATE_TOLERANCE):
        return _verdict(line, seen, f"only {offered:g}/s was offered", conclusive=False)
    if users is not None:
        note = f"{users} users wait for their answers; more of them may reach it"
        return _verdict(line, seen, note, conclusive=False)
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

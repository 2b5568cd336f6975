"""Chooses an autoscaler's target and least replicas: replays a day under many of them, on a cluster that is computed.

Contract: reads `build/<model>/capacity.json` (one server at each rate, as measured: `make capacity`) and the SLO of
`deploy.toml`; `loadtests.autoscaler` is Kubernetes' algorithm, `loadtests.cluster` what happens to pods, nodes and
requests. Each pod is taken to do --margin less than what was measured. Tried are targets for the queue-to-compute
ratio and for requests/s of a pod, each with several least numbers of pods; chosen is the cheapest whose late requests
stay within --late. It leaves `build/<model>/scale.json`, which `make kubernetes` reads, and `scale.html`. Node hours,
and their cost with --node-price, are of the servers' nodes: the gateway's pods are in no sum.

Exit codes: 0 chosen; 1 none holds; 2 wrong input, no capacity.

Examples:
    python -m loadtests.simulate_scale                                  # a day with a peak of five servers
    python -m loadtests.simulate_scale --shape spike --peak-rps 4000 --node-start-s 180 --node-price 0.38
    python -m loadtests.simulate_scale --traffic monday.csv --metric queue --json
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Parser, add_model_arguments, build_dir, run_command
from deepseek.spec.folders import write_whole
from loadtests.autoscaler import Autoscaler
from loadtests.capacity import Capacity, capacity_path
from loadtests.cluster import Day, Setup, replay
from loadtests.limits import latency_limits
from loadtests.report.scaling import page
from loadtests.service_curve import ServiceCurve
from loadtests.traffic import TICK_S, Shape, read_traffic, shape_of_day

Metric = Literal["queue", "rate"]
SHARES = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of one server's capacity, at which a target is taken
CUSTOMARY_RATIO = 1.0  # what is often recommended for the queue-to-compute ratio
LEAST_REPLICAS = 2  # one may fail or be drained
MIN_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the pods that the peak needs, kept as the least number
DEFAULT_PEAK = 5.0  # servers
ROWS = 12  # of the table; all are in scale.json


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One setting of the autoscaler and what a day with it came to."""

    metric: Metric
    target: float
    min_replicas: int
    late_share: float
    late_s: int
    node_hours: float
    pod_hours: float
    most_pods: int

    def holds(self, late: float) -> bool:
        """Whether few enough requests are late."""
        return self.late_share <= late


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """All that was tried, and the day of the one that was chosen (or is nearest to holding)."""

    tried: tuple[Tried, ...]
    best: Tried
    day: Day
    fixed_pods: int
    """What holds without an autoscaler: enough for the highest rate, all the time."""
    late: float


def targets(curve: ServiceCurve, metric: Metric) -> list[float]:
    """What is worth trying: the metric's value at shares of the capacity, and the customary one."""
    if metric == "rate":
        return [round(share * curve.capacity_rps, 1) for share in SHARES]
    if not curve.queue:
        return []
    found = {round(curve.queue_ratio(share * curve.capacity_rps), 3) for share in SHARES} | {CUSTOMARY_RATIO}
    return sorted(found - {0.0})


def least_replicas(peak_pods: int) -> list[int]:
    """Numbers worth keeping at least."""
    return sorted({max(LEAST_REPLICAS, math.ceil(share * peak_pods)) for share in MIN_SHARES})


def settings(curve: ServiceCurve, metrics: Sequence[Metric], peak_pods: int) -> list[tuple[Metric, float, int]]:
    """All that are tried."""
    return [
        (metric, target, least)
        for metric in metrics
        for target in targets(curve, metric)
        for least in least_replicas(peak_pods)
    ]


def simulate(
    rates_rps: np.ndarray,
    curve: ServiceCurve,
    setup: Setup,
    wanted: Iterable[tuple[Metric, float, int]],
    *,
    max_replicas: int,
    late: float,
) -> Simulated:
    """Replays the day under each setting; best is the cheapest that holds, or the one with the fewest late requests."""
    found: list[tuple[Tried, Day]] = []
    for metric, target, least in wanted:
        scaler = Autoscaler(targets={metric: target}, min_replicas=least, max_replicas=max_replicas)
        day = replay(rates_rps, curve, scaler, setup)
        found.append((_tried(metric, target, least, day), day))
    best, day = min(found, key=lambda each: _rank(each[0], late))
    fixed = math.ceil(float(rates_rps.max()) / curve.capacity_rps)
    return Simulated(tried=tuple(tried for tried, _ in found), best=best, day=day, fixed_pods=fixed, late=late)


def _tried(metric: Metric, target: float, least: int, day: Day) -> Tried:
    return Tried(
        metric=metric,
        target=target,
        min_replicas=least,
        late_share=day.late_share,
        late_s=day.late_s,
        node_hours=round(day.node_hours, 3),
        pod_hours=round(day.pod_hours, 3),
        most_pods=int(day.pods.max()),
    )


def _rank(tried: Tried, late: float) -> tuple[bool, float, float]:
    if tried.holds(late):
        return False, tried.node_hours, tried.pod_hours
    return True, tried.late_share, tried.node_hours


def fixed_node_hours(simulated: Simulated, setup: Setup) -> float:
    """Of the same traffic without an autoscaler."""
    hours = len(simulated.day.rates_rps) * TICK_S / 3600
    return math.ceil(simulated.fixed_pods / setup.pods_per_node) * hours


def sentence(simulated: Simulated, setup: Setup) -> str:
    """The result in a line."""
    best, fixed = simulated.best, fixed_node_hours(simulated, setup)
    told = f"{best.late_share:.3%} of the requests late in {best.late_s} s, {best.node_hours:.1f} node hours"
    if not best.holds(simulated.late):
        return f"no setting keeps late requests within {simulated.late:.3%}; the nearest: {described(best)}: {told}"
    return f"{described(best)}: {told}; {simulated.fixed_pods} pods all the time take {fixed:.1f}"


def described(tried: Tried) -> str:
    """A setting in words."""
    what = "queue-to-compute ratio" if tried.metric == "queue" else "requests/s of a pod"
    return f"{what} {tried.target:g}, at least {tried.min_replicas} pods"


def table(simulated: Simulated, setup: Setup, price: float | None) -> Table:
    """The best settings, cheapest first; then those that do not hold, and what it takes without an autoscaler."""
    shown = Table("metric", box=box.SIMPLE_HEAD)
    for name in ("target", "minReplicas", "most pods", "late requests", "for", "node hours"):
        shown.add_column(name, justify="right")
    if price is not None:
        shown.add_column("cost", justify="right")
    shown.add_column("")
    for tried in _worth_showing(simulated):
        mark = "◀ chosen" if tried == simulated.best and tried.holds(simulated.late) else ""
        cost = [] if price is None else [f"{tried.node_hours * price:.2f}"]
        figures = [f"{tried.target:g}", str(tried.min_replicas), str(tried.most_pods), f"{tried.late_share:.3%}"]
        rest = [f"{tried.late_s} s", f"{tried.node_hours:.1f}", *cost, mark or _word(tried, simulated.late)]
        shown.add_row(tried.metric, *figures, *rest)
    hours, pods = fixed_node_hours(simulated, setup), str(simulated.fixed_pods)
    cost = [] if price is None else [f"{hours * price:.2f}"]
    shown.add_section()
    shown.add_row("fixed", "", pods, pods, "", "", f"{hours:.1f}", *cost, "")
    return shown


def _word(tried: Tried, late: float) -> str:
    return "holds" if tried.holds(late) else "fails"


def _worth_showing(simulated: Simulated) -> Iterator[Tried]:
    """The best ones, and of each metric at least its own best."""
    ordered = sorted(simulated.tried, key=lambda each: _rank(each, simulated.late))
    firsts = {each.metric: each for each in reversed(ordered)}
    kept = {*ordered[:ROWS], *firsts.values()}
    customary = [each for each in ordered if each.metric == "queue" and each.target == CUSTOMARY_RATIO][:1]
    yield from (each for each in ordered if each in kept or each in customary)


def _parse() -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m loadtests.simulate_scale")
    add_model_arguments(parser)
    parser.add_argument("--capacity", type=Path, help="(default: build/<model>/capacity.json)")
    parser.add_argument("--traffic", type=Path, metavar="CSV", help="seconds,rate_rps in place of a shape")
    parser.add_argument("--shape", choices=get_args(Shape), default="day", help="(default: %(default)s)")
    parser.add_argument("--peak-rps", type=float, help=f"of the shape (default: {DEFAULT_PEAK:g} times the capacity)")
    parser.add_argument("--seed", type=int, default=0, help="of the shape's noise (default: %(default)s)")
    parser.add_argument("--metric", choices=get_args(Metric), help="try this one alone (default: both)")
    parser.add_argument("--late", type=float, help="share of requests that may be late (default: the SLO's error rate)")
    parser.add_argument(
        "--margin", type=float, default=0.1, help="a pod does so much less than measured (default: 0.1)"
    )
    parser.add_argument("--max-replicas", type=int, help="(default: twice what the peak needs)")
    parser.add_argument("--pod-start-s", type=float, default=60, help="from its node to readiness (default: 60)")
    parser.add_argument("--node-start-s", type=float, default=120, help="of a new node (default: 120)")
    parser.add_argument("--node-idle-s", type=float, default=600, help="an empty node is kept (default: 600)")
    parser.add_argument("--pods-per-node", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--node-price", type=float, help="of an hour, to show cost in it")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    positive = ("peak_rps", "pods_per_node", "node_price")
    for name in ("pod_start_s", "node_start_s", "node_idle_s", "late", *positive):
        value = getattr(args, name)
        if value is not None and not (0 < value < math.inf if name in positive else 0 <= value < math.inf):
            least = "more than 0" if name in positive else "0 or more"
            raise InputError(f"--{name.replace('_', '-')} {value:g}: it must be {least}")
    if not 0 <= args.margin < 1:
        raise InputError(f"--margin {args.margin:g}: it must be 0 or more and below 1")
    if args.seed < 0:
        raise InputError(f"--seed {args.seed}: it must be 0 or more")
    if args.max_replicas is not None and args.max_replicas < LEAST_REPLICAS:
        raise InputError(f"--max-replicas {args.max_replicas}: it must be {LEAST_REPLICAS} or more")
    return args


def setup_of(args: argparse.Namespace, spec: DeploymentSpec) -> Setup:
    """The SLO's limit, Triton's time-out, and the command line's delays."""
    limit = latency_limits(spec.slo).get(99)
    if limit is None:
        raise InputError(f"{args.models}/{args.model}/deploy.toml: [slo] has no p99_ms, by which a day is judged")
    return Setup(
        p99_limit_ms=limit,
        queue_timeout_ms=spec.batching.queue_timeout_ms,
        pod_start_s=args.pod_start_s,
        node_start_s=args.node_start_s,
        node_idle_s=args.node_idle_s,
        pods_per_node=args.pods_per_node,
    )


def result(
    simulated: Simulated,
    capacity: Capacity,
    setup: Setup,
    *,
    traffic: str,
    max_replicas: int,
    margin: float,
    node_price: float | None,
) -> dict[str, Any]:
    """What `scale.json` holds; `chosen` is null where none holds, and without a price nothing has a cost."""
    best = simulated.best
    fixed = {"pods": simulated.fixed_pods, "node_hours": round(fixed_node_hours(simulated, setup), 3)}
    chosen = {
        "targets": [{"metric": best.metric, "value": best.target}],
        "min_replicas": best.min_replicas,
        "max_replicas": max_replicas,
        "cores": _cores(capacity),
    }
    return {
        "schema_version": 1,
        "model": capacity.model,
        "target": capacity.target,
        "precision": capacity.precision,
        "served_versions": list(capacity.served_versions),
        "traffic": traffic,
        "capacity_rps": capacity.capacity_rps,
        "margin": margin,
        "setup": asdict(setup),
        "node_price": node_price,
        "late_allowed": simulated.late,
        "conclusion": sentence(simulated, setup),
        "chosen": chosen if best.holds(simulated.late) else None,
        "best": _priced(asdict(best), node_price),
        "fixed": _priced(fixed, node_price),
        "tried": [_priced(asdict(each), node_price) for each in simulated.tried],
    }


def _priced(found: dict[str, Any], node_price: float | None) -> dict[str, Any]:
    """The same with what its node hours cost."""
    return found if node_price is None else found | {"cost": round(found["node_hours"] * node_price, 4)}


def _cores(capacity: Capacity) -> int | None:
    """Of the server's machine; None where only the load generator's is known."""
    return capacity.machine.get("cores") if re.match(r"127\.|localhost:|\[::1\]", capacity.url) else None


def main() -> None:
    """Replays, chooses, saves, draws, prints."""
    args = _parse()
    capacity = Capacity.load(args.capacity or capacity_path(args.model))
    spec = DeploymentSpec.of_model(args.model, args.models).for_target(capacity.target)
    if capacity.model != spec.name:
        raise InputError(f"{args.capacity}: of the model {capacity.model!r}, not {spec.name!r}")
    curve, setup = ServiceCurve.of(capacity).slowed(args.margin), setup_of(args, spec)
    console = Console(stderr=True, markup=False)
    if not capacity.confirmed or capacity.limited_by == "generator":
        console.print(f"note: {capacity.sentence}", soft_wrap=True)
    peak_rps = args.peak_rps or DEFAULT_PEAK * (capacity.capacity_rps or 0)
    rates = read_traffic(args.traffic) if args.traffic else shape_of_day(args.shape, peak_rps, args.seed)
    traffic = str(args.traffic) if args.traffic else f"{args.shape}, peak {peak_rps:g}/s, seed {args.seed}"
    peak_pods = math.ceil(float(rates.max()) / curve.capacity_rps)
    max_replicas = args.max_replicas or max(LEAST_REPLICAS, 2 * peak_pods)
    metrics: list[Metric] = [args.metric] if args.metric else list(get_args(Metric))
    wanted = [each for each in settings(curve, metrics, peak_pods) if each[2] <= max_replicas]
    if not wanted:
        raise InputError("capacity.json: no run knows the time in the queue (a gateway hides it); --metric rate")
    late = spec.slo.max_error_rate if args.late is None else args.late
    shown = track(wanted, "replaying", console=console, transient=True, disable=not console.is_terminal)
    simulated = simulate(rates, curve, setup, shown, max_replicas=max_replicas, late=late)
    path = build_dir(args.model) / "scale.json"
    found = result(
        simulated,
        capacity,
        setup,
        traffic=traffic,
        max_replicas=max_replicas,
        margin=args.margin,
        node_price=args.node_price,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(found, indent=2) + "\n")
    html = write_whole(path.with_suffix(".html"), page(found, simulated.day, curve))
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        Console(width=max(Console().width, 100), markup=False).print(table(simulated, setup, args.node_price))
        print(f"{found['conclusion']}\n{path}\n{html}", file=sys.stdout)
    if found["chosen"] is None:
        raise GateFailed(found["conclusion"])


if __name__ == "__main__":
    run_command(main)

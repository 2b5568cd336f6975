"""Chooses an autoscaler's target and minimum of replicas: replays a day with many settings on a simulated cluster.

Contract: reads `build/<model>/capacity.json` (measurements of one server at each rate) and the SLO of `deploy.toml`.
`loadtests.scale.autoscaler` is Kubernetes' algorithm, `loadtests.scale.cluster` simulates pods, nodes and requests, and
`loadtests.scale.target_choice` chooses the settings. Writes `build/<model>/scale.json`, which `deepseek kubernetes`
reads. Node-hours count the servers' nodes, without the gateway's pods.

Exit codes: 0 chosen; 1 no setting holds; 2 bad input or no capacity.
"""

import argparse
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Target, build_dir
from deepseek.spec.files.batching_plan import batching_of
from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.measured_batches import read_measured
from deepseek.spec.objectives import latency_limits
from loadtests.scale.cluster import ClusterSettings, Metric
from loadtests.scale.service_curve import ServiceCurve
from loadtests.scale.target_choice import LEAST_REPLICAS, TargetChoice, candidates, choose
from loadtests.scale.traffic import Shape, read_traffic, shape_of_day
from loadtests.search.capacity_result import Capacity, capacity_path
from loadtests.search.slo_at_rate import error_limit_at

DEFAULT_PEAK = 5.0  # servers
MOST_PODS = 10_000  # at the peak
ROWS = 12  # of the table; scale.json has all


def main(options: argparse.Namespace) -> None:
    """Replays the day, chooses, saves and draws the result, prints it; GateFailed if no setting holds."""
    console = Console(stderr=True, markup=False)
    spec = DeploymentSpec.of_model(options.model, options.models)
    capacity = Capacity.load(options.capacity or capacity_path(options.model), options.model)
    spec = spec.for_target(capacity.target)
    if capacity.model != spec.name:
        raise InputError(f"{options.capacity}: capacity of the model {capacity.model!r}, not of {spec.name!r}")
    if not capacity.confirmed or capacity.limited_by == "generator":
        console.print(f"note: {capacity.sentence}", soft_wrap=True)
    curve, settings = ServiceCurve.of(capacity).slowed(options.margin), cluster_settings(options, spec, capacity.target)
    rates, traffic = traffic_of(options, capacity)
    peak_rps = float(rates.max())
    if not peak_rps <= MOST_PODS * curve.capacity_rps:  # NaN is refused too
        raise InputError(
            f"the traffic's peak, {peak_rps:g} requests/s, needs more than {MOST_PODS} pods of "
            f"{curve.capacity_rps:g}/s each; give a lower one (--peak-rps, --traffic)"
        )
    peak_pods = math.ceil(peak_rps / curve.capacity_rps)
    max_replicas = options.max_replicas or max(LEAST_REPLICAS, 2 * peak_pods)
    metrics: list[Metric] = [options.metric] if options.metric else list(get_args(Metric))
    wanted = [each for each in candidates(curve, metrics, peak_pods) if each[2] <= max_replicas]
    if not wanted:
        raise InputError("capacity.json: no run has the time in the queue (a gateway hides it); use --metric rate")
    late = options.late
    if late is None:
        limit = error_limit_at(spec.slo, curve.capacity_rps)
        late = spec.slo.max_error_rate if limit is None else limit
    shown = track(wanted, "replaying", console=console, transient=True, disable=not console.file.isatty())
    choice = choose(rates, curve, settings, shown, max_replicas=max_replicas, late=late)
    facts = {"traffic": traffic, "margin": options.margin, "setup": asdict(settings)}
    found = result(choice, capacity, max_replicas, facts)
    path = build_dir(options.model) / "scale.json"
    write_whole(path, json.dumps(found, indent=2) + "\n")
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        Console(width=max(Console().width, 100), markup=False).print(table(choice))
        print(choice.sentence, path, sep="\n")
    if not choice.holds:
        raise GateFailed(choice.sentence)


def cluster_settings(options: argparse.Namespace, spec: DeploymentSpec, target: Target) -> ClusterSettings:
    """The SLO's p99 limit, Triton's queue time-out, and the delays of the command line."""
    limit = latency_limits(spec.slo.all_objectives()).get(99)
    if limit is None:
        raise InputError(f"{options.models}/{options.model}/deploy.toml: [slo] has no p99_ms; set one to judge the day")
    delays = {name: getattr(options, name) for name in ("pod_start_s", "node_start_s", "node_idle_s", "pods_per_node")}
    timeout_ms = batching_of(spec, read_measured(spec.name, target)).queue_timeout_ms
    return ClusterSettings(p99_limit_ms=limit, queue_timeout_ms=timeout_ms, **delays)


def traffic_of(options: argparse.Namespace, capacity: Capacity) -> tuple[np.ndarray, str]:
    """The rate of each tick in requests/s, and a description of the traffic."""
    if options.traffic not in get_args(Shape):
        return read_traffic(Path(options.traffic)), options.traffic
    peak_rps = options.peak_rps or DEFAULT_PEAK * (capacity.capacity_rps or 0)
    rates = shape_of_day(options.traffic, peak_rps, options.seed)
    return rates, f"{options.traffic}, peak {peak_rps:g}/s, seed {options.seed}"


def result(choice: TargetChoice, capacity: Capacity, max_replicas: int, facts: dict[str, Any]) -> dict[str, Any]:
    """The content of `scale.json`; `chosen` is null if no setting holds."""
    best = choice.best
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
        "capacity_rps": capacity.capacity_rps,
        **facts,
        "late_allowed": choice.late,
        "conclusion": choice.sentence,
        "chosen": chosen if choice.holds else None,
        "best": asdict(best),
        "fixed": {"pods": choice.fixed_pods, "node_hours": round(choice.fixed_node_hours, 3)},
        "tried": [asdict(each) for each in choice.tried],
    }


def _cores(capacity: Capacity) -> int | None:
    """Cores of the server's machine; None if only the load generator's are known."""
    return capacity.machine.get("cores") if re.match(r"127\.|localhost:|\[::1\]", capacity.url) else None


def table(choice: TargetChoice) -> Table:
    """The best settings, cheapest first, then those that do not hold; the last row is the cost without autoscaler."""
    shown = Table("metric", box=box.SIMPLE_HEAD)
    for name in ("target", "minReplicas", "most pods", "late requests", "for", "node-hours"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for tried in sorted(choice.tried, key=lambda each: each.rank(choice.late))[:ROWS]:
        word = "holds" if tried.holds(choice.late) else "fails"
        mark = "◀ chosen" if tried == choice.best and choice.holds else word
        figures = [f"{tried.target:g}", str(tried.min_replicas), str(tried.most_pods), f"{tried.late_share:.3%}"]
        shown.add_row(tried.metric, *figures, f"{tried.late_s} s", f"{tried.node_hours:.1f}", mark)
    shown.add_section()
    pods = str(choice.fixed_pods)
    shown.add_row("fixed", "", pods, pods, "", "", f"{choice.fixed_node_hours:.1f}", "")
    return shown

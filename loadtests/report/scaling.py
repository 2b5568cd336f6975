"""A replayed day under the autoscaler, as a page: traffic and pods, latency, and what every setting came to.

Contract: drawn from what `loadtests.simulate_scale` found; each point of a curve over time is the worst of its few
minutes (highest rate and p99, fewest pods). Cost stands beside node hours where a node's price was given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from loadtests.charts import Chart, Point, Scale, up_to
from loadtests.cluster import Day
from loadtests.report.page import card, document, facts, grid, ms, numbers, sentence
from loadtests.service_curve import ServiceCurve
from loadtests.traffic import TICK_S

BINS = 288  # of a chart over time: five minutes of a day
TIPS = 48
MOST_ROWS = 14
LEAST_SHARE = 1e-5  # of late requests that a logarithmic axis still shows
NAMES = {"queue": "queue-to-compute ratio", "rate": "requests/s of a pod"}


def binned(values: np.ndarray, worst: Callable[[np.ndarray], Any]) -> list[Point]:
    """Points of hour and worst value of each bin."""
    hours = TICK_S / 3600
    parts = np.array_split(np.arange(len(values)), min(BINS, len(values)))
    return [(float(part[0]) * hours, float(worst(values[part]))) for part in parts]


def _chart(day: Day, y: Scale, label: str, y_unit: str) -> Chart:
    hours = len(day.rates_rps) * TICK_S / 3600
    chart = Chart(Scale(0, hours), y, label)
    ticks = [(at, f"{at:02.0f}:00") for at in range(0, 25, 6)] if hours == 24 else None
    chart.axes(x_unit=" h", y_unit=y_unit, x_ticks=ticks)
    return chart


def traffic_chart(day: Day, curve: ServiceCurve) -> str:
    """Requests/s, and what the pods that are ready hold within the SLO."""
    rates, ready = binned(day.rates_rps, np.max), binned(day.ready, np.min)
    held = [(hour, count * curve.capacity_rps) for hour, count in ready]
    chart = _chart(day, up_to([*(y for _, y in rates), *(y for _, y in held)]), "Traffic and capacity", "requests/s")
    chart.line(held, "knee")
    chart.line(rates, "intended")
    step = max(1, len(rates) // TIPS)
    for (hour, rate), (_, count) in list(zip(rates, ready, strict=True))[step // 2 :: step]:
        chart.tip(hour, [_clock(hour), f"{rate:.0f}/s", f"{count:.0f} pods ready: {count * curve.capacity_rps:.0f}/s"])
    chart.legend("intended", "traffic")
    chart.legend("knee", "within the SLO by what is ready")
    return chart.figure()


def pods_chart(day: Day) -> str:
    """Pods and nodes."""
    pods, nodes = binned(day.pods, np.max), binned(day.nodes, np.max)
    chart = _chart(day, up_to([y for _, y in [*pods, *nodes]]), "Pods and nodes", "number")
    chart.line(pods, "intended")
    chart.line(nodes, "service")
    step = max(1, len(pods) // TIPS)
    for (hour, count), (_, machines) in list(zip(pods, nodes, strict=True))[step // 2 :: step]:
        chart.tip(hour, [_clock(hour), f"{count:.0f} pods", f"{machines:.0f} nodes"])
    chart.legend("intended", "pods")
    chart.legend("service", "nodes")
    return chart.figure()


def latency_chart(day: Day, limit_ms: float) -> str:
    """p99 by the service curve, and the SLO's limit."""
    p99 = binned(day.p99_ms, np.max)
    seen = [y for _, y in p99 if math.isfinite(y) and y > 0]
    y = Scale(min([*seen, limit_ms]) / 1.3, max([*seen, limit_ms]) * 1.3, log=True)
    chart = _chart(day, y, "p99", "p99, ms")
    chart.limit(limit_ms, f"SLO: p99 {ms(limit_ms)}", left=True)
    chart.line([(hour, min(value, y.high)) for hour, value in p99 if value > 0], "intended")
    step = max(1, len(p99) // TIPS)
    for hour, value in p99[step // 2 :: step]:
        chart.tip(hour, [_clock(hour), f"p99 {ms(value)}"])
    return chart.figure()


def settings_chart(found: dict[str, Any]) -> str:
    """Late requests over node hours, a point a setting."""
    tried = found["tried"]
    shares = [max(each["late_share"], LEAST_SHARE) for each in tried]
    costs = [each["node_hours"] for each in tried]
    x = Scale(min(costs) * 0.95, max(costs) * 1.05 or 1)
    y = Scale(LEAST_SHARE * 100 / 1.5, max([*shares, found["late_allowed"]]) * 100 * 1.5, log=True)
    chart = Chart(x, y, "Late requests and cost of every setting", x_title="node hours")
    chart.axes(x_unit="", y_unit="late, %")
    if found["late_allowed"]:
        chart.limit(found["late_allowed"] * 100, f"allowed: {found['late_allowed']:.2%}")
    for each, share in sorted(zip(tried, shares, strict=True), key=lambda pair: pair[0] == found["best"]):
        css, shape = ("service", "circle") if each["metric"] == "queue" else ("intended", "circle")
        if each == found["best"]:
            css, shape = ("holds", "star") if found["chosen"] else ("failed", "cross")
        told = f"{each['late_share']:.3%} late, {_hours(each)}"
        tip = [f"{NAMES[each['metric']]} {each['target']:g}", f"at least {each['min_replicas']} pods", told]
        chart.point(each["node_hours"], share * 100, css, shape, tip)
    chart.legend("service circle", NAMES["queue"])
    chart.legend("intended circle", NAMES["rate"])
    chart.legend(*(("holds star", "chosen") if found["chosen"] else ("failed cross", "nearest")))
    return chart.figure()


def _hours(each: dict[str, Any]) -> str:
    cost = f", cost {each['cost']:.2f}" if "cost" in each else ""
    return f"{each['node_hours']:.1f} node hours{cost}"


def _clock(hour: float) -> str:
    return f"{int(hour):02d}:{round(hour * 60) % 60:02d}"


def _rows(found: dict[str, Any]) -> str:
    late = found["late_allowed"]
    ordered = sorted(found["tried"], key=lambda each: (each["late_share"] > late, each["node_hours"]))
    rows = [
        (
            f"{NAMES[each['metric']]} {each['target']:g}",
            str(each["min_replicas"]),
            f"{each['late_share']:.3%}",
            f"{each['node_hours']:.1f}",
            *([f"{each['cost']:.2f}"] if "cost" in each else []),
            "✓" if each["late_share"] <= late else "✕",
        )
        for each in ordered[:MOST_ROWS]
    ]
    left = len(ordered) - len(rows)
    note = f"<p>And {left} more in scale.json.</p>" if left > 0 else ""
    head = ["", "least", "late", "node hours", *(["cost"] if found["node_price"] is not None else []), ""]
    return f"<div class='scroll'>{numbers(head, rows)}</div>{note}"


def page(found: dict[str, Any], day: Day, curve: ServiceCurve) -> str:
    """The whole file."""
    best, setup = found["best"], found["setup"]
    title = "A target for the autoscaler" if found["chosen"] else "No setting holds"
    less = f", {found['margin']:.0%} less than measured" if found["margin"] else ""
    subject = f"{found['model']}: {found['traffic']}; a pod holds {curve.capacity_rps:.4g} requests/s{less}"
    head = (
        f"<header class='{'holds' if found['chosen'] else 'violated'}'><h1>{title}</h1>"
        f"<p class='subject'>{sentence(subject)}</p><p>{sentence(found['conclusion'])}</p></header>"
    )
    chosen = facts(
        [
            ("metric", NAMES[best["metric"]]),
            ("target, a pod", f"{best['target']:g}"),
            ("minReplicas", best["min_replicas"]),
            ("most pods seen", best["most_pods"]),
            ("late requests", f"{best['late_share']:.3%} in {best['late_s']} s"),
            ("node hours", f"{best['node_hours']:.1f}"),
            *([("cost", f"{best['cost']:.2f}")] if "cost" in best else []),
            ("without an autoscaler", f"{found['fixed']['pods']} pods, {_hours(found['fixed'])}"),
        ]
    )
    assumed = facts((name.replace("_", " "), f"{value:g}") for name, value in setup.items())
    cards = [
        card("Traffic and capacity", traffic_chart(day, curve), "Late is what lies above the green line for long."),
        card("Pods and nodes", pods_chart(day), "Nodes are paid for from their request to their end."),
        card("p99 over the day", latency_chart(day, setup["p99_limit_ms"]), "By the service curve, as measured."),
        card("Every setting", settings_chart(found), "Further left and lower is better."),
        card(
            "Chosen" if found["chosen"] else "Nearest",
            chosen + f"<p>Assumed, with Kubernetes' algorithm; all pods alike, nodes never run out:</p>{assumed}",
        ),
        card("Settings", _rows(found)),
    ]
    return document(f"{found['model']}: {title}", head + grid(cards), found["traffic"])

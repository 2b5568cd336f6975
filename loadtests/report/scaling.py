"""The page of a replayed day under the autoscaler: traffic, capacity of the pods, and the result of every setting.

Contract: drawn from the result of `loadtests.scale.simulate_scale`; each point of a curve over time is the worst value
of its few minutes (highest rate, fewest pods).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek.svg_chart import Chart, Point, Scale, up_to
from loadtests.report.page import card, document, facts, grid, numbers, sentence
from loadtests.scale.cluster import ReplayedDay
from loadtests.scale.service_curve import ServiceCurve
from loadtests.scale.traffic import TICK_S

BINS = 288  # of a chart over time: five minutes each for a day
TIPS = 48
MOST_ROWS = 14
LEAST_SHARE = 1e-5  # lowest share of late requests on the logarithmic axis
NAMES = {"queue": "queue-to-compute ratio", "rate": "requests/s per pod"}


def binned(values: np.ndarray, worst: Callable[[np.ndarray], Any]) -> list[Point]:
    hours = TICK_S / 3600
    parts = np.array_split(np.arange(len(values)), min(BINS, len(values)))
    return [(float(part[0]) * hours, float(worst(values[part]))) for part in parts]


def traffic_chart(day: ReplayedDay, curve: ServiceCurve) -> str:
    """Requests/s, and the rate that the ready pods hold within the SLO."""
    rates, ready = binned(day.rates_rps, np.max), binned(day.ready, np.min)
    held = [(hour, count * curve.capacity_rps) for hour, count in ready]
    hours = len(day.rates_rps) * TICK_S / 3600
    chart = Chart(Scale(0, hours), up_to(y for _, y in (*rates, *held)), "Traffic and capacity")
    ticks = [(at, f"{at:02.0f}:00") for at in range(0, 25, 6)] if hours == 24 else None
    chart.axes(x_unit=" h", y_unit="requests/s", x_ticks=ticks)
    chart.line(held, "capacity")
    chart.line(rates, "intended")
    step = max(1, len(rates) // TIPS)
    for (hour, rate), (_, count) in list(zip(rates, ready, strict=True))[step // 2 :: step]:
        time = f"{int(hour):02d}:{round(hour * 60) % 60:02d}"
        chart.tip(hour, [time, f"{rate:.0f}/s", f"{count:.0f} pods ready: {count * curve.capacity_rps:.0f}/s"])
    chart.legend("intended", "traffic")
    chart.legend("capacity", "capacity of the ready pods")
    return chart.figure()


def settings_chart(found: dict[str, Any]) -> str:
    """Late requests over node-hours, one point for each setting."""
    tried = found["tried"]
    shares = [max(each["late_share"], LEAST_SHARE) for each in tried]
    costs = [each["node_hours"] for each in tried]
    x = Scale(min(costs) * 0.95, max(costs) * 1.05 or 1)
    y = Scale(LEAST_SHARE * 100 / 1.5, max([*shares, found["late_allowed"]]) * 100 * 1.5, log=True)
    chart = Chart(x, y, "Late requests and cost of every setting", x_title="node-hours")
    chart.axes(x_unit="", y_unit="late requests, %")
    if found["late_allowed"]:
        chart.limit(found["late_allowed"] * 100, f"allowed: {found['late_allowed']:.2%}")
    for each, share in sorted(zip(tried, shares, strict=True), key=lambda pair: pair[0] == found["best"]):
        css, shape = ("service", "circle") if each["metric"] == "queue" else ("intended", "circle")
        if each == found["best"]:
            css, shape = ("holds", "star") if found["chosen"] else ("failed", "cross")
        told = f"{each['late_share']:.3%} late, {each['node_hours']:.1f} node-hours"
        tip = [f"{NAMES[each['metric']]} {each['target']:g}", f"at least {each['min_replicas']} pods", told]
        chart.point(each["node_hours"], share * 100, css, shape, tip)
    chart.legend("service circle", NAMES["queue"])
    chart.legend("intended circle", NAMES["rate"])
    chart.legend(*(("holds star", "chosen") if found["chosen"] else ("failed cross", "nearest")))
    return chart.figure()


def _rows(found: dict[str, Any]) -> str:
    late = found["late_allowed"]
    ordered = sorted(found["tried"], key=lambda each: (each["late_share"] > late, each["node_hours"]))
    rows = [
        (
            f"{NAMES[each['metric']]} {each['target']:g}",
            str(each["min_replicas"]),
            f"{each['late_share']:.3%}",
            f"{each['node_hours']:.1f}",
            "✓" if each["late_share"] <= late else "✕",
        )
        for each in ordered[:MOST_ROWS]
    ]
    left = len(ordered) - len(rows)
    note = f"<p>{left} more are in scale.json.</p>" if left > 0 else ""
    head = ["", "minReplicas", "late", "node-hours", ""]
    return f"<div class='scroll'>{numbers(head, rows)}</div>{note}"


def page(found: dict[str, Any], day: ReplayedDay, curve: ServiceCurve) -> str:
    best, setup = found["best"], found["setup"]
    title = "A target for the autoscaler" if found["chosen"] else "No setting meets the limit"
    less = f", {found['margin']:.0%} less than measured" if found["margin"] else ""
    subject = f"{found['model']}: {found['traffic']}; one pod serves {curve.capacity_rps:.4g} requests/s{less}"
    head = (
        f"<header class='{'holds' if found['chosen'] else 'violated'}'><h1>{title}</h1>"
        f"<p class='subject'>{sentence(subject)}</p><p>{sentence(found['conclusion'])}</p></header>"
    )
    chosen = facts(
        [
            ("metric", NAMES[best["metric"]]),
            ("target per pod", f"{best['target']:g}"),
            ("minReplicas", best["min_replicas"]),
            ("most pods", best["most_pods"]),
            ("late requests", f"{best['late_share']:.3%} in {best['late_s']} s"),
            ("node-hours", f"{best['node_hours']:.1f}"),
            ("without an autoscaler", f"{found['fixed']['pods']} pods, {found['fixed']['node_hours']:.1f} node-hours"),
        ]
    )
    assumed = facts((name.replace("_", " "), f"{value:g}") for name, value in setup.items())
    cards = [
        card(
            "Traffic and capacity",
            traffic_chart(day, curve),
            "Requests are late where traffic stays above the green line.",
        ),
        card("Every setting", settings_chart(found), "Further left and lower is better."),
        card(
            "Chosen" if found["chosen"] else "Nearest",
            chosen + f"<p>Assumptions: Kubernetes' algorithm, equal pods, unlimited nodes:</p>{assumed}",
        ),
        card("Settings", _rows(found)),
    ]
    return document(f"{found['model']}: {title}", head + grid(cards), found["traffic"])

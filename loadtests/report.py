"""Draws a saved run as one HTML file that needs nothing else: no script, no outside resource.

Contract: reads the run's folder and `deploy.toml`, writes `report.html` into the folder and prints its
path. The verdict comes first; light or dark is the reader's choice; it reads on a phone.

Examples:
    python -m loadtests.report                                  # the latest run of the recommender
    python -m loadtests.report --run build/recommender/loadtests/2026-11-25T12-55-13.042Z
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path

import numpy as np

from deepseek.spec import Parser, SloSpec, run_command
from loadtests import server_statistics
from loadtests.charts import Chart, Scale, stacked_bar, up_to
from loadtests.results import Latency, Run
from loadtests.slo import Judged, Judgement, add_run_arguments, formatted, judge, latency_limits, load

HEADLINES = {
    "holds": "The SLO holds",
    "violated": "The SLO is violated",
    "inconclusive": "Inconclusive",
    "invalid": "Not a valid measurement",
}
SYMBOLS = {"holds": "✓", "violated": "✕", "inconclusive": "?", "invalid": "!"}
MEANINGS = {
    "ms": "latency",
    "throughput": "good answers a second",
    "error_rate": "requests that fail",
    "quality": "task metric of the served model",
}
BOUNDS = {"<": "less than", "<=": "at most", ">": "more than", ">=": "at least"}
TAIL = (50, 75, 90, 95, 99, 99.9, 99.99)  # percentiles named below the tail chart
WORDS = {"intended": "from the planned send", "service": "from the actual send"}
PARTS = {
    "queue": "waiting in Triton's queue",
    "compute_input": "preparing inputs",
    "compute_infer": "the model",
    "compute_output": "preparing outputs",
}


def ms(value: float) -> str:
    """Milliseconds with three figures."""
    if math.isnan(value):
        return "-"
    if math.isinf(value):
        return "never"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def kinds(run: Run) -> tuple[Latency, ...]:
    """The latencies that a run has, the judged one first."""
    return ("intended", "service") if run.settings.open_loop else ("service",)


def tail_chart(run: Run, slo: SloSpec) -> str:
    """Latency at every percentile; the x axis gives each further nine the same room."""
    distributions = {kind: run.window.latency(kind) for kind in kinds(run)}
    total = max(1, run.window.planned)
    last = max(99.0, 100 * (1 - 1 / total))
    position = lambda percent: -math.log10(1 - percent / 100)  # noqa: E731
    percents = [100 * (1 - 10**-step) for step in np.linspace(0, position(last), 300)]
    curves = {
        kind: [(position(percent), found.percentile_ms(percent)) for percent in percents]
        for kind, found in distributions.items()
    }
    limits = latency_limits(slo)
    values = [y for curve in curves.values() for _, y in curve if math.isfinite(y)] + list(limits.values())
    low, high = min(values, default=1), max(values, default=1)
    scale = Scale(max(low, 0.01) / 1.3, high * 1.3, log=True) if high > 30 * low else up_to(values)
    chart = Chart(Scale(0, position(last)), scale, "Latency by percentile")
    ticks = [(position(percent), f"p{percent:g}") for percent in TAIL if percent <= last and percent != 75]
    chart.axes(x_unit="", y_unit="ms", x_ticks=ticks)
    for kind in reversed(curves):
        chart.line(curves[kind], kind)
    for percent, limit in limits.items():
        chart.mark(position(percent), limit, "limit", f"p{percent:g} limit")
    for kind in curves:
        chart.legend(kind, f"{kind}: {WORDS[kind]}")
    return chart.figure()


def distribution_chart(run: Run) -> str:
    """How many requests took how long, on a logarithmic axis."""
    distributions = {kind: run.window.latency(kind) for kind in kinds(run)}
    lows = [found.percentile_ms(0) for found in distributions.values()]
    highs = [found.max_ms for found in distributions.values()]
    low = min((value for value in lows if math.isfinite(value)), default=1)
    high = max((value for value in highs if math.isfinite(value)), default=10)
    edges = np.geomspace(max(low, 0.01) / 1.15, max(high, low * 2) * 1.15, 61)
    heights = {kind: found.density(edges) for kind, found in distributions.items()}
    chart = Chart(
        Scale(edges[0], edges[-1], log=True), up_to(np.concatenate(list(heights.values()))), "Distribution of latency"
    )
    chart.axes(x_unit=" ms", y_unit="requests")
    first, *others = heights
    chart.bars(edges.tolist(), heights[first].tolist(), first)
    for kind in others:
        chart.outline(edges.tolist(), heights[kind].tolist(), kind)
    chart.legend(first, first)
    for kind in others:
        chart.legend(kind, kind)
    return chart.figure()


def _over_time(run: Run) -> Scale:
    return Scale(-run.settings.warmup_s, run.settings.duration_s)


def latency_over_time_chart(run: Run, slo: SloSpec) -> str:
    """p50 and p99 of the requests planned in each second."""
    curves: dict[int, list[tuple[float, float]]] = {50: [], 99: []}
    for second in run.seconds:
        if second.second < run.settings.duration_s:
            found = second.latency(run.judged)
            for percent, curve in curves.items():
                curve.append((second.second + 0.5, found.percentile_ms(percent)))
    limits = latency_limits(slo)
    values = [y for curve in curves.values() for _, y in curve if math.isfinite(y)] + list(limits.values())
    low, high = min(values, default=1), max(values, default=1)
    scale = Scale(max(low, 0.01) / 1.3, high * 1.3, log=True) if high > 30 * low else up_to(values)
    chart = Chart(_over_time(run), scale, "Latency over time")
    if run.settings.warmup_s:
        chart.shade(-run.settings.warmup_s, 0, "warm-up")
    chart.axes(x_unit="", y_unit="ms", x_ticks=_second_ticks(run))
    if limits:
        highest = max(limits)
        chart.limit(limits[highest], f"p{highest:g} limit")
    chart.line(curves[50], "median")
    chart.line(curves[99], run.judged)
    chart.legend(run.judged, f"p99 of each second, {run.judged}")
    chart.legend("median", "p50")
    return chart.figure()


def throughput_chart(run: Run) -> str:
    """Requests planned, answers that came, and failures, in each second."""
    seconds = [second for second in run.seconds if second.second < run.settings.duration_s]
    edges = [float(second.second) for second in seconds] + [run.settings.duration_s]
    planned = [second.planned for second in seconds]
    completed = [second.completed for second in seconds]
    failed = [second.failed for second in seconds]
    chart = Chart(_over_time(run), up_to([*planned, *completed, *failed]), "Throughput over time")
    if run.settings.warmup_s:
        chart.shade(-run.settings.warmup_s, 0, "warm-up")
    chart.axes(x_unit="", y_unit="/s", x_ticks=_second_ticks(run))
    chart.bars(edges, failed, "failed")
    if run.settings.open_loop:
        chart.outline(edges, planned, "planned")
        chart.legend("planned", "planned")
    chart.outline(edges, completed, "intended")
    chart.legend("intended", "good answers")
    chart.legend("failed", "failed")
    return chart.figure()


def _second_ticks(run: Run) -> list[tuple[float, str]]:
    ticks = Scale(0, run.settings.duration_s).ticks(6)
    return [(value, f"{value:g} s") for value in ticks]


def _table(rows: Iterable[tuple[str, object]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table class='facts'>{cells}</table>"


def _card(title: str, body: str, explanation: str = "", css: str = "") -> str:
    text = f"<p class='explained'>{explanation}</p>" if explanation else ""
    return f"<section class='card {css}'><h2>{escape(title)}</h2>{body}{text}</section>"


def _objective(each: Judged) -> str:
    """One objective as a row, with a bar that has the limit at 80 % of its length."""
    used = each.seen / (each.limit or 1e-9)
    width = 100 * min(1.0, used / 1.25) if math.isfinite(used) else 100
    note = f"<span class='note'>{escape(each.note)}</span>" if each.note else ""
    return (
        f"<li class='{each.status}'><div class='objective'><b>{escape(each.name)}</b>"
        f"<span>{_meaning(each)}</span></div>"
        f"<div class='figures'><b>{formatted(each.kind, each.seen)}</b>"
        f"<span>{BOUNDS[each.relation]} {formatted(each.kind, each.limit)}</span></div>"
        f"<div class='bar' role='presentation'><i style='width:{width:.1f}%'></i></div>"
        f"<div class='status'>{SYMBOLS[each.status]} {each.status}{note}</div></li>"
    )


def _meaning(each: Judged) -> str:
    """What an objective asks for, in words."""
    found = re.match(r"p([\d.]+)_ms", each.name)
    return f"{found[1]} of 100 requests are answered within" if found else MEANINGS[each.kind]


def _headline(run: Run, judgement: Judgement) -> str:
    settings = run.settings
    if settings.open_loop:
        rate = f"{settings.rate_rps:g}" if settings.shape is None else settings.shape
        how = f"{rate} requests/s, {settings.arrivals.capitalize()} arrivals (open loop)"
    else:
        how = f"{settings.users} users back to back (closed loop)"
    subject = f"{escape(settings.model)} over {settings.protocol}, {how}, for {settings.duration_s:g} s"
    reasons = "".join(f"<p class='problem'>{_sentence(line)}</p>" for line in judgement.problems)
    notes = "".join(f"<p class='hint'>{_sentence(line)}</p>" for line in judgement.notes)
    objectives = "".join(map(_objective, judgement.objectives))
    return (
        f"<header class='{judgement.verdict}'><h1><span class='badge'>{SYMBOLS[judgement.verdict]}</span>"
        f"{HEADLINES[judgement.verdict]}</h1><p class='subject'>{subject}</p>{reasons}"
        f"<ul class='objectives'>{objectives}</ul>{notes}</header>"
    )


def _sentence(text: str) -> str:
    return escape(f"{text[0].upper()}{text[1:]}.")


def _tiles(run: Run) -> str:
    latency = run.window.latency(run.judged)
    tiles = [(f"p{percent:g}", ms(latency.percentile_ms(percent))) for percent in (50, 95, 99, 99.9)]
    tiles += [("slowest answer", ms(latency.max_ms)), ("good answers", f"{run.window.throughput_rps:.1f}/s")]
    tiles += [("requests", f"{run.window.planned:,}"), ("failed", f"{run.window.failed:,}")]
    return "<dl class='tiles'>" + "".join(f"<div><dt>{n}</dt><dd>{v}</dd></div>" for n, v in tiles) + "</dl>"


def _percentiles(run: Run) -> str:
    """The figures under the charts, for those who want to copy them."""
    found = {kind: run.window.latency(kind) for kind in kinds(run)}
    head = "".join(f"<th>{kind}</th>" for kind in found)
    rows = []
    for percent in (50, 75, 90, 95, 99, 99.9):
        cells = "".join(f"<td>{ms(each.percentile_ms(percent))}</td>" for each in found.values())
        rows.append(f"<tr><th>p{percent:g}</th>{cells}</tr>")
    rows.append("<tr><th>slowest</th>" + "".join(f"<td>{ms(each.max_ms)}</td>" for each in found.values()) + "</tr>")
    return f"<table class='numbers'><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _server(run: Run) -> str:
    statistics = run.server["statistics"]
    means = server_statistics.means_ms(statistics)
    if not means:
        return "<p>Not available: the server does not give its statistics over this connection.</p>"
    seen = run.window.latency("service").mean_ms
    rest = max(0.0, seen - sum(means.values())) if math.isfinite(seen) else 0.0
    rows = [
        *((name, PARTS[name], mean) for name, mean in means.items()),
        ("rest", "client, network and the rest", rest),
    ]
    legend = "".join(
        f"<tr><td><i class='swatch {css}'></i>{text}</td><td>{ms(value)}</td></tr>" for css, text, value in rows
    )
    executions = max(1, statistics["execution_count"])
    batches = sorted((int(size), times / executions) for size, times in statistics["batches"].items())
    common = ", ".join([f"{size} ({share:.0%})" for size, share in batches if share >= 0.005][:8])
    facts = [
        ("mean batch", f"{server_statistics.mean_batch(statistics):.2f}"),
        ("batch sizes", common or "-"),
        ("executions", f"{executions:,} for {statistics['success']['count']:,} requests"),
        ("rejected or failed", f"{statistics['fail']['count']:,}"),
    ]
    bar = stacked_bar([(css, value) for css, _, value in rows], "Where the mean request spends its time")
    return f"{bar}<table class='numbers split'>{legend}</table>{_table(facts)}"


def _failures(run: Run) -> str:
    if not run.window.failed:
        return "<p>No request failed.</p>"
    rows = [(kind, f"{count:,} ({count / run.window.planned:.2%})") for kind, count in run.window.errors.most_common()]
    return _table(rows)


def _generator(run: Run) -> Sequence[tuple[str, object]]:
    lag = run.window.latency("lag")
    facts: list[tuple[str, object]] = [
        (name.replace("_cpu", " CPU"), f"{share:.0%}") for name, share in run.generator.items() if name != "precedence"
    ]
    if run.settings.open_loop:
        facts.insert(0, ("requests taken up in time", f"{run.window.attempted_share:.2%}"))
        facts.insert(1, ("send lag p50 / p99", f"{ms(lag.percentile_ms(50))} / {ms(lag.percentile_ms(99))}"))
        facts.append(("real-time priority", "yes" if run.generator.get("precedence") else "not permitted"))
    return facts


def _settings(run: Run) -> Sequence[tuple[str, object]]:
    settings = run.settings
    return [
        ("started", run.started_at.replace("T", " ").replace("+00:00", " UTC")),
        ("model, version", f"{settings.model}, {run.server.get('version') or '-'}"),
        ("target", settings.target),
        ("endpoint", f"{settings.protocol} at {settings.url}"),
        ("inputs", Path(settings.inputs).name),
        ("warm-up, measured", f"{settings.warmup_s:g} s, {settings.duration_s:g} s"),
        ("time-out", f"{settings.timeout_s:g} s"),
        ("most in flight", settings.max_in_flight if settings.open_loop else settings.users),
        *([("arrivals, seed", f"{settings.arrivals}, {settings.seed}")] if settings.open_loop else []),
    ]


def page(run: Run, slo: SloSpec) -> str:
    """The whole HTML document."""
    judgement = judge(run, slo)
    machine = [(name.replace("_gib", " (GiB)"), value) for name, value in run.machine.items() if name != "versions"]
    machine += [(name, version) for name, version in run.machine.get("versions", {}).items()]
    tail = (
        "Read from the left: this share of the requests was at least as fast. "
        + ("The gap between the lines is time that requests waited to be sent. " if run.settings.open_loop else "")
        + "Failed requests count as slower than any limit."
    )
    cards = [
        _card("Latency by percentile", tail_chart(run, slo), tail),
        _card("Distribution of latency", distribution_chart(run), "How many requests took how long."),
        _card(
            "Latency over time", latency_over_time_chart(run, slo), "By the second in which the request was planned."
        ),
        _card("Throughput over time", throughput_chart(run), "Each second's answers; failures by planned second."),
        _card("Where the time goes", _server(run), "Mean per request; Triton's own statistics over the measured time."),
        _card("Percentiles and failures", _percentiles(run) + _failures(run)),
        _card("The load generator's own health", _table(_generator(run))),
        _card("Settings", _table(_settings(run))),
        _card("Machine of the generator", _table(machine)),
    ]
    title = f"{escape(run.settings.model)}: {HEADLINES[judgement.verdict].lower()}"
    style = files("loadtests").joinpath("report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{title}</title><style>{style}</style></head><body><main>"
        f"{_headline(run, judgement)}{_tiles(run)}<div class='grid'>{''.join(cards)}</div>"
        f"<footer>{escape(run.folder.name)}</footer></main></body></html>\n"
    )


def write_report(run: Run, slo: SloSpec) -> Path:
    """Writes `report.html` into the run's folder."""
    path = run.folder / "report.html"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(page(run, slo), encoding="utf-8")
    return draft.replace(path)


def main() -> None:
    """Draws one run and prints where."""
    parser = Parser(__doc__, prog="python -m loadtests.report")
    add_run_arguments(parser)
    print(write_report(*load(parser.parse_args())))


if __name__ == "__main__":
    run_command(main)

"""The charts of one run, or of several laid over each other.

Contract: each function gives one `<figure>`. Of one run both latencies are drawn, intended and service; of several the
judged one of each. An SLO is one for all runs, or one of each where they are the parts of a mix. Latencies over time
are of requests by their planned second; long runs are drawn in wider steps, whose histograms are added.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deepseek.spec import SloSpec
from loadtests.charts import Chart, Point, Scale, up_to
from loadtests.limits import latency_limits
from loadtests.report.page import ms, percentile
from loadtests.report.verdict import LETTERS, names_of
from loadtests.results import Distribution, Latency, Run, Second, Stretch

TAIL = (50, 90, 99, 99.9, 99.99, 99.999)  # percentiles named below the tail chart
DIAMOND = "\N{BLACK DIAMOND}"
WORDS = {"intended": "from the planned send", "service": "from the actual send"}
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
MOST_STEPS = 120  # of a chart over time
KINDS = 5  # of failures that have a colour of their own

Slos = SloSpec | Sequence[SloSpec]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One latency of one run."""

    run: Run
    kind: Latency
    css: str
    name: str


def curves(runs: Sequence[Run]) -> list[Curve]:
    """What is drawn, the judged latency first."""
    if len(runs) > 1:
        named = zip(LETTERS, names_of(runs), runs, strict=False)
        return [Curve(run=run, kind=run.judged, css=f"run{x}", name=name) for x, name, run in named]
    kinds: tuple[Latency, ...] = ("intended", "service") if runs[0].settings.open_loop else ("service",)
    return [Curve(run=runs[0], kind=kind, css=kind, name=kind) for kind in kinds]


def _latency_scale(values: Sequence[float], limits: Sequence[float]) -> Scale:
    """Logarithmic where the values differ much."""
    finite = [value for value in values if math.isfinite(value)] + list(limits)
    low, high = min(finite, default=1), max(finite, default=1)
    return Scale(max(low, 0.01) / 1.3, high * 1.4, log=True) if high > 30 * low else up_to(finite, 1.15)


@dataclass(frozen=True, kw_only=True)
class _Tail:
    """One line of a percentile chart."""

    css: str
    name: str
    legend: str
    latency: Distribution
    limits: dict[float, float]
    """Percentile -> limit, marked beside it."""

    @property
    def last(self) -> float:
        """The highest percentile that is not the slowest request alone."""
        return max(50.0, 100 * (1 - 1 / max(1, self.latency.total)))


def _limits(drawn: Sequence[Curve], slo: Slos) -> list[dict[float, float]]:
    """Of each curve its own; none where one SLO is for all."""
    if isinstance(slo, SloSpec):
        return [{} for _ in drawn]
    return [latency_limits(each) for each in slo]


def percentiles(runs: Sequence[Run], slo: Slos) -> str:
    """Latency at every percentile; the x axis gives each further nine the same room."""
    drawn = curves(runs)
    tails = []
    for curve, limits in zip(drawn, _limits(drawn, slo), strict=True):
        said = f"{curve.name}: {WORDS[curve.kind]}" if len(runs) == 1 else _with_limits(curve.name, limits)
        latency = curve.run.window.latency(curve.kind)
        tails.append(_Tail(css=curve.css, name=curve.name, legend=said, latency=latency, limits=limits))
    shared = latency_limits(slo) if isinstance(slo, SloSpec) else {}
    unanswered = runs[0].window.failed / max(1, runs[0].window.planned) if len(runs) == 1 else 0.0
    return _tail_chart(tails, shared, unanswered)


def _with_limits(name: str, limits: dict[float, float]) -> str:
    told = ", ".join(f"p{percent:g} {ms(limit)}" for percent, limit in sorted(limits.items()))
    return f"{name} ({DIAMOND} SLO: {told})" if told else name


def by_length(run: Run, slo: SloSpec) -> str:
    """The same of the inputs of each length, of the commonest where there are more than have a colour."""
    common = sorted(run.lengths, key=lambda length: -run.lengths[length].planned)[: len(LETTERS)]
    shown = [length for length in run.lengths if length in common]  # shortest first
    tails = [
        _Tail(css=f"run{x}", name=length, legend=length, latency=run.lengths[length].latency(run.judged), limits={})
        for x, length in zip(LETTERS, shown, strict=False)
    ]
    return _tail_chart(tails, latency_limits(slo))


def _tail_chart(tails: Sequence[_Tail], shared: dict[float, float], unanswered: float = 0.0) -> str:
    last = max(99.0, *(tail.last for tail in tails))
    position = lambda percent: -math.log10(1 - percent / 100)  # noqa: E731
    percents = [100 * (1 - 10**-step) for step in np.linspace(0, position(last), 300)]
    points = {
        tail.css: [(position(at), tail.latency.percentile_ms(at)) for at in percents if at <= tail.last + 1e-9]
        for tail in tails
    }
    limits = [*shared.values(), *(limit for tail in tails for limit in tail.limits.values())]
    scale = _latency_scale([y for curve in points.values() for _, y in curve], limits)
    title = "share of requests answered at least as fast"
    chart = Chart(Scale(0, position(last)), scale, "Latency by percentile", x_title=title)
    ticks = [(position(percent), f"{percent:g}%") for percent in TAIL if percent <= last]
    if 0 < unanswered < 1 and (answered := 100 * (1 - unanswered)) < last:
        chart.shade(position(answered), position(last), "not answered", low=True)
    chart.axes(x_unit="", y_unit="latency, ms", x_ticks=ticks)
    for tail in reversed(tails):
        chart.line(points[tail.css], tail.css)
    for percent, limit in shared.items():
        if percent <= last:
            chart.mark(position(percent), limit, "limit", f"p{percent:g} limit")
    for tail in tails:
        for percent, limit in tail.limits.items():
            chart.mark(position(min(percent, last)), limit, tail.css)
        chart.legend(tail.css, tail.legend)
    for percent in (25, 50, 75, 90, 95, 99, 99.5, 99.9, 99.95, 99.99, 99.999):
        if percent <= last:
            lines = [f"{each.name} {percentile(each.latency, percent)}" for each in tails]
            chart.tip(position(percent), [f"p{percent:g}", *lines])
    return chart.figure()


def distribution(runs: Sequence[Run]) -> str:
    """How many requests took how long, on a logarithmic axis."""
    drawn = curves(runs)
    found = {curve.name: curve.run.window.latency(curve.kind) for curve in drawn}
    low = min((x for each in found.values() if math.isfinite(x := each.percentile_ms(0))), default=1)
    high = max((x for each in found.values() if math.isfinite(x := each.max_ms)), default=10)
    edges = np.geomspace(max(low, 0.01) / 1.15, max(high, low * 2) * 1.15, 49)
    heights = {name: each.density(edges) for name, each in found.items()}
    top = up_to(np.concatenate(list(heights.values())))
    chart = Chart(Scale(edges[0], edges[-1], log=True), top, "Distribution of latency", x_title="latency (logarithmic)")
    chart.axes(x_unit=" ms", y_unit="requests")
    first, *others = drawn
    if others and len(runs) > 1:
        others = drawn
    else:
        chart.bars(edges.tolist(), heights[first.name].tolist(), first.css)
    for curve in others:
        chart.outline(edges.tolist(), heights[curve.name].tolist(), curve.css)
    for curve in drawn:
        chart.legend(curve.css, curve.name)
    for index in range(0, len(edges) - 1, 3):
        lines = [f"{name}: {count[index : index + 3].sum():,}" for name, count in heights.items()]
        end = edges[min(index + 3, len(edges) - 1)]
        chart.tip(math.sqrt(edges[index] * end), [f"{ms(edges[index])} to {ms(end)}", *lines])
    return chart.figure()


@dataclass(frozen=True)
class Step:
    """A stretch of a run, as charts over time draw it."""

    start_s: float
    end_s: float
    stretch: Stretch

    @property
    def middle_s(self) -> float:
        """Where its figures stand."""
        return (self.start_s + self.end_s) / 2

    @property
    def name(self) -> str:
        """For a tip."""
        width = self.end_s - self.start_s
        return f"second {self.start_s:g}" if width == 1 else f"seconds {self.start_s:g} to {self.end_s:g}"


def step_s(runs: Sequence[Run]) -> float:
    """How many seconds are drawn as one."""
    longest = max(run.settings.warmup_s + run.settings.duration_s for run in runs)
    return float(next((step for step in STEPS_S if longest / step <= MOST_STEPS), STEPS_S[-1]))


def steps(run: Run, width_s: float) -> list[Step]:
    """The run from its warm-up to the end of the window, those in which nothing was planned as well."""
    parts: dict[int, list[Second]] = {}
    for second in run.seconds:
        if second.second < run.settings.duration_s:
            parts.setdefault(math.floor(second.second / width_s), []).append(second)
    found = []
    for number in range(min(parts, default=0), max(parts, default=-1) + 1):
        start = max(number * width_s, -math.ceil(run.settings.warmup_s))
        end = min((number + 1) * width_s, run.settings.duration_s)
        found.append(Step(start, end, Stretch(run.settings, parts.get(number, []), end - start)))
    return found


def _over_time(runs: Sequence[Run], y: Scale, label: str) -> Chart:
    warmup_s = max(run.settings.warmup_s for run in runs)
    end_s = max(run.settings.duration_s for run in runs)
    return Chart(Scale(-warmup_s, end_s), y, label, x_title="seconds since measuring began")


def _time_axes(chart: Chart, runs: Sequence[Run], y_unit: str) -> None:
    warmup_s = max(run.settings.warmup_s for run in runs)
    if warmup_s:
        chart.shade(-warmup_s, 0, "warm-up")
    ticks = Scale(0, max(run.settings.duration_s for run in runs)).ticks(6)
    chart.axes(x_unit="", y_unit=y_unit, x_ticks=[(value, f"{value:g}") for value in ticks])


def latency_over_time(runs: Sequence[Run], slo: Slos) -> str:
    """p99 by planned time, with the SLO's line, and of one run the median."""
    width = step_s(runs)
    judged = curves(runs)[: len(runs)]
    shown = {
        curve.name: [
            (step, step.stretch.latency(curve.kind)) for step in steps(curve.run, width) if step.stretch.seconds
        ]
        for curve in judged
    }
    own = _limits(judged, slo)
    limits = latency_limits(slo) if isinstance(slo, SloSpec) else {}
    tails = {name: [(step.middle_s, found.percentile_ms(99)) for step, found in each] for name, each in shown.items()}
    medians = [(step.middle_s, found.percentile_ms(50)) for step, found in next(iter(shown.values()))]
    values = [y for each in [*tails.values(), medians] for _, y in each]
    marked = [*limits.values(), *(each[max(each)] for each in own if each)]
    chart = _over_time(runs, _latency_scale(values, marked), "Latency over time")
    _time_axes(chart, runs, "latency, ms")
    if limits:
        highest = max(limits)
        chart.limit(limits[highest], f"SLO: p{highest:g} {ms(limits[highest])}")
    if len(runs) == 1:
        chart.line(medians, "median")
    for curve, bounds in zip(judged, own, strict=True):
        _tail_line(chart, tails[curve.name], curve.css)
        each = f"p99 of each {'second' if width == 1 else f'{width:g} s'}, {curve.kind}"
        chart.legend(curve.css, each if len(runs) == 1 else f"{curve.name}, p99")
        if bounds:
            highest = max(bounds)
            chart.limit(bounds[highest], "", css=curve.css)
            chart.legend(f"limit {curve.css}", f"its SLO: p{highest:g} {ms(bounds[highest])}")
    if len(runs) == 1:
        chart.legend("median", "median")
    if any(math.isinf(y) for each in tails.values() for _, y in each):
        chart.legend("failed", "✕ over 1 % not answered")
    _time_tips(chart, shown)
    return chart.figure()


def _tail_line(chart: Chart, points: Sequence[Point], css: str) -> None:
    """A line, and a cross at the top for each step in which so many failed that there is no p99."""
    chart.line(points, css)
    for x, y in points:
        if math.isinf(y):
            chart.point(x, chart.y.high, "failed", "cross")


def _time_tips(chart: Chart, shown: dict[str, list]) -> None:
    lines: dict[str, tuple[float, list[str]]] = {}
    for name, each in shown.items():
        for step, found in each:
            if found.total:
                own = f"p99 {ms(found.percentile_ms(99))}, p50 {ms(found.percentile_ms(50))}"
                text = own if len(shown) == 1 else f"{name}: {own}"
                lines.setdefault(step.name, (step.middle_s, []))[1].append(text)
    for name, (middle_s, texts) in lines.items():
        chart.tip(middle_s, [name, *texts])


def rate_over_time(runs: Sequence[Run]) -> str:
    """Requests planned and good answers a second; of one run the failures, too."""
    width = step_s(runs)
    by_run = [(run, steps(run, width)) for run in runs]
    rates = [(s.stretch.planned / (s.end_s - s.start_s), s.stretch.throughput_rps) for _, each in by_run for s in each]
    chart = _over_time(runs, up_to([max(pair) for pair in rates]), "Rate planned and achieved")
    _time_axes(chart, runs, "requests/s")
    for curve, (run, each) in zip(curves(runs)[: len(runs)], by_run, strict=True):
        if not each:
            continue
        edges = [*(step.start_s for step in each), each[-1].end_s]
        if len(runs) == 1:
            chart.bars(edges, [s.stretch.failed / (s.end_s - s.start_s) for s in each], "failed")
        if run.settings.open_loop:
            chart.outline(edges, [s.stretch.planned / (s.end_s - s.start_s) for s in each], "planned")
        chart.outline(edges, [s.stretch.throughput_rps for s in each], curve.css)
        chart.legend(curve.css, "good answers" if len(runs) == 1 else f"{curve.name}, good answers")
    if any(run.settings.open_loop for run in runs):
        chart.legend("planned", "planned")
    if len(runs) == 1 and any(step.stretch.failed for step in by_run[0][1]):
        chart.legend("failed", "failed")
    _rate_tips(chart, by_run)
    return chart.figure()


def _rate_tips(chart: Chart, by_run: Sequence[tuple[Run, list[Step]]]) -> None:
    lines: dict[str, tuple[float, list[str]]] = {}
    for name, (run, each) in zip(names_of([run for run, _ in by_run]), by_run, strict=True):
        for step in each:
            own = step.stretch
            planned = f"{own.planned / (step.end_s - step.start_s):.4g} planned, " if run.settings.open_loop else ""
            text = f"{planned}{own.throughput_rps:.4g} answered, {own.failed} failed"
            text = text if len(by_run) == 1 else f"{name}: {text}"
            lines.setdefault(step.name, (step.middle_s, []))[1].append(text)
    for title, (middle_s, texts) in lines.items():
        chart.tip(middle_s, [title, *texts])


def failures_over_time(run: Run) -> str:
    """Errors and drops by kind; "" where no request of the run failed."""
    each = steps(run, step_s([run]))
    kinds: Counter[str] = sum((step.stretch.errors for step in each), Counter())
    if not kinds:
        return ""
    named = [kind for kind, _ in kinds.most_common(KINDS)]
    layers = {
        f"kind{number}": [step.stretch.errors[kind] / (step.end_s - step.start_s) for step in each]
        for number, kind in enumerate(named, start=1)
    }
    if len(kinds) > KINDS:
        layers["kind6"] = [
            sum(count for kind, count in step.stretch.errors.items() if kind not in named) / (step.end_s - step.start_s)
            for step in each
        ]
    tops = [sum(layer[index] for layer in layers.values()) for index in range(len(each))]
    chart = _over_time([run], up_to(tops), "Failures over time by kind")
    _time_axes(chart, [run], "failures/s")
    chart.stack([*(step.start_s for step in each), each[-1].end_s], layers)
    for css, name in zip(layers, [*named, "others"], strict=False):
        chart.legend(css, name)
    for step in each:
        if step.stretch.errors:
            lines = [f"{kind} {count}" for kind, count in step.stretch.errors.most_common(KINDS)]
            chart.tip(step.middle_s, [step.name, *lines])
    return chart.figure()

"""The charts of one run, or of several overlaid runs.

Contract: each function returns one `<figure>`. A single run shows intended and service latency, several runs show the
judged latency of each. All runs share one SLO; the parts of a mix have one each. Charts over time place a request in
the second for which it was planned; long runs have wider steps with merged histograms.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from deepseek.spec import SloSpec
from deepseek.spec.objectives import latency_limits
from deepseek.svg_chart import Chart, Scale, up_to
from loadtests.percentiles import ALL, ms
from loadtests.report.headline import LETTERS, names_of
from loadtests.results.histogram import Latency
from loadtests.results.run import Run
from loadtests.results.stretch import Second, Stretch, shown_percentile

NINES = (50, 90, 99, 99.9, 99.99, 99.999)  # ticks of the percentile chart, evenly spaced from 90 on
DIAMOND = "\N{BLACK DIAMOND}"
WORDS = {"intended": "from the planned send", "service": "from the actual send"}
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1800, 3600)
MOST_STEPS = 120  # of a chart over time
KINDS = 5  # most kinds of failures in a tip


@dataclass(frozen=True, kw_only=True)
class Curve:
    run: Run
    kind: Latency
    css: str
    name: str


def curves(runs: Sequence[Run]) -> list[Curve]:
    """The curves to draw, the judged latency first."""
    if len(runs) > 1:
        named = zip(LETTERS, names_of(runs), runs, strict=False)
        return [Curve(run=run, kind=run.judged, css=f"run{x}", name=name) for x, name, run in named]
    return [Curve(run=runs[0], kind=kind, css=kind, name=kind) for kind in runs[0].latencies]


def _limits(drawn: Sequence[Curve], slos: Sequence[SloSpec]) -> tuple[dict[float, float], list[dict[float, float]]]:
    """The limits of the only SLO, and those of each curve if each has an SLO of its own."""
    if len(slos) == 1:
        return latency_limits(slos[0].all_objectives()), [{} for _ in drawn]
    return {}, [latency_limits(slo.all_objectives()) for slo in slos]


def scale_of(values: Iterable[float]) -> Scale:
    """A scale for the finite values, logarithmic if they differ more than thirtyfold."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=1), max(finite, default=1)
    return Scale(max(low, 0.01) / 1.3, high * 1.4, log=True) if high > 30 * low else up_to(finite, 1.15)


def _position(percent: float) -> float:
    return -math.log10(1 - percent / 100)


def percentiles(runs: Sequence[Run], slos: Sequence[SloSpec]) -> str:
    """Latency at every percentile; on the x axis each additional nine takes the same width."""
    drawn = curves(runs)
    found = [curve.run.window.latency(curve.kind) for curve in drawn]
    shared, own = _limits(drawn, slos)
    ends = [max(50.0, 100 * (1 - 1 / max(1, each.total))) for each in found]  # beyond it: only the slowest request
    last = max(99.0, *ends)
    percents = [100 * (1 - 10**-step) for step in np.linspace(0, _position(last), 300)]
    lines = [
        [(_position(at), each.percentile_ms(at)) for at in percents if at <= end + 1e-9]
        for each, end in zip(found, ends, strict=True)
    ]
    limits = [limit for each in (shared, *own) for limit in each.values()]
    scale = scale_of([*(y for line in lines for _, y in line), *limits])
    title = "share of requests answered at least as fast"
    chart = Chart(Scale(0, _position(last)), scale, "Latency by percentile", x_title=title)
    answered = 100 * (1 - runs[0].window.failed / max(1, runs[0].window.planned))
    if len(runs) == 1 and answered < last:
        chart.shade(_position(answered), _position(last), "not answered", low=True)
    ticks = [(_position(percent), f"{percent:g}%") for percent in NINES if percent <= last]
    chart.axes(x_unit="", y_unit="latency, ms", x_ticks=ticks)
    for curve, line in reversed(list(zip(drawn, lines, strict=True))):
        chart.line(line, curve.css)
    for percent, limit in shared.items():
        if percent <= last:
            chart.mark(_position(percent), limit, "limit", f"p{percent:g} limit")
    for curve, bounds in zip(drawn, own, strict=True):
        for percent, limit in bounds.items():
            chart.mark(_position(min(percent, last)), limit, curve.css)
        told = ", ".join(f"p{percent:g} {ms(limit)}" for percent, limit in sorted(bounds.items()))
        said = f": {WORDS[curve.kind]}" if len(runs) == 1 else f" ({DIAMOND} SLO: {told})" if told else ""
        chart.legend(curve.css, curve.name + said)
    for percent in ALL:
        if percent <= last:
            texts = [
                f"{curve.name} {shown_percentile(each, percent)}" for curve, each in zip(drawn, found, strict=True)
            ]
            chart.tip(_position(percent), [f"p{percent:g}", *texts])
    return chart.figure()


@dataclass(frozen=True)
class ChartStep:
    """A stretch of a run that is one step of a chart over time."""

    start_s: float
    end_s: float
    stretch: Stretch

    @property
    def middle_s(self) -> float:
        return (self.start_s + self.end_s) / 2

    @property
    def name(self) -> str:
        width = self.end_s - self.start_s
        return f"second {self.start_s:g}" if width == 1 else f"seconds {self.start_s:g} to {self.end_s:g}"


def step_s(runs: Sequence[Run]) -> float:
    longest = max(run.settings.warmup_s + run.settings.duration_s for run in runs)
    return float(next((step for step in STEPS_S if longest / step <= MOST_STEPS), STEPS_S[-1]))


def steps(run: Run, width_s: float) -> list[ChartStep]:
    """The steps from the warm-up to the end of the window, including steps without requests."""
    parts: dict[int, list[Second]] = {}
    for second in run.seconds:
        if second.second < run.settings.duration_s:
            parts.setdefault(math.floor(second.second / width_s), []).append(second)
    found = []
    for number in range(min(parts, default=0), max(parts, default=-1) + 1):
        start = max(number * width_s, -math.ceil(run.settings.warmup_s))
        end = min((number + 1) * width_s, run.settings.duration_s)
        found.append(ChartStep(start, end, Stretch(run.settings, parts.get(number, []), end - start)))
    return found


def _over_time(runs: Sequence[Run], y: Scale, label: str, y_unit: str) -> Chart:
    warmup_s = max(run.settings.warmup_s for run in runs)
    end_s = max(run.settings.duration_s for run in runs)
    chart = Chart(Scale(-warmup_s, end_s), y, label, x_title="seconds since the measurement began")
    if warmup_s:
        chart.shade(-warmup_s, 0, "warm-up")
    chart.axes(x_unit="", y_unit=y_unit, x_ticks=[(value, f"{value:g}") for value in Scale(0, end_s).ticks(6)])
    return chart


def _add_tips(chart: Chart, texts: Iterable[tuple[ChartStep, str]]) -> None:
    lines: dict[str, tuple[float, list[str]]] = {}
    for step, text in texts:
        lines.setdefault(step.name, (step.middle_s, []))[1].append(text)
    for name, (middle_s, own) in lines.items():
        chart.tip(middle_s, [name, *own])


def latency_over_time(runs: Sequence[Run], slos: Sequence[SloSpec]) -> str:
    """p99 by planned time, with the SLO's limit; for a single run also the median."""
    width, single = step_s(runs), len(runs) == 1
    judged = curves(runs)[: len(runs)]
    shared, own = _limits(judged, slos)
    found = [
        [(step, step.stretch.latency(curve.kind)) for step in steps(curve.run, width) if step.stretch.seconds]
        for curve in judged
    ]
    tails = [[(step.middle_s, each.percentile_ms(99)) for step, each in line] for line in found]
    medians = [(step.middle_s, each.percentile_ms(50)) for step, each in found[0]]
    marked = [*shared.values(), *(bounds[max(bounds)] for bounds in own if bounds)]
    scale = scale_of([*(y for line in (*tails, medians) for _, y in line), *marked])
    chart = _over_time(runs, scale, "Latency over time", "latency, ms")
    if shared:
        chart.limit(shared[max(shared)], f"SLO: p{max(shared):g} {ms(shared[max(shared)])}")
    if single:
        chart.line(medians, "median")
    for curve, line, bounds in zip(judged, tails, own, strict=True):
        chart.line(line, curve.css)
        for x, y in line:
            if math.isinf(y):  # the p99 falls on failed requests
                chart.point(x, chart.y.high, "failed", "cross")
        each = f"p99 of each {'second' if width == 1 else f'{width:g} s'}, {curve.kind}"
        chart.legend(curve.css, each if single else f"{curve.name}, p99")
        if bounds:
            highest = max(bounds)
            chart.limit(bounds[highest], "", css=curve.css)
            chart.legend(f"limit {curve.css}", f"its SLO: p{highest:g} {ms(bounds[highest])}")
    if single:
        chart.legend("median", "median")
    if any(math.isinf(y) for line in tails for _, y in line):
        chart.legend("failed", "✕ over 1 % failed")
    _add_tips(
        chart,
        (
            (step, f"{_whose(curve, single)}p99 {ms(each.percentile_ms(99))}, p50 {ms(each.percentile_ms(50))}")
            for curve, line in zip(judged, found, strict=True)
            for step, each in line
            if each.total
        ),
    )
    return chart.figure()


def _whose(curve: Curve, single: bool) -> str:
    return "" if single else f"{curve.name}: "


def rate_over_time(runs: Sequence[Run]) -> str:
    """Planned requests/s and good answers/s; for a single run also failures, with their kinds in the tips."""
    single, judged = len(runs) == 1, curves(runs)[: len(runs)]
    by_run = [steps(run, step_s(runs)) for run in runs]
    rates = [max(step.stretch.planned_rps, step.stretch.throughput_rps) for each in by_run for step in each]
    chart = _over_time(runs, up_to(rates), "Rate planned and achieved", "requests/s")
    for curve, each in zip(judged, by_run, strict=True):
        if not each:
            continue
        edges = [*(step.start_s for step in each), each[-1].end_s]
        if single:
            chart.bars(edges, [step.stretch.failed / step.stretch.duration_s for step in each], "failed")
        if curve.run.settings.open_loop:
            chart.outline(edges, [step.stretch.planned_rps for step in each], "planned")
        chart.outline(edges, [step.stretch.throughput_rps for step in each], curve.css)
        chart.legend(curve.css, "answered" if single else f"{curve.name}, answered")
    if any(run.settings.open_loop for run in runs):
        chart.legend("planned", "planned")
    if single and any(step.stretch.failed for step in by_run[0]):
        chart.legend("failed", "failed")
    _add_tips(
        chart, (text for curve, each in zip(judged, by_run, strict=True) for text in _counts(curve, each, single))
    )
    return chart.figure()


def _counts(curve: Curve, drawn: Iterable[ChartStep], single: bool) -> Iterator[tuple[ChartStep, str]]:
    for step in drawn:
        own = step.stretch
        planned = f"{own.planned_rps:.4g} planned, " if curve.run.settings.open_loop else ""
        yield step, f"{_whose(curve, single)}{planned}{own.throughput_rps:.4g} answered, {own.failed} failed"
        if single:
            yield from ((step, f"{kind} {count}") for kind, count in own.errors.most_common(KINDS))

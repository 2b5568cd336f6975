"""Capacity and tuning: the knee of latency over rate, and the front of latency and throughput.

Contract: drawn from `capacity.json` and `tuning.json` alone (`loadtests.capacity`, `loadtests.tuning`); as cards of a
run's report where they are of its model and target, or as pages of their own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from loadtests.capacity import Capacity
from loadtests.charts import Chart, Point, Scale, up_to
from loadtests.report.page import card, document, facts, grid, ms, numbers, sentence
from loadtests.trial import Trial
from loadtests.tuning import Setting, TriedSetting, Tuning

LOOKS = {
    "holds": ("holds", "circle"),
    "fails": ("failed", "cross"),
    "invalid": ("doubtful", "diamond"),
    "inconclusive": ("doubtful", "diamond"),
}
MARKS = {"holds": "✓", "failed": "✕", "doubtful": "?"}
OUTCOMES = {"holds": "holds", "failed": "fails", "doubtful": "proves nothing"}
TRIALS_READ = "Rates in requests/s, latencies in ms. ✓ holds, ✕ fails, ? proves nothing."
MOST_SETTINGS = 12  # of the table; all are in tuning.json


def _scale(values: Sequence[float], room: float = 1.3) -> Scale:
    """Logarithmic where the values differ by more than tenfold."""
    low, high = min(values, default=1.0), max(values, default=1.0)
    if low > 0 and high > 10 * low:
        return Scale(low / room, high * room, log=True)
    return up_to(values, 1.2)


def p99_limit(objectives: Sequence[str]) -> float | None:
    """The SLO's limit for p99 at every rate, in milliseconds, where one of the objectives is that."""
    for text in objectives:
        found = re.fullmatch(r"p99_ms\s*(?:<=?|≤)\s*([\d.]+)(?:\s*ms)?", text.strip())
        if found:
            return float(found[1])
    return None


def knee(capacity: Capacity) -> str:
    """p99 of every trial over its rate, with the highest rate that holds."""
    limit = p99_limit(capacity.objectives)
    trials = [trial for trial in capacity.trials if trial.sent]
    seen = [trial.p99_ms for trial in trials if trial.p99_ms is not None]
    rates = [trial.rate_rps for trial in trials]
    y = _scale([*seen, *([limit] if limit else [])])
    chart = Chart(_scale(rates, 1.15), y, "p99 by rate", x_title="planned rate, requests/s")
    chart.axes(x_unit="", y_unit="p99, ms")
    if limit:
        chart.limit(limit, f"SLO: p99 {ms(limit)}", left=True)  # low rates are far below it
    if capacity.capacity_rps is not None:
        least = "at least " if capacity.limited_by == "generator" else ""
        chart.at(capacity.capacity_rps, f"{least}{capacity.capacity_rps:g}/s", "knee")
    chart.line(_typical(trials), "median")
    for trial in trials:
        css, shape = LOOKS[trial.outcome]
        chart.point(trial.rate_rps, y.high if trial.p99_ms is None else trial.p99_ms, css, shape, _trial_tip(trial))
    for css in dict.fromkeys(LOOKS[trial.outcome][0] for trial in trials):
        shape = next(shape for name, shape in LOOKS.values() if name == css)
        chart.legend(f"{css} {shape}", OUTCOMES[css])
    return chart.figure()


def _typical(trials: Sequence[Trial]) -> list[Point]:
    """One point a rate: of its longest trial."""
    longest: dict[float, Trial] = {}
    for trial in trials:
        if trial.p99_ms is not None and trial.duration_s >= getattr(longest.get(trial.rate_rps), "duration_s", 0):
            longest[trial.rate_rps] = trial
    return [(rate, longest[rate].p99_ms or 0.0) for rate in sorted(longest)]


def _trial_tip(trial: Trial) -> list[str]:
    why = f": {', '.join(trial.failed)}" if trial.failed else ""
    return [
        f"{trial.rate_rps:g}/s {trial.outcome}{why}",
        f"p50 {ms(trial.p50_ms)}, p99 {ms(trial.p99_ms)}",
        f"{trial.achieved_rps:.4g}/s answered, {trial.error_rate:.2%} failed",
        f"{trial.phase}, {trial.duration_s:g} s",
    ]


def capacity_card(capacity: Capacity) -> str:
    """The knee with its sentence."""
    told = f"<p class='told'>{sentence(capacity.sentence)}</p>"
    when = f"{capacity.started.replace('T', ' ').replace('+00:00', ' UTC')}, {capacity.protocol}"
    return card("Capacity", told + knee(capacity), f"Every trial of make capacity, {escape(when)}.")


def _trials(capacity: Capacity) -> str:
    rows = [
        (
            f"{trial.rate_rps:g}",
            *(_figures(trial) if trial.sent else ("-",) * 4),
            MARKS[LOOKS[trial.outcome][0]],
        )
        for trial in sorted(capacity.trials, key=lambda each: (each.rate_rps, each.duration_s))
    ]
    return numbers(["planned", "answered", "p50", "p99", "failed", ""], rows)


def _figures(trial: Trial) -> tuple[str, ...]:
    latencies = (ms(each).removesuffix(" ms") for each in (trial.p50_ms, trial.p99_ms))
    return (f"{trial.achieved_rps:.4g}", *latencies, f"{trial.error_rate:.1%}")


def front(tuning: Tuning) -> str:
    """p99 over throughput of every setting, the ones that none beats in both joined by a line."""
    tried = [each for each in tuning.trials if each.p99_ms is not None]
    x = _scale([each.throughput_rps for each in tried], 1.1)
    y = _scale([each.p99_ms or 0.0 for each in tried])
    chart = Chart(x, y, "p99 and throughput of every setting", x_title="throughput, answers/s")
    chart.axes(x_unit="", y_unit=f"p99 at {tuning.reference_rps:g}/s, ms")
    best = sorted((each.throughput_rps, each.p99_ms or 0.0) for each in tried if each.pareto)
    chart.line(
        [point for pair in zip(best, [*best[1:], best[-1]], strict=True) for point in _corner(*pair)] if best else [],
        "intended",
    )
    for each in sorted(tried, key=lambda one: _rank(one, tuning)):
        css, shape = _look(each, tuning)
        chart.point(each.throughput_rps, each.p99_ms or 0.0, css, shape, _setting_tip(each))
    chart.legend("median circle", "tried")
    chart.legend("intended circle", "on the front")
    chart.legend("service diamond", "default")
    if tuning.best is not None:
        chart.legend("holds star", "best")
    return chart.figure()


def _corner(left: Point, right: Point) -> list[Point]:
    """Steps: between two settings of the front nothing was measured."""
    return [left, (right[0], left[1])]


def _look(each: TriedSetting, tuning: Tuning) -> tuple[str, str]:
    if tuning.best is not None and each.settings == tuning.best:
        return "holds", "star"
    if each.settings == tuning.default:
        return "service", "diamond"
    return ("intended" if each.pareto else "median"), "circle"


def _rank(each: TriedSetting, tuning: Tuning) -> int:
    """What is drawn last lies on top."""
    return ["median", "intended", "service", "holds"].index(_look(each, tuning)[0])


def _parts(setting: Setting) -> list[str]:
    """A setting in short lines."""
    return [part.strip() for part in str(setting).split(",")]


def _setting_tip(each: TriedSetting) -> list[str]:
    rate = "" if each.capacity_rps is None else f", {each.capacity_rps:g}/s in the SLO"
    figures = f"p99 {ms(each.p99_ms)}, {each.throughput_rps:.4g}/s{rate}"
    first, *others = _parts(each.settings)
    return [figures, first, ", ".join(others)]


def tuning_card(tuning: Tuning) -> str:
    """The front with what was concluded."""
    told = f"<p class='told'>{sentence(tuning.conclusion)}</p>"
    rows: list[tuple[str, object]] = [("default", tuning.default)]
    if tuning.best is not None:
        rows += [("best", tuning.best), ("gain", tuning.gain or "not confirmed")]
        rows.append(("written to the tuned values", "yes" if tuning.applied else "no"))
    when = tuning.started.replace("T", " ").replace("+00:00", " UTC")
    explanation = (
        f"Further right and lower is better. make tune, {escape(when)}; throughput with {tuning.users} in flight."
    )
    return card("Tuning", told + front(tuning) + facts(rows), explanation)


def _settings_tried(tuning: Tuning) -> str:
    ordered = sorted(tuning.trials, key=lambda each: (-(each.capacity_rps or 0), -each.throughput_rps))
    rows = [
        (
            str(each.settings),
            "-" if each.capacity_rps is None else f"{each.capacity_rps:g}/s",
            f"{each.throughput_rps:.1f}/s",
            "-" if each.p99_ms is None else ms(each.p99_ms),
        )
        for each in ordered[:MOST_SETTINGS]
    ]
    left = len(ordered) - len(rows)
    note = f"<p>And {left} more in tuning.json.</p>" if left > 0 else ""
    return f"<div class='scroll'>{numbers(['', 'in the SLO', 'throughput', 'p99'], rows)}</div>{note}"


def _environment(found: Capacity | Tuning) -> list[str]:
    """A card, where anything is known."""
    rows = [(name.replace("_gib", " (GiB)"), value) for name, value in found.machine.items() if name != "versions"]
    rows += found.versions.items()
    return [card("Machine and versions", facts(rows))] if rows else []


def _head(title: str, subject: str, css: str) -> str:
    return f"<header class='{css}'><h1>{escape(title)}</h1><p class='subject'>{escape(subject)}</p></header>"


def capacity_page(capacity: Capacity) -> str:
    """A page of its own."""
    held = capacity.capacity_rps
    title = "No rate holds" if held is None else f"Holds its SLO up to {held:g} requests/s"
    if capacity.exit_code == 3:
        title = "Inconclusive" if held is None else f"At least {held:g} requests/s"
    status = {0: "holds", 1: "violated"}.get(capacity.exit_code, "inconclusive")
    about = f"{capacity.model} on {capacity.target}, {capacity.precision or 'precision not said'}, {capacity.protocol}"
    subject = f"{about} at {capacity.url}: {', '.join(capacity.objectives)}"
    settings = [
        (name.replace("_", " "), "automatic" if (name, value) == ("threads", 0) else value)
        for name, value in capacity.settings.model_dump().items()
        if value is not None
    ]
    cards = [capacity_card(capacity), card("Trials", _trials(capacity), TRIALS_READ)]
    cards += [card("Settings served", facts(settings))] if settings else []
    cards += _environment(capacity)
    return document(f"{capacity.model}: {title}", _head(title, subject, status) + grid(cards), capacity.started)


def tuning_page(tuning: Tuning) -> str:
    """A page of its own."""
    title = "No setting is better than the default" if tuning.best is None else "A better setting"
    subject = f"{tuning.model} on {tuning.target}, {tuning.precision}: {', '.join(tuning.objectives)}"
    cards = [tuning_card(tuning), card("Settings tried", _settings_tried(tuning)), *_environment(tuning)]
    status = "plain" if tuning.best is None else "holds"
    return document(f"{tuning.model}: {title}", _head(title, subject, status) + grid(cards), tuning.started)

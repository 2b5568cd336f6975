"""Capacity and tuning: latency over rate, and the expected latency of every setting.

Contract: drawn only from `capacity.json` and `tuning.json` (`loadtests.search.capacity_result`,
`loadtests.tune.tune_result`), as cards in the report of a run with the same model and target, or as separate pages.
"""

import math
from collections.abc import Sequence
from html import escape

from deepseek.spec import ExitCode
from deepseek.spec.objectives import p99_limits
from deepseek.svg_chart import Chart, Point
from loadtests.percentiles import ms
from loadtests.report.curves import scale_of
from loadtests.report.page import card, document, facts, grid, machine_facts, numbers, sentence, utc
from loadtests.search.capacity_result import Capacity
from loadtests.search.rate_trial import RateTrial
from loadtests.tune.tune_result import ExpectedSettings, TuneResult

DOUBTFUL = ("doubtful diamond", "inconclusive", "?")
OUTCOMES = {
    "holds": ("holds circle", "holds", "✓"),
    "fails": ("failed cross", "fails", "✕"),
    "invalid": DOUBTFUL,
    "inconclusive": DOUBTFUL,
}  # CSS class and shape, word, mark
TRIALS_READ = "Rates in requests/s, latencies in ms. ✓ holds, ✕ fails, ? inconclusive."


def latency_by_rate(capacity: Capacity) -> str:
    """p99 of every trial over its rate, with the highest rate that holds."""
    limit = min(p99_limits(capacity.objectives, math.inf), default=None)  # that of every rate
    trials = [trial for trial in capacity.trials if trial.sent]
    seen = [trial.p99_ms for trial in trials if trial.p99_ms is not None]
    rates = [trial.rate_rps for trial in trials]
    y = scale_of([*seen, *([limit] if limit else [])])
    chart = Chart(scale_of(rates), y, "p99 by rate", x_title="planned rate, requests/s")
    chart.axes(x_unit="", y_unit="p99, ms")
    if limit:
        chart.limit(limit, f"SLO: p99 {ms(limit)}", left=True)  # the left end, where low rates leave room
    if capacity.capacity_rps is not None:
        least = "about " if not capacity.confirmed else "at least " if capacity.limited_by == "generator" else ""
        chart.at(capacity.capacity_rps, f"{least}{capacity.capacity_rps:g}/s", "capacity")
    chart.line(_typical(trials), "median")
    for trial in trials:
        css, shape = OUTCOMES[trial.outcome][0].split()
        chart.point(trial.rate_rps, y.high if trial.p99_ms is None else trial.p99_ms, css, shape, _trial_tip(trial))
    for look, word, _ in dict.fromkeys(OUTCOMES[trial.outcome] for trial in trials):
        chart.legend(look, word)
    return chart.figure()


def _typical(trials: Sequence[RateTrial]) -> list[Point]:
    longest: dict[float, RateTrial] = {}
    for trial in trials:
        if trial.p99_ms is not None and trial.duration_s >= getattr(longest.get(trial.rate_rps), "duration_s", 0):
            longest[trial.rate_rps] = trial
    return [(rate, longest[rate].p99_ms or 0.0) for rate in sorted(longest)]


def _trial_tip(trial: RateTrial) -> list[str]:
    why = f": {', '.join(trial.failed)}" if trial.failed else ""
    return [
        f"{trial.rate_rps:g}/s {trial.outcome}{why}",
        f"p50 {ms(trial.p50_ms)}, p99 {ms(trial.p99_ms)}",
        f"{trial.achieved_rps:.4g}/s answered, {trial.error_rate:.2%} failed",
        f"{trial.phase}, {trial.duration_s:g} s",
    ]


def capacity_card(capacity: Capacity) -> str:
    told = f"<p class='told'>{sentence(capacity.sentence)}</p>"
    when = f"{utc(capacity.started)}, {capacity.protocol}"
    return card("Capacity", told + latency_by_rate(capacity), f"All trials of make capacity, {escape(when)}.")


def _trials(capacity: Capacity) -> str:
    rows = []
    for trial in sorted(capacity.trials, key=lambda each: (each.rate_rps, each.duration_s)):
        latencies = (ms(each).removesuffix(" ms") for each in (trial.p50_ms, trial.p99_ms))
        figures = (f"{trial.achieved_rps:.4g}", *latencies, f"{trial.error_rate:.1%}") if trial.sent else ("-",) * 4
        rows.append((f"{trial.rate_rps:g}", *figures, OUTCOMES[trial.outcome][2]))
    return numbers(["planned", "answered", "p50", "p99", "failed", ""], rows)


def settings_chart(tuning: TuneResult) -> str:
    """The expected p99 of every setting at the two rates."""
    served = [(each, each.p99_ms, each.high_p99_ms) for each in tuning.expected if each.p99_ms and each.high_p99_ms]
    x, y = (scale_of([found[place] for found in served]) for place in (1, 2))  # type: ignore[misc]
    chart = Chart(x, y, "expected p99 of every setting", x_title=f"p99 at {tuning.usual_rps:g}/s, ms")
    chart.axes(x_unit="", y_unit="p99 when busy, ms")
    drawn: list[tuple[str, str]] = [("median circle", "other"), ("service diamond", "default"), ("holds star", "best")]
    for look, _ in drawn:  # the last is on top
        for each, usual_ms, high_ms in served:
            if _look(each, tuning) == look:
                css, shape = look.split()
                tip = [f"p99 {ms(usual_ms)}, {ms(high_ms)} when busy", *str(each.settings).split(", ", 1)]
                chart.point(usual_ms, high_ms, css, shape, tip)
    for look, word in drawn[: 2 if tuning.best is None else 3]:
        chart.legend(look, word)
    return chart.figure()


def _look(each: ExpectedSettings, tuning: TuneResult) -> str:
    if tuning.best is not None and each.settings == tuning.best:
        return "holds star"
    return "service diamond" if each.settings == tuning.default else "median circle"


def tuning_card(tuning: TuneResult) -> str:
    told = f"<p class='told'>{sentence(tuning.conclusion)}</p>"
    rows: list[tuple[str, object]] = [("default", tuning.default)]
    if tuning.best is not None:
        rows += [("best", tuning.best), ("gain", tuning.gain)]
        rows.append(
            ("holds with confidence", "not proved" if tuning.proved_rps is None else f"{tuning.proved_rps:g}/s")
        )
        rows.append(("written to the file of tuned values", "yes" if tuning.applied else "no"))
    by = "predicted from measured batches" if tuning.predicted else "from one short run each"
    made = f"make tune, {escape(utc(tuning.started))}; p99 {by}."
    return card("Tuning", told + settings_chart(tuning) + facts(rows), f"Further left and lower is better. {made}")


def _compared(tuning: TuneResult) -> str:
    rows = [
        (str(each.settings), f"{each.rate_rps:g}/s", ms(default_ms), ms(other_ms), str(pair + 1))
        for each in tuning.comparisons
        for pair, (default_ms, other_ms) in enumerate(each.pairs)
    ]
    said = "".join(
        f"<p>{escape(f'{each.settings}: {each}: {each.outcome} {each.note}'.strip())}</p>"
        for each in tuning.comparisons
    )
    table = numbers(["", "rate", "p99, default", "p99, this setting", "pair"], rows) if rows else ""
    return f"{said or '<p>No setting was worth comparing.</p>'}<div class='scroll'>{table}</div>"


def _page(found: Capacity | TuneResult, title: str, subject: str, css: str, cards: Sequence[str]) -> str:
    environment = card("Machine and versions", machine_facts(found.machine, found.versions))
    head = f"<header class='{css}'><h1>{escape(title)}</h1><p class='subject'>{escape(subject)}</p></header>"
    return document(f"{found.model}: {title}", head + grid([*cards, environment]), found.started)


def capacity_page(capacity: Capacity) -> str:
    held = capacity.capacity_rps
    title = "No rate meets the SLO" if held is None else f"Meets the SLO up to {held:g} requests/s"
    if capacity.exit_code == ExitCode.INVALID:
        title = "Inconclusive"
        if held is not None:
            title = (
                f"At least {held:g} requests/s" if capacity.confirmed else f"About {held:g} requests/s, not confirmed"
            )
    status = {ExitCode.PASS: "holds", ExitCode.GATE_FAILED: "violated"}.get(capacity.exit_code, "inconclusive")
    about = f"{capacity.model} on {capacity.target}, {capacity.precision or 'unknown precision'}, {capacity.protocol}"
    subject = f"{about} at {capacity.url}: {', '.join(capacity.objectives)}"
    settings = [
        (name.replace("_", " "), "automatic" if (name, value) == ("threads", 0) else value)
        for name, value in capacity.settings.model_dump().items()
        if value is not None
    ]
    cards = [capacity_card(capacity), card("Trials", _trials(capacity), TRIALS_READ)]
    cards += [card("Serving settings", facts(settings))] if settings else []
    return _page(capacity, title, subject, status, cards)


def tuning_page(tuning: TuneResult) -> str:
    title = "No setting is proved better than the default" if tuning.best is None else "A better setting was found"
    subject = f"{tuning.model} on {tuning.target}, {tuning.precision}: {', '.join(tuning.objectives)}"
    cards = [tuning_card(tuning), card("Compared with the default", _compared(tuning))]
    return _page(tuning, title, subject, "plain" if tuning.best is None else "holds", cards)

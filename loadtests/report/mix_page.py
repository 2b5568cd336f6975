"""The page of a mix: several models that were asked at once, each judged by its own SLO, and all of it together."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from deepseek.spec import InputError, SloSpec
from deepseek.spec.folders import write_whole
from loadtests.report import details
from loadtests.report.page import card, document, grid, ms, numbers, percentile
from loadtests.report.run_page import charts
from loadtests.report.verdict import LETTERS, SHORT, SYMBOLS, badge, load_of, names_of, objectives, tiled
from loadtests.results import Run
from loadtests.slo import Judgement, Verdict, judge, overall

HEADLINES: dict[Verdict, str] = {
    "holds": "The mix holds every SLO",
    "violated": "The mix violates an SLO",
    "inconclusive": "Inconclusive",
    "invalid": "Not a valid measurement",
}
Part = tuple[Run, SloSpec]


def mix_page(parts: Sequence[Part]) -> str:
    """The whole HTML document: the verdict on all of it, on each part, and the parts' curves over each other."""
    runs = [run for run, _ in parts]
    judgements = [judge(run, slo, alone=False) for run, slo in parts]
    verdict = overall(judgement.verdict for judgement in judgements)
    cards = charts(runs, [slo for _, slo in parts])
    for run in runs:
        if failures := details.failures(run):
            cards.append(card(f"Failures of {run.settings.model}", failures))
    cards.append(card("Where the time goes", details.servers(runs), "Means, by Triton's own statistics of each model."))
    cards.append(card("Percentiles", f"<div class='scroll'>{details.percentiles(runs)}</div>"))
    for run, slo in parts:
        if by_length := details.lengths(run, slo):
            cards.append(card(f"{run.settings.model} by length of the input", by_length))
    cards.append(card("The load generator's own health", details.generator(runs[0], runs[1:])))
    cards += [card(f"Settings of {run.settings.model}", details.settings(run)) for run in runs]
    cards.append(card("Machine of the generator", details.machine(runs[0])))
    title = f"{runs[0].settings.mix}: {SHORT[verdict]}"
    return document(title, _header(verdict, runs, judgements) + _tiles(runs) + grid(cards), runs[0].folder.name)


def _header(verdict: Verdict, runs: Sequence[Run], judgements: Sequence[Judgement]) -> str:
    settings = runs[0].settings
    mix = ", ".join((settings.mix or "").split(","))
    subject = f"{mix} over {settings.protocol}, {_load(runs)}, for {settings.duration_s:g} s"
    told = "".join(
        _judged(letter, name, run, judgement)
        for letter, name, run, judgement in zip(LETTERS, names_of(runs), runs, judgements, strict=False)
    )
    return (
        f"<header class='{verdict}'><h1>{badge(verdict)}{HEADLINES[verdict]}</h1>"
        f"<p class='subject'>{escape(subject)}</p>{told}{_figures(runs)}</header>"
    )


def _load(runs: Sequence[Run]) -> str:
    """Of all models together."""
    settings = [run.settings for run in runs]
    if any(each.rate_rps is None for each in settings):  # a shape, or users: each has its own words
        return f"{len(runs)} models at once"
    kind = f"{settings[0].arrivals.capitalize()} arrivals (open loop)"
    return f"{sum(each.rate_rps or 0 for each in settings):g} requests/s in all, {kind}"


def _judged(letter: str, name: str, run: Run, judgement: Judgement) -> str:
    """One model's verdict, with its objectives."""
    verdict = judgement.verdict
    return (
        f"<section class='part'><h2><i class='swatch run{letter}'></i>{escape(name)}"
        f"<span class='status {verdict}'>{SYMBOLS[verdict]} {SHORT[verdict]}</span></h2>"
        f"<p class='hint'>{escape(load_of(run.settings))}</p>{objectives(judgement)}</section>"
    )


def _figures(runs: Sequence[Run]) -> str:
    rows = []
    for name, run in zip(names_of(runs), runs, strict=True):
        latency = run.window.latency(run.judged)
        shown = [percentile(latency, percent) for percent in (50, 99)]
        failed = f"{run.window.failed / max(1, run.window.planned):.2%}"
        rows.append((name, *shown, f"{run.window.throughput_rps:.1f}", failed))
    return f"<div class='scroll part'>{numbers(['', 'p50', 'p99', 'answers/s', 'failed'], rows)}</div>"


def _tiles(runs: Sequence[Run]) -> str:
    """All models together; a latency of all has no SLO, but the slowest answer is somebody's."""
    windows = [run.window for run in runs]
    failed = sum(window.failed for window in windows)
    planned = sum(window.planned for window in windows)
    slowest = max(runs, key=lambda run: run.window.latency(run.judged).max_ms)
    shown = [
        ("requests in all", f"{planned:,}"),
        ("good answers", f"{sum(window.throughput_rps for window in windows):.1f}/s"),
        ("failed", f"{failed:,} ({failed / max(1, planned):.2%})"),
        (f"slowest, {escape(slowest.settings.model)}", ms(slowest.window.latency(slowest.judged).max_ms)),
    ]
    return tiled(shown)


def write_mix_report(parts: Sequence[Part]) -> Path:
    """Writes the page into the folder of the first model's run."""
    if len(parts) > len(LETTERS):
        raise InputError(f"a mix of {len(parts)} models; at most {len(LETTERS)} can be told apart in one chart")
    return write_whole(parts[0][0].folder / "report-mix.html", mix_page(parts))

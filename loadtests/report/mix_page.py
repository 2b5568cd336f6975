"""The page of a mix: several models under load at once, each judged by its own SLO, and the whole mix."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from deepseek.spec import InputError, SloSpec
from deepseek.spec.files.folders import write_whole
from loadtests.report import run_tables
from loadtests.report.headline import LETTERS, SHORT, SYMBOLS, badge, figures, load_of, names_of, objectives
from loadtests.report.page import card, document, grid
from loadtests.report.run_page import charts
from loadtests.results.run import Run
from loadtests.slo.judge import judge, overall
from loadtests.slo.objectives import SloStatus, SloVerdict

HEADLINES: dict[SloStatus, str] = {
    "holds": "The mix holds every SLO",
    "violated": "The mix violates an SLO",
    "inconclusive": "Inconclusive",
    "invalid": "Invalid measurement",
}
Part = tuple[Run, SloSpec]


def mix_page(parts: Sequence[Part]) -> str:
    """The whole HTML document: the verdict on the mix, on each part, and the overlaid curves of the parts."""
    runs = [run for run, _ in parts]
    judgements = [judge(run, slo, alone=False) for run, slo in parts]
    verdict = overall(judgement.verdict for judgement in judgements)
    cards = charts(runs, [slo for _, slo in parts])
    for run in runs:
        if failures := run_tables.failures(run):
            cards.append(card(f"Failures of {run.settings.model}", failures))
    cards.append(card("Where the time goes", run_tables.servers(runs), "Means from Triton's statistics of each model."))
    cards.append(card("Percentiles", f"<div class='scroll'>{run_tables.percentiles(runs)}</div>"))
    for run in runs:
        if by_length := run_tables.lengths(run):
            cards.append(card(f"{run.settings.model} by input length", by_length))
    cards.append(card("Load generator health", run_tables.generator(runs[0], runs[1:])))
    cards += [card(f"Settings of {run.settings.model}", run_tables.settings(run)) for run in runs]
    cards.append(card("Load generator machine", run_tables.machine(runs[0])))
    title = f"{runs[0].settings.mix}: {SHORT[verdict]}"
    return document(title, _header(verdict, runs, judgements) + grid(cards), runs[0].folder.name)


def _header(verdict: SloStatus, runs: Sequence[Run], judgements: Sequence[SloVerdict]) -> str:
    settings = runs[0].settings
    mix = ", ".join((settings.mix or "").split(","))
    subject = f"{mix} over {settings.over}, {_load(runs)}, for {settings.duration_s:g} s"
    told = "".join(
        _judged(letter, name, run, judgement)
        for letter, name, run, judgement in zip(LETTERS, names_of(runs), runs, judgements, strict=False)
    )
    return (
        f"<header class='{verdict}'><h1>{badge(verdict)}{HEADLINES[verdict]}</h1>"
        f"<p class='subject'>{escape(subject)}</p>{told}<div class='part'>{figures(runs)}</div></header>"
    )


def _load(runs: Sequence[Run]) -> str:
    settings = [run.settings for run in runs]
    if any(each.rate_rps is None for each in settings):  # a shape, or users: each part has its own text
        return f"{len(runs)} models at once"
    kind = f"{settings[0].arrivals.capitalize()} arrivals (open loop)"
    return f"{sum(each.rate_rps or 0 for each in settings):g} requests/s in all, {kind}"


def _judged(letter: str, name: str, run: Run, judgement: SloVerdict) -> str:
    verdict = judgement.verdict
    return (
        f"<section class='part'><h2><i class='swatch run{letter}'></i>{escape(name)}"
        f"<span class='status {verdict}'>{SYMBOLS[verdict]} {SHORT[verdict]}</span></h2>"
        f"<p class='hint'>{escape(load_of(run.settings))}</p>{objectives(judgement)}</section>"
    )


def write_mix_report(parts: Sequence[Part]) -> Path:
    if len(parts) > len(LETTERS):
        raise InputError(f"a mix of {len(parts)} models: a chart shows at most {len(LETTERS)}")
    return write_whole(parts[0][0].folder / "report-mix.html", mix_page(parts))

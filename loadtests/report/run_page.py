"""The pages of load tests: one run, several runs over each other, or a mix of models under load at once."""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from deepseek.spec import InputError, SloSpec
from deepseek.spec.files.folders import write_whole
from loadtests.report import curves, run_tables
from loadtests.report.headline import (
    HEADLINES,
    LETTERS,
    SHORT,
    SYMBOLS,
    badge,
    compared,
    figures,
    headline,
    names_of,
    objectives,
    tiles,
)
from loadtests.report.page import card, document, grid, machine_facts
from loadtests.report.searches import capacity_card, tuning_card
from loadtests.results.run import Run
from loadtests.search.capacity_result import Capacity
from loadtests.slo.judge import judge, overall
from loadtests.slo.judged_objectives import SloStatus, SloVerdict
from loadtests.slo.time_split import TimeSplit
from loadtests.tune.tune_result import TuneResult

READ_TAIL = "Each point: this share of the requests was at least this fast. "
WAITED = "The gap between the lines is the time before a request was sent. "
RATES = "Answers count when they arrive, all else at its planned time."
FAILED_SLOW = "Failed requests count as slower than any limit; means leave them out."
MIX_HEADLINES = HEADLINES | {"holds": "The mix holds every SLO", "violated": "The mix violates an SLO"}
Part = tuple[Run, SloSpec]


def page(runs: Sequence[Run], slo: SloSpec, capacity: Capacity | None = None, tuning: TuneResult | None = None) -> str:
    """The whole HTML document, with capacity and tuning if they are given."""
    searches = [capacity_card(capacity)] if capacity else []
    searches += [tuning_card(tuning)] if tuning else []
    if len(runs) > 1:
        return _comparison(runs, slo, searches)
    run = runs[0]
    judgement = judge(run, slo)
    split = TimeSplit.of_run(run)
    extra = [*([split.sentence] if split else []), *([capacity.sentence] if capacity else [])]
    title = f"{run.settings.model}: {SHORT[judgement.verdict]}"
    body = headline(run, judgement, extra) + tiles(run) + grid(cards_of(runs, [slo], searches))
    return document(title, body, run.folder.name)


def cards_of(runs: Sequence[Run], slos: Sequence[SloSpec], searches: Sequence[str] = ()) -> list[str]:
    """The cards of one run, or of all runs of a mix, below the headline."""

    def each(title: str, draw: Callable[[Run], str]) -> list[str]:
        drawn = [(run.settings.model, body) for run in runs if (body := draw(run))]
        return [card(title if len(runs) == 1 else f"{title} of {model}", body) for model, body in drawn]

    return [
        *charts(runs, slos),
        *each("Failures", run_tables.failures),
        where_time_goes(runs),
        *searches,
        card("Percentiles", run_tables.percentiles(runs)),
        *each("By input length", run_tables.lengths),
        card("Load generator health", run_tables.generator(runs[0], runs[1:])),
        *each("Settings", run_tables.settings),
        card("Load generator machine", machine_facts(runs[0].machine, runs[0].machine.get("versions", {}))),
    ]


def where_time_goes(runs: Sequence[Run]) -> str:
    body = run_tables.server(runs[0]) if len(runs) == 1 else run_tables.servers(runs)
    return card("Where the time goes", body, "Means from Triton's statistics over the measured time.")


def charts(runs: Sequence[Run], slos: Sequence[SloSpec]) -> list[str]:
    waited = WAITED if len(runs) == 1 and runs[0].settings.open_loop else ""
    return [
        card("Latency by percentile", curves.percentiles(runs, slos), READ_TAIL + waited + FAILED_SLOW),
        card("Latency over time", curves.latency_over_time(runs, slos), "By planned send time."),
        card("Rate planned and achieved", curves.rate_over_time(runs), RATES),
    ]


def _comparison(runs: Sequence[Run], slo: SloSpec, searches: Sequence[str]) -> str:
    cards = [
        *charts(runs, [slo]),
        where_time_goes(runs),
        card("Percentiles", run_tables.percentiles(runs)),
        card("Differences", run_tables.differing(runs)),
        *searches,
    ]
    names = " and ".join(run.folder.name for run in runs)
    return document(f"{runs[0].settings.model}: {len(runs)} runs", compared(runs, slo) + grid(cards), names)


def write_report(
    runs: Sequence[Run], slo: SloSpec, capacity: Capacity | None = None, tuning: TuneResult | None = None
) -> Path:
    name = "report.html" if len(runs) == 1 else f"report-{len(runs)}-runs.html"
    return write_whole(runs[-1].folder / name, page(runs, slo, capacity, tuning))


def mix_page(parts: Sequence[Part]) -> str:
    """The whole HTML document: the verdict on the mix, on each part, and the overlaid curves of the parts."""
    runs = [run for run, _ in parts]
    judgements = [judge(run, slo, alone=False) for run, slo in parts]
    verdict = overall(judgement.verdict for judgement in judgements)
    cards = cards_of(runs, [slo for _, slo in parts])
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
        f"<header class='{verdict}'><h1>{badge(verdict)}{MIX_HEADLINES[verdict]}</h1>"
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
        f"<p class='hint'>{escape(run.settings.load)}</p>{objectives(judgement)}</section>"
    )


def write_mix_report(parts: Sequence[Part]) -> Path:
    if len(parts) > len(LETTERS):
        raise InputError(f"a mix of {len(parts)} models: a chart shows at most {len(LETTERS)}")
    return write_whole(parts[0][0].folder / "report-mix.html", mix_page(parts))

"""The page of one run, or of several overlaid runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek.spec import SloSpec
from deepseek.spec.files.folders import write_whole
from loadtests.report import curves, run_tables
from loadtests.report.curves import Slos
from loadtests.report.headline import SHORT, compared, headline, tiles
from loadtests.report.page import card, document, grid
from loadtests.report.searches import capacity_card, tuning_card
from loadtests.results.run import Run
from loadtests.search.capacity_result import Capacity
from loadtests.slo.judge import judge
from loadtests.slo.time_split import TimeSplit
from loadtests.tune.tune_result import TuneResult

READ_TAIL = "Each point: this share of the requests was at least this fast. "
WAITED = "The gap between the lines is the time before a request was sent. "
RATES = "Answers count when they arrive, all else at its planned time. "
FAILED_SLOW = "Failed requests count as slower than any limit; means leave them out."


def page(
    runs: Run | Sequence[Run], slo: SloSpec, capacity: Capacity | None = None, tuning: TuneResult | None = None
) -> str:
    """The whole HTML document, with capacity and tuning if they are given."""
    runs = [runs] if isinstance(runs, Run) else list(runs)
    searches = [capacity_card(capacity)] if capacity else []
    searches += [tuning_card(tuning)] if tuning else []
    if len(runs) > 1:
        return _comparison(runs, slo, searches)
    run = runs[0]
    judgement = judge(run, slo)
    split = TimeSplit.of_run(run)
    extra = [*([split.sentence] if split else []), *([capacity.sentence] if capacity else [])]
    cards = charts(runs, slo)
    if failures := run_tables.failures(run):
        cards.append(card("Failures", failures))
    cards.append(
        card("Where the time goes", run_tables.server(run), "From Triton's statistics over the measured time.")
    )
    cards += searches
    cards.append(card("Percentiles", run_tables.percentiles(runs)))
    if by_length := run_tables.lengths(run):
        cards.append(card("By input length", by_length))
    cards += [
        card("Load generator health", run_tables.generator(run)),
        card("Settings", run_tables.settings(run)),
        card("Load generator machine", run_tables.machine(run)),
    ]
    title = f"{run.settings.model}: {SHORT[judgement.verdict]}"
    return document(title, headline(run, judgement, extra) + tiles(run) + grid(cards), run.folder.name)


def charts(runs: Sequence[Run], slo: Slos) -> list[str]:
    waited = WAITED if len(runs) == 1 and runs[0].settings.open_loop else ""
    return [
        card("Latency by percentile", curves.percentiles(runs, slo), READ_TAIL + waited + FAILED_SLOW),
        card("Latency over time", curves.latency_over_time(runs, slo), "By planned send time."),
        card("Rate planned and achieved", curves.rate_over_time(runs), RATES + _none_failed(runs)),
    ]


def _none_failed(runs: Sequence[Run]) -> str:
    failed = any(run.window.failed for run in runs)
    answered = sum(run.window.ok for run in runs)
    return "" if failed or not answered else f"No request failed: all {answered:,} were answered."


def _comparison(runs: Sequence[Run], slo: SloSpec, searches: Sequence[str]) -> str:
    cards = [
        *charts(runs, slo),
        card("Where the time goes", run_tables.servers(runs), "Means from Triton's statistics over the measured time."),
        card("Percentiles", f"<div class='scroll'>{run_tables.percentiles(runs)}</div>"),
        card("Differences", run_tables.differing(runs)),
        *searches,
    ]
    names = " and ".join(run.folder.name for run in runs)
    return document(f"{runs[0].settings.model}: {len(runs)} runs", compared(runs, slo) + grid(cards), names)


def report_path(runs: Sequence[Run]) -> Path:
    return runs[-1].folder / ("report.html" if len(runs) == 1 else f"report-{len(runs)}-runs.html")


def write_report(
    runs: Run | Sequence[Run], slo: SloSpec, capacity: Capacity | None = None, tuning: TuneResult | None = None
) -> Path:
    runs = [runs] if isinstance(runs, Run) else list(runs)
    return write_whole(report_path(runs), page(runs, slo, capacity, tuning))

"""The page of one run, or of several laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deepseek.spec import SloSpec
from deepseek.spec.folders import write_whole
from loadtests.capacity import Capacity
from loadtests.report import curves, details
from loadtests.report.curves import Slos
from loadtests.report.page import card, document, grid
from loadtests.report.searches import capacity_card, tuning_card
from loadtests.report.verdict import SHORT, compared, headline, tiles
from loadtests.results import Run
from loadtests.server_statistics import Split
from loadtests.slo import judge
from loadtests.tuning import Tuning

READ_TAIL = "Read from the left: this share of the requests was at least as fast. "
WAITED = "The gap between the lines is time that requests waited to be sent. "
RATES = "Answers by when they came, the rest by planned time. "
FAILED_SLOW = "Failed requests count as slower than any limit; a mean leaves them out."


def page(
    runs: Run | Sequence[Run], slo: SloSpec, capacity: Capacity | None = None, tuning: Tuning | None = None
) -> str:
    """The whole HTML document; capacity and tuning are drawn where they are given."""
    runs = [runs] if isinstance(runs, Run) else list(runs)
    searches = [capacity_card(capacity)] if capacity else []
    searches += [tuning_card(tuning)] if tuning else []
    if len(runs) > 1:
        return _comparison(runs, slo, searches)
    run = runs[0]
    judgement = judge(run, slo)
    split = Split.of_run(run)
    extra = [*([split.sentence] if split else []), *([capacity.sentence] if capacity else [])]
    cards = charts(runs, slo)
    if failures := details.failures(run):
        cards.append(card("Failures", failures))
    cards.append(card("Where the time goes", details.server(run), "Triton's own statistics over the measured time."))
    cards += searches
    cards.append(card("Percentiles", details.percentiles(runs)))
    if by_length := details.lengths(run, slo):
        cards.append(card("By length of the input", by_length))
    cards += [
        card("The load generator's own health", details.generator(run)),
        card("Settings", details.settings(run)),
        card("Machine of the generator", details.machine(run)),
    ]
    title = f"{run.settings.model}: {SHORT[judgement.verdict]}"
    return document(title, headline(run, judgement, extra) + tiles(run) + grid(cards), run.folder.name)


def charts(runs: Sequence[Run], slo: Slos) -> list[str]:
    """The cards that every page of runs has."""
    waited = WAITED if len(runs) == 1 and runs[0].settings.open_loop else ""
    return [
        card("Latency by percentile", curves.percentiles(runs, slo), READ_TAIL + waited + FAILED_SLOW),
        card("Latency over time", curves.latency_over_time(runs, slo), "By the time for which a request was planned."),
        card("Rate planned and achieved", curves.rate_over_time(runs), RATES + _none_failed(runs)),
        card("Distribution of latency", curves.distribution(runs), "How many requests took how long."),
    ]


def _none_failed(runs: Sequence[Run]) -> str:
    failed = any(run.window.failed for run in runs)
    answered = sum(run.window.ok for run in runs)
    return "" if failed or not answered else f"No request failed: all {answered:,} were answered."


def _comparison(runs: Sequence[Run], slo: SloSpec, searches: Sequence[str]) -> str:
    cards = [
        *charts(runs, slo),
        card("Where the time goes", details.servers(runs), "Means, by Triton's own statistics over the measured time."),
        card("Percentiles", f"<div class='scroll'>{details.percentiles(runs)}</div>"),
        card("What differs", details.differing(runs)),
        *searches,
    ]
    names = " and ".join(run.folder.name for run in runs)
    return document(f"{runs[0].settings.model}: {len(runs)} runs", compared(runs, slo) + grid(cards), names)


def report_path(runs: Sequence[Run]) -> Path:
    """In the folder of the last run."""
    return runs[-1].folder / ("report.html" if len(runs) == 1 else f"report-{len(runs)}-runs.html")


def write_report(
    runs: Run | Sequence[Run], slo: SloSpec, capacity: Capacity | None = None, tuning: Tuning | None = None
) -> Path:
    """Writes the page into the run's folder, into the last one's where there are several."""
    runs = [runs] if isinstance(runs, Run) else list(runs)
    return write_whole(report_path(runs), page(runs, slo, capacity, tuning))

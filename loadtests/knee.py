"""The trials of a search for people: a line each while it goes on, a table with the knee marked at its end.

Example:
    console.print(table(capacity.trials, capacity.capacity_rps))
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from loadtests.slo import formatted
from loadtests.trial import Outcome, Trial

STYLES: dict[Outcome, str] = {"holds": "green", "fails": "red", "invalid": "yellow", "inconclusive": "yellow"}
BAR = 16  # characters of the latency at the table's slowest answer


def trial_line(trial: Trial, again: bool) -> Text:
    """One trial while the search goes on."""
    why = ", ".join(trial.failed) if trial.outcome == "fails" else "; ".join(trial.problems[:1])
    found = f"p99 {_shown(trial.p99_ms)}, {trial.error_rate:.2%} errors" if trial.sent else "not sent"
    told = f"{f' ({why})' if why else ''}{'  (from before)' if again else ''}"
    head = f"{trial.phase:<8} {trial.rate_rps:>7g}/s  {found:<32} "
    return Text.assemble(head, (trial.outcome, STYLES[trial.outcome]), told)


def table(trials: Sequence[Trial], capacity_rps: float | None) -> Table:
    """The trials by rate, with the latency as a bar and the knee marked."""
    columns = Table("rate", "", "answered", "p50", "p99")
    columns.add_column(no_wrap=True, min_width=BAR)
    columns.add_column("errors")
    columns.add_column("outcome", no_wrap=True)
    slowest = max((trial.p99_ms for trial in trials if trial.p99_ms), default=1.0)
    below = [trial for trial in trials if capacity_rps and trial.rate_rps <= capacity_rps]  # it may lie between two
    knee = max(below, key=lambda trial: (trial.rate_rps, *_certainty(trial)), default=None)
    for trial in sorted(trials, key=lambda each: (each.rate_rps, _certainty(each))):
        bar = "█" * max(1, round(BAR * trial.p99_ms / slowest)) if trial.p99_ms else "∞"
        mark = ("◀ capacity" if trial is knee else "", "bold")
        outcome = Text.assemble((trial.outcome, STYLES[trial.outcome]), f" {_first(trial.failed)}", mark)
        answered, errors = f"{trial.achieved_rps:.1f}/s", f"{trial.error_rate:.2%}"
        figures = (answered, _shown(trial.p50_ms), _shown(trial.p99_ms), bar, errors)
        if not trial.sent:
            figures = ("-", "-", "-", "", "-")
        columns.add_row(f"{trial.rate_rps:g}/s", trial.phase, *figures, outcome)
    return columns


def _shown(latency_ms: float | None) -> str:
    return "never" if latency_ms is None else formatted("ms", latency_ms)


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" +{len(names) - 1}" if names[1:] else "") if names else ""


def _certainty(trial: Trial) -> tuple[bool, float]:
    return trial.outcome == "holds", trial.duration_s

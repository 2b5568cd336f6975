"""What stands first: whether the SLO holds, objective by objective, and the figures that everybody asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape

from deepseek.spec import SloSpec
from loadtests.report.page import ms, percentile, sentence
from loadtests.results import Run, Settings
from loadtests.slo import Judged, Judgement, Verdict, formatted, judge

HEADLINES = {
    "holds": "The SLO holds",
    "violated": "The SLO is violated",
    "inconclusive": "Inconclusive",
    "invalid": "Not a valid measurement",
}
SHORT = {"holds": "SLO holds", "violated": "SLO violated", "inconclusive": "inconclusive", "invalid": "not valid"}
SYMBOLS = {"holds": "✓", "violated": "✕", "inconclusive": "?", "invalid": "!"}
MEANINGS = {
    "ms": "latency",
    "throughput": "good answers a second",
    "error_rate": "requests that fail",
    "quality": "task metric of the served model",
}
BOUNDS = {"<": "less than", "<=": "at most", ">": "more than", ">=": "at least"}
TIMES = "\N{MULTIPLICATION SIGN}"
LETTERS = "ABCDEF"  # of runs laid over each other: their names and their colours


def names_of(runs: Sequence[Run]) -> list[str]:
    """What runs on one page are called: the parts of a mix by their models, runs of one model by letters."""
    models = [run.settings.model for run in runs]
    return models if len(set(models)) == len(runs) > 1 else list(LETTERS[: len(runs)])


def load_of(settings: Settings) -> str:
    """What was asked of the server, in words."""
    if not settings.open_loop:
        return f"{settings.users} users back to back (closed loop)"
    rate = f"{settings.rate_rps:g}" if settings.shape is None else settings.shape
    return f"{rate} requests/s, {settings.arrivals.capitalize()} arrivals (open loop)"


def headline(run: Run, judgement: Judgement, extra: Sequence[str] = ()) -> str:
    """The verdict on one run; `extra` are sentences below the objectives."""
    settings = run.settings
    subject = f"{settings.model} over {settings.protocol}, {load_of(settings)}, for {settings.duration_s:g} s"
    notes = "".join(f"<p class='hint'>{sentence(line)}</p>" for line in (*judgement.notes, *extra))
    return (
        f"<header class='{judgement.verdict}'><h1>{badge(judgement.verdict)}{HEADLINES[judgement.verdict]}</h1>"
        f"<p class='subject'>{escape(subject)}</p>{objectives(judgement)}{notes}</header>"
    )


def badge(verdict: Verdict) -> str:
    """The verdict's symbol in its colour."""
    return f"<span class='badge' aria-hidden='true'>{SYMBOLS[verdict]}</span>"


def objectives(judgement: Judgement) -> str:
    """Why nothing can be concluded, if so, and every objective with what was seen."""
    reasons = "".join(f"<p class='problem'>{sentence(line)}</p>" for line in judgement.problems)
    return f"{reasons}<ul class='objectives'>{''.join(map(_objective, judgement.objectives))}</ul>"


def _objective(each: Judged) -> str:
    """One objective as a row, with a bar that has the limit at 80 % of its length."""
    used = each.seen / (each.limit or 1e-9)
    width = 100 * min(1.0, used / 1.25) if math.isfinite(used) else 100
    note = f"<span class='note'>{escape(each.note)}</span>" if each.note else ""
    return (
        f"<li class='{each.status}'><div class='objective'><b>{escape(each.name)}</b>"
        f"<span>{_meaning(each)}</span></div>"
        f"<div class='figures'><b>{formatted(each.kind, each.seen)}</b>"
        f"<span>{BOUNDS[each.relation]} {formatted(each.kind, each.limit)}</span></div>"
        f"<div class='bar' role='presentation'><i style='width:{width:.1f}%'></i></div>"
        f"<div class='status'>{SYMBOLS[each.status]} {each.status}{note}</div></li>"
    )


def _meaning(each: Judged) -> str:
    """What an objective asks for, in words."""
    found = re.match(r"p([\d.]+)_ms", each.name)
    return f"{found[1]} of 100 requests are answered within" if found else MEANINGS[each.kind]


def tiles(run: Run) -> str:
    """The figures of a run at a glance."""
    latency = run.window.latency(run.judged)
    shown = [(f"p{percent:g}", percentile(latency, percent)) for percent in (50, 95, 99, 99.9)]
    shown += [("slowest answer", ms(latency.max_ms)), ("good answers", f"{run.window.throughput_rps:.1f}/s")]
    shown += [("requests", f"{run.window.planned:,}"), ("failed", f"{run.window.failed:,}")]
    return tiled(shown)


def tiled(shown: Sequence[tuple[str, str]]) -> str:
    """Figures with their names, side by side."""
    return (
        f"<dl class='tiles of{len(shown)}'>"
        + "".join(f"<div><dt>{n}</dt><dd>{v}</dd></div>" for n, v in shown)
        + "</dl>"
    )


def compared(runs: Sequence[Run], slo: SloSpec) -> str:
    """The verdicts on several runs, and their figures beside those of the first."""
    rows = []
    for letter, run in zip(LETTERS, runs, strict=False):
        judgement = judge(run, slo)
        broken = ", ".join(each.name for each in judgement.objectives if each.status == "violated")
        rows.append(
            f"<li class='{judgement.verdict}'><div class='objective'><b><i class='swatch run{letter}'></i>{letter} "
            f"&nbsp;{escape(run.folder.name)}</b><span>{escape(_description(run))}</span></div>"
            f"<div class='status'>{SYMBOLS[judgement.verdict]} {SHORT[judgement.verdict]}"
            f"<span class='note'>{escape(broken or '; '.join(judgement.problems[:1]))}</span></div></li>"
        )
    model = escape(", ".join(dict.fromkeys(run.settings.model for run in runs)))
    return (
        f"<header class='plain'><h1>{len(runs)} runs laid over each other</h1><p class='subject'>{model}</p>"
        f"<ul class='objectives runs'>{''.join(rows)}</ul>{_figures(runs)}</header>"
    )


def _description(run: Run) -> str:
    settings = run.settings
    version = f"version {run.server.get('version') or '-'}"
    return f"{load_of(settings)}, {settings.protocol}, {settings.target}, {version}, {settings.duration_s:g} s"


def _figures(runs: Sequence[Run]) -> str:
    """p50, p99, answers and failures of each run; below each figure its ratio to the first run's."""
    kinds = {run.judged for run in runs}
    head = ["", *(f"p{percent:g}" for percent in (50, 99, 99.9)), "answers/s", "failed"]
    body = ""
    first = _measures(runs[0])
    for letter, run in zip(LETTERS, runs, strict=False):
        own = _measures(run)
        ratios = ["" if run is runs[0] else _ratio(value, other) for value, other in zip(own, first, strict=True)]
        texts = [
            *(ms(value) for value in own[:3]),
            f"{own[3]:.1f}",
            f"{run.window.failed / max(1, run.window.planned):.2%}",
        ]
        cells = zip(texts, [*ratios, ""], strict=True)
        body += (
            f"<tr><th scope='row'>{letter}</th>"
            + "".join(f"<td>{text}<small>{ratio}</small></td>" for text, ratio in cells)
            + "</tr>"
        )
    kind = "" if len(kinds) == 1 else "<p class='hint'>Of closed loops it is service latency: no fair comparison.</p>"
    top = "".join(f"<th scope='col'>{name}</th>" for name in head)
    return f"<table class='numbers compared'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{kind}"


def _measures(run: Run) -> list[float]:
    latency = run.window.latency(run.judged)
    return [*(latency.percentile_ms(percent) for percent in (50, 99, 99.9)), run.window.throughput_rps]


def _ratio(value: float, first: float) -> str:
    return f"{TIMES} {value / first:.2f}" if math.isfinite(value) and math.isfinite(first) and first else ""

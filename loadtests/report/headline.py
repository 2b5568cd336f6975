"""The top of a report: the verdict, objective by objective, and the main figures."""

import math
import re
from collections.abc import Sequence
from html import escape

from deepseek.spec import SloSpec
from deepseek.spec.objectives import KINDS, formatted
from loadtests.percentiles import SUMMARY, ms
from loadtests.report.page import sentence
from loadtests.results.run import Run
from loadtests.results.stretch import read_percentile, shown_percentile
from loadtests.slo.judge import judge
from loadtests.slo.judged_objectives import JudgedObjective, SloStatus, SloVerdict

HEADLINES = {
    "holds": "The SLO holds",
    "violated": "The SLO is violated",
    "inconclusive": "Inconclusive",
    "invalid": "Invalid measurement",
}
SHORT = {"holds": "SLO holds", "violated": "SLO violated", "inconclusive": "inconclusive", "invalid": "invalid"}
SYMBOLS = {"holds": "✓", "violated": "✕", "inconclusive": "?", "invalid": "!"}
BOUNDS = {"<": "less than", "<=": "at most", ">": "more than", ">=": "at least"}
TIMES = "\N{MULTIPLICATION SIGN}"
LETTERS = "ABCDEF"  # names and colours of overlaid runs


def names_of(runs: Sequence[Run]) -> list[str]:
    """The names of runs on one page: models for the parts of a mix, letters for runs of one model."""
    models = [run.settings.model for run in runs]
    return models if len(set(models)) == len(runs) > 1 else list(LETTERS[: len(runs)])


def headline(run: Run, judgement: SloVerdict, extra: Sequence[str] = ()) -> str:
    """The verdict on one run; `extra` are sentences below the objectives."""
    settings = run.settings
    subject = f"{settings.model} over {settings.over}, {settings.load}, for {settings.duration_s:g} s"
    notes = "".join(f"<p class='hint'>{sentence(line)}</p>" for line in (*judgement.notes, *extra))
    return (
        f"<header class='{judgement.verdict}'><h1>{badge(judgement.verdict)}{HEADLINES[judgement.verdict]}</h1>"
        f"<p class='subject'>{escape(subject)}</p>{objectives(judgement)}{notes}</header>"
    )


def badge(verdict: SloStatus) -> str:
    return f"<span class='badge' aria-hidden='true'>{SYMBOLS[verdict]}</span>"


def objectives(judgement: SloVerdict) -> str:
    """The reasons of an invalid run, if any, and every objective with its measured value."""
    reasons = "".join(f"<p class='problem'>{sentence(line)}</p>" for line in judgement.problems)
    return f"{reasons}<ul class='objectives'>{''.join(map(_objective, judgement.objectives))}</ul>"


def _objective(each: JudgedObjective) -> str:
    """One objective as a row, with a bar that reaches 80 % of its length at the limit; empty if not measured."""
    used = each.seen / (each.limit or 1e-9)
    width = 0 if math.isnan(used) else 100 * min(1.0, used / 1.25)
    note = f"<span class='note'>{escape(each.note)}</span>" if each.note else ""
    return (
        f"<li class='{each.status}'><div class='objective'><b>{escape(each.name)}</b>"
        f"<span>{_meaning(each)}</span></div>"
        f"<div class='figures'><b>{formatted(each.kind, each.seen)}</b>"
        f"<span>{BOUNDS[each.relation]} {formatted(each.kind, each.limit)}</span></div>"
        f"<div class='bar' role='presentation'><i style='width:{width:.1f}%'></i></div>"
        f"<div class='status'>{SYMBOLS[each.status]} {each.status}{note}</div></li>"
    )


def _meaning(each: JudgedObjective) -> str:
    found = re.match(r"p([\d.]+)_ms", each.name)
    return f"{found[1]} of 100 requests are answered within" if found else KINDS[each.kind].meaning


def tiles(run: Run) -> str:
    latency = run.window.latency(run.judged)
    shown = [(f"p{percent:g}", shown_percentile(latency, percent)) for percent in SUMMARY]
    shown += [("slowest", ms(latency.max_ms)), ("answered", f"{run.window.throughput_rps:.1f}/s")]
    shown += [("tokens", f"{run.tokens_per_s:.0f}/s")] if run.tokens_per_s else []
    shown += [("requests", f"{run.window.planned:,}"), ("failed", f"{run.window.failed:,}")]
    cells = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown)
    return f"<dl class='tiles'>{cells}</dl>"


def compared(runs: Sequence[Run], slo: SloSpec) -> str:
    """The verdicts on several runs, and their figures compared with those of the first."""
    rows = []
    for letter, run in zip(LETTERS, runs, strict=False):
        judgement = judge(run, slo)
        broken = ", ".join(each.name for each in judgement.objectives if each.status == "violated")
        settings, version = run.settings, f"version {run.server.get('version') or '-'}"
        what = f"{settings.load}, {settings.over}, {settings.target}, {version}, {settings.duration_s:g} s"
        rows.append(
            f"<li class='{judgement.verdict}'><div class='objective'><b><i class='swatch run{letter}'></i>{letter} "
            f"&nbsp;{escape(run.folder.name)}</b><span>{escape(what)}</span></div>"
            f"<div class='status'>{SYMBOLS[judgement.verdict]} {SHORT[judgement.verdict]}"
            f"<span class='note'>{escape(broken or '; '.join(judgement.problems[:1]))}</span></div></li>"
        )
    model = escape(", ".join(dict.fromkeys(run.settings.model for run in runs)))
    return (
        f"<header class='plain'><h1>{len(runs)} runs compared</h1><p class='subject'>{model}</p>"
        f"<ul class='objectives runs'>{''.join(rows)}</ul>{figures(runs)}</header>"
    )


def figures(runs: Sequence[Run]) -> str:
    """Percentiles, answers and failures of each run; for runs of one model also the ratios to the first run."""
    head = ["", *(f"p{percent:g}" for percent in SUMMARY), "answers/s", "failed"]
    alike = len({run.settings.model for run in runs}) == 1
    body, first = "", _measures(runs[0])
    for name, run in zip(names_of(runs), runs, strict=True):
        own = _measures(run)
        ratios = [_ratio(*pair) if alike and run is not runs[0] else "" for pair in zip(own, first, strict=True)]
        failed = f"{run.window.failed / max(1, run.window.planned):.2%}"
        cells = zip([*map(ms, own[:-1]), f"{own[-1]:.1f}", failed], [*ratios, ""], strict=True)
        row = "".join(f"<td>{text}<small>{ratio}</small></td>" for text, ratio in cells)
        body += f"<tr><th scope='row'>{escape(name)}</th>{row}</tr>"
    same = len({run.judged for run in runs}) == 1
    kind = "" if same else "<p class='hint'>Closed loops show service latency: the comparison is not fair.</p>"
    top = "".join(f"<th scope='col'>{name}</th>" for name in head)
    table = f"<table class='numbers compared'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll'>{table}</div>{kind}"


def _measures(run: Run) -> list[float]:
    latency = run.window.latency(run.judged)
    return [*(read_percentile(latency, percent) for percent in SUMMARY), run.window.throughput_rps]


def _ratio(value: float, first: float) -> str:
    return f"{TIMES} {value / first:.2f}" if math.isfinite(value) and math.isfinite(first) and first else ""

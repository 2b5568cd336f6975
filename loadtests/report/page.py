"""The frame of a page: HTML, style, cards and tables.

Contract: no script and nothing from outside, which the page's own Content-Security-Policy forbids as well; light or
dark is the reader's choice. Text given to these functions is escaped here, apart from `body` and `explanation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

from loadtests.results import Distribution

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def ms(value: float | None) -> str:
    """Milliseconds with three figures; "never" for what no answer reached."""
    if value is None or math.isinf(value):
        return "never"
    if math.isnan(value):
        return "-"
    return f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms" if value < 100 else f"{value:.0f} ms"


def percentile(latency: Distribution, percent: float) -> str:
    """A percentile in milliseconds; "-" of fewer requests than 1 in 1 - p, where it would be the slowest alone."""
    return ms(latency.percentile_ms(percent)) if latency.total * (100 - percent) >= 100 - 1e-6 else "-"


def sentence(text: str) -> str:
    """With a capital and a full stop, escaped."""
    return escape(f"{text[0].upper()}{text[1:]}{'' if text[-1] in '.!?' else '.'}") if text else ""


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """Names and their values, one a line."""
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows
    )
    return f"<table class='facts'>{cells}</table>"


def numbers(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures, the first column their name."""
    top = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table class='numbers'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def card(title: str, body: str, explanation: str = "", css: str = "") -> str:
    """A titled part of the page."""
    text = f"<p class='explained'>{explanation}</p>" if explanation else ""
    return f"<section class='card {css}'><h2>{escape(title)}</h2>{body}{text}</section>"


def grid(cards: Iterable[str]) -> str:
    """Cards, two beside one another where there is room."""
    return f"<div class='grid'>{''.join(cards)}</div>"


def document(title: str, body: str, footer: str) -> str:
    """The whole file."""
    style = files("loadtests.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"{body}<footer>{escape(footer)}</footer></main></body></html>\n"
    )

"""The frame of a page: HTML, style, cards and tables.

Contract: no scripts and no external resources; the page's Content-Security-Policy forbids both. Light or dark follows
the reader's system. These functions escape the text they are given, except `body` and `explanation`.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def sentence(text: str) -> str:
    """The text with a capital letter and a full stop, escaped."""
    return escape(f"{text[0].upper()}{text[1:]}{'' if text[-1] in '.!?' else '.'}") if text else ""


def facts(rows: Iterable[tuple[str, object]]) -> str:
    cells = "".join(
        f"<tr><th scope='row'>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows
    )
    return f"<table class='facts'>{cells}</table>"


def machine_facts(machine: Mapping[str, object], versions: Mapping[str, str]) -> str:
    rows = [(name.replace("_gib", " (GiB)"), value) for name, value in machine.items() if name != "versions"]
    return facts([*rows, *versions.items()])


def utc(time: str) -> str:
    """An ISO time in UTC, for people."""
    return time.replace("T", " ").replace("+00:00", " UTC")


def numbers(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of figures; the first column has their names."""
    top = "".join(f"<th scope='col'>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr><th scope='row'>{escape(name)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for name, *cells in rows
    )
    return f"<table class='numbers'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def card(title: str, body: str, explanation: str = "") -> str:
    text = f"<p class='explained'>{explanation}</p>" if explanation else ""
    return f"<section class='card'><h2>{escape(title)}</h2>{body}{text}</section>"


def grid(cards: Iterable[str]) -> str:
    return f"<div class='grid'>{''.join(cards)}</div>"


def document(title: str, body: str, footer: str) -> str:
    style = files("loadtests.report").joinpath("report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='color-scheme' content='light dark'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body><main>"
        f"{body}<footer>{escape(footer)}</footer></main></body></html>\n"
    )

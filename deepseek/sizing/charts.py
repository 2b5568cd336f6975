"""Small SVG files, drawn as text: bars that are stacked, bars, and predictions against measurements.

Contract: a chart is one self-contained `<svg>`: no script, no outside resource, colours for light and for dark; as wide
as the window where that is narrow. Values are finite and not negative.

Examples:
    write_whole(path, bar_chart({"l4": 560.0, "t4": 387.0}, title="Cost a month", unit="USD"))
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape

WIDTH, MARGIN, ROW, LINE = 480, 12, 26, 18
LETTER = 6.7  # width of a letter of 12 px, about
COLOURS = ("#2f6fde", "#e08a1e", "#2f9e5b", "#b04fc4", "#d1495b", "#4a8fa8", "#8a7340")
STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}.faint{fill:#666;font-size:11px}
.grid{stroke:#ddd;fill:none}
.band{fill:#8883}.page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#ddd}.faint{fill:#aaa}.grid{stroke:#444}.page{fill:#16181d}}
"""


def stacked_chart(bars: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> str:
    """A horizontal bar for each name, made of parts."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    sums = {name: sum(bar.values()) for name, bar in bars.items()}
    notes = {name: f"{_short(value)} {unit}" for name, value in sums.items()}
    drawn, top = _head(title, parts)
    left, scale = _span(bars, notes.values(), max(sums.values(), default=0.0))
    for index, (name, bar) in enumerate(bars.items()):
        y, x = top + ROW * index, left
        drawn.append(_text(left - 8, y + 15, name, "end"))
        for part, value in bar.items():
            drawn.append(_bar(x, y, scale * value, _colour(parts, part)))
            x += scale * value
        drawn.append(_text(x + 6, y + 15, notes[name], "start", "faint"))
    return _svg(title, top + ROW * len(bars) + MARGIN, drawn)


def bar_chart(bars: Mapping[str, float], *, title: str, unit: str, notes: Mapping[str, str] | None = None) -> str:
    """A horizontal bar for each name, with a note behind it."""
    behind = {name: f", {note}" for name, note in (notes or {}).items() if note}
    said = {name: f"{_short(value)} {unit}{behind.get(name, '')}" for name, value in bars.items()}
    drawn, top = _head(title, [])
    left, scale = _span(bars, said.values(), max(bars.values(), default=0.0))
    for index, (name, value) in enumerate(bars.items()):
        y = top + ROW * index
        drawn += [_text(left - 8, y + 15, name, "end"), _bar(left, y, scale * value, COLOURS[0])]
        drawn.append(_text(left + scale * value + 6, y + 15, said[name], "start", "faint"))
    return _svg(title, top + ROW * len(bars) + MARGIN, drawn)


def scatter_chart(
    points: Mapping[str, Sequence[tuple[float, float]]],
    *,
    title: str,
    unit: str,
    x_label: str,
    y_label: str,
    band: float,
) -> str:
    """Pairs on two logarithmic axes of one scale, with the diagonal and a band of so large a share around it."""
    values = [value for group in points.values() for pair in group for value in pair]
    low, high = math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)
    drawn, top = _head(title, list(points))
    left, top = 60, top + LINE
    size = WIDTH - left - 2 * MARGIN

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * size

    base = top + size
    first, last, wide, narrow = 10**low, 10**high, 1 + band, 1 - band
    corners = [(first, first), (first, first * wide), (last / wide, last), (last, last), (last, last * narrow)]
    corners.append((first / narrow, first))
    shape = " ".join(f"{left + at(x):.1f},{base - at(y):.1f}" for x, y in corners)
    drawn.append(f'<polygon class="band" points="{shape}"/>')
    for power in range(math.ceil(low), math.floor(high) + 1):
        offset = at(10.0**power)
        drawn.append(
            f'<path class="grid" d="M{left} {base - offset:.1f}H{left + size}M{left + offset:.1f} {top}V{base}"/>'
        )
        drawn.append(_text(left - 6, base - offset + 4, _short(10.0**power), "end", "faint"))
        drawn.append(_text(left + offset, base + 16, _short(10.0**power), "middle", "faint"))
    drawn.append(f'<path class="grid" d="M{left} {base}L{left + size} {top}"/>')
    for name, group in points.items():
        for x, y in group:
            colour = _colour(list(points), name)
            drawn.append(
                f'<circle cx="{left + at(x):.1f}" cy="{base - at(y):.1f}" r="3" fill="{colour}" fill-opacity="0.7"/>'
            )
    drawn.append(_text(left + size / 2, base + 34, f"{x_label}, {unit}", "middle"))
    drawn.append(_text(left, top - 8, f"{y_label}, {unit}", "start", "faint"))
    return _svg(title, base + 46, drawn)


def _head(title: str, names: Sequence[str]) -> tuple[list[str], float]:
    """Title and legend, on as many lines as they take, and where they end."""
    drawn, y = [], 4.0
    for line in textwrap.wrap(title, int((WIDTH - 2 * MARGIN) / 8)) or [""]:
        y += LINE
        drawn.append(_text(MARGIN, y, line, "start", "title"))
    x, y = float(MARGIN), y + LINE + 3
    for name in names:
        wide = 30 + LETTER * len(name)
        if x + wide > WIDTH and x > MARGIN:
            x, y = float(MARGIN), y + LINE
        drawn.append(f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" fill="{_colour(names, name)}"/>')
        drawn.append(_text(x + 14, y, name, "start", "faint"))
        x += wide
    return drawn, y + 12 if names else y - 6


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[list(names).index(name) % len(COLOURS)]


def _span(names: Iterable[str], notes: Iterable[str], most: float) -> tuple[float, float]:
    """Where bars begin, and how wide one of the value 1 is, so that names before and notes behind find room."""
    left = MARGIN + 8 + LETTER * max(map(len, names), default=0)
    behind = MARGIN + 6 + LETTER * max(map(len, notes), default=0)
    return left, max(40.0, WIDTH - left - behind) / (most or 1.0)


def _bar(x: float, y: float, wide: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y + 3:.1f}" width="{wide:.1f}" height="{ROW - 8}" fill="{colour}"/>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, drawn: Sequence[str]) -> str:
    """Half as wide again as its sums, so that letters are read; narrower where the window is."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{1.5 * WIDTH:.0f}" '
        f'style="max-width:100%;height:auto" role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect class="page" width="100%" height="100%"/>{"".join(drawn)}</svg>\n'
    )

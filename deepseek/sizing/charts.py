"""Small SVG files, drawn as text: bars that are stacked, bars, and predictions against measurements.

Contract: a chart is one self-contained `<svg>`: no script, no outside resource, colours for light and for dark. Values
are finite and not negative. Written beside its place and renamed.

Examples:
    write_svg(path, bar_chart({"l4": 560.0, "t4": 387.0}, title="Cost a month", unit="USD"))
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, LEFT, RIGHT, TOP, ROW = 640, 170, 78, 62, 26
COLOURS = ("#2f6fde", "#e08a1e", "#2f9e5b", "#b04fc4", "#d1495b", "#4a8fa8", "#8a7340")
STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}.faint{fill:#777;font-size:11px}
.grid{stroke:#ddd;fill:none}
.band{fill:#8883}.page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#ddd}.faint{fill:#999}.grid{stroke:#444}.page{fill:#16181d}}
"""


def write_svg(path: Path, svg: str) -> None:
    """Writes a chart, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(svg, encoding="utf-8")
    beside.replace(path)


def stacked_chart(bars: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> str:
    """A horizontal bar for each name, made of parts."""
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    most = max(sum(bar.values()) for bar in bars.values()) or 1.0
    height = TOP + ROW * len(bars) + 12
    drawn = _legend(parts)
    for index, (name, bar) in enumerate(bars.items()):
        y, x = TOP + ROW * index, float(LEFT)
        drawn.append(_text(LEFT - 8, y + 15, name, "end"))
        for part, value in bar.items():
            wide = _span(value, most)
            drawn.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{wide:.1f}" height="{ROW - 8}" fill="{_colour(parts, part)}"/>'
            )
            x += wide
        drawn.append(_text(x + 6, y + 15, f"{_short(sum(bar.values()))} {unit}", "start", "faint"))
    return _svg(title, height, drawn)


def bar_chart(bars: Mapping[str, float], *, title: str, unit: str, notes: Mapping[str, str] | None = None) -> str:
    """A horizontal bar for each name, with a note behind it."""
    most = max(bars.values(), default=1.0) or 1.0
    drawn = []
    for index, (name, value) in enumerate(bars.items()):
        y, wide = 40 + ROW * index, 0.62 * _span(value, most)
        drawn.append(_text(LEFT - 8, y + 15, name, "end"))
        drawn.append(f'<rect x="{LEFT}" y="{y + 3}" width="{wide:.1f}" height="{ROW - 8}" fill="{COLOURS[0]}"/>')
        note = f"  {notes[name]}" if notes and notes.get(name) else ""
        drawn.append(_text(LEFT + wide + 6, y + 15, f"{_short(value)} {unit}{note}", "start", "faint"))
    return _svg(title, 40 + ROW * len(bars) + 12, drawn)


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
    size, left, top = 440, 70, TOP + 12

    def at(value: float) -> float:
        return (math.log10(value) - low) / (high - low) * size

    base = top + size
    drawn = _legend(list(points))
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
        drawn.append(_text(left - 6, base - offset + 4, f"{10.0**power:g}", "end", "faint"))
        drawn.append(_text(left + offset, base + 16, f"{10.0**power:g}", "middle", "faint"))
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


def _legend(names: Sequence[str]) -> list[str]:
    drawn, x = [], 12.0
    for index, name in enumerate(names):
        drawn.append(f'<rect x="{x:.0f}" y="34" width="10" height="10" fill="{COLOURS[index % len(COLOURS)]}"/>')
        drawn.append(_text(x + 14, 43, name, "start", "faint"))
        x += 30 + 6.2 * len(name)
    return drawn


def _colour(names: Sequence[str], name: str) -> str:
    return COLOURS[list(names).index(name) % len(COLOURS)]


def _span(value: float, most: float) -> float:
    return value / most * (WIDTH - LEFT - RIGHT)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str, css: str = "") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(title: str, height: float, drawn: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style><rect class="page" width="100%" height="100%"/>'
        f'<text class="title" x="12" y="22">{escape(title)}</text>{"".join(drawn)}</svg>\n'
    )

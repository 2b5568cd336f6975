"""Scatter chart of predictions against measurements: one self-contained SVG file for light and dark mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, LEFT, RIGHT, TOP, BOTTOM, LINE = 480, 60, 24, 56, 46, 18
COLOURS = ("#2f6fde", "#e08a1e", "#2f9e5b", "#b04fc4", "#d1495b", "#4a8fa8", "#8a7340")
STYLE = """
text{font:12px system-ui,sans-serif;fill:#333}.title{font-weight:600;font-size:14px}.faint{fill:#666;font-size:11px}
.grid{stroke:#ddd;fill:none}.band{fill:#8883}.page{fill:#fff}
@media(prefers-color-scheme:dark){text{fill:#ddd}.faint{fill:#aaa}.grid{stroke:#444}.page{fill:#16181d}}
"""


def scatter_chart(
    points: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x_label: str, y_label: str, band: float
) -> str:
    """Pairs on two logarithmic axes of equal scale, with the diagonal and a relative band around it."""
    values = [value for group in points.values() for pair in group for value in pair]
    low, high = math.log10(min(values) / 1.3), math.log10(max(values) * 1.3)
    side = WIDTH - LEFT - RIGHT
    base = TOP + LINE * math.ceil(len(points) / 4) + side

    def at(value: float) -> tuple[float, float]:  # offset right of the y axis, and down
        offset = (math.log10(value) - low) / (high - low) * side
        return LEFT + offset, base - offset

    def line(start: tuple[float, float], end: tuple[float, float]) -> str:
        return f'<path class="grid" d="M{start[0]:.1f} {start[1]:.1f}L{end[0]:.1f} {end[1]:.1f}"/>'

    first, last, up, down = 10**low, 10**high, 1 + band, 1 - band
    corners = [(first, first), (first, first * up), (last / up, last), (last, last), (last, last * down)]
    shape = " ".join(f"{at(x)[0]:.1f},{at(y)[1]:.1f}" for x, y in [*corners, (first / down, first)])
    drawn = [_text(12, 22, title, "start", "title"), f'<polygon class="band" points="{shape}"/>']
    for power in range(math.ceil(low), math.floor(high) + 1):
        x, y = at(10.0**power)
        drawn += [line((LEFT, y), (LEFT + side, y)), line((x, base - side), (x, base))]
        drawn += [_text(LEFT - 6, y + 4, f"{10.0**power:g}", "end"), _text(x, base + 16, f"{10.0**power:g}", "middle")]
    drawn.append(line((LEFT, base), (LEFT + side, base - side)))
    for index, (name, group) in enumerate(points.items()):
        colour, x, y = COLOURS[index % len(COLOURS)], 12 + 116 * (index % 4), 44 + LINE * (index // 4)
        drawn.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        drawn.append(_text(x + 14, y, name, "start"))
        dots = ((at(x)[0], at(y)[1]) for x, y in group)
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}" fill-opacity="0.7"/>' for x, y in dots]
    drawn += [_text(LEFT + side / 2, base + 34, x_label, "middle"), _text(LEFT, base - side - 6, y_label, "start")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {base + BOTTOM}" width="{1.5 * WIDTH:.0f}" '
        f'style="max-width:100%;height:auto" role="img" aria-label="{escape(title)}"><style>{STYLE}</style>'
        f'<rect class="page" width="100%" height="100%"/>{"".join(drawn)}</svg>\n'
    )


def _text(x: float, y: float, text: str, anchor: str, css: str = "faint") -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'

"""Horizontal bars as one SVG file: a whisker from the lowest to the highest value, and a line for each bound of a goal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, ROW, MARGIN, BAR = 720, 62, 16, 12
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 }
.bar { fill: #4a7dbd } .missed { fill: #c0504d } .whisker { stroke: #1f2328; stroke-width: 2; fill: none }
.goal { stroke: #2e8b57; stroke-width: 2; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .bar { fill: #6ea0e0 } .missed { fill: #e07a76 } .whisker { stroke: #e6edf3 }
  .goal { stroke: #5fc08a }
}
"""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A bar with its name above and its values below."""

    name: str
    values: tuple[float, float, float] | None
    """The lower end of the whisker, the end of the bar, the upper end of the whisker; None: only the text."""
    text: str
    bounds: Sequence[float] = ()
    missed: bool = False


def bar_chart(title: str, bars: Sequence[Bar], *, log: bool = False) -> str:
    """The bars on one scale from 0; with `log` on a logarithmic scale that begins below the lowest value."""
    ends = [value for bar in bars for value in (*(bar.values or ()), *bar.bounds)] or [1.0]
    low, high = min(ends) / 1.2 if log else 0.0, max(ends) * 1.05 or 1.0

    def at(value: float) -> float:
        share = math.log(value / low) / math.log(high / low) if log else value / high
        return MARGIN + (WIDTH - 2 * MARGIN) * share

    rows = []
    for place, bar in enumerate(bars):
        y = MARGIN + ROW * place
        top, middle, bottom = y + 20, y + 20 + BAR / 2, y + 20 + BAR
        rows.append(f'<text x="{MARGIN}" y="{y + 12}">{escape(bar.name)}</text>')
        if bar.values:
            first, value, last = map(at, bar.values)
            css = "missed" if bar.missed else "bar"
            rows.append(f'<rect class="{css}" x="{MARGIN}" y="{top}" width="{value - MARGIN:.1f}" height="{BAR}"/>')
            ticks = "".join(f"M{x:.1f} {top + 2}V{bottom - 2}" for x in (first, last))
            rows.append(f'<path class="whisker" d="M{first:.1f} {middle:.1f}H{last:.1f}{ticks}"/>')
        rows += [f'<path class="goal" d="M{at(bound):.1f} {top - 4}V{bottom + 4}"/>' for bound in bar.bounds]
        rows.append(f'<text x="{MARGIN}" y="{bottom + 15}">{escape(bar.text)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {2 * MARGIN + ROW * len(bars)}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{''.join(rows)}</svg>\n"
    )

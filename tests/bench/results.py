"""The ratios of a benchmark: their goals, their files and their chart.

Contract: a part's results are one JSON file and one SVG file of the same name. The chart has a bar for each ratio, a
whisker from the lower to the upper quartile, and a line for each bound of its goal.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

from deepseek.spec.files.folders import write_whole

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


@dataclass(frozen=True)
class Goal:
    """Bounds of a ratio; None for no bound."""

    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        if self.least is None:
            return f"at most {self.most:g}"
        return f"at least {self.least:g}" if self.most is None else f"{self.least:g} to {self.most:g}"

    def met(self, ratio: float) -> bool:
        """Whether the ratio is inside the bounds."""
        return (self.least is None or ratio >= self.least) and (self.most is None or ratio <= self.most)

    @property
    def bounds(self) -> list[float]:
        return [bound for bound in (self.least, self.most) if bound is not None]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One row of the table."""

    name: str
    ratio: float
    """The median of the pairs."""
    quartiles: tuple[float, float]
    pairs: int
    goal: Goal | None = None
    note: str = ""

    @classmethod
    def of(cls, name: str, ratios: Sequence[float], goal: Goal | None, note: str) -> Ratio:
        """The median and the quartiles of the pairs; one pair is its own quartiles."""
        low, middle, high = statistics.quantiles([*ratios] * (2 if len(ratios) == 1 else 1), n=4, method="inclusive")
        return cls(name=name, ratio=middle, quartiles=(low, high), pairs=len(ratios), goal=goal, note=note)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the goal; None without a goal."""
        return None if self.goal is None else self.goal.met(self.ratio)

    @property
    def said(self) -> str:
        """The goal, whether it is met, and the note."""
        verdict = f"goal: {self.goal}, {'met' if self.met else 'missed'}" if self.goal else ""
        return "; ".join(filter(None, (verdict, self.note)))


def write(results: Sequence[Ratio], path: Path) -> None:
    """Writes `path` (JSON: the machine's CPU and the ratios) and the chart beside it, each whole or not at all."""
    cpu = {"cores": len(os.sched_getaffinity(0)), "machine": platform.machine()}
    rows = [{**asdict(each), "met": each.met} for each in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps({**cpu, "ratios": rows}, indent=2) + "\n")
    write_whole(path.with_suffix(".svg"), chart(results, title=path.stem))


def chart(results: Sequence[Ratio], title: str) -> str:
    """An SVG of horizontal bars from 0, one below the other, on one linear scale."""
    most = 1.05 * max((max(each.ratio, each.quartiles[1], *_bounds(each)) for each in results), default=1.0)
    scale = (WIDTH - 2 * MARGIN) / most
    rows = "".join(_row(each, MARGIN + ROW * place, scale) for place, each in enumerate(results))
    height = 2 * MARGIN + ROW * len(results)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>{rows}</svg>\n"
    )


def _bounds(result: Ratio) -> list[float]:
    return result.goal.bounds if result.goal else []


def _row(result: Ratio, y: float, scale: float) -> str:
    low, high = (MARGIN + scale * value for value in result.quartiles)
    top = y + 20
    middle, bottom = top + BAR / 2, top + BAR
    css = "missed" if result.met is False else "bar"
    lines = "".join(
        f'<path class="goal" d="M{MARGIN + scale * bound:.1f} {top - 4:.1f}V{bottom + 4:.1f}"/>'
        for bound in _bounds(result)
    )
    spread = "{:.2f} ({:.2f} to {:.2f})".format(result.ratio, *result.quartiles)
    below = "; ".join(filter(None, (spread, result.said)))
    return (
        f'<text x="{MARGIN}" y="{y + 12}">{escape(result.name)}</text>'
        f'<rect class="{css}" x="{MARGIN}" y="{top}" width="{scale * result.ratio:.1f}" height="{BAR}"/>'
        f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}M{low:.1f} {top + 2}V{bottom - 2}'
        f'M{high:.1f} {top + 2}V{bottom - 2}"/>{lines}'
        f'<text x="{MARGIN}" y="{bottom + 15}">{escape(below)}</text>'
    )

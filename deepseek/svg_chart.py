"""Small SVG charts, drawn as text, for the reports of load tests and of training.

Contract: a chart is one `<figure>` with a legend and an `<svg>`, without scripts or external resources. Each mark has a
class, and the page's CSS gives it a colour in light and in dark mode. Charts are 460 units wide, so they are legible
on a phone. A tip with the figures of a point appears when the pointer or the Tab key is on it; the page's CSS shows it.
No plotting library, because those that make HTML add megabytes of script, and those that make SVG fix the colours.

Example:
    chart = Chart(x=Scale(0, 20), y=Scale(0, 120), label="Answers per second")
    chart.axes(x_unit=" s", y_unit="/s")
    chart.line([(0, 99), (1, 101)], "intended")
    chart.tip(1, ["second 1", "101 answers"])
    chart.legend("intended", "answers")
    html = chart.figure()
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 24, 26
TITLE = 17  # room below the figures of the x axis for its title
TAB_STOPS = 6  # per chart: more would make it tedious to tab through the page
CHARACTER, LINE = 8.2, 18  # largest mean width of a character, and height of a line, in a tip on any screen

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` along an axis, linear or logarithmic."""

    low: float
    high: float
    log: bool = False

    def share(self, value: float) -> float:
        """Position of a value between the ends, 0 to 1; values beyond an end are clamped to it."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, most: int = 5) -> list[float]:
        """Round values, about `most` of them at most: 1, 2 or 5 times a power of ten."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            for steps in ((1, 2, 5), (1, 3), (1,)):
                found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
                found = [value for value in found if self.low <= value <= self.high]
                if len(found) <= most + 2:
                    break
            return found
        step = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * by for by in (1, 2, 5, 10) if (self.high - self.low) / (step * by) <= most)
        first = math.ceil(self.low / step)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


def up_to(values: Iterable[float], room: float = 1.08) -> Scale:
    """A scale from 0 to slightly above the largest finite value."""
    return Scale(0, max((value for value in values if math.isfinite(value)), default=1) * room or 1)


def number(value: float) -> str:
    """A figure for an axis, as short as possible without rounding."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"


@dataclass
class Chart:
    """One chart over an x and a y scale. Marks are drawn in the order of the calls, labels of shades on top."""

    x: Scale
    y: Scale
    label: str
    x_title: str = ""
    _parts: list[str] = field(default_factory=list)
    _above: list[str] = field(default_factory=list)
    _legend: list[str] = field(default_factory=list)
    _tips: list[tuple[float, float | None, list[str]]] = field(default_factory=list)

    def _at_x(self, value: float) -> float:
        return LEFT + self.x.share(value) * (WIDTH - LEFT - RIGHT)

    def _at_y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.y.share(value) * (HEIGHT - TOP - BOTTOM)

    def _text(self, x: float, y: float, text: str, anchor: str = "middle", css: str = "tick") -> None:
        self._parts.append(_text(x, y, text, anchor, css))

    def axes(self, *, x_unit: str, y_unit: str, x_ticks: Sequence[tuple[float, str]] | None = None) -> None:
        """Grid lines with their figures; the unit of x follows each figure, the unit of y is above the axis."""
        for value in self.y.ticks():
            y = self._at_y(value)
            self._parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            self._text(LEFT - 6, y + 4, number(value), "end")
        for value, text in x_ticks or [(value, number(value) + x_unit) for value in self.x.ticks(4)]:
            at_x = self._at_x(value)
            anchor = "end" if at_x > WIDTH - RIGHT - 16 else "middle"
            self._text(WIDTH - 1 if anchor == "end" else at_x, HEIGHT - BOTTOM + 16, text, anchor)
        self._text(0, 12, y_unit, "start")
        if self.x_title:
            self._text(WIDTH - RIGHT, HEIGHT - BOTTOM + 16 + TITLE, self.x_title, "end")
        self._parts.append(f'<path class="axis" d="M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')

    def line(self, points: Sequence[Point], css: str) -> None:
        """A line through the points, with a gap at each point that is not finite."""
        path, pen = [], "M"
        for x, y in points:
            if math.isfinite(x) and math.isfinite(y):
                path.append(f"{pen}{self._at_x(x):.1f} {self._at_y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        self._parts.append(f'<path class="line {css}" d="{"".join(path)}"/>')

    def bars(self, edges: Sequence[float], heights: Sequence[float], css: str) -> None:
        """A bar from the x axis up between each pair of successive edges."""
        base = HEIGHT - BOTTOM
        path = []
        for left, right, height in zip(edges[:-1], edges[1:], heights, strict=True):
            if height > 0:
                x, y = self._at_x(left), self._at_y(height)
                path.append(f"M{x:.1f} {base}V{y:.1f}H{max(self._at_x(right) - 0.6, x + 0.6):.1f}V{base}Z")
        self._parts.append(f'<path class="area {css}" d="{"".join(path)}"/>')

    def outline(self, edges: Sequence[float], heights: Sequence[float], css: str) -> None:
        """The outline of `bars`: a line over their tops."""
        steps = zip(edges[:-1], edges[1:], heights, strict=True)
        self.line([(x, height) for left, right, height in steps for x in (left, right)], css)

    def limit(self, value: float, text: str, *, left: bool = False, css: str = "") -> None:
        """A horizontal line for a limit, labelled at its right or left end."""
        y = self._at_y(value)
        name = f"line limit {css}".strip()
        self._parts.append(f'<path class="{name}" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        label_y = y - 5 if y > TOP + 20 else y + 13  # not over the marks at the top
        place = (LEFT + 6, label_y, text, "start") if left else (WIDTH - RIGHT, label_y, text, "end")
        if text:
            self._text(*place, "tick limit-text")

    def at(self, value: float, text: str, css: str) -> None:
        """A vertical line at `value` on the x axis, with a label beside it."""
        x = self._at_x(value)
        self._parts.append(f'<path class="line {css}" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        left = x > (WIDTH + LEFT) / 2
        self._text(x - 5 if left else x + 5, TOP + 12, text, "end" if left else "start", f"tick {css}-text")

    def point(self, x: float, y: float, css: str, shape: str = "circle", tip: Sequence[str] = ()) -> None:
        """One measured point: a circle, ring, cross, diamond or star."""
        at_x, at_y = self._at_x(x), self._at_y(y)
        self._parts.append(
            f'<path class="point {shape} {css}" transform="translate({at_x:.1f} {at_y:.1f})" d="{SHAPES[shape]}"/>'
        )
        if tip:
            self._tips.append((at_x, at_y, list(tip)))

    def tip(self, x: float, lines: Sequence[str]) -> None:
        """Figures at `x`, shown while the pointer is closest to it."""
        self._tips.append((self._at_x(x), None, list(lines)))

    def mark(self, x: float, y: float, css: str, text: str = "") -> None:
        """A diamond. Its label is above on the left, or on the right if the axis is too close."""
        at_x, at_y = self._at_x(x), self._at_y(y)
        self._parts.append(f'<path class="mark {css}" d="M{at_x:.1f} {at_y - 5.5:.1f}l5.5 5.5l-5.5 5.5l-5.5 -5.5Z"/>')
        if text:
            near = at_x < LEFT + CHARACTER * len(text)
            place = (at_x + 9, at_y + 4, text, "start") if near else (at_x - 4, at_y - 8, text, "end")
            self._text(*place, f"tick {css}-text")

    def shade(self, left: float, right: float, text: str, *, low: bool = False) -> None:
        """Shades a range of x that does not count; its label is at the top, or at the bottom with `low`."""
        x, end = self._at_x(left), self._at_x(right)
        height = HEIGHT - TOP - BOTTOM
        self._parts.append(f'<rect class="shade" x="{x:.1f}" y="{TOP}" width="{end - x:.1f}" height="{height}"/>')
        if end - x > 40:  # labels of narrow ranges start at their left edge, clear of the figures of the y axis
            narrow = end - x < CHARACTER * len(text) + 8
            place = x + 4 if narrow else (x + end) / 2
            y = HEIGHT - BOTTOM - 10 if low else TOP + 14
            self._above.append(_text(place, y, text, "start" if narrow else "middle", "tick shade-text"))

    def legend(self, css: str, text: str) -> None:
        self._legend.append(f'<span><i class="key {css}"></i>{escape(text)}</span>')

    def figure(self, title: str = "") -> str:
        """The complete HTML element; `title` precedes the legend."""
        height = HEIGHT + (TITLE if self.x_title else 0)
        return (
            f"<figure><figcaption>{escape(title)}{''.join(self._legend)}</figcaption>"
            f'<svg viewBox="0 0 {WIDTH} {height}" role="group" aria-label="{escape(self.label)}">'
            f"{''.join((*self._parts, *self._above, *self._drawn_tips()))}</svg></figure>"
        )

    def _drawn_tips(self) -> Iterator[str]:
        tips = sorted(self._tips, key=lambda tip: tip[0])
        stop_each = max(1, math.ceil(len(tips) / TAB_STOPS))
        places = [x for x, y, _ in tips if y is None]
        for index, (x, y, lines) in enumerate(tips):
            stop = ' tabindex="0"' if index % stop_each == stop_each // 2 else ""
            yield f'<g class="tip" role="img" aria-label="{escape(", ".join(lines))}"{stop}>'
            yield self._hit(x, y, places)
            yield self._bubble(x, lines)
            yield "</g>"

    def _hit(self, x: float, y: float | None, places: list[float]) -> str:
        """The area in which a tip is shown: around its point, or halfway to the neighbouring tips."""
        if y is not None:
            return f'<circle class="hit" cx="{x:.1f}" cy="{y:.1f}" r="10"/>'
        left = max([place for place in places if place < x], default=2 * LEFT - x)
        right = min([place for place in places if place > x], default=2 * (WIDTH - RIGHT) - x)
        start, height = max((left + x) / 2, LEFT), HEIGHT - TOP - BOTTOM
        width = min((x + right) / 2, WIDTH - RIGHT) - start
        return f'<rect class="hit" x="{start:.1f}" y="{TOP}" width="{max(width, 1):.1f}" height="{height}"/>'

    def _bubble(self, x: float, lines: list[str]) -> str:
        width = min(CHARACTER * max(map(len, lines)) + 16, WIDTH - 4)
        left = x - width - 8 if x > (WIDTH + LEFT) / 2 else x + 8
        left = min(max(left, 2), WIDTH - width - 2)
        rows = "".join(
            f'<text x="{left + 8:.1f}" y="{TOP + 2 + LINE * row:.1f}">{escape(line)}</text>'
            for row, line in enumerate(lines, start=1)
        )
        return (
            f'<g class="bubble"><path class="hair" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<rect x="{left:.1f}" y="{TOP}" width="{width:.1f}" height="{LINE * len(lines) + 12}" rx="5"/>{rows}</g>'
        )


def _text(x: float, y: float, text: str, anchor: str, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


SHAPES = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "ring": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "cross": "M-4 -4L4 4M4 -4L-4 4",
    "diamond": "M0 -5.5L5.5 0L0 5.5L-5.5 0Z",
    "star": "M0 -7.5L2 -2.4L7.2 -2.2L3.2 1.1L4.5 6.2L0 3.3L-4.5 6.2L-3.2 1.1L-7.2 -2.2L-2 -2.4Z",
}


def stacked_bar(parts: Sequence[tuple[str, float]], label: str, whole: float = 0.0) -> str:
    """One horizontal bar of `parts` (CSS class, size); `whole` is the size of its full length, by default their sum."""
    total = whole or sum(size for _, size in parts) or 1
    x, pieces = 0.0, []
    for css, size in parts:
        width = size / total * WIDTH
        pieces.append(f'<rect class="area {css}" x="{x:.1f}" y="0" width="{width:.1f}" height="26"/>')
        x += width
    return f'<svg viewBox="0 0 {WIDTH} 26" role="img" aria-label="{escape(label)}">{"".join(pieces)}</svg>'

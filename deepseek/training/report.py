"""The page of a training run: curves of loss, learning rate, gradient norm, throughput, waiting and memory.

Contract: one self-contained HTML file (no script, nothing from outside, light and dark), and beside it the same
figures as JSON, from which the page can be drawn again. Both are written beside their place and renamed. Figures that
are no finite number are left out of a curve.

Examples:
    write_report("build/mine/training.html", record)  # and training.json beside it; train_model(report=...) does this
    draw(json.loads(Path("build/mine/training.json").read_text()))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from deepseek.spec.folders import write_whole

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 360, 190, 54, 12, 12, 24  # letters of 11 px on a telephone
STYLE = """
:root{color-scheme:light dark;--faint:#59606c}
@media(prefers-color-scheme:dark){:root{--faint:#a8aeb9}}
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2rem auto;padding:0 1rem}
section{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)}.grid{stroke:var(--faint);stroke-opacity:.3;fill:none}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.a{stroke:#2f6fde}.b{stroke:#e08a1e}
.key{display:inline-block;width:.9em;height:.25em;margin:0 .3em 0 .8em;vertical-align:middle}
.key.a{background:#2f6fde}.key.b{background:#e08a1e}.key+small{font-weight:400}
table{border-collapse:collapse;margin:1rem 0}
td{padding:.1rem 1rem .1rem 0;vertical-align:top}td:first-child{color:var(--faint)}
.note{border-left:4px solid #d1495b;padding:.3rem .8rem}
"""
Points = Sequence[tuple[float, float]]


def write_report(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes the page, and the figures beside it."""
    page, record = Path(path), _finite(record)
    write_whole(page.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_whole(page, draw(record))


def draw(record: Mapping[str, Any]) -> str:
    """The page of one record, as `write_report` keeps it."""
    steps, epochs = record["steps"], record["epochs"]
    of = {
        name: [(point["step"], point[name]) for point in steps] for name in ("loss", "learning_rate", "gradient_norm")
    }
    rates = [(point["step"], point["rows"] / point["seconds"]) for point in steps if point["seconds"]]
    waits = [(point["step"], 100 * point["waited_s"] / point["seconds"]) for point in steps if point["seconds"]]
    memory = [(point["step"], point["memory_bytes"] / 2**20) for point in steps]
    ends = (record["steps_per_epoch"] * (epoch["epoch"] + 1) for epoch in epochs)
    validation = [(end, epoch["validation_loss"]) for end, epoch in zip(ends, epochs, strict=True)]
    charts = [
        chart("Loss", {"training": of["loss"], "validation": validation}, log=_spans(of["loss"])),
        chart("Learning rate", {"": of["learning_rate"]}, log=_spans(of["learning_rate"])),
        chart("Gradient norm, before clipping", {"": of["gradient_norm"]}, log=True),
        chart("Rows per second", {"": rates}),
        chart("Waiting for data, % of a step", {"": waits}),
        chart("Memory, MiB", {"": memory}),
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in record["notes"])
    title = f"Training of {record['model']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><h1>{escape(title)}</h1>{notes}{_table(_facts(record))}"
        f"<section>{''.join(charts)}</section><h2>Settings</h2>{_table(record['settings'])}</html>\n"
    )


def _facts(record: Mapping[str, Any]) -> dict[str, str]:
    best = record["best_epoch"]
    epochs = record["epochs"]
    found = f"{epochs[best]['validation_loss']:.5g} in epoch {best + 1} of {len(epochs)}" if best >= 0 else "none yet"
    return {
        "best validation loss": found,
        "steps": f"{record['steps_done']:,}",
        "rows per second": f"{record['rows_per_s']:,.1f}",
        "waiting for data": f"{record['data_share']:.1%} of the time of steps",
        "memory, peak": f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "processes": f"{record['processes']}, on {record['device']}, mixed precision: {record['mixed_precision']}",
    }


def chart(title: str, lines: Mapping[str, Points], *, log: bool = False) -> str:
    """A figure of lines over steps; its y axis has 0 at its bottom, or within it, or is logarithmic."""
    kept = {name: [(x, y) for x, y in points if _drawn(y, log)] for name, points in lines.items()}
    values = [y for points in kept.values() for _, y in points]
    if not values:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>nothing to draw</p></figure>"
    last = max(x for points in kept.values() for x, _ in points)
    low, high = (min(values) / 1.2, max(values) * 1.2) if log else _frame(values)

    def at(x: float, y: float) -> str:
        share = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        across = (x - 1) / (last - 1) if last > 1 else 0.5
        return f"{LEFT + across * (WIDTH - LEFT - RIGHT):.1f} {HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM):.1f}"

    drawn = [_grid(tick, at(1, tick)) for tick in _ticks(low, high, log)]
    for css, points in zip("ab", kept.values(), strict=False):
        drawn.append(f'<path class="line {css}" d="M{"L".join(at(x, y) for x, y in points)}"/>' if points else "")
    drawn.append(f'<text x="{LEFT}" y="{HEIGHT - 6}">1</text>')
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step {last:,.0f}</text>')
    keys = "".join(
        f'<span class="key {css}"></span><small>{escape(name)}</small>'
        for css, name in zip("ab", lines, strict=False)
        if name
    )
    return (
        f'<figure><figcaption>{escape(title)}{keys}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(drawn)}</svg></figure>'
    )


def _grid(value: float, place: str) -> str:
    y = place.split()[1]
    line = f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>'
    return line + f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{_short(value)}</text>'


def _frame(values: Sequence[float]) -> tuple[float, float]:
    """Ends of a linear axis that has 0 and all values."""
    low, high = min(0.0, *values), max(0.0, *values)
    return low * 1.05, high * 1.05 if high or low else 1.0


def _ticks(low: float, high: float, log: bool) -> list[float]:
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = max(1, len(powers) // 5)
        found = [10.0**power for power in powers if power % every == 0 and low <= 10.0**power <= high]
        if len(found) < 2:  # less than a decade
            found = [by * 10.0**power for power in powers for by in (1, 2, 3, 5, 7) if low <= by * 10.0**power <= high]
        return found if len(found) > 1 else [low * 1.2, high / 1.2]
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * by for by in (1, 2, 5, 10) if (high - low) / (step * by) <= 5)
    return [index * step for index in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _spans(points: Points) -> bool:
    """Whether values, all above 0, lie more than 20 times apart: they need a logarithmic axis."""
    values = [y for _, y in points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _drawn(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _short(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"


def _finite(value: Any) -> Any:
    """As JSON has it: null for what is no finite number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value

"""The HTML report of a training run: loss, learning rate, gradient norm, throughput, waiting for data, memory.

Contract: one self-contained HTML file (no scripts or external resources, light and dark mode), and beside it the same
figures as JSON, from which the report can be drawn again. Both are written atomically. Curves leave out NaN and
infinite values.
"""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from deepseek.spec.files.folders import write_whole
from deepseek.svg_chart import Chart, Scale

STYLE = """
:root{color-scheme:light dark;--faint:#59606c}
@media(prefers-color-scheme:dark){:root{--faint:#a8aeb9}}
body{font:15px/1.5 system-ui,sans-serif;max-width:980px;margin:2rem auto;padding:0 1rem}
section{display:grid;grid-template-columns:repeat(auto-fit,minmax(320px,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)}.grid,.axis{stroke:var(--faint);stroke-opacity:.3;fill:none}
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.a{stroke:#2f6fde}.b{stroke:#e08a1e}
.key{display:inline-block;width:.9em;height:.25em;margin:0 .3em 0 .8em;vertical-align:middle}
.key.a{background:#2f6fde}.key.b{background:#e08a1e}figcaption span{font-weight:400}
table{border-collapse:collapse;margin:1rem 0}
td{padding:.1rem 1rem .1rem 0;vertical-align:top}td:first-child{color:var(--faint)}
.note{border-left:4px solid #d1495b;padding:.3rem .8rem}
"""
Points = Sequence[tuple[float, float]]


def write_report(path: str | Path, record: Mapping[str, Any]) -> None:
    """Writes the report, and its figures as JSON beside it."""
    page, text = Path(path), to_json(record, indent=1, inf_nan_mode="null").decode()
    write_whole(page.with_suffix(".json"), text + "\n")
    write_whole(page, draw(json.loads(text)))


def draw(record: Mapping[str, Any]) -> str:
    """The HTML of a record in the form that `write_report` stores."""
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
        "waiting for data": f"{record['data_share']:.1%} of the training time",
        "memory, peak": f"{record['peak_memory_bytes'] / 2**20:,.0f} MiB",
        "processes": f"{record['processes']}, on {record['device']}, mixed precision: {record['mixed_precision']}",
    }


def chart(title: str, lines: Mapping[str, Points], *, log: bool = False) -> str:
    """A figure with lines over steps; its y axis includes 0, or is logarithmic."""
    kept = {name: [(x, y) for x, y in points if _drawn(y, log)] for name, points in lines.items()}
    values = [y for points in kept.values() for _, y in points]
    if not values:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>no data</p></figure>"
    last = max(x for points in kept.values() for x, _ in points)
    low, high = 1.05 * min(0.0, *values), 1.05 * max(0.0, *values)
    scale = Scale(min(values) / 1.2, max(values) * 1.2, log=True) if log else Scale(low, high if high > low else 1.0)
    made = Chart(Scale(1, last), scale, title)
    made.axes(x_unit="", y_unit="", x_ticks=[(1, "1"), (last, f"step {last:,.0f}")])
    for css, (name, points) in zip("ab", kept.items(), strict=False):
        if points:
            made.line(points, css)
        if name:
            made.legend(css, name)
    return made.figure(title)


def _spans(points: Points) -> bool:
    """Whether the values need a logarithmic axis: all are above 0, and the largest exceeds 20 times the smallest."""
    values = [y for _, y in points if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def _drawn(value: float | None, log: bool) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not log)


def _table(rows: Mapping[str, Any]) -> str:
    cells = (f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in rows.items())
    return f"<table>{''.join(cells)}</table>"

"""Finds the layers to keep in high precision if an 8-bit graph breaks the accuracy budget.

Contract: ranks the quantized layers by the output error that each causes alone, on calibration rows. Then keeps the
worst ones high: the fewest that bring the drop on one half of the evaluation split inside the budget, by its number.
The other half judges the choice, with an interval if there is one. Nothing is recalibrated.

Share of a layer: its part of the sum of the squared output errors that each layer causes alone, averaged over the
outputs. Errors of single layers add up about like independent noise.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from rich import box
from rich.table import Table

from deepseek.spec.paired_drop import DropJudgement, interval_text
from export.precision.accuracy import alike, common
from export.precision.qdq import quantized_layers, with_high
from export.rows import Row

RANKING_ROWS = 32
SHOWN_LAYERS = 20
BOUNDLESS = 1e9  # squared error of an output with NaN or Inf where fp32 has none, or the other way round

Run = Callable[[onnx.ModelProto], list[Row]]
"""The outputs of a graph, row by row."""


def layer_shares(model: onnx.ModelProto, run: Run) -> dict[str, float]:
    """Each quantized layer's share of the output error, worst first; the shares add up to 1."""
    layers = quantized_layers(model)
    reference = run(with_high(model, layers))
    alone = {name: run(with_high(model, layers.keys() - {name})) for name in layers}
    errors = np.array([squared_errors(outputs, reference) for outputs in alone.values()])  # (layers, outputs)
    totals = errors.sum(axis=0)
    shares = np.divide(errors, totals, out=np.zeros_like(errors), where=totals > 0)
    means = shares[:, totals > 0].mean(axis=1) if (totals > 0).any() else np.full(len(layers), 1 / len(layers))
    return dict(sorted(zip(layers, map(float, means), strict=True), key=lambda pair: -pair[1]))


def squared_errors(outputs: Sequence[Row], reference: Sequence[Row]) -> list[float]:
    """By output: squared error relative to the squared reference; for integers the share of differing entries.

    NaN and Inf at the same places are ignored: a masked item may have the score -Inf. At other places they count as
    BOUNDLESS.
    """
    errors = []
    for name in reference[0]:
        pairs = [(row[name], expected[name]) for row, expected in zip(outputs, reference, strict=True)]
        if reference[0][name].dtype.kind == "f":
            if not all(alike(value, ref) for value, ref in pairs):
                errors.append(BOUNDLESS)
                continue
            finite = [(value[np.isfinite(ref)].astype(np.float64), ref[np.isfinite(ref)]) for value, ref in pairs]
            wrong = sum(float(np.square(value - ref).sum()) for value, ref in finite)
            scale = sum(float(np.square(ref.astype(np.float64)).sum()) for _, ref in finite)
            errors.append(min(wrong / (scale or 1.0), BOUNDLESS))
        else:
            errors.append(1 - common(pairs))
    return errors


def output_error(outputs: Sequence[Row], reference: Sequence[Row]) -> float:
    """Root mean relative squared error over the float outputs, or over all outputs if none is float."""
    floats = [value.dtype.kind == "f" for value in reference[0].values()]
    errors = squared_errors(outputs, reference)
    chosen = [error for error, is_float in zip(errors, floats, strict=True) if is_float or not any(floats)]
    return math.sqrt(sum(chosen) / len(chosen))


def fewest_high(
    worst_first: Sequence[str], drop_with: Callable[[Sequence[str]], float], max_drop: float
) -> tuple[list[str] | None, list[dict[str, Any]]]:
    """The shortest prefix of `worst_first` that has to stay high, and what was tried.

    Doubles the number until the drop is inside the budget, then bisects. None if even a single layer left at 8 bits
    breaks the budget.
    """
    tried: list[dict[str, Any]] = []

    def inside(count: int) -> bool:
        tried.append({"high": count, "drop": drop_with(worst_first[:count])})
        return tried[-1]["drop"] <= max_drop

    most = max(len(worst_first) - 1, 0)
    fails, holds = 0, min(1, most)
    while holds and not inside(holds):
        fails, holds = holds, min(2 * holds, most) if holds < most else 0
    if not holds:
        return None, tried
    while holds - fails > 1:
        middle = (fails + holds) // 2
        fails, holds = (fails, middle) if inside(middle) else (middle, holds)
    return list(worst_first[:holds]), tried


def sensitivity_pass(
    model: onnx.ModelProto,
    run: Run,
    judged: Callable[[onnx.ModelProto], DropJudgement],
    judged_on_half: Callable[[onnx.ModelProto, bool], DropJudgement],
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The graph that the budget accepts, and the report; `model` itself if it accepts no graph.

    `judged_on_half` takes a graph, and whether the half of the rows is the one to choose on or the one to judge on. If
    the budget accepts `model`, that one measurement is the only cost.
    """
    found = judged(model)
    report: dict[str, Any] = {"max_drop": found.max_drop, **_facts(found), "layers": [], "tried": []}
    if report["held"]:
        return model, report
    layers = quantized_layers(model)
    if not layers:
        return model, report
    shares = layer_shares(model, run)
    high, report["tried"] = fewest_high(
        list(shares), lambda names: judged_on_half(with_high(model, names), True).drop, found.max_drop
    )
    report["layers"] = [
        {"name": name, "operator": layers[name], "share": share, "high": name in (high or ())}
        for name, share in shares.items()
    ]
    if high is None:
        return model, report
    graph = with_high(model, high)
    report |= {**_facts(judged_on_half(graph, False)), "judged": True}
    return graph, report


def _facts(found: DropJudgement) -> dict[str, Any]:
    """A judgement in a report."""
    bounds = None if found.low is None else [found.low, found.high]
    return {"drop": found.drop, "interval": bounds, "verdict": found.verdict, "held": found.accepted}


def verdict(report: dict[str, Any], precision: str, high: str) -> str:
    """The report in one line; `high` is the precision of layers that are not quantized.

    In a report read from JSON, an infinite drop is None.
    """
    allowed, drop = f"{report['max_drop']:.2%} allowed", _percent(report["drop"])
    if report.get("interval") and None not in report["interval"]:
        drop += f" ({interval_text(*report['interval'])})"
    halves = "; layers chosen on {chosen_on} rows, judged on {judged_on} others"
    told = halves.format(**report["rows"]) if "rows" in report else ""
    if not report["layers"]:
        return f"drop {drop}, {_standing(report, allowed)}"
    if report["held"]:
        kept = sum(layer["high"] for layer in report["layers"])
        return f"{kept} of {len(report['layers'])} layers stay {high}; drop {drop}, {_standing(report, allowed)}{told}"
    if report.get("judged"):
        return f"{precision} misses the budget on the rows that judge: drop {drop}, {allowed}{told}"
    line = f"{precision} cannot meet the budget: drop {drop}, {allowed}"
    if report["tried"]:
        least = min(report["tried"], key=lambda each: math.inf if each["drop"] is None else each["drop"])
        rows = " on {chosen_on} rows to choose by".format(**report["rows"]) if "rows" in report else ""
        kept = f"{least['high']} of {len(report['layers'])} layers kept {high}"
        line += f"; at best {_percent(least['drop'])}{rows}, with {kept}"
    return line


def _standing(report: dict[str, Any], allowed: str) -> str:
    word = report.get("verdict", "inside" if report["held"] else "outside")
    return f"{word} the {allowed}" if word in ("inside", "outside") else f"{word}, {allowed}"


def _percent(drop: float | None) -> str:
    return "infinite" if drop is None else f"{drop:.2%}"


def shares_table(report: dict[str, Any], precision: str, high: str) -> Table:
    """A table of each layer's share of the error, worst first, and its precision."""
    table = Table("layer", "operator", box=box.SIMPLE_HEAD)
    table.add_column("share of the error", justify="right")
    table.add_column("runs in")
    for layer in report["layers"][:SHOWN_LAYERS]:
        table.add_row(layer["name"], layer["operator"], f"{layer['share']:.1%}", high if layer["high"] else precision)
    if rest := report["layers"][SHOWN_LAYERS:]:
        table.add_row(f"{len(rest)} more", "", f"{sum(layer['share'] for layer in rest):.1%}", "")
    return table

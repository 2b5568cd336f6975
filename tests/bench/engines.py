"""Speed and size of int8 in raw ONNX Runtime."""

from __future__ import annotations

import json

import onnxruntime

from export.artifact import choice_path, onnx_path, read_manifest
from export.rows import Row, batches
from tests.bench.setting import MODELS, Bench, seconds


def int8(bench: Bench) -> None:
    """int8 over fp32 in raw ONNX Runtime by batch size, with the loss of the task metric, and the graphs' sizes."""
    for name in MODELS:
        lost = _lost(name, "int8")
        sessions = {precision: bench.raw_sessions(onnx_path(name, precision), 1)[0] for precision in ("fp32", "int8")}
        batch_axis = bench.specs[name].axes["batch"]
        for batch in sorted({1, batch_axis.opt, batch_axis.max}):
            _, inputs = max(batches(bench.rows[name], batch), key=lambda found: len(found[0]))
            bench.record(f"int8 over fp32: {name} batch {batch}", speedups(bench, sessions, inputs), lost)
        sizes = {key: read_manifest(onnx_path(name, key)).size_bytes for key in sessions}
        bench.record(f"int8 size over fp32: {name}", [sizes["int8"] / sizes["fp32"]])


def speedups(bench: Bench, sessions: dict[str, onnxruntime.InferenceSession], inputs: Row) -> list[float]:
    """How many times faster the second session is, for each pair."""
    ratios = []
    for _ in range(bench.pairs(24)):
        first, second = (_seconds_of_runs(session, inputs) for session in sessions.values())
        ratios.append(first / second)
    return ratios


def _lost(name: str, precision: str) -> str:
    """The loss of the task metric that `export.stages.select_precision` measured."""
    path = choice_path(name, "onnxruntime")
    if not path.is_file():
        return ""
    choice = json.loads(path.read_text())
    if precision not in choice["variants"]:  # the last build had one precision alone
        return ""
    return f"{100 * choice['variants'][precision]['drop']:.2f} % of {choice['metric'].upper()} lost"


def _seconds_of_runs(session: onnxruntime.InferenceSession, inputs: Row) -> float:
    """Seconds of a batch of runs, enough to time a small model."""
    return seconds(lambda: [session.run(None, inputs) for _ in range(10)])

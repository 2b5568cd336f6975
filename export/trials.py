"""What parity is tried on, whoever predicts: corners of the profile, rows sent apart, NaN and Inf, the task metric.

Contract: a `Judge` asks one endpoint and compares with given outputs; a request that the endpoint refuses is a failed
check, any other error goes through. `export.parity` runs the trials over each protocol.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from deepseek.spec import BATCH, DeploymentSpec, InputError, ParitySpec, Tolerance
from export.accuracy import metric_drop, parity, task_metrics, too_small
from export.artifact import Row
from export.reference import inputs_at, sizes_text
from export.runners import outputs_of
from export.source import Predict, Source

Outputs = Callable[[Predict], list[Row]]  # what a trial makes of whatever predicts: outputs row by row

MOST_CORNERS = 27  # of three axes; with more, one axis at a time leaves opt
CORNER_ROWS = 8  # compared at a corner at least: one row of one label would say little
CONCURRENT_ROWS = 32  # sent at once
BATCHING_ROUNDS = 3
BATCHING_SECONDS = 5.0
SPECIAL_ROWS = 8
SPECIAL_ROW = "a row with"
SPECIALS = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf}


class Refused(Exception):
    """The server answered a request with an error, or with something that cannot be this model's outputs."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the result: an output of one trial over one protocol."""

    at: str
    protocol: str
    output: str
    numbers: dict[str, float]
    """As `export.accuracy.parity` has them; empty where the server refused."""
    verdict: str
    holds: bool


def same_engine(spec: DeploymentSpec) -> Tolerance:
    """Of two answers of one engine: another batch may take another kernel, which rounds no more coarsely than fp16.

    More than that where deploy.toml allows fp32 more: the model loses digits in it.
    """
    fp16, fp32 = ParitySpec().fp16, spec.parity.fp32
    return Tolerance(
        worst_error=max(fp16.worst_error, fp32.worst_error),
        cosine=min(fp16.cosine, fp32.cosine),
        common=min(fp16.common, fp32.common),
    )


def corners(spec: DeploymentSpec) -> list[dict[str, int]]:
    """Smallest, opt and largest of each axis in all combinations; past MOST_CORNERS the common ones.

    These are all axes at min, at opt and at max, and each axis alone at its ends with the others at opt.
    """
    ends = {name: sorted({axis.min, axis.opt, axis.max}) for name, axis in spec.axes.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        return [dict(zip(ends, sizes, strict=True)) for sizes in itertools.product(*ends.values())]
    opt = {name: axis.opt for name, axis in spec.axes.items()}
    found = [{name: getattr(axis, end) for name, axis in spec.axes.items()} for end in ("min", "opt", "max")]
    found += [{**opt, name: size} for name, sizes in ends.items() for size in sizes]
    return [sizes for place, sizes in enumerate(found) if sizes not in found[:place]]


def batches_at(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> list[Row]:
    """Batches of real rows at a corner: as many as it takes for CORNER_ROWS rows."""
    size = sizes[BATCH]
    starts = [k * size % len(rows) for k in range(math.ceil(CORNER_ROWS / size))]
    return [inputs_at(spec, rows[start:] + rows[:start], sizes) for start in starts]


def outputs_of_batches(predict: Predict, batches: list[Row]) -> list[Row]:
    """Outputs row by row."""
    return [row for inputs in batches for row in _rows(predict(inputs))]


def _rows(outputs: Row) -> list[Row]:
    return [{name: array[row] for name, array in outputs.items()} for row in range(rows_in(outputs))]


def rows_in(tensors: Row) -> int:
    """Rows of a batch."""
    return len(next(iter(tensors.values())))


def beyond(tolerance: Tolerance, numbers: dict[str, float], entries: int, true: int = 0) -> str:
    """What of an output is past the tolerance, in words; "" where nothing is. `true`: how many entries are True."""
    if "common" in numbers:
        flags = {"common_true": (true, "True entries"), "common_false": (entries - true, "False entries")}
        counts = {key: flags[key] for key in flags if key in numbers} or {"common": (entries, "entries")}
        for key, (count, what) in counts.items():
            allowed = math.ceil(round((1 - tolerance.common) * count, 6))
            differ = round((1 - numbers[key]) * count)
            if differ > allowed:
                return f"{differ} of {count} {what} differ, {allowed} may"
        return ""
    if not math.isfinite(numbers["worst_error"]):
        return "NaN, Inf or shape differs"
    if not numbers["worst_error"] <= tolerance.worst_error:
        return f"worst error {numbers['worst_error']:.2g} > {tolerance.worst_error:g}"
    if not numbers["cosine"] >= tolerance.cosine:
        return f"cosine {numbers['cosine']:.5f} < {tolerance.cosine:g}"
    return ""


class Judge:
    """Compares what one endpoint answers, and keeps what it found."""

    def __init__(self, spec: DeploymentSpec, protocol: str, predict: Predict) -> None:
        self.spec, self.protocol, self.predict = spec, protocol, predict
        self.checks: list[Check] = []

    def ask(self, at: str, outputs: Outputs) -> list[Row] | None:
        """The endpoint's outputs; a refused request is a failed check, and None."""
        try:
            return outputs(self.predict)
        except Refused as error:
            self.add(at, "all", {}, str(error))
            return None

    def compare(
        self, at: str, found: list[Row] | None, expected: list[Row], tolerance: Tolerance, *, gate: bool = True
    ) -> None:
        """One check an output; not gated, it only tells."""
        if found is None:
            return
        for name, numbers in parity(self.spec, found, expected).items():
            entries = sum(row[name].size for row in expected)
            true = sum(int(row[name].sum()) for row in expected) if "common_true" in numbers else 0
            self.add(at, name, numbers, beyond(tolerance, numbers, entries, true), gate=gate)

    def add(self, at: str, output: str, numbers: dict[str, float], problem: str, *, gate: bool = True) -> None:
        """Keeps a check, which holds where there is no problem or no gate."""
        self.checks.append(
            Check(
                at=at,
                protocol=self.protocol,
                output=output,
                numbers=numbers,
                verdict=(problem if gate else f"reported: {problem}") if problem else "holds",
                holds=not (problem and gate),
            )
        )


def some_rows(spec: DeploymentSpec, rows: list[Row], most: int) -> Row:
    """Real rows as one batch that falls into requests of the smallest size; other axes at opt."""
    least = spec.axes[BATCH].min
    size = max(1, min(spec.max_batch, most) // least) * least
    return inputs_at(spec, rows, {**{name: axis.opt for name, axis in spec.axes.items()}, BATCH: size})


def apart(predict: Predict, inputs: Row, least: int) -> list[Row]:
    """Outputs row by row of requests of `least` rows each, all sent at once, so that Triton batches them."""
    starts = range(0, rows_in(inputs), least)
    parts = [{name: array[start : start + least] for name, array in inputs.items()} for start in starts]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [row for outputs in pool.map(predict, parts) for row in _rows(outputs)]


def compare_batching(judge: Judge, rows: list[Row], executions: Callable[[], int | None]) -> dict[str, int | None]:
    """Rows as requests of their own against the same rows as one batch; returns how Triton batched them.

    Triton batches what has queued up, which is nothing in many a round where the model is fast, so that there are more
    rounds until some requests were put together, up to BATCHING_SECONDS: batching may be off.
    """
    spec, at = judge.spec, "rows sent apart, at once"
    least, inputs = spec.axes[BATCH].min, some_rows(spec, rows, CONCURRENT_ROWS)
    if rows_in(inputs) == least:
        return {}  # the largest batch is the smallest: nothing is ever put together
    batch = judge.ask(at, lambda predict: outputs_of_batches(predict, [inputs]))
    if batch is None:
        return {}
    found: list[Row] = []
    rounds, ran, before, end = 0, None, executions(), time.monotonic() + BATCHING_SECONDS
    while rounds < BATCHING_ROUNDS or (ran == len(found) // least and time.monotonic() < end):
        answers = judge.ask(at, lambda predict: apart(predict, inputs, least))
        if answers is None:
            return {}
        rounds, found, now = rounds + 1, found + answers, executions()
        ran = None if before is None or now is None else now - before
    judge.compare(at, found, batch * rounds, same_engine(spec))
    return {"requests": len(found) // least, "executions": ran}


def planted(spec: DeploymentSpec, inputs: Row, row: int, value: float) -> Row:
    """The inputs with `value` in the middle of each float tensor of one row."""
    changed = {name: array.copy() for name, array in inputs.items()}
    for name in float_inputs(spec):
        values = changed[name][row : row + 1].reshape(-1)  # a view: the copy is contiguous
        values[values.size // 2] = value
    return changed


def float_inputs(spec: DeploymentSpec) -> list[str]:
    """Inputs that can hold a NaN."""
    return [name for name, tensor in spec.inputs.items() if tensor.dtype.startswith("float")]


def compare_specials(judge: Judge, rows: list[Row], reference: Predict, tolerance: Tolerance, *, gate: bool) -> None:
    """NaN and Inf in one row, in a batch and among requests sent at once: that row, and those beside it."""
    spec = judge.spec
    least, inputs = spec.axes[BATCH].min, some_rows(spec, rows, SPECIAL_ROWS)
    row = rows_in(inputs) // 2
    clean = judge.ask("rows of one batch", lambda predict: outputs_of_batches(predict, [inputs]))
    if clean is None:
        return
    for word, value in SPECIALS.items():
        bad = planted(spec, inputs, row, value)
        at = f"{SPECIAL_ROW} {word}"
        try:
            expected = outputs_of_batches(reference, [bad])
        except InputError as error:
            judge.add(at, "all", {}, f"not compared: {error}", gate=False)
            continue
        found = judge.ask(
            at,
            lambda predict, bad=bad: outputs_of_batches(predict, [bad]) + apart(predict, bad, least),  # type: ignore[misc]
        )
        if found is None:
            continue
        beside = [place for place in range(len(found)) if place % len(clean) != row]
        itself = [found[row], found[row + len(clean)]]
        judge.compare(at, itself, [expected[row]] * 2, tolerance, gate=gate)
        if beside:
            judge.compare(
                f"rows beside {word}", [found[k] for k in beside], [(clean * 2)[k] for k in beside], same_engine(spec)
            )


def compare_metric(source: Source, reference: Predict, judges: list[Judge]) -> dict[str, Any]:
    """The task metric by PyTorch and through each endpoint, and what is lost; empty where the spec has none."""
    metric = source.spec.precision.metric
    if metric is None:
        return {}
    base = task_metrics(source, reference)[metric]
    served: dict[str, dict[str, Any]] = {}
    for judge in judges:
        try:
            value = task_metrics(source, judge.predict)[metric]
            drop = 0.0 if too_small(source.spec, {metric: base}) else metric_drop(metric, value, base)
            served[judge.protocol] = {"value": value, "drop": drop}
        except Refused as error:
            served[judge.protocol] = {"value": math.nan, "drop": math.inf, "refused": str(error)}
    return {"name": metric, "max_drop": source.spec.precision.max_drop, "pytorch": base, "served": served}


def trials(spec: DeploymentSpec, rows: list[Row]) -> Iterator[tuple[str, Outputs]]:
    """What is compared with PyTorch, by name."""
    yield "evaluation split", lambda predict: outputs_of(spec, predict, rows)
    for sizes in corners(spec):
        batches = batches_at(spec, rows, sizes)
        yield sizes_text(sizes), lambda predict, batches=batches: outputs_of_batches(predict, batches)  # type: ignore[misc]


def failures(checks: list[Check], metric: dict[str, Any]) -> list[str]:
    """What does not hold, a line each."""
    found = [
        f"{check.at} over {check.protocol}, {check.output}: {check.verdict}" for check in checks if not check.holds
    ]
    for protocol, value in metric.get("served", {}).items():
        if not value["drop"] <= metric["max_drop"]:
            reason = value.get("refused", f"drop {value['drop']:.2%} > {metric['max_drop']:.2%}")
            found.append(f"{metric['name']} over {protocol}: {reason}")
    return found

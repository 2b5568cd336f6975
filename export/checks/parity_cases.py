"""The trials of parity: corners of the profile, small requests at once, NaN and Inf, the task metric.

Contract: an `EndpointComparison` calls one endpoint and compares with given outputs; a request that the endpoint
refuses is a failed check, any other error propagates. `export.checks.parity` runs the trials over each protocol.
"""

import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from deepseek.spec import BATCH, DeploymentSpec, InputError, Precision, Tolerance
from deepseek.spec.files.repository import TF32
from deepseek.spec.paired_drop import DropJudgement, values_text
from export.artifact import pruning_of
from export.model_folder import ModelFolder, Predict
from export.precision.accuracy import evaluated, paired_drop, parity, too_small
from export.precision.accuracy_budget import Baseline, judged, sensitivity_of
from export.rows import Row
from export.runtimes.batching import outputs_of
from export.runtimes.pytorch_reference import inputs_at, module_predictor, sizes_text

Outputs = Callable[[Predict], list[Row]]  # a trial: runs a predictor, returns outputs row by row

MOST_CORNERS = 27  # of three axes; with more axes, only one at a time leaves opt
CORNER_ROWS = 8  # least rows compared at a corner: a single label would say little
CONCURRENT_ROWS = 32  # sent at once
BATCHING_ROUNDS = 3
BATCHING_SECONDS = 5.0
SPECIAL_ROWS = 8
SPECIAL_ROW = "a row with"
SPECIALS = {"NaN": math.nan, "+Inf": math.inf, "-Inf": -math.inf}


class RequestRefused(Exception):
    """The server answered with an error, or with something that cannot be this model's outputs."""


@dataclass(frozen=True, kw_only=True)
class ParityCheck:
    """One line of the result: an output of one trial over one protocol."""

    at: str
    protocol: str
    output: str
    numbers: dict[str, float]
    """Those of `export.precision.accuracy.parity`; empty if the server refused the request."""
    verdict: str
    holds: bool


def same_engine(spec: DeploymentSpec) -> Tolerance:
    """Tolerance between two answers of one engine: another batch may use another kernel, at worst as coarse as TF32.

    If deploy.toml allows fp32 more than that, the larger tolerance applies: the model itself loses digits.
    """
    return spec.parity.of_tf32()


def tolerance_of(spec: DeploymentSpec, precision: Precision, parameters: Collection[str]) -> Tolerance:
    """The tolerance of a served model with these parameters."""
    return spec.parity.of_tf32() if TF32 in parameters else spec.parity.of(precision)


def corners(spec: DeploymentSpec) -> list[dict[str, int]]:
    """Smallest, opt and largest size of each axis in all combinations; past MOST_CORNERS a subset.

    The subset is all axes at min, at opt and at max, and each axis alone at its ends with the others at opt.
    """
    ends = {name: sorted({axis.min, axis.opt, axis.max}) for name, axis in spec.axes.items()}
    if math.prod(map(len, ends.values())) <= MOST_CORNERS:
        return [dict(zip(ends, sizes, strict=True)) for sizes in itertools.product(*ends.values())]
    opt = {name: axis.opt for name, axis in spec.axes.items()}
    found = [{name: getattr(axis, end) for name, axis in spec.axes.items()} for end in ("min", "opt", "max")]
    found += [{**opt, name: size} for name, sizes in ends.items() for size in sizes]
    return [sizes for place, sizes in enumerate(found) if sizes not in found[:place]]


def batches_at(spec: DeploymentSpec, rows: list[Row], sizes: dict[str, int]) -> list[Row]:
    """Batches of real rows at a corner, enough for CORNER_ROWS rows."""
    size = sizes[BATCH]
    starts = [k * size % len(rows) for k in range(math.ceil(CORNER_ROWS / size))]
    return [inputs_at(spec, rows[start:] + rows[:start], sizes) for start in starts]


def outputs_of_batches(predict: Predict, batches: list[Row]) -> list[Row]:
    """Outputs of all batches, row by row."""
    return [row for inputs in batches for row in _rows(predict(inputs))]


def _rows(outputs: Row) -> list[Row]:
    return [{name: array[row] for name, array in outputs.items()} for row in range(rows_in(outputs))]


def rows_in(tensors: Row) -> int:
    """Number of rows of a batch."""
    return len(next(iter(tensors.values())))


def beyond(tolerance: Tolerance, numbers: dict[str, float], entries: int, true: int = 0) -> str:
    """How an output exceeds the tolerance; "" if it does not. `entries`, `true`: counts of all and of True entries."""
    if "common" in numbers:
        flags = {"common_true": (true, "True entries"), "common_false": (entries - true, "False entries")}
        counts = {key: flags[key] for key in flags if key in numbers} or {"common": (entries, "entries")}
        for key, (count, what) in counts.items():
            allowed = math.ceil(round((1 - tolerance.common) * count, 6))
            differ = round((1 - numbers[key]) * count)
            if differ > allowed:
                return f"{differ} of {count} {what} differ, {allowed} allowed"
        return ""
    if not math.isfinite(numbers["worst_error"]):
        return "NaN, Inf or shape differs"
    if not numbers["worst_error"] <= tolerance.worst_error:
        return f"worst error {numbers['worst_error']:.2g} > {tolerance.worst_error:g}"
    if not numbers["cosine"] >= tolerance.cosine:
        return f"cosine {numbers['cosine']:.5f} < {tolerance.cosine:g}"
    return ""


class EndpointComparison:
    """Compares the answers of one endpoint, and collects the checks."""

    def __init__(self, spec: DeploymentSpec, protocol: str, predict: Predict) -> None:
        self.spec, self.protocol, self.predict = spec, protocol, predict
        self.checks: list[ParityCheck] = []

    def ask(self, at: str, outputs: Outputs) -> list[Row] | None:
        """The endpoint's outputs; a refused request adds a failed check and returns None."""
        try:
            return outputs(self.predict)
        except RequestRefused as error:
            self.add(at, "all", {}, str(error))
            return None

    def compare(
        self, at: str, found: list[Row] | None, expected: list[Row], tolerance: Tolerance, *, gate: bool = True
    ) -> None:
        """Adds one check per output; without `gate` it is only reported."""
        if found is None:
            return
        for name, numbers in parity(self.spec, found, expected).items():
            entries = sum(row[name].size for row in expected)
            true = sum(int(row[name].sum()) for row in expected) if "common_true" in numbers else 0
            self.add(at, name, numbers, beyond(tolerance, numbers, entries, true), gate=gate)

    def add(self, at: str, output: str, numbers: dict[str, float], problem: str, *, gate: bool = True) -> None:
        """Adds a check, which holds if there is no problem or no gate."""
        self.checks.append(
            ParityCheck(
                at=at,
                protocol=self.protocol,
                output=output,
                numbers=numbers,
                verdict=(problem if gate else f"reported: {problem}") if problem else "holds",
                holds=not (problem and gate),
            )
        )


def some_rows(spec: DeploymentSpec, rows: list[Row], most: int) -> Row:
    """Real rows as one batch that splits into requests of the smallest size; other axes at opt."""
    least = spec.axes[BATCH].min
    size = max(1, min(spec.max_batch, most) // least) * least
    return inputs_at(spec, rows, {**{name: axis.opt for name, axis in spec.axes.items()}, BATCH: size})


def apart(predict: Predict, inputs: Row, least: int) -> list[Row]:
    """Sends requests of `least` rows each, all at once so that Triton batches them; returns outputs by row."""
    starts = range(0, rows_in(inputs), least)
    parts = [{name: array[start : start + least] for name, array in inputs.items()} for start in starts]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [row for outputs in pool.map(predict, parts) for row in _rows(outputs)]


def compare_batching(
    judge: EndpointComparison, rows: list[Row], executions: Callable[[], int | None]
) -> dict[str, int | None]:
    """Compares rows sent as small requests with the same rows as one batch; returns how Triton batched them.

    Triton batches queued requests; if the model is fast, few queue up. So rounds repeat until some requests were
    batched, at most for BATCHING_SECONDS, since batching may be off.
    """
    spec, at = judge.spec, "small requests at once"
    least, inputs = spec.axes[BATCH].min, some_rows(spec, rows, CONCURRENT_ROWS)
    if rows_in(inputs) == least:
        return {}  # the largest batch is the smallest: nothing can be batched
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
    """A copy of the inputs with `value` in the middle of each float tensor of one row."""
    changed = {name: array.copy() for name, array in inputs.items()}
    for name in float_inputs(spec):
        values = changed[name][row : row + 1].reshape(-1)  # a view: the copy is contiguous
        values[values.size // 2] = value
    return changed


def float_inputs(spec: DeploymentSpec) -> list[str]:
    """Names of the float inputs, which can hold NaN."""
    return [name for name, tensor in spec.inputs.items() if tensor.dtype.startswith("float")]


def compare_specials(
    judge: EndpointComparison, rows: list[Row], reference: Predict, tolerance: Tolerance, *, gate: bool
) -> None:
    """Sends NaN and Inf in one row, in a batch and in small requests; compares that row and the rows beside it."""
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
        if beside and len(clean) > least:
            judge.compare(
                f"rows beside {word}", [found[k] for k in beside], [(clean * 2)[k] for k in beside], same_engine(spec)
            )
        elif beside:  # all rows are of one caller, so forward may let them influence one another
            right = [(expected * 2)[k] for k in beside]
            judge.compare(f"rows beside {word}", [found[k] for k in beside], right, tolerance, gate=gate)


def compare_metric(
    source: ModelFolder, reference: Predict, judges: list[EndpointComparison], precision: Precision
) -> dict[str, Any]:
    """The task metric of PyTorch and of each endpoint, and the drop; empty if the spec has no metric.

    Judged as in the build: against the model that the user brought (for a pruned model, the unpruned one), on the rows
    that judge a graph whose layers were chosen on the others, and by the same interval.
    """
    spec, metric = source.spec, source.spec.precision.metric
    if metric is None:
        return {}
    pruned = bool(pruning_of(spec.name))
    base = evaluated(source, module_predictor(spec, source.unpruned()) if pruned else reference)
    halved = bool((sensitivity_of(spec, precision) or {}).get("judged")) and not too_small(spec, base.metrics)
    baseline = Baseline.of(source, reference) if halved else None
    served: dict[str, dict[str, Any]] = {}
    for judge in judges:
        try:
            found = evaluated(source, judge.predict)
            if baseline is not None:
                drop, paired = baseline.drop_on_half(judge.predict, choosing=False)
            else:
                drop, paired = (0.0, None) if too_small(spec, base.metrics) else paired_drop(source, found, base)
            values = None if found.values is None else values_text(found.values)
            facts: dict[str, Any] = {"value": found.metrics[metric], "drop": drop, "values": values}
        except (RequestRefused, InputError) as error:  # evaluate() may fail at outputs that it does not expect
            facts, paired = {"value": math.nan, "drop": math.inf, "values": None, "refused": str(error)}, None
        served[judge.protocol] = {**facts, "judgement": asdict(judged(spec, facts["drop"], paired))}
    against = "unpruned PyTorch" if pruned else "PyTorch"
    return {
        "name": metric,
        "max_drop": spec.precision.max_drop,
        "against": against,
        "pytorch": base.metrics[metric],
        "served": served,
    }


def trials(spec: DeploymentSpec, rows: list[Row]) -> Iterator[tuple[str, Outputs]]:
    """The trials to compare with PyTorch, by name."""
    yield "evaluation split", lambda predict: outputs_of(spec, predict, rows)
    for sizes in corners(spec):
        batches = batches_at(spec, rows, sizes)
        yield sizes_text(sizes), lambda predict, batches=batches: outputs_of_batches(predict, batches)  # type: ignore[misc]


def failures(checks: list[ParityCheck], metric: dict[str, Any]) -> list[str]:
    """The failed checks and metrics, one line each."""
    found = [
        f"{check.at} over {check.protocol}, {check.output}: {check.verdict}" for check in checks if not check.holds
    ]
    for protocol, value in metric.get("served", {}).items():
        judgement = DropJudgement(**value["judgement"])
        if not judgement.accepted:
            found.append(f"{metric['name']} over {protocol}: {value.get('refused', judgement.reason)}")
    return found

"""The same requests to two servers, one beside the other: what they answer, and how long each takes.

Contract: BASE serves the version that callers have, NEW the one that is to take its place. Each request goes to both,
one after the other, in turn first to one and first to the other, so that what else the machine does falls on both
alike. NEW fails where it refuses a request, gives other outputs (names, types, shapes), a NaN or Inf where BASE gives a
number, or is slower: the whole confidence interval of the ratio of the medians lies above what is allowed. Refused as
busy, with one request at a time, is what a busy machine does: such a request is sent again, and one that stays refused
makes the run inconclusive. Numbers that
differ are told, not judged: two versions may well differ (`export.parity` judges). Tails are `loadtests.slo`'s matter.

Exit codes: 0 holds; 1 NEW fails; 2 wrong input; 3 the medians are too close to what is allowed to tell, or
the machine is too busy.

Examples:
    python -m loadtests.shadow --model recommender --base-url 127.0.0.1:8001 --new-url 127.0.0.1:9001
    python -m loadtests.shadow --base-url 127.0.0.1:8001 --new-url 127.0.0.1:9001 --requests 2000 --threshold 5 --json
"""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from deepseek_client import InferenceClient, InferenceError, InvalidInput, ServerBusy
from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import BATCH, DeploymentSpec, GateFailed, InputError, Parser, add_model_arguments, run_command
from loadtests.bootstrap import Draws, Stretches, percentiles, ratio_interval
from loadtests.endpoint import inputs_of
from loadtests.inputs import Row, read_inputs, shuffled

BLOCKS = 20  # stretches of the run that are drawn again; what the machine did in one stays together
LEAST_REQUESTS = 10 * BLOCKS
WARMUP = 20  # requests to both that are not counted
BUSY_TRIES, BUSY_PAUSE_S = 5, 0.1  # of a request that is refused as busy
CONFIDENCE = 0.99
SIDES = ("base", "new")

Verdict = Literal["holds", "fails", "inconclusive"]
EXIT_CODES: dict[Verdict, int] = {"holds": 0, "fails": 1, "inconclusive": 3}


@dataclass(kw_only=True)
class Differences:
    """How one output of NEW differs from BASE's, over all rows."""

    worst_error: float = 0.0
    """Largest absolute difference of a number."""
    same: int = 0
    """Numbers that are equal."""
    numbers: int = 0
    cosines: list[float] = field(default_factory=list)

    def add(self, base: np.ndarray, new: np.ndarray) -> None:
        """One row's."""
        self.numbers += base.size
        self.same += int(np.count_nonzero(base == new))
        if base.dtype.kind not in "fiu" or not base.size:
            return
        one, other = base.astype(np.float64).ravel(), new.astype(np.float64).ravel()
        finite = np.isfinite(one) & np.isfinite(other)
        one, other = one[finite], other[finite]
        self.worst_error = max(self.worst_error, float(np.abs(one - other).max(initial=0.0)))
        length = float(np.linalg.norm(one) * np.linalg.norm(other))
        if base.dtype.kind == "f" and length:
            self.cosines.append(float(one @ other) / length)

    def figures(self) -> dict[str, float | None]:
        """As they are told."""
        return {
            "worst_error": self.worst_error,
            "same": self.same / self.numbers if self.numbers else None,
            "cosine": float(np.mean(self.cosines)) if self.cosines else None,
        }


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A percentile of both sides."""

    percent: int
    base_ms: float
    new_ms: float
    ratio: float
    low: float
    high: float


class Shadow:
    """Sends, compares and counts."""

    def __init__(self, model: str, clients: dict[str, InferenceClient], rows: list[Row]) -> None:
        self._model, self._clients, self._rows = model, clients, rows
        self.latencies_ms: dict[str, list[float]] = {side: [] for side in SIDES}
        self.errors: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self.busy: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        """Refused at every attempt, for want of room or time."""
        self.outputs: dict[str, Differences] = {}
        self.broken: Counter[str] = Counter()
        """What NEW gives that no caller of BASE expects."""

    def run(self, count: int) -> None:
        """So many requests to both, after some that are not counted."""
        requests = {side: [self._prepare(side, row) for row in self._rows] for side in SIDES}
        for number in range(-WARMUP, count):
            place, answers = number % len(self._rows), {}
            for side in SIDES if number % 2 == 0 else SIDES[::-1]:
                answers[side] = self._send(side, requests[side][place], counted=number >= 0)
            if number < len(self._rows) and answers["base"] is not None and answers["new"] is not None:
                self._compare(answers["base"], answers["new"])

    def _prepare(self, side: str, row: Row) -> Any:
        try:
            return self._clients[side].prepare(self._model, row)
        except InvalidInput as error:
            raise GateFailed(f"{side} does not take the inputs that the other does: {error}") from None

    def _send(self, side: str, request: Any, *, counted: bool) -> dict[str, np.ndarray] | None:
        tries = BUSY_TRIES
        while True:
            started_s = time.perf_counter()
            try:
                answer = self._clients[side].send(request)
                break
            except ServerBusy as error:
                tries -= 1
                if not tries or self.busy[side]:  # once one stayed refused, the run tells nothing
                    self.busy[side][f"{type(error).__name__}: {error}"] += 1
                    return None
                time.sleep(BUSY_PAUSE_S)
            except InferenceError as error:
                self.errors[side][f"{type(error).__name__}: {error}"] += 1
                return None
        if counted:
            self.latencies_ms[side].append((time.perf_counter() - started_s) * 1000)
        return answer

    def _compare(self, base: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> None:
        if base.keys() != new.keys():
            self.broken[f"gives the outputs {', '.join(sorted(new))}, base gives {', '.join(sorted(base))}"] += 1
            return
        for name, one in base.items():
            other = new[name]
            if (one.dtype, one.shape) != (other.dtype, other.shape):
                found = f"{other.dtype} {list(other.shape)}, base's {one.dtype} {list(one.shape)}"
                self.broken[f"output {name!r} is {found}"] += 1
                continue
            if one.dtype.kind == "f" and np.any(np.isfinite(one) & ~np.isfinite(other)):
                self.broken[f"output {name!r} has a NaN or Inf where base has a number"] += 1
            self.outputs.setdefault(name, Differences()).add(one, other)


def speeds(base_ms: list[float], new_ms: list[float]) -> list[Speed]:
    """Percentiles of both, and how far their ratio may be off."""
    count = min(len(base_ms), len(new_ms))
    draws = Draws.of(BLOCKS, BLOCKS)
    sides = [_blocks(side[:count]) for side in (base_ms, new_ms)]
    found = []
    for percent in (50, 90, 99):
        base, new = (
            percentiles(side, drawn, percent) for side, drawn in zip(sides, (draws.base, draws.new), strict=True)
        )
        each = ratio_interval(new, base, pairs=BLOCKS, confidence=CONFIDENCE)
        values = {"base_ms": float(base[0]), "new_ms": float(new[0])}
        found.append(Speed(percent=percent, **values, ratio=each.ratio, low=each.low, high=each.high))
    return found


def _blocks(latencies_ms: list[float]) -> Stretches:
    """The run in stretches of equal length, in whole microseconds."""
    values, places = np.unique(np.round(np.array(latencies_ms), 3), return_inverse=True)
    counts = np.zeros((BLOCKS, len(values)), np.int64)
    np.add.at(counts, (np.arange(len(places)) * BLOCKS // len(places), places), 1)
    none = np.zeros(BLOCKS, np.int64)
    totals = counts.sum(axis=1)
    return Stretches(counts=counts, values_ms=values, failed=none, planned=totals, completed_rps=totals)


def judged(shadow: Shadow, threshold: float) -> dict[str, Any]:
    """All that was found, and the verdict; `threshold` is what the median may lose, as a share."""
    failures = [f"{what} ({times} times)" for what, times in shadow.broken.items()]
    failures += [f"{times} requests failed on new: {what}" for what, times in shadow.errors["new"].items()]
    found: list[Speed] = []
    verdict: Verdict = "fails" if failures else "holds"
    least = min(len(each) for each in shadow.latencies_ms.values())
    note = ""
    if least >= LEAST_REQUESTS:
        found = speeds(shadow.latencies_ms["base"], shadow.latencies_ms["new"])
        median, allowed = found[0], 1 + threshold
        range_ = f"{median.low:.2f} to {median.high:.2f}, allowed {allowed:.2f}"
        if median.low > allowed:
            failures.append(f"slower: p50 {median.new_ms:.2f} ms, base {median.base_ms:.2f} ms: {range_} times")
            verdict = "fails"
        elif median.high > allowed and verdict == "holds":
            verdict, note = "inconclusive", f"p50 {range_} times: more requests, or a quieter machine, would tell"
    elif not failures:
        verdict, note = "inconclusive", f"{least} requests were answered by both, {LEAST_REQUESTS} needed"
    if verdict != "fails" and (busy := shadow.busy["new"]):
        reason, times = next(iter(busy.items()))
        verdict = "inconclusive"
        note = f"{times} requests, one at a time, refused on new: {reason}; a quieter machine would tell"
    return {
        "verdict": verdict,
        "requests": least,
        "failures": failures,
        "note": note,
        "outputs": {name: each.figures() for name, each in shadow.outputs.items()},
        "latency": [asdict(each) for each in found],
        "allowed": 1 + threshold,
        "errors": {side: dict(shadow.errors[side] + shadow.busy[side]) for side in SIDES},
    }


def _print(result: dict[str, Any]) -> None:
    table = Table("", "base", "new", "new / base", "interval", box=box.SIMPLE_HEAD)
    for each in result["latency"]:
        times = f"{each['ratio']:.2f}", f"{each['low']:.2f} to {each['high']:.2f}"
        table.add_row(f"p{each['percent']}", f"{each['base_ms']:.2f} ms", f"{each['new_ms']:.2f} ms", *times)
    Console(markup=False).print(table)
    for name, found in result["outputs"].items():
        shown = [f"{key.replace('_', ' ')} {value:.4g}" for key, value in found.items() if value is not None]
        print(f"{name}: {', '.join(shown)}")
    for line in (*result["failures"], result["note"]):
        if line:
            print(line)
    print(f"{result['verdict']}: {result['requests']} requests to both")


def main() -> int:
    """Sends, judges, prints."""
    parser = Parser(__doc__, prog="python -m loadtests.shadow")
    add_model_arguments(parser)
    parser.add_argument("--base-url", required=True, help="host:port of the server that callers have")
    parser.add_argument("--new-url", required=True, help="host:port of the one that is to take its place")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="of both (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=1000, help="to each of both (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=10, help="%% that the median may lose (default: %(default)s)"
    )
    parser.add_argument("--timeout-s", type=float, default=10, help="deadline of a request (default: %(default)s)")
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    args = parser.parse_args()
    if args.requests < LEAST_REQUESTS:
        raise InputError(f"--requests {args.requests}: {LEAST_REQUESTS} or more are needed for an interval")
    if not 0 < args.threshold < math.inf:
        raise InputError(f"--threshold {args.threshold:g}: it must be more than 0")
    spec = DeploymentSpec.of_model(args.model, args.models)
    rows = shuffled(read_inputs(Path(args.inputs or inputs_of(args.model)), spec.axes[BATCH].min), seed=0)
    with ExitStack() as stack:
        clients = {
            side: stack.enter_context(InferenceClient(url, args.protocol, timeout_s=args.timeout_s, retries=0))
            for side, url in (("base", args.base_url), ("new", args.new_url))
        }
        shadow = Shadow(args.model, clients, rows)
        try:
            shadow.run(args.requests)
        except InferenceError as error:
            raise InputError(str(error)) from None
    result = judged(shadow, args.threshold / 100)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result)
    return EXIT_CODES[result["verdict"]]


if __name__ == "__main__":
    run_command(main)

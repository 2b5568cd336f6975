"""Sends the same requests to two servers and compares their answers and latencies.

Contract: BASE serves the current version, NEW its replacement. Each request goes to both, one after the other, and the
order alternates, so that other load on the machine affects both alike. NEW fails if it

- refuses a request,
- returns outputs with other names, types or shapes, or NaN or Inf where BASE returns a number,
- is slower: the whole confidence interval of the ratio of the medians lies above the allowed ratio.

A request that is refused as busy is retried; one that stays refused makes the run inconclusive. Differing numbers and
tail latencies are reported, not judged (`export.checks.parity` judges the numbers).
"""

import argparse
import json
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from deepseek_client import InferenceClient, InferenceError, InvalidInput, ServerBusy

from deepseek.spec import DeploymentSpec, ExitCode, GateFailed, InputError
from loadtests.load.inputs import Row, rows_of, shuffled
from loadtests.load.settings_from_options import inputs_of
from loadtests.slo.paired_intervals import paired_ratio

BLOCKS = 20  # stretches of the run, so that a disturbance of the machine stays within one
LEAST_REQUESTS = 10 * BLOCKS
WARMUP = 20  # requests to both before the count starts
BUSY_TRIES, BUSY_PAUSE_S = 5, 0.1  # attempts of a request that is refused as busy
CONFIDENCE = 0.99
SIDES = ("base", "new")

Verdict = Literal["holds", "fails", "inconclusive"]
EXIT_CODES: dict[Verdict, ExitCode] = {
    "holds": ExitCode.PASS,
    "fails": ExitCode.GATE_FAILED,
    "inconclusive": ExitCode.INVALID,
}


@dataclass(kw_only=True)
class Differences:
    """How one output of NEW differs from BASE's, over all rows."""

    worst_error: float = 0.0
    """Largest absolute difference of a number."""
    equal: int = 0
    """Count of equal numbers."""
    numbers: int = 0

    def add(self, base: np.ndarray, new: np.ndarray) -> None:
        """Adds the output of one row, as an array of the same shape from each side."""
        self.numbers += base.size
        self.equal += int(np.count_nonzero(base == new))
        if base.dtype.kind in "fiu":
            finite = np.isfinite(base) & np.isfinite(new)
            apart = np.abs(base[finite].astype(np.float64) - new[finite].astype(np.float64))
            self.worst_error = max(self.worst_error, float(apart.max(initial=0.0)))

    def figures(self) -> dict[str, float | None]:
        """The worst error and the share of equal numbers, None without numbers."""
        return {"worst_error": self.worst_error, "same": self.equal / self.numbers if self.numbers else None}


class Shadow:
    def __init__(self, model: str, clients: dict[str, InferenceClient], rows: list[Row]) -> None:
        self._model, self._clients, self._rows = model, clients, rows
        self.latencies_ms: dict[str, list[float]] = {side: [] for side in SIDES}
        self.errors: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self.busy: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        """Requests that were refused as busy at every attempt."""
        self.outputs: dict[str, Differences] = {}
        self.broken: Counter[str] = Counter()
        """Answers of NEW that callers of BASE cannot use."""

    def run(self, count: int) -> None:
        """Sends `count` requests to both, after WARMUP uncounted ones."""
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
            raise GateFailed(f"{side} rejects inputs that the other accepts: {error}") from None

    def _send(self, side: str, request: Any, *, counted: bool) -> dict[str, np.ndarray] | None:
        tries = BUSY_TRIES
        while True:
            started_s = time.perf_counter()
            try:
                answer = self._clients[side].send(request)
                break
            except ServerBusy as error:
                tries -= 1
                if not tries or self.busy[side]:  # one request that stays refused already makes the run inconclusive
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
            self.broken[f"returns the outputs {', '.join(sorted(new))}, base returns {', '.join(sorted(base))}"] += 1
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


def speeds(base_ms: list[float], new_ms: list[float]) -> list[dict[str, float]]:
    """Percentiles of both sides, and their `ratio`, new / base, with its confidence interval from `low` to `high`:
    Student's t over stretches of the run."""
    count, found = min(len(base_ms), len(new_ms)), []
    both = np.array([base_ms[:count], new_ms[:count]])
    for percent in (50, 90, 99):
        parts = np.array([_percentile(part, percent) for part in np.array_split(both, BLOCKS, axis=1)])
        ratio = paired_ratio(list(parts[:, 1] / parts[:, 0]), CONFIDENCE)
        base, new = _percentile(both, percent).tolist()
        found.append({"percent": percent, "base_ms": base, "new_ms": new, **asdict(ratio)})
    return found


def _percentile(both_ms: np.ndarray, percent: float) -> np.ndarray:  # (sides, requests) -> (sides,)
    return np.percentile(both_ms, percent, axis=1, method="inverted_cdf")  # nearest rank, as a load test's


def judged(shadow: Shadow, threshold: float) -> dict[str, Any]:
    """The figures and the verdict; `threshold` is the allowed increase of the median, as a share."""
    failures = [f"{what} ({times} times)" for what, times in shadow.broken.items()]
    failures += [f"{times} requests failed on new: {what}" for what, times in shadow.errors["new"].items()]
    found, doubts, allowed = list[dict[str, float]](), list[str](), 1 + threshold  # the last doubt counts most
    if failed := shadow.errors["base"] + shadow.busy["base"]:
        reason, times = next(iter(failed.items()))
        doubts.append(f"{times} requests failed on base, so the two cannot be compared: {reason}")
    least = min(len(each) for each in shadow.latencies_ms.values())
    if least >= LEAST_REQUESTS:
        found = speeds(shadow.latencies_ms["base"], shadow.latencies_ms["new"])
        median = found[0]
        range_ = f"{median['low']:.2f} to {median['high']:.2f} times as long; {allowed:.2f} allowed"
        if median["low"] > allowed:
            failures.append(f"slower: p50 {median['new_ms']:.2f} ms, base {median['base_ms']:.2f} ms, {range_}")
        elif median["high"] > allowed:
            doubts.append(f"p50 is {range_}; send more requests (--requests) or use a quieter machine")
    else:
        doubts.append(f"both answered only {least} requests, {LEAST_REQUESTS} needed")
    if busy := shadow.busy["new"]:
        reason, times = next(iter(busy.items()))
        doubts.append(f"new refused {times} requests, although sent one at a time: {reason}; try a quieter machine")
    verdict: Verdict = "fails" if failures else "inconclusive" if doubts else "holds"
    return {
        "verdict": verdict,
        "requests": least,
        "failures": failures,
        "note": doubts[-1] if verdict == "inconclusive" else "",
        "outputs": {name: each.figures() for name, each in shadow.outputs.items()},
        "latency": found,
        "allowed": allowed,
        "errors": {side: dict(shadow.errors[side] + shadow.busy[side]) for side in SIDES},
    }


def main(args: argparse.Namespace) -> int:
    """Sends the requests, judges the answers, prints the result as JSON; returns the exit code."""
    spec = DeploymentSpec.of_model(args.model, args.models)
    rows = shuffled(list(rows_of(Path(args.inputs or inputs_of(args.model)), spec).values()), seed=0)
    try:
        with ExitStack() as stack:
            clients = {
                side: stack.enter_context(
                    InferenceClient(url, args.protocol, timeout_s=args.timeout_s, retries=0, max_response_bytes=None)
                )
                for side, url in (("base", args.base_url), ("new", args.new_url))
            }
            shadow = Shadow(args.model, clients, rows)
            shadow.run(args.requests)
    except InferenceError as error:
        raise InputError(str(error)) from None
    result = judged(shadow, args.threshold / 100)
    print(json.dumps(result, indent=2))
    return EXIT_CODES[result["verdict"]]

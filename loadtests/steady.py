"""A steady load on a server while something is done to it: was a request lost, and how far did the latency rise?

Contract: sends real inputs at a constant rate, each at its planned time whatever the server does, without a retry, from
before the change until some seconds after the server gives the version that is waited for. What drives it reads its
standard output and writes to its standard input:

    <- {"steady": true, "version": 4}        the load runs; 4 is what the server gives now
    -> a line                                the change begins
    <- {"version": 5, "requests": ...}       the end: all figures; "version" is what the server gives then

Where standard input ends before the change, so does the load, and nothing is told. Latency counts from the planned
time. "failed" and "errors" are those of requests that were not yet answered at the change, or were sent after it;
"failed_before" is the others', "since_seen" has those of what was to be sent once the version was seen.

Exit codes: 0 measured, whatever was found; 2 wrong input or no server; 3 the load could not be sent on time, or
requests failed before the change (unless they may).

Examples:
    (sleep 9; echo; mv new model_repository/shop/5) | python -m loadtests.steady --model shop --until 5
    (sleep 9; echo) | python -m loadtests.steady --until 5 --url localhost:8443 --ca-cert build/gateway/ca.crt
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import (
    BATCH,
    DeploymentSpec,
    InputError,
    InvalidMeasurement,
    Parser,
    add_model_arguments,
    run_command,
)
from loadtests.endpoint import inputs_of
from loadtests.inputs import read_inputs, shuffled

DEFAULT_RPS, MOST_RPS = 50.0, 200.0  # what one process with threads sends on time
MOST_IN_FLIGHT = 128
AROUND_S = 1.0  # after the new version was seen, in which the old one still goes
LOOK_S = 0.05  # between two questions for the version
LATEST_MS = 100.0  # p99 of how late requests were sent


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one stretch of the load."""

    requests: int
    failed: int
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None

    @classmethod
    def of(cls, sent: Iterable[Sent]) -> Figures:
        """Of requests planned in the stretch; latencies are those of the answered ones."""
        sent = list(sent)
        answered = np.array([each.latency_ms for each in sent if each.error is None])
        values: list[float | None] = [None, None, None]
        if len(answered):
            values = [round(float(each), 3) for each in np.percentile(answered, (50, 99, 100), method="inverted_cdf")]
        failed = len(sent) - len(answered)
        return cls(requests=len(sent), failed=failed, p50_ms=values[0], p99_ms=values[1], max_ms=values[2])


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One request."""

    planned_s: float
    lag_ms: float
    latency_ms: float
    error: str | None


class Load:
    """Requests at a constant rate, from a thread of its own, until it is stopped."""

    def __init__(self, client: InferenceClient, requests: list[Any], rate_rps: float) -> None:
        self._client, self._requests, self._rate_rps = client, requests, rate_rps
        self._pool = ThreadPoolExecutor(MOST_IN_FLIGHT)
        self._stopping = threading.Event()
        self._began_at = time.perf_counter()
        self.sent: list[Sent] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def now_s(self) -> float:
        """Seconds since it began."""
        return time.perf_counter() - self._began_at

    def _run(self) -> None:
        number = 0
        while not self._stopping.wait(max(0.0, number / self._rate_rps - self.now_s)):
            self._pool.submit(self._send, number / self._rate_rps, self._requests[number % len(self._requests)])
            number += 1

    def _send(self, planned_s: float, request: Any) -> None:
        sent_s, error = self.now_s, None
        try:
            self._client.send(request)
        except Exception as failure:  # whatever it is, the request was not answered
            error = f"{type(failure).__name__}: {failure}"
        lag_ms, latency_ms = (sent_s - planned_s) * 1000, (self.now_s - planned_s) * 1000
        self.sent.append(Sent(planned_s=planned_s, lag_ms=lag_ms, latency_ms=latency_ms, error=error))

    def stop(self) -> None:
        """Lets what is in flight end."""
        self._stopping.set()
        self._thread.join()
        self._pool.shutdown()


def version_of(client: InferenceClient, model: str) -> int | None:
    """The newest version that the server gives; None where it does not tell."""
    with suppress(InferenceError):
        return max(map(int, client.metadata(model).versions), default=None)
    return None


def wait_for(client: InferenceClient, load: Load, model: str, until: int, timeout_s: float) -> float | None:
    """When the server gave the version, in seconds of the load; None where it did not in time."""
    ends_s = load.now_s + timeout_s
    while load.now_s < ends_s:
        if version_of(client, model) == until:
            return load.now_s
        time.sleep(LOOK_S)
    return None


def _failures(sent: list[Sent]) -> dict[str, Any]:
    errors = Counter(each.error for each in sent if each.error is not None)
    return {"failed": errors.total(), "errors": dict(errors.most_common(10))}


def result_of(sent: list[Sent], changed_s: float, seen_s: float | None) -> dict[str, Any]:
    """The load before, around and after the change."""
    end_s = (seen_s or float("inf")) + AROUND_S
    stretches = {
        "before": (each for each in sent if each.planned_s < changed_s),
        "around": (each for each in sent if changed_s <= each.planned_s < end_s),
        "after": (each for each in sent if each.planned_s >= end_s),
    }
    ended = [each.planned_s + each.latency_ms / 1000 < changed_s for each in sent]
    before = [each for each, early in zip(sent, ended, strict=True) if early]
    since = [each for each, early in zip(sent, ended, strict=True) if not early]
    return {
        "requests": len(sent),
        **_failures(since),
        "failed_before": _failures(before)["failed"],
        "since_seen": _failures([each for each in sent if seen_s is not None and each.planned_s >= seen_s]),
        "switched_s": None if seen_s is None else round(seen_s - changed_s, 3),
        **{name: asdict(Figures.of(part)) for name, part in stretches.items()},
    }


def check_before(sent: list[Sent], *, may_fail: bool) -> None:
    """Raises InvalidMeasurement before the change: what cannot be watched is not begun."""
    if not sent:
        raise InvalidMeasurement("no request was answered before the change: a longer --before-s, or a higher --rate")
    if (lag_ms := float(np.percentile([each.lag_ms for each in sent], 99))) > LATEST_MS:
        raise InvalidMeasurement(
            f"requests left late (p99 {lag_ms:.0f} ms, {LATEST_MS:g} ms allowed): lower --rate, or a quieter machine"
        )
    errors = Counter(each.error for each in sent if each.error is not None)
    if errors and not may_fail:
        error, times = errors.most_common(1)[0]
        raise InvalidMeasurement(
            f"{errors.total()} of {len(sent)} requests failed before the change ({times} times: {error}), so that a "
            "failure after it would tell nothing: see to what is served now, or go back first (make rollback)"
        )


def drive(client: InferenceClient, load: Load, model: str, until: int, args: Any) -> dict[str, Any] | None:
    """The whole course; None where standard input ended before the change."""
    try:
        time.sleep(args.before_s)
        check_before(list(load.sent), may_fail=args.may_fail)
        print(json.dumps({"steady": True, "version": version_of(client, model)}), flush=True)
        if not sys.stdin.readline():
            return None
        changed_s = load.now_s
        seen_s = wait_for(client, load, model, until, args.max_s)
        time.sleep(args.after_s if seen_s is not None else 0)
    finally:
        load.stop()
    sent = sorted(load.sent, key=lambda each: each.planned_s)
    return {"version": version_of(client, model), **result_of(sent, changed_s, seen_s)}


def rate_of(asked: float | None, spec: DeploymentSpec) -> float:
    """What was asked for, or the SLO's rate, as far as this sends it on time."""
    rate = min(spec.slo.rate_rps or DEFAULT_RPS, MOST_RPS) if asked is None else asked
    if not 0 < rate <= MOST_RPS:
        raise InputError(f"--rate {rate:g}: more than 0 and at most {MOST_RPS:g} requests/s")
    return rate


def main() -> None:
    """Sends until it is told that all is done."""
    parser = Parser(__doc__, prog="python -m loadtests.steady")
    add_model_arguments(parser)
    parser.add_argument("--url", default="127.0.0.1:8001", help="host:port (default: %(default)s)")
    parser.add_argument("--protocol", choices=("grpc", "http"), default="grpc", help="(default: %(default)s)")
    parser.add_argument("--tls", action="store_true", help="speak TLS, trusting the system's authorities")
    parser.add_argument("--ca-cert", metavar="FILE", help="speak TLS, trusting this; $DEEPSEEK_API_KEY is sent")
    parser.add_argument("--until", type=int, required=True, help="version that is waited for")
    parser.add_argument("--rate", type=float, help=f"requests/s (default: the SLO's, {MOST_RPS:g} at most)")
    parser.add_argument("--before-s", type=float, default=3, help="load before the change (default: %(default)s)")
    parser.add_argument("--after-s", type=float, default=3, help="load after it (default: %(default)s)")
    parser.add_argument("--max-s", type=float, default=60, help="longest wait for the version (default: %(default)s)")
    parser.add_argument("--timeout-s", type=float, default=10, help="deadline of a request (default: %(default)s)")
    parser.add_argument("--may-fail", action="store_true", help="begin although requests failed before the change")
    parser.add_argument("--inputs", help="file of real inputs (default: build/<model>/evaluation.npz)")
    parser.add_argument("--json", action="store_true", help="accepted for uniformity: the output is JSON")
    args = parser.parse_args()
    spec = DeploymentSpec.of_model(args.model, args.models)
    rate = rate_of(args.rate, spec)
    rows = shuffled(read_inputs(Path(args.inputs or inputs_of(args.model)), spec.axes[BATCH].min), seed=0)
    access: dict[str, Any] = {}
    if args.tls or args.ca_cert:
        access = {"tls": True, "ca_cert": args.ca_cert, "api_key": os.environ.get("DEEPSEEK_API_KEY") or None}
    with InferenceClient(args.url, args.protocol, timeout_s=args.timeout_s, retries=0, **access) as client:
        try:
            requests = [client.prepare(args.model, row) for row in rows]
            client.send(requests[0])
        except InferenceError as error:
            raise InputError(str(error)) from None
        result = drive(client, Load(client, requests, rate), args.model, args.until, args)
    if result is not None:
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    run_command(main)

"""Loads a server while it changes versions: counts lost requests and measures the latency.

Contract: sends real inputs at a constant rate, open loop and without retries, from before the change until some seconds
after the server reports the expected version. The calling command talks to it over standard output and input:

    <- {"steady": true, "version": 4}        the load runs; the server has version 4
    -> a line                                the change begins
    <- {"version": 5, "requests": ...}       the end: all figures, and the server's version

If standard input ends before the change, the load ends without a result. Latency counts from the planned time. "failed"
and "errors" count requests that were in flight at the change or were sent after it, "failed_before" the earlier ones,
"since_seen" those that were planned after the server first reported the version.
"""

import argparse
import json
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec, InvalidMeasurement
from loadtests.load.background_load import BackgroundLoad, Stream
from loadtests.load.preflight import check
from loadtests.load.request_log import RequestLog
from loadtests.load.settings_from_options import inputs_of
from loadtests.results.settings import LoadSettings

DEFAULT_RPS, MOST_RPS = 50.0, 200.0
LONGEST_S = 3600.0  # the load ends after this time even without a stop
AROUND_S = 1.0  # after the new version was seen: the old one may still answer
LOOK_S = 0.05  # between two queries of the version
LATEST_MS = 100.0  # largest p99 of the sending delay


def figures(log: RequestLog) -> dict[str, float | None]:
    """Figures of one stretch of the load, None where it has no requests: latencies of the answered ones, and how late
    this machine sent (`send_lag_ms`, p99), which is part of those latencies."""
    answered = log.answered
    latencies = {
        name: round(answered.latency_ms(percent), 3) if len(answered) else None
        for name, percent in (("p50_ms", 50), ("p99_ms", 99), ("max_ms", 100))
    }
    lag_ms = round(log.lag_ms(99), 3) if len(log) else None
    return {"requests": len(log), "failed": len(log) - len(answered), **latencies, "send_lag_ms": lag_ms}


def version_of(client: InferenceClient, model: str) -> int | None:
    """The newest version that the server reports; None if it does not answer."""
    with suppress(InferenceError):
        return max(map(int, client.metadata(model).versions), default=None)
    return None


def wait_for(client: InferenceClient, load: BackgroundLoad, model: str, until: int, timeout_s: float) -> float | None:
    """When the server first reported the version, in seconds of the load; None after `timeout_s`."""
    ends_s = load.now_s + timeout_s
    while load.now_s < ends_s:
        if version_of(client, model) == until:
            return load.now_s
        time.sleep(LOOK_S)
    return None


def _failures(log: RequestLog) -> dict[str, Any]:
    errors = Counter(each.error for each in log.failed.requests)
    return {"failed": errors.total(), "errors": dict(errors.most_common(10))}


def result_of(log: RequestLog, changed_s: float, seen_s: float | None) -> dict[str, Any]:
    """The load before, around and after the change."""
    end_s = (seen_s or float("inf")) + AROUND_S
    before = RequestLog([each for each in log.requests if each.finished_s < changed_s])
    since = RequestLog([each for each in log.requests if each.finished_s >= changed_s])
    return {
        "requests": len(log),
        **_failures(since),
        "failed_before": len(before.failed),
        "since_seen": _failures(log.between(float("inf") if seen_s is None else seen_s)),
        "switched_s": None if seen_s is None else round(seen_s - changed_s, 3),
        "before": figures(log.between(0, changed_s)),
        "around": figures(log.between(changed_s, end_s)),
        "after": figures(log.between(end_s)),
    }


def check_before(log: RequestLog, *, may_fail: bool) -> None:
    """Raises InvalidMeasurement if the load is not steady, so that the change does not begin unobserved.

    With `may_fail` (a rollback, which must not wait) it only has to run.
    """
    if not len(log):
        raise InvalidMeasurement("no request was answered before the change: raise --before-s or --rate")
    if may_fail:
        return
    if (lag_ms := log.lag_ms(99)) > LATEST_MS:
        raise InvalidMeasurement(
            f"requests were sent late: p99 {lag_ms:.0f} ms, allowed {LATEST_MS:g} ms; lower --rate or use a less busy "
            "machine"
        )
    failures = _failures(log)
    if failures["failed"]:
        error, times = next(iter(failures["errors"].items()))
        raise InvalidMeasurement(
            f"{failures['failed']} of {len(log)} requests failed before the change ({times} times: {error}), so "
            "failures after it would prove nothing; fix the served version or roll back first (make rollback)"
        )


def drive(client: InferenceClient, settings: LoadSettings, until: int, args: Any) -> dict[str, Any] | None:
    """Runs the load over the change; returns the figures, None if standard input ended before the change."""
    model = settings.model
    with BackgroundLoad([Stream(name=model, settings=settings)]) as load:
        time.sleep(args.before_s)
        check_before(load.so_far()[model], may_fail=args.may_fail)
        print(json.dumps({"steady": True, "version": version_of(client, model)}), flush=True)
        if not sys.stdin.readline():
            return None
        changed_s = load.now_s
        seen_s = wait_for(client, load, model, until, args.max_s)
        time.sleep(args.after_s if seen_s is not None else 0)
        log = load.stop()[model]
    return {"version": version_of(client, model), **result_of(log, changed_s, seen_s)}


def rate_of(asked: float | None, spec: DeploymentSpec) -> float:
    """`asked`, or the SLO's rate, at most MOST_RPS."""
    return asked or min(spec.slo.rate_rps or DEFAULT_RPS, MOST_RPS)


def main(args: argparse.Namespace) -> None:
    """Runs the load that the options describe and prints the protocol's JSON lines."""
    spec = DeploymentSpec.of_model(args.model, args.models).for_target(args.target)
    settings = LoadSettings(
        model=args.model,
        models=str(args.models),
        target=args.target,
        protocol=args.protocol,
        url=args.url,
        tls=args.tls,
        ca_cert=args.ca_cert,
        inputs=args.inputs or inputs_of(args.model),
        rate_rps=rate_of(args.rate, spec),
        arrivals="constant",
        warmup_s=0.0,
        duration_s=LONGEST_S,
        timeout_s=args.timeout_s,
    )
    check(settings, spec)
    with InferenceClient(args.url, args.protocol, timeout_s=args.timeout_s, retries=0, **settings.access) as client:
        result = drive(client, settings, args.until, args)
    if result is not None:
        print(json.dumps(result), flush=True)

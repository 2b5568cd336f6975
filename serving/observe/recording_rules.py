"""Recording rules for Prometheus: what budgets, dashboard and autoscaling read, named level:metric:operation.

Contract: latencies come from the gateway's histogram, which has the SLO's own limits among its bounds. Failures,
queues, batches and versions come from Triton's counters; `serving/backend/onnxruntime_backend.py` adds one. The alerts
in `serving.observe.alerts` build on these rules.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from deepseek.spec.metric_windows import BUDGETS, OPENAI_BOUNDS_S, QUEUES
from serving.repository.served_models import ServedModel, bound_s, has_openai_routes

DURATION = "gateway_request_duration_seconds"
# The gateway's HTTP and gRPC statuses: answers, and requests that no server took or that a server failed. Mistakes of
# callers are in neither.
ANSWERED, FAILED = "200|0", "500|502|503|13|14"
# Triton's failures, and ONNX Runtime's, which Triton's Python backend counts as successes.
FAILURES = ("nv_inference_request_failure", "onnxruntime_inference_request_failure")
REQUESTS = '__name__=~"nv_inference_request_(success|failure)"'
NOT_GIVEN_UP = 'reason!="CANCELED"'  # by the caller
SLOW = "instance_model:requests_slow:total"  # with the bound as `le`
READY = "nv_inference_pending_request_count"  # exists for loaded versions only
OPENAI_DURATION = "openai_request_duration_seconds"
OPENAI_REQUESTS = "openai_requests_total"
# What the OpenAI routes answered, and left unanswered for lack of room or by a failure.
OPENAI_UNSERVED = "429|5.."

Rule = dict[str, Any]


@dataclass(frozen=True)
class Scope:
    """Which series count: all in Prometheus, or those of one namespace of a shared cluster."""

    namespace: str = ""

    @property
    def labels(self) -> dict[str, str]:
        return {"namespace": self.namespace} if self.namespace else {}

    def __call__(self, *matchers: str, **labels: str) -> str:
        """`{name="value"}` or ""; PromQL reads JSON's strings. `matchers`, which are not equalities, go first."""
        equal = (f"{name}={json.dumps(value)}" for name, value in {**labels, **self.labels}.items())
        inside = ",".join([*matchers, *equal])
        return f"{{{inside}}}" if inside else ""


EVERYWHERE = Scope()


def recording_groups(models: list[ServedModel], scope: Scope = EVERYWHERE) -> list[dict[str, Any]]:
    groups = {
        "slo": [*_slow_counts(models, scope), *_shares(models, scope), *_budgets(models)],
        "models": [*_queues_and_batches(models, scope)],
        "openai": [*_openai(models, scope)] if has_openai_routes(models) else [],
    }
    for rule in (rule for rules in groups.values() for rule in rules if scope.labels):
        rule["labels"] = rule.get("labels", {}) | scope.labels
    return [{"name": f"deepseek-{name}", "rules": rules} for name, rules in groups.items() if rules]


def allowed_slow(percent: float) -> float:
    """The share of the requests that may be slower than a percentile's limit."""
    return 1 - percent / 100


def number(value: float) -> str:
    """A number as PromQL reads it."""
    return f"{value:.6g}"


def _record(name: str, expr: str, **labels: str) -> Rule:
    return {"record": name, "expr": expr, **({"labels": labels} if labels else {})}


def failures(chosen: str, window: str) -> str:
    """Rates of failures by reason. `or`: a backend that a model was published with earlier may count one of Triton's
    reasons, and two series with the same labels would end every query that reads both names at once."""
    return " or ".join(f"rate({name}{chosen}[{window}])" for name in FAILURES)


def _slow_counts(models: list[ServedModel], scope: Scope) -> Iterator[Rule]:
    """Counters of requests slower than each limit, for all models.

    After a change of the SLO, the bucket of the new limit is younger than the count of all requests. A difference of
    their rates would count all earlier requests as slow; the difference of the counters is as young as the bucket.
    """
    limits_ms = {limit_ms for model in models for limit_ms in model.latency_limits_ms.values()}
    for bound in sorted({bound_s(limit_ms) for limit_ms in {*limits_ms, _longest_ms(models)}}, key=float):
        late = f"{DURATION}_count{scope()} - ignoring (le) {DURATION}_bucket{scope(le=bound)}"
        yield _record(SLOW, late, le=bound)


def _longest_ms(models: list[ServedModel]) -> float:
    return max((max(model.latency_limits_ms.values(), default=model.p99_ms) for model in models), default=0)


def _shares(models: list[ServedModel], scope: Scope) -> Iterator[Rule]:
    """For each window, the shares that the budgets limit, and their total rates."""
    of_a_model = scope('model!=""')
    for window in BUDGETS:
        requests = f"sum by (model) (rate({DURATION}_count{of_a_model}[{window}]))"
        yield _record(f"model:requests:rate{window}", requests)
        failed = f"sum by (model) ({failures(scope(NOT_GIVEN_UP), window)})"
        everything = f"sum by (model) (rate({scope(REQUESTS, NOT_GIVEN_UP)}[{window}]))"
        yield _record(f"model:triton_requests:rate{window}", everything)
        yield _record(f"model:triton_requests_failed:ratio_rate{window}", f"{failed} / {everything}")
        answered, unserved = _endpoint(models, window, scope)
        yield _record(f"endpoint:requests:rate{window}", f"{answered} + {unserved}")
        share = f"({unserved}) / ({answered} + {unserved})"
        yield _record(f"endpoint:requests_unserved:ratio_rate{window}", share)
        for model in models:
            for percent, limit_ms in model.latency_limits_ms.items():
                yield _slow(model.name, percent, limit_ms, window, scope)


def _endpoint(models: list[ServedModel], window: str, scope: Scope) -> tuple[str, str]:
    """Rates of answered requests, and of requests that failed, were refused or timed out.

    Timed out: no answer for longer than any SLO's limit, whether the gateway or the caller gave up. Otherwise an
    endpoint so slow that all callers give up would look healthy.
    """

    def rate(series: str) -> str:
        return f"(sum(rate({series}[{window}])) or vector(0))"

    answered, failed = (
        rate("gateway_requests_total" + scope(f'status=~"{statuses}"', api="infer")) for statuses in (ANSWERED, FAILED)
    )
    return answered, f"{failed} + {rate(SLOW + scope(model='', le=bound_s(_longest_ms(models))))}"


def _slow(model: str, percent: float, limit_ms: float, window: str, scope: Scope) -> Rule:
    """The share of a model's requests that took longer than a limit."""
    slow = f"sum(rate({SLOW}{scope(model=model, le=bound_s(limit_ms))}[{window}]))"
    share = f"{slow} / sum(rate({DURATION}_count{scope(model=model)}[{window}]))"
    return _record(f"model:requests_slow:ratio_rate{window}", share, model=model, objective=f"p{percent:g}")


def _budgets(models: list[ServedModel]) -> Iterator[Rule]:
    """The allowed shares, for the dashboard."""
    for model in models:
        for percent in model.latency_limits_ms:
            allowed = f"vector({number(allowed_slow(percent))})"
            yield _record("model:requests_slow:budget", allowed, model=model.name, objective=f"p{percent:g}")
        if model.max_error_rate is not None:
            allowed = f"vector({number(model.max_error_rate)})"
            yield _record("model:triton_requests_failed:budget", allowed, model=model.name)


def _queues_and_batches(models: list[ServedModel], scope: Scope) -> Iterator[Rule]:
    def rate(counter: str) -> str:
        return f"sum by (model) (rate(nv_inference_{counter}{scope()}[{QUEUES}]))"

    queue, compute = rate("queue_duration_us"), rate("compute_infer_duration_us")
    yield _record(f"model:batch_size:mean_rate{QUEUES}", f"{rate('count')} / {rate('exec_count')}")
    yield _record(f"model:queue_to_compute:ratio_rate{QUEUES}", f"{queue} / {compute}")
    yield _record(f"model:queue_seconds:mean_rate{QUEUES}", f"{queue} / {rate('request_success')} / 1e6")
    for model in models:
        if model.queue_size:
            fill = f"sum by (instance) ({READY}{scope(model=model.name)}) / {model.queue_size}"
            yield _record("instance_model:queue_fill:ratio", fill, model=model.name)


def openai_bound_s(limit_ms: float) -> float | None:
    """The first bound of the OpenAI routes' histogram from a limit on: requests above it are certainly too slow."""
    return next((bound for bound in OPENAI_BOUNDS_S if bound * 1000 >= limit_ms), None)


def _openai(models: list[ServedModel], scope: Scope) -> Iterator[Rule]:
    """The OpenAI routes: unserved requests, and for each model the slow ones among the lists of one batch."""
    one_batch = 'split="no"'
    for window in BUDGETS:
        unserved, total = (
            f"(sum(rate({OPENAI_REQUESTS}{scope(f'status=~{json.dumps(statuses)}')}[{window}])) or vector(0))"
            for statuses in (OPENAI_UNSERVED, f"200|{OPENAI_UNSERVED}")
        )
        yield _record(f"openai:requests:rate{window}", total)
        yield _record(f"openai:requests_unserved:ratio_rate{window}", f"{unserved} / {total}")
        requests = f"sum by (model) (rate({OPENAI_DURATION}_count{scope(one_batch)}[{window}]))"
        yield _record(f"model:openai_requests:rate{window}", requests)
        for model in models:
            for percent, limit_ms in model.latency_limits_ms.items() if model.text_bytes else ():
                if (bound := openai_bound_s(limit_ms)) is None:
                    continue
                of = {"model": model.name, "split": "no"}
                fast = f"sum(rate({OPENAI_DURATION}_bucket{scope(**of, le=str(bound))}[{window}]))"
                share = f"1 - {fast} / sum(rate({OPENAI_DURATION}_count{scope(**of)}[{window}]))"
                name = f"model:openai_requests_slow:ratio_rate{window}"
                yield _record(name, share, model=model.name, objective=f"p{percent:g}")

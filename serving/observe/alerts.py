"""Alerts for Prometheus from each model's SLO and the repository, with the recording rules that they need.

Contract: `rules` makes the content of a rule file. `deepseek stack` writes it into `build/observe/rules/`, which
compose mounts; `serving.kubernetes.overlay` wraps it as a PrometheusRule. Budgets are watched over several windows
(Google's SRE workbook, "Alerting on SLOs"). Each alert has a section in docs/runbook.md. Prometheus must scrape the
jobs `triton`, `gateway` and `openai` at least twice a minute. A `Scope` limits all rules to one namespace, since a
cluster's Prometheus may scrape other Tritons too.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from deepseek.spec.metric_windows import QUEUES, WINDOWS_S
from serving.observe.recording_rules import (
    EVERYWHERE,
    READY,
    Rule,
    Scope,
    allowed_slow,
    number,
    openai_bound_s,
    recording_groups,
)
from serving.repository.served_models import ServedModel, has_openai_routes, served_models

RUNBOOK = "docs/runbook.md"
PERIOD_DAYS = 30  # that an error budget is meant for
LEAST_BAD = 10  # requests in the long window: of a few, a single slow one would be a large share
ROLLOUT_MIN = 10  # that one instance may serve another version than the repository has
START_MIN = 10  # that an instance may take, its image's pull included: progressDeadlineSeconds of kubernetes/base
FULL = 0.8  # of the queue's places
CERTIFICATE = "gateway_certificate_expiry_timestamp_seconds"

Severity = Literal["page", "ticket"]
CERTIFICATE_DAYS: tuple[tuple[int, Severity], ...] = ((3, "page"), (21, "ticket"))


@dataclass(frozen=True, kw_only=True)
class Burn:
    """A burn rate over two windows: the short one ends the alert soon after the problem."""

    factor: float
    """Multiple of the rate at which the budget lasts exactly the whole period."""
    long: str
    short: str
    severity: Severity


# By the time they fire, 2 %, 5 %, 10 % and 10 % of a 30-day budget are used up.
BURNS = (
    Burn(factor=14.4, long="1h", short="5m", severity="page"),
    Burn(factor=6, long="6h", short="30m", severity="page"),
    Burn(factor=3, long="1d", short="2h", severity="ticket"),
    Burn(factor=1, long="3d", short="6h", severity="ticket"),
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share of the requests that may be bad, and the recorded series that hold it."""

    alert: str
    share: str
    """Recorded name of the share, without its operation."""
    total: str
    """Recorded name of the request rate that it is a share of."""
    allowed: float
    summary: str
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the share; the rate has only the model."""


def rules(
    models: list[ServedModel], runbook: str = RUNBOOK, scope: Scope = EVERYWHERE, rollout_min: int = ROLLOUT_MIN
) -> dict[str, Any]:
    """A rule file: recording rules, then alerts. `rollout_min`: minutes that a rollout of all instances may take."""
    alerts = [*_stack_alerts(models, scope)]
    alerts += [rule for budget in _budgets(models) for rule in _burns(budget, scope)]
    for model in models:
        alerts += [_queue_alert(model, scope), _ready_alert(model, scope)]
        alerts += [_version_alert(model, scope, rollout_min)] if model.versions else []
    for alert in alerts:
        alert["labels"] |= scope.labels
        alert["annotations"]["runbook_url"] = f"{runbook}#{alert['alert'].lower()}"
    return {"groups": [*recording_groups(models, scope), {"name": "deepseek-alerts", "rules": alerts}]}


def as_yaml(content: dict[str, Any]) -> str:
    """The YAML text, in the order of the rules."""
    return yaml.safe_dump(content, sort_keys=False, width=118, allow_unicode=True)


def _alert(
    name: str, expr: str, severity: Severity, summary: str, description: str, wait: str = "", **labels: str
) -> Rule:
    pending = {"for": wait} if wait else {}
    return {
        "alert": name,
        "expr": expr,
        **pending,
        "labels": {"severity": severity, **labels},
        "annotations": {"summary": summary, "description": description},
    }


# ---- budgets -----------------------------------------------------------------------------------------


def _budgets(models: list[ServedModel]) -> Iterator[Budget]:
    take_texts = [model for model in models if model.text_bytes] if has_openai_routes(models) else []
    # Over all models the strictest counts: a gRPC call without an answer has no known model.
    if (allowed := _strictest(models)) is not None:
        yield Budget(
            alert="EndpointBudgetBurn",
            share="endpoint:requests_unserved",
            total="endpoint:requests",
            allowed=allowed,
            summary="The endpoint leaves too many requests unanswered: no server, full queue, failure or time-out",
        )
    if (allowed := _strictest(take_texts)) is not None:
        yield Budget(
            alert="OpenAIBudgetBurn",
            share="openai:requests_unserved",
            total="openai:requests",
            allowed=allowed,
            summary="The OpenAI routes refuse or fail too many requests: status 429 or 5xx",
        )
    for model in models:
        for percent, limit_ms in model.latency_limits_ms.items():
            objective = f"p{percent:g}"
            yield Budget(
                alert="LatencyBudgetBurn",
                share="model:requests_slow",
                total="model:requests",
                allowed=allowed_slow(percent),
                summary=f"{model.name}: too many requests take longer than {limit_ms:g} ms ({objective})",
                labels={"model": model.name, "objective": objective},
            )
            bound = openai_bound_s(limit_ms) if model in take_texts else None
            if bound is not None:  # a list that needs several batches has no latency limit
                yield Budget(
                    alert="OpenAILatencyBudgetBurn",
                    share="model:openai_requests_slow",
                    total="model:openai_requests",
                    allowed=allowed_slow(percent),
                    summary=f"{model.name}: too many requests of the OpenAI routes take longer than {bound:g} s; "
                    f"the SLO's {objective} is {limit_ms:g} ms",
                    labels={"model": model.name, "objective": objective},
                )
        if model.max_error_rate is not None:
            yield Budget(
                alert="ErrorBudgetBurn",
                share="model:triton_requests_failed",
                total="model:triton_requests",
                allowed=model.max_error_rate,
                summary=f"{model.name}: Triton or the model fails too many requests",
                labels={"model": model.name},
            )


def _strictest(models: list[ServedModel]) -> float | None:
    """The smallest `max_error_rate`; None if no model has one."""
    return min((model.max_error_rate for model in models if model.max_error_rate is not None), default=None)


def _burns(budget: Budget, scope: Scope) -> Iterator[Rule]:
    """One alert per pair of windows whose limit a share can exceed."""
    model = {name: value for name, value in budget.labels.items() if name == "model"}
    chosen, on = scope(**budget.labels), f"on ({', '.join(model)})"
    for burn in BURNS:
        limit = burn.factor * budget.allowed
        if limit >= 1:  # no share is that large; the longer windows watch slower burns
            continue
        share, recent = (f"{budget.share}:ratio_rate{window}{chosen}" for window in (burn.long, burn.short))
        total = f"{budget.total}:rate{burn.long}{scope(**model)}"
        enough = f"{share} * {on} {total} * {WINDOWS_S[burn.long]} >= {LEAST_BAD}"
        yield _alert(
            budget.alert,
            f"{share} > {number(limit)} and {recent} > {number(limit)} and {on} {enough}",
            burn.severity,
            budget.summary,
            f"{{{{ $value | humanizePercentage }}}} in the last {burn.long}, and over {number(100 * limit)} % in the "
            f"last {burn.short}; {number(100 * budget.allowed)} % are allowed. At this rate a {PERIOD_DAYS}-day budget "
            f"lasts {_lasts(PERIOD_DAYS / burn.factor)} or less.",
            window=burn.long,
            **budget.labels,
        )


def _lasts(days: float) -> str:
    return f"{days:g} days" if days >= 3 else f"{days * 24:g} hours"


# ---- states ------------------------------------------------------------------------------------------


def _stack_alerts(models: list[ServedModel], scope: Scope) -> Iterator[Rule]:
    """Alerts about Triton, the gateway and the OpenAI routes, for all models."""
    jobs = [
        ("TritonDown", "triton", "Callers get 503 / UNAVAILABLE."),
        ("GatewayDown", "gateway", "Callers reach no model."),
    ]
    if has_openai_routes(models):
        jobs.append(("OpenAIDown", "openai", "Callers of the OpenAI routes get 503."))
    for name, job, effect in jobs:
        none, one = f"Prometheus reaches no {job}", f"Prometheus does not reach {job} {{{{ $labels.instance }}}}"
        up = f"up{scope(job=job)}"
        yield _alert(name, f"absent({up} == 1)", "page", none, effect, "1m")
        alone = f"For longer than a start takes. If it is the only {job}: {effect[0].lower()}{effect[1:]}"
        yield _alert(name, f"{up} == 0", "ticket", one, alone, f"{START_MIN}m")
    yield _alert(
        "GatewayReloadFails",
        f"gateway_reload_pending{scope()} == 1",
        "ticket",
        "The gateway cannot load a changed file",
        "It serves with the old files. Do not restart it: it would not start.",
        "5m",
    )
    left = f"({CERTIFICATE}{scope()} - time())"
    for days, severity in CERTIFICATE_DAYS:
        # unless, not <: an unreadable certificate has the end NaN, and NaN < x is false
        yield _alert(
            "CertificateExpires",
            f"{left} unless {left} >= {days * 86_400}",
            severity,
            f"The gateway's certificate expires in less than {days} days",
            "In {{ $value | humanizeDuration }}. After that, callers refuse to connect.",
            "5m",
        )


def _queue_alert(model: ServedModel, scope: Scope) -> Rule:
    """The queue is nearly full, or requests wait for half of the queue time-out."""
    chosen = scope(model=model.name)
    wait_s = (model.queue_timeout_ms / 2 or model.p99_ms) / 1000
    expr = f"model:queue_seconds:mean_rate{QUEUES}{chosen} > {number(wait_s)}"
    described = f"Requests wait longer than {wait_s * 1000:g} ms on average"
    if model.queue_size:
        expr = f"instance_model:queue_fill:ratio{chosen} > {FULL} or {expr}"
        described += f", or the queue has over {100 * FULL:g} % of its {model.queue_size} requests"
    summary = f"{model.name}: the queue is nearly full, or requests wait too long"
    return _alert("QueueSaturated", expr, "page", summary, f"{described}.", "1m", model=model.name)


def _ready_alert(model: ServedModel, scope: Scope) -> Rule:
    """Triton has counters only for loaded models."""
    return _alert(
        "ModelNotReady",
        f"sum by (instance) (up{scope(job='triton')} == 1) unless on (instance) {READY}{scope(model=model.name)}",
        "page",
        f"{model.name}: {{{{ $labels.instance }}}} has not loaded it",
        "Triton runs, but the model failed to load or was unloaded.",
        "5m",
        model=model.name,
    )


def _version_alert(model: ServedModel, scope: Scope, rollout_min: int) -> Rule:
    """Per instance: a version that is served and should not be, else one that is missing."""
    no_such = f'version!~"{"|".join(map(str, model.versions))}"'
    extra = f"count by (instance, version) ({READY}{scope(no_such, model=model.name)})"
    here = f"count by (instance) ({READY}{scope(model=model.name)})"
    missing = [
        f"({here} unless on (instance) {READY}{scope(model=model.name, version=str(version))})"
        for version in model.versions
    ]
    names = ", ".join(map(str, model.versions))
    return _alert(
        "VersionMismatch",
        " or on (instance) ".join([extra, *missing]),
        "ticket",
        f"{model.name}: {{{{ $labels.instance }}}} does not serve exactly version {names}",
        "{{ with $labels.version }}It serves {{ . }}. {{ end }}"
        f"The repository had version {names} when these rules were written.",
        f"{rollout_min}m",
        model=model.name,
    )


def main(options: argparse.Namespace) -> None:
    content = rules(served_models(options.repository, options.models), options.runbook, Scope(options.namespace))
    print(json.dumps(content, indent=2) if options.json else as_yaml(content).rstrip())

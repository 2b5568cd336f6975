"""Alerts for Prometheus, out of each model's SLO and what the repository holds; with the recording rules they need.

Contract: `rules` makes the content of a rule file. `serving.stack` writes it into `build/observe/rules/`: compose
mounts that folder, and `serving.kubernetes` wraps the file as a PrometheusRule. Budgets are watched over several
windows (Google's SRE workbook, "Alerting on SLOs"). Each alert has its section in docs/runbook.md. The programs are
expected to be scraped under the jobs `triton` and `gateway`, twice a minute or more often. With a `Scope` they look at
one namespace of a cluster alone, whose Prometheus may know other Tritons.

Examples:
    python -m serving.alerts                                    # rules of model_repository/, for rule_files
    python -m serving.alerts --repository /models --runbook https://wiki.example.com/runbook --json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from deepseek.spec import Parser, run_command
from serving.recording_rules import EVERYWHERE, READY, WINDOWS_S, Rule, Scope, allowed_slow, number, recording_groups
from serving.served import Served, served_models

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
    """How fast a budget is used up, seen over a long window, and over a short one so that the alert ends soon."""

    factor: float
    """Times the rate at which the budget lasts for the whole period."""
    long: str
    short: str
    severity: Severity


# Of a budget of 30 days these take 2 %, 5 %, 10 % and 10 % before they fire.
BURNS = (
    Burn(factor=14.4, long="1h", short="5m", severity="page"),
    Burn(factor=6, long="6h", short="30m", severity="page"),
    Burn(factor=3, long="1d", short="2h", severity="ticket"),
    Burn(factor=1, long="3d", short="6h", severity="ticket"),
)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A share of the requests that may be bad, and the recorded series that tell it."""

    alert: str
    share: str
    """Name of the share, without its operation."""
    total: str
    """Name of the rate that it is a share of."""
    allowed: float
    summary: str
    labels: dict[str, str] = field(default_factory=dict)
    """Of the share; of the rate only the model."""


def rules(
    models: list[Served], runbook: str = RUNBOOK, scope: Scope = EVERYWHERE, rollout_min: int = ROLLOUT_MIN
) -> dict[str, Any]:
    """A rule file: recording rules, then the alerts; all instances change their version within `rollout_min`."""
    alerts = [*_stack_alerts(scope), *_endpoint_burns(models, scope)]
    for model in models:
        alerts += [rule for budget in _budgets(model) for rule in _burns(budget, scope)]
        alerts += [_queue_alert(model, scope), _ready_alert(model, scope)]
        alerts += [_version_alert(model, scope, rollout_min)] if model.versions else []
    for alert in alerts:
        alert["labels"] |= scope.labels
        alert["annotations"]["runbook_url"] = f"{runbook}#{alert['alert'].lower()}"
    return {"groups": [*recording_groups(models, scope), {"name": "deepseek-alerts", "rules": alerts}]}


def as_yaml(content: dict[str, Any]) -> str:
    """As a file, in the order in which it was made."""
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


def _budgets(model: Served) -> Iterator[Budget]:
    """Those of a model's SLO."""
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
    if model.max_error_rate is not None:
        yield Budget(
            alert="ErrorBudgetBurn",
            share="model:triton_requests_failed",
            total="model:triton_requests",
            allowed=model.max_error_rate,
            summary=f"{model.name}: too many requests fail in Triton or in the model",
            labels={"model": model.name},
        )


def _endpoint_burns(models: list[Served], scope: Scope) -> Iterator[Rule]:
    """Over gRPC nobody can tell for which model it was that no answer came: the strictest budget holds for all."""
    shares = [model.max_error_rate for model in models if model.max_error_rate is not None]
    if shares:
        budget = Budget(
            alert="EndpointBudgetBurn",
            share="endpoint:requests_unserved",
            total="endpoint:requests",
            allowed=min(shares),
            summary="The endpoint leaves requests unserved: no server, no room, a failure, or no answer in time",
        )
        yield from _burns(budget, scope)


def _burns(budget: Budget, scope: Scope) -> Iterator[Rule]:
    """An alert for each pair of windows in which the share can exceed what it may be there."""
    model = {name: value for name, value in budget.labels.items() if name == "model"}
    chosen, on = scope(**budget.labels), f"on ({', '.join(model)})"
    for burn in BURNS:
        limit = burn.factor * budget.allowed
        if limit >= 1:  # no share is that large: what burns slower is left to the longer windows
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
            f"last {burn.short}, too; {number(100 * budget.allowed)} % are allowed. Like this a budget of "
            f"{PERIOD_DAYS} days is gone after {_lasts(PERIOD_DAYS / burn.factor)} or sooner.",
            window=burn.long,
            **budget.labels,
        )


def _lasts(days: float) -> str:
    return f"{days:g} days" if days >= 3 else f"{days * 24:g} hours"


# ---- states ------------------------------------------------------------------------------------------


def _stack_alerts(scope: Scope) -> Iterator[Rule]:
    """What concerns the programs, whichever model they serve."""
    for name, job, effect in (
        ("TritonDown", "triton", "The gateway answers 503 / UNAVAILABLE."),
        ("GatewayDown", "gateway", "Callers reach nothing."),
    ):
        none, one = f"no {job} answers Prometheus", f"{job} ({{{{ $labels.instance }}}}) does not answer Prometheus"
        up = f"up{scope(job=job)}"
        yield _alert(name, f"absent({up} == 1)", "page", none, effect, "1m")
        alone = f"For longer than a start may take; if it is the only one: {effect[0].lower()}{effect[1:]}"
        yield _alert(name, f"{up} == 0", "ticket", one, alone, f"{START_MIN}m")
    yield _alert(
        "GatewayReloadFails",
        f"gateway_reload_pending{scope()} == 1",
        "ticket",
        "The gateway cannot load a change of its files",
        "It serves on with what it had: after a restart it would not start.",
        "5m",
    )
    left = f"({CERTIFICATE}{scope()} - time())"
    for days, severity in CERTIFICATE_DAYS:
        # unless, not <: the end of a certificate that cannot be read is NaN, which is smaller than nothing
        yield _alert(
            "CertificateExpires",
            f"{left} unless {left} >= {days * 86_400}",
            severity,
            f"The gateway's certificate ends in less than {days} days",
            "In {{ $value | humanizeDuration }}; after that callers refuse to connect.",
            "5m",
        )


def _queue_alert(model: Served, scope: Scope) -> Rule:
    """A queue that is full, or in which requests wait for half of the time after which they are refused."""
    chosen = scope(model=model.name)
    wait_s = (model.queue_timeout_ms / 2 or model.p99_ms) / 1000
    expr = f"model:queue_seconds:mean_rate2m{chosen} > {number(wait_s)}"
    described = f"Requests wait longer than {wait_s * 1000:g} ms on average"
    if model.queue_size:
        expr = f"instance_model:queue_fill:ratio{chosen} > {FULL} or {expr}"
        described += f", or over {100 * FULL:g} % of the queue's {model.queue_size} places are taken"
    summary = f"{model.name}: requests wait, and are about to be refused"
    return _alert("QueueSaturated", expr, "page", summary, f"{described}.", "1m", model=model.name)


def _ready_alert(model: Served, scope: Scope) -> Rule:
    """Triton has counters of what is loaded, and of nothing else."""
    return _alert(
        "ModelNotReady",
        f"sum by (instance) (up{scope(job='triton')} == 1) unless on (instance) {READY}{scope(model=model.name)}",
        "page",
        f"{model.name} is not loaded in {{{{ $labels.instance }}}}",
        "Triton answers, and has no counters of the model: it did not load, or was unloaded.",
        "5m",
        model=model.name,
    )


def _version_alert(model: Served, scope: Scope, rollout_min: int) -> Rule:
    """Of each instance: a version that is served and should not be; else one that should be and is not."""
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
        f"{model.name}: {{{{ $labels.instance }}}} does not serve version {names}, or serves another",
        "{{ with $labels.version }}Seen: {{ . }}. {{ end }}"
        f"The repository had {names} to serve when these rules were written.",
        f"{rollout_min}m",
        model=model.name,
    )


def main() -> None:
    """Prints the rules of a repository."""
    parser = Parser(__doc__, prog="python -m serving.alerts")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="(default: %(default)s)")
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of model folders (default: %(default)s)"
    )
    parser.add_argument("--runbook", default=RUNBOOK, help="where the alerts link to (default: %(default)s)")
    parser.add_argument("--namespace", default="", help="of a cluster: look at this one alone (default: at all)")
    parser.add_argument("--json", action="store_true", help="as JSON")
    args = parser.parse_args()
    content = rules(served_models(args.repository, args.models), args.runbook, Scope(args.namespace))
    print(json.dumps(content, indent=2) if args.json else as_yaml(content).rstrip())


if __name__ == "__main__":
    run_command(main)

"""The Grafana dashboard of what a repository serves, for the data source that compose provisions.

Contract: `dashboard` makes the content of a dashboard file. It reads what `serving.recording_rules` records, and the
gateway's and Triton's own metrics; the row of the GPU is there where a model needs one. `queries` are what the panels
ask, as Grafana sends it with every model chosen.

Examples:
    python -m serving.dashboard                                 # of model_repository/
    python -m serving.dashboard --repository /models >deepseek.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deepseek.spec import Parser, run_command
from serving.alerts import BURNS
from serving.recording_rules import DURATION, FAILURES, READY
from serving.served import Served, served_models

UID, SOURCE = "deepseek", {"type": "prometheus", "uid": "prometheus"}
ROW_WIDTH, PANEL_HEIGHT = 24, 8  # of Grafana's grid
MODEL = 'model=~"$model"'
RANGE = "[$__rate_interval]"  # Grafana's: at least four scrapes


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One graph: queries by what its lines are called, and what it shows."""

    title: str
    unit: str
    queries: dict[str, str]
    description: str = ""
    kind: Literal["timeseries", "stat"] = "timeseries"
    limits: tuple[float, ...] = ()
    """Lines across it."""


def _rate(metric: str, by: str, *chosen: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{','.join(chosen)}}}{RANGE}))"


def _quantile(share: float) -> str:
    return f"histogram_quantile({share}, {_rate(f'{DURATION}_bucket', 'le, model', MODEL)})"


def _slo() -> list[Panel]:
    slow, failed = "model:requests_slow", "model:triton_requests_failed"
    of_slow, of_failed = "/ on (model, objective)", "/ on (model)"
    chosen = f"{{{MODEL}}}"
    fast = tuple(burn.factor for burn in BURNS)
    return [
        Panel(
            title="Burn rate of the budgets, 1 h",
            unit="none",
            description="1: the budget lasts its 30 days. The lines are where alerts fire; docs/runbook.md.",
            limits=fast,
            queries={
                "{{model}} slower than {{objective}}": f"{slow}:ratio_rate1h{chosen} {of_slow} {slow}:budget{chosen}",
                "{{model}} failed": f"{failed}:ratio_rate1h{chosen} {of_failed} {failed}:budget{chosen}",
            },
        ),
        Panel(
            title="Budget left, of the last 3 days",
            unit="percentunit",
            kind="stat",
            description="Below 0: more than the SLO allows.",
            queries={
                "{{model}} {{objective}}": f"1 - {slow}:ratio_rate3d{chosen} {of_slow} {slow}:budget{chosen}",
                "{{model}} errors": f"1 - {failed}:ratio_rate3d{chosen} {of_failed} {failed}:budget{chosen}",
            },
        ),
        Panel(
            title="Alerts that fire",
            unit="none",
            kind="stat",
            queries={"pages": _firing("page"), "tickets": _firing("ticket")},
        ),
    ]


def _firing(severity: str) -> str:
    return f'count(ALERTS{{alertstate="firing",severity="{severity}"}}) or vector(0)'


def _gateway() -> list[Panel]:
    requests = "gateway_requests_total"
    mean = f"{_rate(f'{DURATION}_sum', 'model', MODEL)} / {_rate(f'{DURATION}_count', 'model', MODEL)}"
    triton = f"{_rate('nv_inference_request_duration_us', 'model', MODEL)} / 1e6"
    return [
        Panel(
            title="Answered requests",
            unit="reqps",
            queries={"{{model}} {{protocol}}": _rate(f"{DURATION}_count", "model, protocol", MODEL)},
        ),
        Panel(
            title="Statuses of the gateway",
            unit="reqps",
            description="HTTP's, and gRPC's of one or two digits: 0 OK, 4 too late, 8 too many, 13 failed, "
            "14 unavailable.",
            queries={"{{protocol}} {{status}}": _rate(requests, "protocol, status", 'api="infer"')},
        ),
        Panel(
            title="Share left unserved",
            unit="percentunit",
            description="No server, no room, a failure, or a wait in vain. What callers do wrong does not count.",
            queries={"unserved": "endpoint:requests_unserved:ratio_rate5m"},
        ),
        Panel(
            title="Latency at the gateway",
            unit="s",
            queries={f"{{{{model}}}} p{100 * share:g}": _quantile(share) for share in (0.5, 0.95, 0.99)},
        ),
        Panel(
            title="Slower than the SLO, 5 min",
            unit="percentunit",
            queries={"{{model}} {{objective}}": f"model:requests_slow:ratio_rate5m{{{MODEL}}}"},
        ),
        Panel(
            title="Mean latency: at the gateway, and in Triton",
            unit="s",
            description="What lies between them is TLS, keys, and callers that send or read slowly.",
            queries={
                "{{model}} gateway": mean,
                "{{model}} Triton": f"{triton} / {_rate('nv_inference_request_success', 'model', MODEL)}",
            },
        ),
    ]


def _triton() -> list[Panel]:
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    each = f"1e6 / {_rate('nv_inference_request_success', 'model', MODEL)}"
    return [
        Panel(
            title="Queue over compute",
            unit="none",
            description="Above 1, requests wait longer than they are computed: add replicas.",
            limits=(1,),
            queries={"{{model}}": f"model:queue_to_compute:ratio_rate2m{{{MODEL}}}"},
        ),
        Panel(title="Mean batch", unit="none", queries={"{{model}}": f"model:batch_size:mean_rate2m{{{MODEL}}}"}),
        Panel(
            title="Waiting requests",
            unit="none",
            queries={"{{model}} {{instance}}": f"sum by (model, instance) ({READY}{{{MODEL}}})"},
        ),
        Panel(
            title="Where a request's time goes",
            unit="s",
            queries={
                f"{{{{model}}}} {part}": f"{_rate(f'nv_inference_{part}_duration_us', 'model', MODEL)} / {each}"
                for part in parts
            },
        ),
        Panel(
            title="Failures by reason",
            unit="reqps",
            description="REJECTED: the queue was full, or the wait too long. CANCELED: the caller gave up. "
            "INTERNAL: ONNX Runtime failed. BACKEND: another backend did, or the model's process died.",
            queries={"{{model}} {{reason}}": _rate("", "model, reason", FAILURES, MODEL)},
        ),
        Panel(
            title="Versions served",
            unit="none",
            kind="stat",
            description="By how many replicas.",
            queries={"{{model}} {{version}}": f"count by (model, version) ({READY}{{{MODEL}}})"},
        ),
    ]


def _machine() -> list[Panel]:
    memory = "nv_cpu_memory_used_bytes / nv_cpu_memory_total_bytes"
    certificate = "gateway_certificate_expiry_timestamp_seconds - time()"
    return [
        Panel(
            title="CPU and memory",
            unit="percentunit",
            queries={"CPU {{instance}}": "nv_cpu_utilization", "memory {{instance}}": memory},
        ),
        Panel(title="Up", unit="none", kind="stat", queries={"{{job}}": "sum by (job) (up)"}),
        Panel(title="Certificate ends in", unit="s", kind="stat", queries={"{{instance}}": certificate}),
    ]


def _gpu() -> list[Panel]:
    memory = "nv_gpu_memory_used_bytes / nv_gpu_memory_total_bytes"
    return [
        Panel(title="GPU", unit="percentunit", queries={"{{gpu_uuid}}": "nv_gpu_utilization"}),
        Panel(title="GPU memory", unit="percentunit", queries={"{{gpu_uuid}}": memory}),
        Panel(title="GPU power", unit="watt", queries={"{{gpu_uuid}}": "nv_gpu_power_usage"}),
    ]


def dashboard(models: list[Served]) -> dict[str, Any]:
    """A dashboard file."""
    rows = {"Objectives": _slo(), "Requests": _gateway(), "Triton": _triton(), "Machine": _machine()}
    if any(model.needs_gpu for model in models):
        rows["GPU"] = _gpu()
    return {
        "uid": UID,
        "title": "Models on Triton",
        "description": ", ".join(model.name for model in models),
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_model_variable()]},
        "panels": _laid_out(rows),
    }


def _model_variable() -> dict[str, Any]:
    """The models to choose from: those that Triton has."""
    found = "label_values(nv_inference_request_success, model)"
    return {
        "name": "model",
        "type": "query",
        "datasource": SOURCE,
        "definition": found,
        "query": {"query": found, "refId": "models"},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _laid_out(rows: dict[str, list[Panel]]) -> list[dict[str, Any]]:
    """Panels with their places and ids, three beside each other under the title of their row."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        place = {"x": 0, "y": y, "w": ROW_WIDTH, "h": 1}
        found.append({"id": len(found) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        y += 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, 3)
            place = {"x": column * 8, "y": y + line * PANEL_HEIGHT, "w": 8, "h": PANEL_HEIGHT}
            found.append({"id": len(found) + 1, "gridPos": place, **_panel(panel)})
        y += -(-len(panels) // 3) * PANEL_HEIGHT
    return found


def _panel(panel: Panel) -> dict[str, Any]:
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        for index, (legend, expr) in enumerate(panel.queries.items())
    ]
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": "red", "value": limit} for limit in sorted(panel.limits)]
    defaults: dict[str, Any] = {"unit": panel.unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if panel.kind == "timeseries":
        style = "dashed" if panel.limits else "off"
        defaults["custom"] = {"fillOpacity": 10, "thresholdsStyle": {"mode": style}}
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def queries(content: dict[str, Any], interval: str = "1m") -> Iterator[tuple[str, str]]:
    """Title and query of each line of each panel, as Grafana sends it with all models chosen."""
    for panel in content["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", interval).replace("$model", ".*")


def main() -> None:
    """Prints the dashboard of a repository."""
    parser = Parser(__doc__, prog="python -m serving.dashboard")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="(default: %(default)s)")
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of model folders (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="the same: a dashboard is JSON")
    args = parser.parse_args()
    print(json.dumps(dashboard(served_models(args.repository, args.models)), indent=2))


if __name__ == "__main__":
    run_command(main)

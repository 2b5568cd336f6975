"""The Grafana dashboard for a repository, for the data source that Compose provisions.

Contract: `dashboard` makes the content of a dashboard file. It reads what `serving.observe.recording_rules` records,
and the metrics of the gateway, Triton and the OpenAI routes. The rows of the GPU and of these routes are there if the
models need them.
"""

from typing import Any, Literal

from deepseek.spec.metric_windows import QUEUES
from serving.observe.alerts import BURNS, CERTIFICATE
from serving.observe.recording_rules import DURATION, OPENAI_DURATION, OPENAI_REQUESTS, READY, failures
from serving.repository.served_models import ServedModel, has_openai_routes

UID, SOURCE = "deepseek", {"type": "prometheus", "uid": "prometheus"}
ROW_WIDTH, PANEL_HEIGHT = 24, 8  # of Grafana's grid
MODEL = 'model=~"$model"'
RANGE = "[$__rate_interval]"  # Grafana's: at least four scrapes
Panel = dict[str, Any]


def _panel(
    title: str,
    unit: str,
    queries: dict[str, str],
    description: str = "",
    *,
    kind: Literal["timeseries", "stat"] = "timeseries",
    limits: tuple[float, ...] = (),
) -> Panel:
    """One panel: queries by legend; `limits` are horizontal lines."""
    targets = [
        {"refId": chr(ord("A") + index), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
        for index, (legend, expr) in enumerate(queries.items())
    ]
    steps: list[dict[str, Any]] = [{"color": "green", "value": None}]
    steps += [{"color": "red", "value": limit} for limit in sorted(limits)]
    defaults: dict[str, Any] = {"unit": unit, "thresholds": {"mode": "absolute", "steps": steps}}
    if kind == "timeseries":
        defaults["custom"] = {"fillOpacity": 10, "thresholdsStyle": {"mode": "dashed" if limits else "off"}}
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "targets": targets,
    }


def _rate(metric: str, by: str, *chosen: str) -> str:
    return f"sum by ({by}) (rate({metric}{{{','.join(chosen)}}}{RANGE}))"


def _quantiles(histogram: str, *chosen: str) -> dict[str, str]:
    """The median, p95 and p99 of each model."""
    buckets = _rate(f"{histogram}_bucket", "le, model", MODEL, *chosen)
    return {f"{{{{model}}}} p{100 * share:g}": f"histogram_quantile({share}, {buckets})" for share in (0.5, 0.95, 0.99)}


def _slo() -> list[Panel]:
    slow, failed = "model:requests_slow", "model:triton_requests_failed"
    of_slow, of_failed = "/ on (model, objective)", "/ on (model)"
    chosen = f"{{{MODEL}}}"
    fast = tuple(burn.factor for burn in BURNS)
    return [
        _panel(
            "Burn rate, 1 h",
            "none",
            {
                "{{model}} slower than {{objective}}": f"{slow}:ratio_rate1h{chosen} {of_slow} {slow}:budget{chosen}",
                "{{model}} failed": f"{failed}:ratio_rate1h{chosen} {of_failed} {failed}:budget{chosen}",
            },
            description="At 1 the error budget lasts 30 days. Alerts fire at the lines: docs/runbook.md.",
            limits=fast,
        ),
        _panel(
            "Error budget left, 3 days",
            "percentunit",
            {
                "{{model}} {{objective}}": f"1 - {slow}:ratio_rate3d{chosen} {of_slow} {slow}:budget{chosen}",
                "{{model}} errors": f"1 - {failed}:ratio_rate3d{chosen} {of_failed} {failed}:budget{chosen}",
            },
            description="Below 0, the SLO is missed over these 3 days.",
            kind="stat",
        ),
        _panel("Firing alerts", "none", {"pages": _firing("page"), "tickets": _firing("ticket")}, kind="stat"),
    ]


def _firing(severity: str) -> str:
    return f'count(ALERTS{{alertstate="firing",severity="{severity}"}}) or vector(0)'


def _gateway() -> list[Panel]:
    requests = "gateway_requests_total"
    mean = f"{_rate(f'{DURATION}_sum', 'model', MODEL)} / {_rate(f'{DURATION}_count', 'model', MODEL)}"
    triton = f"{_rate('nv_inference_request_duration_us', 'model', MODEL)} / 1e6"
    return [
        _panel(
            "Answered requests",
            "reqps",
            {"{{model}} {{protocol}}": _rate(f"{DURATION}_count", "model, protocol", MODEL)},
        ),
        _panel(
            "Answers by status",
            "reqps",
            {"{{protocol}} {{status}}": _rate(requests, "protocol, status", 'api="infer"')},
            description="Three digits: HTTP. One or two digits: gRPC (0 OK, 4 deadline exceeded, 8 resource exhausted, "
            "13 internal, 14 unavailable).",
        ),
        _panel(
            "Unanswered requests",
            "percentunit",
            {"unserved": "endpoint:requests_unserved:ratio_rate5m"},
            description="No server, a full queue, a failure or a time-out. Callers' mistakes do not count.",
        ),
        _panel("Latency at the gateway", "s", _quantiles(DURATION)),
        _panel(
            "Mean latency: gateway and Triton",
            "s",
            {
                "{{model}} gateway": mean,
                "{{model}} Triton": f"{triton} / {_rate('nv_inference_request_success', 'model', MODEL)}",
            },
            description="The difference is TLS, keys, and callers that send or read slowly.",
        ),
    ]


def _triton() -> list[Panel]:
    parts = ("queue", "compute_input", "compute_infer", "compute_output")
    each = f"1e6 / {_rate('nv_inference_request_success', 'model', MODEL)}"
    return [
        _panel(
            "Queue over compute",
            "none",
            {"{{model}}": f"model:queue_to_compute:ratio_rate{QUEUES}{{{MODEL}}}"},
            description="Above 1, requests wait longer than they compute: add replicas.",
            limits=(1,),
        ),
        _panel("Mean batch size", "none", {"{{model}}": f"model:batch_size:mean_rate{QUEUES}{{{MODEL}}}"}),
        _panel("Queued requests", "none", {"{{model}} {{instance}}": f"sum by (model, instance) ({READY}{{{MODEL}}})"}),
        _panel(
            "Where a request's time goes",
            "s",
            {
                f"{{{{model}}}} {part}": f"{_rate(f'nv_inference_{part}_duration_us', 'model', MODEL)} / {each}"
                for part in parts
            },
        ),
        _panel(
            "Failures by reason",
            "reqps",
            {"{{model}} {{reason}}": f"sum by (model, reason) ({failures(f'{{{MODEL}}}', '$__rate_interval')})"},
            description="REJECTED, REJECTED_BULK: full queue or queue time-out. CANCELED: the caller gave up. "
            "INTERNAL: ONNX Runtime failed. BACKEND: another backend failed, or the model's process died.",
        ),
        _panel(
            "Versions served",
            "none",
            {"{{model}} {{version}}": f"count by (model, version) ({READY}{{{MODEL}}})"},
            description="Number of replicas per version.",
            kind="stat",
        ),
    ]


def _openai() -> list[Panel]:
    route = 'route=~"/v1/embeddings|/similarity|/rerank"'
    padded, tokens = (_rate(f"onnxruntime_text_{name}", "model", MODEL) for name in ("padded_tokens", "tokens"))
    return [
        _panel(
            "Requests of the OpenAI routes",
            "reqps",
            {"{{route}} {{status}}": _rate(OPENAI_REQUESTS, "route, status", route)},
            description="429: no room in a queue or in memory. 499: the caller disconnected.",
        ),
        _panel(
            "Unserved by the OpenAI routes",
            "percentunit",
            {"429 and 5xx": "openai:requests_unserved:ratio_rate5m"},
            description="Callers' mistakes and refusals of the gateway do not count.",
        ),
        _panel(
            "Latency of the OpenAI routes",
            "s",
            _quantiles(OPENAI_DURATION, 'split="no"'),
            description="Lists that fit into one batch. Longer lists take as long as their batches.",
        ),
        _panel("Texts per second", "none", {"{{model}}": _rate("openai_texts_total", "model", MODEL)}),
        _panel("Tokens per second", "none", {"{{model}}": _rate("openai_tokens_total", "model", MODEL)}),
        _panel(
            "Padding of texts",
            "none",
            {"{{model}}": f"{padded} / {tokens}"},
            description="Tokens that ran with padding, over those without; 1: none. Texts over KServe v2 count too.",
        ),
    ]


def _machine(jobs: str) -> list[Panel]:
    memory = "nv_cpu_memory_used_bytes / nv_cpu_memory_total_bytes"
    certificate = f"{CERTIFICATE} - time()"
    return [
        _panel(
            "CPU and memory", "percentunit", {"CPU {{instance}}": "nv_cpu_utilization", "memory {{instance}}": memory}
        ),
        _panel("Up", "none", {"{{job}}": f'sum by (job) (up{{job=~"{jobs}"}})'}, kind="stat"),
        _panel("Certificate expires in", "s", {"{{instance}}": certificate}, kind="stat"),
    ]


def _gpu() -> list[Panel]:
    memory = "nv_gpu_memory_used_bytes / nv_gpu_memory_total_bytes"
    return [
        _panel("GPU", "percentunit", {"{{gpu_uuid}}": "nv_gpu_utilization"}),
        _panel("GPU memory", "percentunit", {"{{gpu_uuid}}": memory}),
        _panel("GPU power", "watt", {"{{gpu_uuid}}": "nv_gpu_power_usage"}),
    ]


def dashboard(models: list[ServedModel]) -> dict[str, Any]:
    rows, jobs = {"Objectives": _slo(), "Requests": _gateway(), "Triton": _triton()}, "triton|gateway"
    if has_openai_routes(models):
        rows["OpenAI routes"] = _openai()
        jobs += "|openai"
    rows["Machine"] = _machine(jobs)
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
    """Panels with positions and ids, three per line under their row's title."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, panels in rows.items():
        place = {"x": 0, "y": y, "w": ROW_WIDTH, "h": 1}
        found.append({"id": len(found) + 1, "type": "row", "title": title, "gridPos": place, "panels": []})
        y += 1
        for index, panel in enumerate(panels):
            line, column = divmod(index, 3)
            place = {"x": column * 8, "y": y + line * PANEL_HEIGHT, "w": 8, "h": PANEL_HEIGHT}
            found.append({"id": len(found) + 1, "gridPos": place, **panel})
        y += -(-len(panels) // 3) * PANEL_HEIGHT
    return found

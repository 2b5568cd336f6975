"""Alerts from an SLO: each fires when it should and only then, as promtool evaluates it, and has a runbook section."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import values_of
from deepseek.spec import Objective
from serving.observe.alerts import rules
from serving.observe.dashboard import dashboard
from serving.repository.served_models import ServedModel
from tests.conftest import Refused
from tests.test_stack import TEXT
from tests.test_stack_files import services

P99 = Objective(name="p99_ms", measure="p99_ms", relation="<=", limit=80)
ERRORS = Objective(name="max_error_rate", measure="error_rate", relation="<=", limit=0.001)
MODEL = replace(TEXT, objectives=(P99, ERRORS), queue_size=100, versions=(5,), text_bytes=1000)
OBSERVE = Path("docker/observe")
Fired = set[tuple[str, str]]

TRITON = 'model="text",instance="a"'
FAST = 'gateway_request_duration_seconds_bucket{model="text",le="0.08"}'
ANSWERED = 'gateway_request_duration_seconds_count{model="text"}'
SERVED = 'gateway_requests_total{api="infer",protocol="grpc",model="text",status="0"}'
UNSERVED = 'gateway_requests_total{api="infer",protocol="grpc",model="",status="14"}'
GIVEN_UP, SOON = (
    'gateway_request_duration_seconds_count{model=""}',
    'gateway_request_duration_seconds_bucket{model="",le="0.08"}',
)
HTTP_500, GRPC_13 = (
    f'gateway_requests_total{{api="infer",protocol="{protocol}",model="",status="{status}"}}'
    for protocol, status in (("http", 500), ("grpc", 13))
)
WRONG = 'gateway_requests_total{api="infer",protocol="grpc",model="",status="3"}'
FAILED = f'nv_inference_request_failure{{{TRITON},version="5",reason="REJECTED"}}'
MODEL_FAILED = f'onnxruntime_inference_request_failure{{{TRITON},version="5",reason="INTERNAL"}}'
REFUSED_TOO = FAILED.replace("nv_", "onnxruntime_")  # the same labels
CANCELED = f'nv_inference_request_failure{{{TRITON},version="5",reason="CANCELED"}}'
SUCCESS = f'nv_inference_request_success{{{TRITON},version="5"}}'
QUEUE_US = f'nv_inference_queue_duration_us{{{TRITON},version="5"}}'
WAITING = f'nv_inference_pending_request_count{{{TRITON},version="5"}}'
OLDER = f'nv_inference_pending_request_count{{{TRITON},version="4"}}'
OPENAI, OPENAI_REFUSED = (f'openai_requests_total{{route="/v1/embeddings",status="{status}"}}' for status in (200, 429))
OPENAI_WRONG = 'openai_requests_total{route="/v1/embeddings",status="400"}'
OPENAI_UP = 'up{job="openai",instance="a"}'
OPENAI_FAST = 'openai_request_duration_seconds_bucket{model="text",split="no",le="0.1"}'  # the next from 80 ms on
OPENAI_LISTS = 'openai_request_duration_seconds_count{model="text",split="no"}'
OPENAI_LONG_LISTS = 'openai_request_duration_seconds_count{model="text",split="yes"}'
TRITON_UP, GATEWAY_UP = 'up{job="triton",instance="a"}', 'up{job="gateway",instance="g"}'
STARTING, GATEWAY_STARTING = (up.replace('instance="', 'instance="new-') for up in (TRITON_UP, GATEWAY_UP))
PENDING = 'gateway_reload_pending{instance="g"}'
CERTIFICATE = 'gateway_certificate_expiry_timestamp_seconds{instance="g"}'
# A hundred requests a second, all well. Values a minute: start, and what each minute adds.
HEALTHY = {
    FAST: "0+6000", ANSWERED: "0+6000", SUCCESS: "0+6000", FAILED: "0+0", CANCELED: "0+0", QUEUE_US: "0+6000000",
    SERVED: "0+6000",
    WAITING: "2+0", TRITON_UP: "1+0", GATEWAY_UP: "1+0", CERTIFICATE: "1e10+0", PENDING: "0+0",
    OPENAI_UP: "1+0", OPENAI: "0+6000", OPENAI_FAST: "0+6000", OPENAI_LISTS: "0+6000",
}  # fmt: skip
# Every request is answered at once, with 500 or INTERNAL.
ALL_FAIL = {
    FAST: "0+0", ANSWERED: "0+0", SERVED: "0+0", MODEL_FAILED: "0+6000",
    HTTP_500: "0+3000", GRPC_13: "0+3000",
}  # fmt: skip


def need_promtool() -> None:
    """The one-line error about what is missing."""
    if not shutil.which("promtool"):
        pytest.skip("no promtool here: apt-get install prometheus")


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    need_promtool()
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


def write_rules(folder: Path, *models: ServedModel) -> Path:
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump(rules(list(models))))
    return path


Case = tuple[str, dict[str, str], int, Fired]
"""A name, series with one value per step, the minutes after which to look, and the alerts that fire then."""


def check(folder: Path, *tests: dict[str, Any], every_min: int = 1) -> None:
    """Runs `promtool test rules` over `rules.yml`, which are evaluated every `every_min` minutes."""
    groups = [group["name"] for group in yaml.safe_load((folder / "rules.yml").read_text())["groups"]]
    content = {
        "rule_files": ["rules.yml"],
        "group_eval_order": groups,  # else in any: an alert would see what was recorded a step before, or nothing
        "evaluation_interval": f"{every_min}m",
        "tests": list(tests),
    }
    (folder / "test.yml").write_text(yaml.safe_dump(content))
    done = promtool("test", "rules", folder / "test.yml")
    assert done.returncode == 0, done.stdout + done.stderr


def at_the_end(
    name: str, series: dict[str, str], minutes: int, asked: dict[str, Any], step_min: int = 1
) -> dict[str, Any]:
    """A test for `check`: what `asked` says, after `minutes` of series with one value per step."""
    count = minutes // step_min
    written = [
        {"series": metric, "values": value if " " in value or "x" in value else f"{value}x{count}"}
        for metric, value in series.items()
    ]
    expected = [{"eval_time": f"{minutes}m", **asked}]
    return {"name": name, "interval": f"{step_min}m", "input_series": written, "promql_expr_test": expected}


def check_fired(folder: Path, *cases: Case, step_min: int = 1, every_min: int = 1) -> None:
    """Exactly the expected alerts, by name and severity, must fire in each case."""
    firing = 'group by (alertname, severity) (ALERTS{alertstate="firing"})'
    tests = []
    for name, series, minutes, fired in cases:
        labels = [f'{{alertname="{alert}", severity="{severity}"}}' for alert, severity in sorted(fired)]
        # promtool prints the expression of a failure, and so the comment with the case's name
        asked = {"expr": f"{firing} # {name}", "exp_samples": [{"labels": each, "value": 1} for each in labels]}
        tests.append(at_the_end(name, series, minutes, asked, step_min))
    check(folder, *tests, every_min=every_min)


BOTH = {"page", "ticket"}


def each(name: str, *severities: str) -> Fired:
    return {(name, severity) for severity in severities}


CASES: list[Case] = [
    ("healthy", {}, 70, set()),
    ("no requests", dict.fromkeys((FAST, ANSWERED, SERVED, SUCCESS, QUEUE_US, OPENAI, OPENAI_FAST, OPENAI_LISTS), "0+0"), 70, set()),
    ("counters start again", dict.fromkeys((FAST, ANSWERED, SERVED, SUCCESS), "0+6000x30 100+6000x39"), 70, set()),
    ("no bucket of the limit", {FAST: ""}, 70, set()),
    ("a change of the gateway's files is half there", {PENDING: "0+0x5 1+0x3"}, 8, set()),
    ("a change cannot be loaded", {PENDING: "1+0"}, 8, each("GatewayReloadFails", "ticket")),
    ("a fifth is slow", {FAST: "0+4800"}, 70, each("LatencyBudgetBurn", *BOTH)),
    ("4 % are slow", {FAST: "0+5760"}, 70, each("LatencyBudgetBurn", "ticket")),
    ("half of what may be slow", {FAST: "0+5970"}, 70, set()),
    ("slow until 45 min ago", {FAST: "0+4800x60 288000+6000x45"}, 105, each("LatencyBudgetBurn", "ticket")),
    ("a new SLO", {FAST: "_x60 360000+6000x10"}, 62, set()),
    ("a new SLO, a fifth is slow", {FAST: "_x60 360000+4800x45"}, 105, each("LatencyBudgetBurn", *BOTH)),
    ("a new SLO, callers give up at once", {GIVEN_UP: "0+300", SOON: "_x60 18000+300x10"}, 62, set()),
    ("too few to tell", {FAST: "0+0", ANSWERED: "0+1"}, 8, set()),
    ("few, all slow", {FAST: "0+0", ANSWERED: "0+1"}, 30, each("LatencyBudgetBurn", *BOTH)),
    ("refused", {FAILED: "0+600"}, 70, each("ErrorBudgetBurn", *BOTH)),
    ("refused, and an older backend has that reason too", {FAILED: "0+600", REFUSED_TOO: "0+0"}, 70, each("ErrorBudgetBurn", *BOTH)),
    ("the model fails, asked directly", {MODEL_FAILED: "0+600"}, 70, each("ErrorBudgetBurn", *BOTH)),
    ("half of what may fail", {MODEL_FAILED: "0+3"}, 70, set()),
    ("all fail", ALL_FAIL, 70, each("ErrorBudgetBurn", *BOTH) | each("EndpointBudgetBurn", *BOTH)),
    ("500 from any program", {HTTP_500: "0+300"}, 70, each("EndpointBudgetBurn", *BOTH)),
    ("INTERNAL from any program", {GRPC_13: "0+300"}, 70, each("EndpointBudgetBurn", *BOTH)),
    ("callers gave up", {CANCELED: "0+600"}, 70, set()),
    ("nobody answers", {UNSERVED: "0+300"}, 70, each("EndpointBudgetBurn", *BOTH)),
    ("callers wait in vain", {GIVEN_UP: "0+300", SOON: "0+0"}, 70, each("EndpointBudgetBurn", *BOTH)),
    ("callers give up at once", {GIVEN_UP: "0+300", SOON: "0+300"}, 70, set()),
    ("callers do wrong", {WRONG: "0+3000"}, 70, set()),
    ("queue nearly full", {WAITING: "90+0"}, 5, each("QueueSaturated", "page")),
    ("queue not yet full", {WAITING: "79+0"}, 5, set()),
    ("120 ms in the queue", {QUEUE_US: "0+720000000"}, 5, each("QueueSaturated", "page")),
    ("still loading", {WAITING: ""}, 4, set()),
    ("not loaded", {WAITING: ""}, 7, each("ModelNotReady", "page")),
    ("an older version", {WAITING: "", OLDER: "0+0"}, 15, each("VersionMismatch", "ticket")),
    ("one version too many", {OLDER: "0+0"}, 15, each("VersionMismatch", "ticket")),
    ("a version changes", {WAITING: "", OLDER: "0+0"}, 8, set()),
    ("a version changes in place", {WAITING: "_x30 0+0x39", OLDER: "0+0x30 stale"}, 70, set()),
    ("triton down", {TRITON_UP: "0+0"}, 3, each("TritonDown", "page")),
    ("triton gone", {TRITON_UP: ""}, 3, each("TritonDown", "page")),
    ("triton stays down", {TRITON_UP: "0+0"}, 15, each("TritonDown", *BOTH)),
    ("one more triton starts", {STARTING: "0+0"}, 9, set()),
    ("one of two does not come up", {STARTING: "0+0"}, 15, each("TritonDown", "ticket")),
    ("gateway down", {GATEWAY_UP: "0+0"}, 3, each("GatewayDown", "page")),
    ("one of two gateways down", {GATEWAY_STARTING: "0+0"}, 15, each("GatewayDown", "ticket")),
    ("the OpenAI routes are down", {OPENAI_UP: "0+0"}, 3, each("OpenAIDown", "page")),
    ("the routes refuse", {OPENAI_REFUSED: "0+600"}, 70, each("OpenAIBudgetBurn", *BOTH)),
    ("the routes refuse half of what they may", {OPENAI_REFUSED: "0+3"}, 70, set()),
    ("callers of the routes do wrong", {OPENAI_WRONG: "0+6000"}, 70, set()),
    ("a fifth is slow on the routes", {OPENAI_FAST: "0+4800"}, 70, each("OpenAILatencyBudgetBurn", *BOTH)),
    ("half of what may be slow on the routes", {OPENAI_FAST: "0+5970"}, 70, set()),
    ("long lists take long", {OPENAI_LONG_LISTS: "0+6000"}, 70, set()),
    ("ten days left", {CERTIFICATE: "864000+0"}, 7, each("CertificateExpires", "ticket")),
    ("certificate ended", {CERTIFICATE: "60+0"}, 7, each("CertificateExpires", *BOTH)),
    ("certificate unreadable", {CERTIFICATE: "NaN+0"}, 7, each("CertificateExpires", *BOTH)),
]  # fmt: skip


@pytest.mark.server
def test_an_alert_fires_when_it_should_and_no_other_does(tmp_path: Path) -> None:
    write_rules(tmp_path, MODEL)

    def series(changed: dict[str, str]) -> dict[str, str]:
        return {name: values for name, values in {**HEALTHY, **changed}.items() if values}

    cases: dict[int, list[Case]] = defaultdict(list)
    for name, changed, minutes, fired in CASES:
        steps = (10, 5, 2) if minutes >= 60 else ()  # an evaluation costs promtool 10 ms
        every_min = next((step for step in steps if minutes % step == 0), 1)
        cases[every_min].append((name, series(changed), minutes, fired))
    for every_min, of_step in cases.items():
        check_fired(tmp_path, *of_step, every_min=every_min)


@pytest.mark.server
def test_a_budget_that_is_used_up_just_too_fast_is_a_ticket_after_three_days(tmp_path: Path) -> None:
    write_rules(tmp_path, MODEL)
    slow = {**HEALTHY, FAST: "0+177300", ANSWERED: "0+180000"}  # 1.5 % of them, half an hour a value
    check_fired(tmp_path, ("", slow, 3 * 1440, each("LatencyBudgetBurn", "ticket")), step_min=30, every_min=30)


def queries(content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Title and query of each panel's lines, as Grafana sends them with all models selected."""
    for panel in content["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")


def _alerts(*models: ServedModel) -> list[dict[str, Any]]:
    return [rule for group in rules(list(models))["groups"] for rule in group["rules"] if "alert" in rule]


def test_an_alert_says_how_long_the_budget_lasts_and_where_to_read_on() -> None:
    labels = {"severity": "page", "model": "text", "objective": "p99", "window": "1h"}
    (alert,) = (rule for rule in _alerts(MODEL) if rule["alert"] == "LatencyBudgetBurn" and rule["labels"] == labels)
    said = alert["annotations"]
    assert said["summary"] == "text: too many requests take longer than 80 ms (p99)"
    assert "over 14.4 % in the last 5m; 1 % are allowed" in said["description"]
    assert "a 30-day budget lasts 50 hours or less" in said["description"]
    assert said["runbook_url"] == "docs/runbook.md#latencybudgetburn"


# ---- from the SLO --------------------------------------------------------------------------------


def test_without_a_known_slo_no_budget_is_watched() -> None:
    names = {rule["alert"] for rule in _alerts(replace(MODEL, objectives=()))}
    assert not {name for name in names if name.endswith("BudgetBurn")}
    assert {"QueueSaturated", "ModelNotReady", "VersionMismatch", "TritonDown"} <= names


def test_without_models_that_take_texts_nothing_watches_the_openai_routes() -> None:
    without = replace(MODEL, text_bytes=0)
    assert "openai" not in yaml.safe_dump(rules([without]))
    assert "openai" not in str(dashboard([without]))
    assert 'up{job=~"triton|gateway"}' in str(dashboard([without]))  # Prometheus also has their target, which is down


def test_the_openai_routes_watch_only_limits_that_their_histogram_reaches() -> None:
    late = Objective(name="p99_ms", measure="p99_ms", relation="<=", limit=60_001)
    assert "openai_requests_slow" not in yaml.safe_dump(rules([replace(MODEL, objectives=(late,))]))


def test_a_share_that_no_window_can_exceed_is_left_to_the_longer_ones() -> None:
    median = Objective(name="p50_ms", measure="p50_ms", relation="<", limit=10)
    found = [rule for rule in _alerts(replace(MODEL, objectives=(median,))) if rule["alert"] == "LatencyBudgetBurn"]
    assert [rule["labels"]["window"] for rule in found] == ["3d"]
    assert "> 0.5 and" in found[0]["expr"]


def test_if_no_error_is_allowed_ten_errors_fire(tmp_path: Path) -> None:
    none = replace(ERRORS, limit=0)
    write_rules(tmp_path, replace(MODEL, objectives=(none,)))
    check_fired(tmp_path, ("", {**HEALTHY, FAILED: "0+1"}, 15, each("ErrorBudgetBurn", *BOTH)))


def test_the_strictest_of_two_limits_counts() -> None:
    tighter = Objective.parse("p99_ms < 60")
    assert replace(MODEL, objectives=(P99, tighter)).latency_limits_ms == {99: 60}


def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    path = write_rules(tmp_path, MODEL, replace(MODEL, name="other", queue_size=0, queue_timeout_ms=0, versions=(2, 1)))
    done = promtool("check", "rules", "--lint=all", "--lint-fatal", path)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- runbook, dashboard, files that agree ---------------------------------------------------------


def test_every_alert_has_its_section_of_the_runbook_and_every_section_its_alert() -> None:
    text = Path("docs/runbook.md").read_text()
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert sections.keys() == {rule["alert"] for rule in _alerts(MODEL)}, "docs/runbook.md: a section for each alert"
    for name, section in sections.items():
        parts = re.findall(r"^\*\*(.+?):\*\*", section, re.MULTILINE)
        assert parts == ["What it means", "Look at", "Do now", "Later"], name


def test_every_panel_that_the_runbook_names_is_on_the_dashboard() -> None:
    named = re.findall(r"(?<!\*)\*([^*\n]+)\*(?!\*)", Path("docs/runbook.md").read_text())
    assert named
    assert set(named) <= {panel["title"] for panel in dashboard([MODEL])["panels"]}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    assert "GPU" not in {panel["title"] for panel in dashboard([MODEL])["panels"]}
    panels = dashboard([replace(MODEL, needs_gpu=True)])["panels"]
    assert "GPU" in {panel["title"] for panel in panels}
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [panel["gridPos"] for panel in panels]
    taken = [(at["x"] + x, at["y"] + y) for at in places for x in range(at["w"]) for y in range(at["h"])]
    assert len(set(taken)) == len(taken)
    assert max(x for x, _ in taken) < 24


def test_the_queries_of_the_dashboard_are_promql(tmp_path: Path) -> None:
    gpu_row, without = (dashboard([replace(MODEL, needs_gpu=on_gpu)]) for on_gpu in (True, False))
    asked = sorted({expr for content in (gpu_row, without) for _, expr in queries(content)})
    recorded = [{"record": f"query:{index}:is", "expr": expr} for index, expr in enumerate(asked)]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    done = promtool("check", "rules", tmp_path / "queries.yml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(asked)} rules found" in done.stdout


def test_what_the_dashboard_and_the_alerts_read_is_recorded() -> None:
    found = rules([MODEL])["groups"]
    recorded = {rule["record"] for group in found for rule in group["rules"] if "record" in rule}
    texts = [expr for _, expr in queries(dashboard([MODEL]))]
    texts += [rule["expr"] for group in found for rule in group["rules"] if "alert" in rule]
    read = {
        name for text in texts for name in re.findall(r"\b(?:model|instance_model|endpoint|openai):[a-z_]+:\w+", text)
    }
    assert read <= recorded


def test_compose_mounts_them_where_prometheus_and_grafana_look() -> None:
    stack = services("compose.yaml")
    volumes = {name: {v["target"]: v["source"] for v in stack[name]["volumes"] if isinstance(v, dict)} for name in ("prometheus", "grafana")}  # fmt: skip
    prometheus = yaml.safe_load((OBSERVE / "prometheus" / "prometheus.yml").read_text())
    assert volumes["prometheus"]["/rules"] == "${STACK_OBSERVE:-build/observe}/rules"
    assert prometheus["rule_files"] == ["/rules/*.yml"]
    ports = {job["job_name"]: job["dns_sd_configs"][0]["port"] for job in prometheus["scrape_configs"]}
    assert ports == {"triton": 8002, "gateway": 9145, "openai": values_of("serve").openai_port}
    (provider,) = yaml.safe_load((OBSERVE / "grafana/dashboards/dashboards.yml").read_text())["providers"]
    assert volumes["grafana"][provider["options"]["path"]] == "${STACK_OBSERVE:-build/observe}/dashboards"
    (source,) = yaml.safe_load((OBSERVE / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in dashboard([MODEL])["panels"] if "datasource" in panel} == {source["uid"]}  # fmt: skip


def test_the_configurations_are_valid_for_the_programs() -> None:
    done = promtool("check", "config", "--syntax-only", OBSERVE / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stderr
    if not shutil.which("amtool"):
        pytest.skip("no amtool here: apt-get install prometheus-alertmanager")
    command = ["amtool", "check-config", str(OBSERVE / "alertmanager" / "alertmanager.yml")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_missing_repository_is_one_line(refused: Refused) -> None:
    assert refused("alerts", "--repository", "nosuch").startswith("error: nosuch: no model in it")

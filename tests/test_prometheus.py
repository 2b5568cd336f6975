"""A real Prometheus over Triton and the gateway: every rule, every panel, and a model that fails."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.observe.dashboard import dashboard
from serving.repository.served_models import served_models
from serving.stack.refresh import write_observed
from tests.gateway import free_port
from tests.test_alerts import queries
from tests.test_observe import X, observed
from tests.test_openai import Serving, call, serving
from tests.waiting import wait_for

__all__ = ["serving"]  # a fixture


class Prometheus:
    """A real one that scrapes each second, with the rules of `folder`."""

    def __init__(self, folder: Path, targets: dict[str, str]) -> None:
        """`targets`: host:port of each job; other jobs are left out."""
        if not shutil.which("prometheus"):
            pytest.skip("no prometheus here: apt-get install prometheus")
        self.port = free_port()
        config = yaml.safe_load(Path("docker/observe/prometheus/prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(folder / "observe" / "rules" / "*.yml")]
        del config["alerting"]
        config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
        for job in config["scrape_configs"]:
            del job["dns_sd_configs"]
            job["static_configs"] = [{"targets": [targets[job["job_name"]]]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        flags = {
            "config.file": folder / "prometheus.yml",
            "storage.tsdb.path": folder / "data",
            "web.listen-address": f"127.0.0.1:{self.port}",
            "log.level": "warn",
        }
        command = ["prometheus", *(f"--{name}={value}" for name, value in flags.items())]
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def ask(self, path: str, **parameters: str) -> dict[str, Any]:
        """The data of an answer of its API; empty until it is up."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            return json.load(urllib.request.urlopen(url, timeout=60))["data"]
        except urllib.error.URLError as error:
            if isinstance(error, urllib.error.HTTPError) and error.code != 503:  # 503: it is starting
                raise AssertionError(f"{parameters}: {error.read().decode()}") from None
            assert self.process.poll() is None, self.log.read_text()
            return {"result": [], "groups": [], "alerts": []}

    def has(self, query: str) -> bool:
        return any(not math.isnan(float(sample["value"][1])) for sample in self.ask("query", query=query)["result"])

    def rules(self) -> list[dict[str, Any]]:
        return [rule for group in self.ask("rules")["groups"] for rule in group["rules"]]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.mark.slow
def test_every_rule_evaluates_and_every_panel_has_data(tmp_path: Path) -> None:
    with (
        observed(tmp_path) as running,
        running.gateway.client("grpc") as grpc_client,
        running.gateway.client("http") as http_client,
    ):
        write_observed(running.models, tmp_path / "observe")
        ports = {"triton": running.server.metrics_port, "gateway": running.gateway.internal_port}
        prometheus = Prometheus(tmp_path, {job: f"127.0.0.1:{port}" for job, port in ports.items()})
        try:
            rules = wait_for(prometheus.rules, lambda found: found and all(rule["health"] == "ok" for rule in found))
            asked = {rule["name"]: rule["name"] for rule in rules if rule["type"] == "recording"}
            asked |= {f"{title}: {query}": query for title, query in queries(dashboard(running.models))}

            def without_data() -> list[str]:
                for client in (grpc_client, http_client):
                    client.infer("add_one", X)
                return [name for name, query in asked.items() if not prometheus.has(query)]

            wait_for(without_data, [].__eq__)
            assert [rule["name"] for rule in prometheus.rules() if rule.get("alerts")] == []
            running.server.stop()
            pending = wait_for(lambda: prometheus.ask("alerts")["alerts"])
            assert {alert["labels"]["alertname"] for alert in pending} == {"TritonDown"}
        finally:
            prometheus.stop()


@pytest.mark.slow
def test_the_rules_and_panels_of_the_openai_routes_have_data(
    built_sentence: Path, serving: Serving, tmp_path: Path
) -> None:
    models = served_models(built_sentence / "repository", Path("tests/models"))
    write_observed(models, tmp_path / "observe")
    places = {"triton": serving.places["metrics"], "openai": serving.places["OpenAI"]}
    prometheus = Prometheus(tmp_path, {job: urllib.parse.urlsplit(url).netloc for job, url in places.items()})
    first = next(panel["id"] for panel in dashboard(models)["panels"] if panel["title"] == "OpenAI routes")
    row = {"panels": [panel for panel in dashboard(models)["panels"] if first < panel["id"] <= first + 6]}
    asked = {query for _, query in queries(row)} | {"openai:requests:rate5m", "model:openai_requests_slow:ratio_rate5m"}
    try:

        def without_data() -> list[str]:
            call(serving.places["OpenAI"], "POST", "/v1/embeddings", b'{"model": "sentence", "input": ["ab", "abc"]}')
            return [query for query in asked if not prometheus.has(query)]

        wait_for(without_data, [].__eq__)
        assert all(rule["health"] == "ok" for rule in prometheus.rules() if rule["query"].startswith("openai"))
    finally:
        prometheus.stop()

"""A real stack counts its requests in the gateway's metrics, and sends traces with one id."""

from __future__ import annotations

import contextlib
import functools
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient

from cli.main import values_of
from deepseek.spec import InputError
from serving.embedded.flags import main as flags_command
from serving.embedded.flags import trace_flags
from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import ServedModel, served_models
from serving.stack.gateway_limits import limits
from tests.add_one import write_add_one
from tests.conftest import FREE, Refused, RunHere
from tests.fake_kserve import http_answer, http_serving
from tests.gateway import Gateway, free_port, json_body, series_of, skip_without_nginx
from tests.test_onnxruntime_backend import write_fragile
from tests.waiting import wait_for

X = {"x": np.zeros((1, 2, 3), np.float32)}
DEPLOY = """
name = "add_one"
inputs.x = {dtype = "float32", shape = ["batch", 2, "columns"]}
outputs.y = {dtype = "float32", shape = ["batch", 2, "columns"]}
axes.batch = {min = 1, opt = 1, max = 8}
axes.columns = {min = 1, opt = 3, max = 64}
slo = {p99_ms = 5000, max_error_rate = 0.001}
"""
both = pytest.mark.parametrize("protocol", ["http", "grpc"])


@dataclass
class Collector:
    """Receives spans by OTLP over HTTP, as JSON."""

    url: str = ""
    spans: list[dict[str, Any]] = field(default_factory=list)

    def take(self, path: str, body: bytes) -> bytes:
        assert path == "/v1/traces"
        for resource in json.loads(body)["resourceSpans"]:
            self.spans += [span for scope in resource["scopeSpans"] for span in scope["spans"]]
        return http_answer(b"")

    def of_trace(self, trace_id: str) -> dict[str, dict[str, Any]]:
        return {span["name"]: span for span in self.spans if span["traceId"] == trace_id}


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A Triton behind a gateway, and the facts about its model."""

    server: EmbeddedServer
    gateway: Gateway
    models: list[ServedModel]


@contextlib.contextmanager
def observed(folder: Path, trace_url: str = "") -> Iterator[Observed]:
    """Both programs with `add_one` and `fragile`, with limits from a deploy.toml, and `stuck`, without one."""
    skip_without_nginx()
    write_add_one(folder / "repository")
    write_add_one(folder / "repository", "stuck", delay_s=1)
    write_fragile(folder / "repository")
    for name in ("add_one", "fragile"):
        (folder / "models" / name).mkdir(parents=True)
        (folder / "models" / name / "deploy.toml").write_text(DEPLOY.replace("add_one", name))
    models = served_models(folder / "repository", folder / "models")
    flags = trace_flags(trace_url)
    if flags:
        flags.append("--trace-config=opentelemetry,bsp_schedule_delay=200")  # ms; else spans wait for five seconds
    with EmbeddedServer(
        folder / "repository",
        **FREE,
        log_path=folder / "triton.log",
        behind_gateway=True,
        exit_timeout_s=1,
        flags=tuple(flags),
    ) as server:
        gateway = Gateway(folder, limits(models), server.http_url, server.grpc_url)
        try:
            yield Observed(server=server, gateway=gateway, models=models)
        finally:
            gateway.stop()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    made = Collector()
    with http_serving(made.take) as address:
        made.url = f"http://{address}/v1/traces"
        yield made


@pytest.fixture(scope="module")
def traced(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Observed]:
    """A stack that sends its spans there."""
    with observed(tmp_path_factory.mktemp("traced"), collector.url) as running:
        yield running


# ---- the gateway's metrics ------------------------------------------------------------------------


@both
def test_inferences_are_counted_and_timed_by_model(traced: Observed, protocol: str) -> None:
    labels = f'{{protocol="{protocol}",api="infer",model="add_one"'
    count = f"gateway_request_duration_seconds_count{labels}}}"
    with traced.gateway.client(protocol) as client:
        before = traced.gateway.metrics().get(count, 0)
        for _ in range(3):
            client.infer("add_one", X)
    after = wait_for(traced.gateway.metrics, lambda found: found.get(count, 0) >= before + 3)
    assert after[f'gateway_request_duration_seconds_bucket{labels},le="5.0"}}'] > 0


def test_only_answers_of_an_inference_name_a_model(traced: Observed) -> None:
    assert traced.gateway.grpc_status("/inference.GRPCInferenceService/ServerMetadata") == "OK"
    counted = 'gateway_requests_total{protocol="grpc",api="metadata",model="",status="0"}'
    found = wait_for(traced.gateway.metrics, lambda metrics: counted in metrics)
    assert not [series for series in found if 'model="triton"' in series]


def test_what_callers_do_wrong_is_no_failure_of_the_model(traced: Observed) -> None:
    for body in (b"x", json_body(rows=9), json_body().replace(b"FP32", b"INT64"), json_body().replace(b'"x"', b'"z"')):
        status, _ = traced.gateway.http("POST", "/v2/models/add_one/infer", body=body)
        assert status >= 400
    found = series_of(traced.server.metrics_url)
    counts = {
        count for name, count in found.items() if name.startswith('nv_inference_request_failure{model="add_one",')
    }
    assert counts == {0}


# ---- traces ----------------------------------------------------------------------------------------


def traceparent(trace_id: str, flags: str = "01") -> dict[str, str]:
    """The header of a caller with span 00f067aa0ba902b7."""
    return {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-{flags}"}


def traced_call(client: InferenceClient, collector: Collector) -> str:
    """The id of a trace with all its spans. Triton drops spans on a busy machine: then this makes another call."""
    for _ in range(10):
        trace_id = uuid.uuid4().hex
        client.infer("add_one", X, headers=traceparent(trace_id))
        with contextlib.suppress(AssertionError):
            wait_for(functools.partial(collector.of_trace, trace_id), lambda spans: len(spans) == 3, 15)
            return trace_id
    raise AssertionError("no whole trace came")


@both
def test_client_gateway_and_triton_share_a_trace(traced: Observed, collector: Collector, protocol: str) -> None:
    silent = uuid.uuid4().hex
    with traced.gateway.client(protocol) as client:
        client.infer("add_one", X, headers=traceparent(silent, flags="00"))  # not sampled
        trace_id = traced_call(client, collector)
    assert not collector.of_trace(silent)
    spans = collector.of_trace(trace_id)
    assert spans.keys() == {"InferRequest", "add_one", "compute"}
    assert spans["InferRequest"]["parentSpanId"] == "00f067aa0ba902b7"
    assert spans["add_one"]["parentSpanId"] == spans["InferRequest"]["spanId"]
    assert spans["compute"]["parentSpanId"] == spans["add_one"]["spanId"]
    (line,) = traced.gateway.lines(traceparent=traceparent(trace_id)["traceparent"])
    assert line["status"] == 200


@pytest.mark.slow
def test_a_collector_that_is_not_there_costs_no_request(tmp_path: Path) -> None:
    with (
        observed(tmp_path, f"http://127.0.0.1:{free_port()}/v1/traces") as running,
        running.gateway.client("grpc") as client,
    ):
        for _ in range(20):
            assert client.infer("add_one", X, headers=traceparent("8" * 32))["y"].sum() == 6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trace-url", "jaeger:4318"], "TRACE_URL: seen 'jaeger:4318'"),
        (["--trace-url", "http://jaeger:4318", "--trace-every", "-1"], "TRACE_EVERY: seen -1"),
    ],
)
def test_wrong_settings_of_traces_are_one_line(flags: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        flags_command(values_of("flags", *flags))


def test_both_images_take_the_settings_of_traces_from_the_environment(run_here: RunHere, refused: Refused) -> None:
    run = run_here("flags", DEEPSEEK_TRACE_URL="http://jaeger:4318/v1/traces", DEEPSEEK_TRACE_EVERY="100")
    assert run.stdout.splitlines()[-5:] == trace_flags("http://jaeger:4318/v1/traces", 100)
    refused("serve", "--profile", "/tmp/nowhere", DEEPSEEK_TRACE_URL="http://jaeger:4318/v1/traces")

"""What the stack tells of itself, for real: the gateway's metrics, traces with one id."""

from __future__ import annotations

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography import x509
from deepseek_client import InferenceClient
from tritonclient.utils import InferenceServerException

from serving.embedded import EmbeddedServer
from serving.flags import trace_flags
from serving.served import Served, served_models
from serving.stack import limits
from tests.conftest import run_module, write_add_one
from tests.gateway import Gateway, authorized, free_port, grpc_input, json_body, skip_without_nginx
from tests.test_onnxruntime_backend import write_fragile

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


class Collector(http.server.ThreadingHTTPServer):
    """Takes spans by OTLP over HTTP, as JSON, on loopback."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.spans: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where spans go."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def of_trace(self, trace_id: str, wait_s: float = 10) -> dict[str, dict[str, Any]]:
        """The spans of a trace by name, once the outermost has come, which is sent last."""
        deadline = time.monotonic() + wait_s
        while True:
            found = {span["name"]: span for span in self.spans if span["traceId"] == trace_id}
            if "InferRequest" in found or time.monotonic() > deadline:
                return found
            time.sleep(0.05)


class _Receiver(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Collector

    def do_POST(self) -> None:
        received = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/traces"
        for resource in received["resourceSpans"]:
            self.server.spans += [span for scope in resource["scopeSpans"] for span in scope["spans"]]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """A Triton behind a gateway, and what is known of its model."""

    server: EmbeddedServer
    gateway: Gateway
    models: list[Served]

    def client(self, protocol: str) -> InferenceClient:
        """As an application has it."""
        ca_cert = str(self.gateway.folder / "ca.crt")
        return InferenceClient(f"localhost:{self.gateway.port}", protocol, ca_cert=ca_cert, api_key=self.gateway.key)  # type: ignore[arg-type]

    def metrics(self) -> dict[str, float]:
        """The gateway's own, by series."""
        url = f"http://127.0.0.1:{self.gateway.internal_port}/metrics"
        lines = urllib.request.urlopen(url).read().decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


@contextlib.contextmanager
def observed(folder: Path, trace_url: str = "") -> Iterator[Observed]:
    """Both programs over `add_one` and `fragile`, with limits from a deploy.toml, and `stuck`, which has none."""
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
        http_port=0,
        grpc_port=0,
        metrics_port=0,
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
    """A collector for the module."""
    with Collector() as running:
        yield running
        running.shutdown()


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
    with traced.client(protocol) as client:
        before = traced.metrics().get(count, 0)
        for _ in range(3):
            client.infer("add_one", X)
    after = wait_for(traced.metrics, lambda found: found.get(count, 0) >= before + 3)
    assert after[f'gateway_request_duration_seconds_bucket{labels},le="5.0"}}'] > 0


def wait_for(ask: Callable[[], Any], holds: Callable[[Any], bool], wait_s: float = 5) -> Any:
    """What `ask` gives, once it is so: a request is counted after its answer."""
    deadline = time.monotonic() + wait_s
    while not holds(found := ask()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def test_only_answers_of_an_inference_name_a_model(traced: Observed) -> None:
    assert traced.gateway.grpc_status("/inference.GRPCInferenceService/ServerMetadata") == "OK"
    counted = 'gateway_requests_total{protocol="grpc",api="metadata",model="",status="0"}'
    found = wait_for(traced.metrics, lambda metrics: counted in metrics)
    assert not [series for series in found if 'model="triton"' in series]


def test_a_caller_that_gave_up_is_timed_without_a_model(traced: Observed) -> None:
    series = 'gateway_request_duration_seconds_count{protocol="grpc",api="infer",model=""}'
    before = traced.metrics().get(series, 0)
    with traced.gateway.grpc_client() as client, pytest.raises(InferenceServerException, match="DEADLINE_EXCEEDED"):
        client.infer("stuck", grpc_input(), client_timeout=0.2, headers=authorized(traced.gateway.key))
    wait_for(traced.metrics, lambda found: found.get(series, 0) == before + 1)


def test_what_callers_do_wrong_is_no_failure_of_the_model(traced: Observed) -> None:
    wrong = [
        b"{}",
        b"x",
        json_body(rows=9),
        json_body().replace(b"FP32", b"INT64"),
        json_body().replace(b'"x"', b'"z"'),
    ]
    for body in wrong:
        status, _ = traced.gateway.http("POST", "/v2/models/add_one/infer", body=body)
        assert status >= 400
    text = urllib.request.urlopen(traced.server.metrics_url).read().decode()
    counts = re.findall(r'^nv_inference_request_failure\{model="add_one",.*\} (\d+)$', text, re.MULTILINE)
    assert counts
    assert set(counts) == {"0"}


def test_the_gateway_says_when_its_certificate_ends(traced: Observed) -> None:
    certificate = x509.load_pem_x509_certificate((traced.gateway.folder / "tls.crt").read_bytes())
    told = traced.metrics()["gateway_certificate_expiry_timestamp_seconds"]
    assert told == certificate.not_valid_after_utc.timestamp()


# ---- traces ----------------------------------------------------------------------------------------


def traceparent(trace_id: str, flags: str = "01") -> dict[str, str]:
    """The header of a caller whose own span is 00f067aa0ba902b7."""
    return {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-{flags}"}


@both
def test_client_gateway_and_triton_share_a_trace(traced: Observed, collector: Collector, protocol: str) -> None:
    trace_id = {"http": "4bf92f3577b34da6a3ce929d0e0e4736", "grpc": "7d3b92f3577b34da6a3ce929d0e0e473"}[protocol]
    with traced.client(protocol) as client:
        client.infer("add_one", X, headers=traceparent(trace_id))
    spans = collector.of_trace(trace_id)
    assert spans.keys() == {"InferRequest", "add_one", "compute"}
    assert spans["InferRequest"]["parentSpanId"] == "00f067aa0ba902b7"
    assert spans["add_one"]["parentSpanId"] == spans["InferRequest"]["spanId"]
    assert spans["compute"]["parentSpanId"] == spans["add_one"]["spanId"]
    (line,) = traced.gateway.lines(traceparent=traceparent(trace_id)["traceparent"])
    assert line["status"] == 200


@both
def test_a_trace_that_is_not_sampled_costs_triton_nothing(
    traced: Observed, collector: Collector, protocol: str
) -> None:
    silent, told = "5" * 32, {"http": "6" * 32, "grpc": "7" * 32}[protocol]
    with traced.client(protocol) as client:
        client.infer("add_one", X, headers=traceparent(silent, flags="00"))
        client.infer("add_one", X)
        client.infer("add_one", X, headers=traceparent(told))
    assert collector.of_trace(told)
    assert not collector.of_trace(silent, wait_s=0)


def test_a_collector_that_is_not_there_costs_no_request(tmp_path: Path) -> None:
    with observed(tmp_path, f"http://127.0.0.1:{free_port()}/v1/traces") as running, running.client("grpc") as client:
        for _ in range(20):
            assert client.infer("add_one", X, headers=traceparent("8" * 32))["y"].sum() == 6


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--trace-url", "jaeger:4318"], "error: TRACE_URL: seen 'jaeger:4318'"),
        (["--trace-url", "http://jaeger:4318", "--trace-every", "-1"], "error: TRACE_EVERY: seen -1"),
    ],
)
def test_wrong_settings_of_traces_are_one_line(flags: list[str], said: str) -> None:
    run = run_module("serving.flags", *flags)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith(said)


def test_both_images_take_the_settings_of_traces_from_the_environment() -> None:
    run = run_module("serving.flags", TRACE_URL="http://jaeger:4318/v1/traces", TRACE_EVERY="100")
    assert run.stdout.splitlines()[-5:] == trace_flags("http://jaeger:4318/v1/traces", 100)
    run = run_module("serving.embedded", "--profile", "/tmp/nowhere", TRACE_URL="http://jaeger:4318/v1/traces")
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)

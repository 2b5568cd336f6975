"""The split of a mean request's time between Triton, and client and network; the padding of texts."""

from __future__ import annotations

import json
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient

from loadtests.load import padding_counters
from loadtests.load.server_statistics import difference, fetch
from loadtests.slo.time_split import TimeSplit
from serving.embedded.launcher import EmbeddedServer
from tests.conftest import RunHere
from tests.saved_runs import saved_run, steady
from tests.test_report import STATISTICS


def split_of(statistics: dict[str, Any], **latencies_ms: float) -> TimeSplit:
    split = TimeSplit.of(statistics, **latencies_ms)
    assert split is not None
    return split


def test_the_parts_and_the_rest_add_up_to_the_clients_latency_and_a_sentence_explains_them() -> None:
    split = split_of(STATISTICS, service_ms=60.0)
    parts = {"queue": 2.0, "compute_input": 0.1, "compute_infer": 6.5, "compute_output": 0.4}
    assert split.parts == pytest.approx(parts)
    assert (split.outside, split.total, split.late) == (pytest.approx(51.0), pytest.approx(60.0), 0.0)
    assert split.sentence.startswith(
        "A mean request took 60.0 ms: 6.50 ms in the model, 2.00 ms in Triton's queue, 0.50 ms handing tensors over "
        "and 51.0 ms in client, network and Triton's front end. The largest part, 85%, is in client, network"
    )


def test_a_late_send_is_named_if_it_matters() -> None:
    late = split_of(STATISTICS, service_ms=10.0, intended_ms=15.0)
    assert "it was sent 5.00 ms after its planned time" in late.account
    assert "planned" not in split_of(STATISTICS, service_ms=10.0, intended_ms=10.2).account


@pytest.mark.parametrize(
    ("statistics", "service_ms"),
    [({}, 10.0), ({**STATISTICS, "success": {"count": 0, "ns": 0}}, 10.0), (STATISTICS, float("nan"))],
)
def test_unknown_times_are_not_split(statistics: dict[str, Any], service_ms: float) -> None:
    assert TimeSplit.of(statistics, service_ms=service_ms) is None


def test_counters_that_a_restart_has_set_back_are_unknown() -> None:
    before, after = ({"1": Counter({"success.count": n, "queue.ns": ns})} for n, ns in ((1000, 9_000), (1500, 8_000)))
    assert difference(before, after) == {}
    assert difference({}, after)["success"]["count"] == 1500  # a version that was loaded between the two


@pytest.mark.parametrize("models", [None, [5], [{"version": "1", "inference_count": "many"}]])
def test_statistics_of_another_kind_are_unknown(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(InferenceClient, "model_statistics", lambda *_: {"model_stats": models})
    assert fetch("127.0.0.1:9", "http", "m") is None


def test_a_real_servers_delay_lies_in_the_model(server: EmbeddedServer) -> None:
    before = fetch(server.grpc_url, "grpc", "slow")
    with InferenceClient(server.grpc_url) as client:
        for _ in range(2):
            client.infer("slow", {"x": np.ones((1, 2, 1), np.float32)})
    split = split_of(difference(before, fetch(server.grpc_url, "grpc", "slow")), service_ms=300.0)
    assert split.parts["compute_infer"] >= 200
    assert split.total >= sum(split.parts.values())


def test_the_verdict_says_where_the_time_goes(tmp_path: Path, run_here: RunHere) -> None:
    server = {"version": "3", "statistics": STATISTICS}
    saved_run(tmp_path, steady(0.06), server=server, model="recommender", url="127.0.0.1:8001")
    arguments = ("verdict", "--run", str(tmp_path))
    told = " ".join(run_here(*arguments).stdout.split())
    assert "A mean request took 60.0 ms: 6.50 ms in the model" in told
    found = json.loads(run_here(*arguments, "--json").stdout)["where_time_goes_ms"]
    assert found["outside"] == pytest.approx(51.0, rel=2e-3)


# ---- padding of texts ------------------------------------------------------------------------------


def test_the_tokens_of_all_versions_of_a_model_count(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "# TYPE onnxruntime_text_tokens counter",
        'onnxruntime_text_tokens{model="m",version="1"} 100',
        'onnxruntime_text_tokens{model="m",version="2"} 2e+02',
        'onnxruntime_text_padded_tokens{model="m",version="2"} 330',
        'onnxruntime_text_tokens{model="another",version="1"} 7',
    ]
    monkeypatch.setattr(padding_counters._OPENER, "open", lambda *_, **__: BytesIO("\n".join(lines).encode()))
    assert padding_counters.fetch("127.0.0.1:8002", "m") == {"text_tokens": 300, "text_padded_tokens": 330}


def test_tokens_that_are_unknown_before_or_after_are_left_out() -> None:
    tokens = [Counter({"text_tokens": n, "text_padded_tokens": 2 * n}) for n in (100, 300)]
    assert padding_counters.difference(*tokens) == {"text_tokens": 200, "text_padded_tokens": 400}
    for before, after in ((Counter[str](), tokens[1]), (tokens[0], Counter[str]()), tokens[::-1], (tokens[0],) * 2):
        assert padding_counters.difference(before, after) == {}
    assert padding_counters.fetch("127.0.0.1:9", "m") == padding_counters.fetch(None, "m") == {}

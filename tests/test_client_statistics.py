"""The client's statistics."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from deepseek_client import InferenceClient, InferenceError
from deepseek_client.statistics import MOST_MODELS, OTHERS, Counters, Histogram

from serving.embedded.launcher import EmbeddedServer
from tests.failing_servers import X, protocols, url_of
from tests.fake_kserve import SIGNATURE, binary, http_answer, http_json, http_serving


def test_percentiles_are_within_one_percent() -> None:
    latencies_s = np.random.default_rng(0).lognormal(-5, 1, 20_000)
    histogram = Histogram()
    for latency_s in latencies_s.tolist():
        histogram.record(latency_s)
    for percent in (1, 50, 90, 99, 99.9):
        expected_ms = np.percentile(latencies_s, percent) * 1000
        assert histogram.percentile_ms(percent) == pytest.approx(expected_ms, rel=0.012)
    assert Histogram().percentile_ms(50) is None


def test_names_of_users_do_not_grow_the_counters() -> None:
    counters = Counters()
    for number in range(2 * MOST_MODELS):
        counters.of(f"name {number}").failed(ValueError())
        if number in (0, MOST_MODELS + 1):
            counters.of(f"name {number}").answered(0.1)
    told = counters.statistics()
    assert len(told) <= MOST_MODELS + 1
    assert told["name 0"].calls == told[f"name {MOST_MODELS + 1}"].calls == 2  # real models keep their own
    assert sum(model.errors["ValueError"] for model in told.values()) == 2 * MOST_MODELS
    full = Counters()
    for number in range(MOST_MODELS + 2):
        full.of(f"name {number}").answered(0.1)
    assert full.statistics()[OTHERS].calls == 2


@protocols
def test_a_client_counts_its_calls_and_errors_by_model(server: EmbeddedServer, protocol: Any) -> None:
    with InferenceClient(url_of(server, protocol), protocol, timeout_s=60) as client:
        for _ in range(3):
            client.infer("add_one", {"x": X})
        client.infer("slow", {"x": X})
        with pytest.raises(InferenceError):
            client.infer("slow", {"x": X}, timeout_s=0.05)
        with pytest.raises(InferenceError):
            client.infer("absent", {"x": X})
        told = client.statistics()
    assert set(told.models) == {"add_one", "slow"}  # unknown names are not counted
    assert (told.models["add_one"].calls, told.models["add_one"].errors) == (3, {})
    assert (told.models["slow"].calls, told.models["slow"].errors) == (2, {"DeadlineExceeded": 1})
    p50_ms, p99_ms = told.models["slow"].p50_ms, told.models["slow"].p99_ms
    assert p50_ms is not None
    assert p99_ms is not None
    assert 195 < p50_ms <= p99_ms
    assert told.replicas == {url_of(server, protocol): True}


def test_the_metadata_of_each_model_is_fetched_once_if_there_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_client.core.MOST_METADATA", 2)
    fetched: list[str] = []

    def answer(path: str, body: bytes) -> bytes | None:
        if path.endswith("/infer"):
            return http_json({"outputs": [binary()]}, np.arange(3, dtype=np.float32).tobytes())
        if path.count("/") != 3:
            return http_answer(b"", status="404 Not Found")
        fetched.append(path)
        return http_json({**SIGNATURE, "name": path.rpartition("/")[2]})

    with http_serving(answer) as url, InferenceClient(url, "http") as client:
        for model in ("a", "b", "a", "b", "c", "a"):
            client.infer(model, {"x": np.ones((1, 3), np.float32)})
    assert fetched == [f"/v2/models/{model}" for model in "abca"]

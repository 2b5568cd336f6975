"""Shadow traffic: what makes the new version fail."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from deepseek_client import ServerBusy, ServerError

from loadtests.release.shadow_load import Differences, Shadow, judged


class Answers:
    """Stands in for a client: returns `outputs` for every request."""

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = outputs

    def prepare(self, model: str, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return row

    def send(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs


@pytest.mark.parametrize(
    ("new", "failure"),
    [
        ({"y": np.array([1.0, np.nan])}, "has a NaN or Inf where base has a number"),
        ({"y": np.array([1, 2])}, "is int64 [2], base's float64 [2]"),
        ({"z": np.array([1.0, 2.0])}, "returns the outputs z, base returns y"),
    ],
    ids=["nan", "type", "name"],
)
def test_outputs_that_callers_cannot_take_fail(new: dict[str, np.ndarray], failure: str) -> None:
    clients: Any = {"base": Answers({"y": np.array([1.0, 2.0])}), "new": Answers(new)}
    shadow = Shadow("text", clients, [{}])
    shadow.run(20)
    assert failure in judged(shadow, 0.1)["failures"][0]


@pytest.mark.parametrize(("refusals", "verdict"), [(3, "holds"), (30, "inconclusive")], ids=["a while", "longer"])
def test_requests_refused_as_busy_are_retried_and_never_fail_a_version(
    refusals: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(Answers):
        def send(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal refusals
            refusals -= 1
            if refusals >= 0:
                raise ServerBusy("Request timeout expired")
            return self.outputs

    monkeypatch.setattr("loadtests.release.shadow_load.BUSY_PAUSE_S", 0)
    outputs = {"y": np.array([1.0])}
    clients: Any = {"base": Answers(outputs), "new": Busy(outputs)}
    shadow = Shadow("text", clients, [{}])
    shadow.run(220)
    found = judged(shadow, 1e9)
    assert (found["verdict"], found["failures"]) == (verdict, [])


def test_a_baseline_that_fails_makes_the_comparison_inconclusive() -> None:
    sent = 0

    class Failing(Answers):
        def send(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal sent
            sent += 1
            if sent == 100:
                raise ServerError("out of memory")
            return self.outputs

    outputs = {"y": np.array([1.0])}
    clients: Any = {"base": Failing(outputs), "new": Answers(outputs)}
    shadow = Shadow("text", clients, [{}])
    shadow.run(300)
    found = judged(shadow, 1e9)
    assert found["verdict"] == "inconclusive"
    assert "1 requests failed on base" in found["note"]


@pytest.mark.parametrize(
    ("times", "count", "verdict"),
    [(1.0, 1000, "holds"), (1.4, 1000, "fails"), (1.1, 1000, "inconclusive"), (1.0, 100, "inconclusive")],
    ids=["the same", "slower", "at the threshold", "too few"],
)
def test_the_whole_interval_of_the_median_decides(times: float, count: int, verdict: str) -> None:
    generator = np.random.default_rng(0)
    shadow = Shadow("text", {}, [])
    shadow.latencies_ms = {
        side: list(generator.lognormal(0, 0.3, count) * factor) for side, factor in (("base", 1.0), ("new", times))
    }
    found = judged(shadow, 0.1)
    assert found["verdict"] == verdict
    json.dumps(found, allow_nan=False)


def test_differences_between_versions_are_reported() -> None:
    found = Differences()
    found.add(np.array([[1.0, 2.0]]), np.array([[1.0, 2.5]]))
    found.add(np.array([[np.inf, 2.0]]), np.array([[np.inf, 2.0]]))
    figures = found.figures()
    assert (figures["worst_error"], figures["same"]) == (0.5, 0.75)

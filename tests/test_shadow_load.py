"""Shadow traffic: what makes the new version fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import ServerBusy, ServerError

from cli.main import values_of
from deepseek.spec import InputError
from loadtests.release.shadow_load import Differences, Shadow, judged, main


class Answers:
    """Stands in for a client: returns `outputs`, or raises what `fails` gives for the number of the request."""

    def __init__(
        self, outputs: dict[str, np.ndarray], fails: Callable[[int], Exception | None] = lambda sent: None
    ) -> None:
        self.outputs, self.fails, self.sent = outputs, fails, 0

    def prepare(self, model: str, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return row

    def send(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.sent += 1
        if (error := self.fails(self.sent)) is not None:
            raise error
        return self.outputs


ONE = {"y": np.array([1.0, 2.0])}


def found(base: Answers, new: Answers, count: int = 220) -> dict[str, Any]:
    clients: Any = {"base": base, "new": new}
    shadow = Shadow("text", clients, [{}])
    shadow.run(count)
    return judged(shadow, 1e9)


@pytest.mark.parametrize(
    ("new", "failure"),
    [
        ({"y": np.array([1.0, np.nan])}, "has a NaN or Inf where base has a number"),
        ({"y": np.array([1, 2])}, "is int64 [2], base's float64 [2]"),
        ({"z": np.array([1.0, 2.0])}, "returns the outputs z, base returns y"),
    ],
)
def test_outputs_that_callers_cannot_take_fail(new: dict[str, np.ndarray], failure: str) -> None:
    assert failure in found(Answers(ONE), Answers(new), 20)["failures"][0]


@pytest.mark.parametrize(("refusals", "verdict"), [(3, "holds"), (30, "inconclusive")])
def test_requests_refused_as_busy_are_retried_and_never_fail_a_version(
    refusals: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtests.release.shadow_load.BUSY_PAUSE_S", 0)
    busy = Answers(ONE, lambda sent: ServerBusy("Request timeout expired") if sent <= refusals else None)
    result = found(Answers(ONE), busy)
    assert (result["verdict"], result["failures"]) == (verdict, [])


def test_a_baseline_that_fails_makes_the_comparison_inconclusive() -> None:
    failing = Answers(ONE, lambda sent: ServerError("out of memory") if sent == 100 else None)
    result = found(failing, Answers(ONE), 300)
    assert (result["verdict"], "1 requests failed on base" in result["note"]) == ("inconclusive", True)


@pytest.mark.parametrize(
    ("times", "count", "verdict"),
    [(1.0, 1000, "holds"), (1.4, 1000, "fails"), (1.1, 1000, "inconclusive"), (1.0, 100, "inconclusive")],
)
def test_the_whole_interval_of_the_median_decides(times: float, count: int, verdict: str) -> None:
    generator = np.random.default_rng(0)
    shadow = Shadow("text", {}, [])
    shadow.latencies_ms = {
        side: list(generator.lognormal(0, 0.3, count) * factor) for side, factor in (("base", 1.0), ("new", times))
    }
    result = judged(shadow, 0.1)
    assert result["verdict"] == verdict
    json.dumps(result, allow_nan=False)


def test_differences_between_versions_are_reported() -> None:
    both = Differences()
    both.add(np.array([[1.0, 2.0]]), np.array([[1.0, 2.5]]))
    both.add(np.array([[np.inf, 2.0]]), np.array([[np.inf, 2.0]]))
    assert both.figures() == {"worst_error": 0.5, "same": 0.75}


def test_a_wrong_address_is_bad_input(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **{"00000/ids": np.ones((1, 3))})  # type: ignore[arg-type]
    words = ("--model", "text", "--models", "tests/models", "--inputs", str(tmp_path / "rows.npz"))
    with pytest.raises(InputError, match="must be host:port"):
        main(values_of("shadow-load", *words, "--base-url", "nowhere", "--new-url", "127.0.0.1:9"))

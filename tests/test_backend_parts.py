"""The Python backend runs a batch in parts, and answers each request when its last row is computed."""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import deepseek
import serving.backend


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend's module, with a stand-in for Triton's that returns what it gets."""
    names = ("onnxruntime_backend", "bulk_requests", "compute_slots", "model_inputs", "onnxruntime_session")
    stub = SimpleNamespace(
        InferenceResponse=lambda tensors=(), error=None: error or dict(tensors),
        Tensor=SimpleNamespace(from_dlpack=lambda name, _: name),
        TritonError=lambda reason, code: f"{code}: {reason}",
    )
    stub.TritonError.INVALID_ARG = "INVALID_ARG"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)
    for package in (serving.backend, deepseek):
        monkeypatch.syspath_prepend(str(Path(str(package.__file__)).parent))
    module = importlib.import_module("onnxruntime_backend")
    monkeypatch.setattr(module, "_tensor", lambda name, array: (name, array.tolist()))
    yield module
    for name in names:
        sys.modules.pop(name, None)


class Request:
    """A request with the input x, one column, that asks for y alone."""

    def __init__(self, *rows: float) -> None:
        self.x = np.array(rows, np.float32).reshape(-1, 1)

    def inputs(self) -> list[Any]:
        return [
            SimpleNamespace(name=lambda: "x", __dlpack__=self.x.__dlpack__, __dlpack_device__=self.x.__dlpack_device__)
        ]

    def requested_output_names(self) -> list[str]:
        return ["y"]

    def get_response_sender(self) -> Any:
        return self


def model_of(backend: Any, run_rows: int, folder: Path) -> Any:
    """y = x + 1 and z = x, which fail if a row is negative; `ran` lists the rows of each run."""
    model = backend.TritonPythonModel()
    model.text, model.vocabulary, model.inputs, model.outputs, model.ran = None, None, ["x"], ["y", "z"], []

    def run(feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        model.ran.append(len(feed["x"]))
        if (feed["x"] < 0).any():
            raise backend.InvalidArgument("negative")
        return [feed["x"] + 1, feed["x"]]

    model._results, model.model_inputs = run, backend.ModelInputs(str(folder), run_rows, None)
    return model


def test_a_request_is_answered_when_its_last_row_is_computed(backend: Any, tmp_path: Path) -> None:
    model = model_of(backend, 2, tmp_path)
    found = list(model._responses([Request(1, 2, 3), Request(4), Request(5, 6)], model._results))
    assert found == [{}, {0: {"y": [[2], [3], [4]]}, 1: {"y": [[5]]}}, {2: {"y": [[6], [7]]}}]
    assert model.ran == [2, 2, 2]


@pytest.mark.parametrize("returns", [True, False])
def test_execute_returns_the_answers_of_the_last_part_if_the_batcher_is_woken_in_time(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, returns: bool
) -> None:
    monkeypatch.setattr(backend, "RETURNS", returns)
    model, bulk = model_of(backend, 2, tmp_path), Request(9)
    model.answers, model.no_online = SimpleQueue(), threading.Event()
    model.bulk = SimpleNamespace(take=lambda request: request is bulk)
    first, second, third = requests = [Request(1, 2), Request(3), Request(4)]
    returned = model.execute([first, bulk, second, third])
    sent = dict[Request, Any]()
    while not model.answers.empty():
        sent |= dict(zip(*model.answers.get(), strict=True))
    answers = {first: {"y": [[2], [3]]}, second: {"y": [[4]]}, third: {"y": [[5]]}}
    assert returned == ([None, None, answers[second], answers[third]] if returns else [None] * 4)
    assert sent == {request: answers[request] for request in (requests[:1] if returns else requests)}


def test_rows_run_in_equal_parts_that_are_not_smaller_than_asked_for(backend: Any, tmp_path: Path) -> None:
    for run_rows, ran in ((3, [3, 3, 3]), (4, [4, 5]), (5, [9]), (0, [9])):
        model = model_of(backend, run_rows, tmp_path)
        (*_, last) = model._responses([Request(*range(9))], model._results)
        assert (model.ran, last) == (ran, {0: {"y": [[each] for each in range(1, 10)]}})


def test_only_the_bad_request_of_a_part_fails_and_no_other_runs_twice(backend: Any, tmp_path: Path) -> None:
    model = model_of(backend, 2, tmp_path)
    answers: dict[int, Any] = {}
    for found in model._responses([Request(1), Request(2), Request(-3), Request(4)], model._results):
        assert not answers.keys() & found.keys()
        answers |= found
    assert answers.pop(2) == "INVALID_ARG: inference failed: negative"
    assert answers == {0: {"y": [[2]]}, 1: {"y": [[3]]}, 3: {"y": [[5]]}}
    assert model.ran == [2, 2, 1, 1]


def test_a_request_of_several_parts_is_answered_beside_one_that_fails(backend: Any, tmp_path: Path) -> None:
    model = model_of(backend, 2, tmp_path)
    answers: dict[int, Any] = {}
    for found in model._responses([Request(-1), Request(2, 3, 4, 5)], model._results):
        answers |= found
    assert answers == {0: "INVALID_ARG: inference failed: negative", 1: {"y": [[3], [4], [5], [6]]}}
    assert model.ran == [2, 1, 2, 2]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_batch_outside_the_profile_is_refused_and_not_joined_with_others(
    backend: Any, tmp_path: Path, rows: int
) -> None:
    manifest = {"axes": {"batch": {"min": 4, "max": 4}}, "inputs": {"x": {"shape": ["batch", 1]}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    model = model_of(backend, 0, tmp_path)
    answers: dict[int, Any] = {}
    for found in model._responses([Request(*range(rows)), Request(*range(4))], model._results):
        answers |= found
    assert answers[0] == f"INVALID_ARG: x: axis batch is {rows}; allowed: 4"
    assert (model.ran, answers[1]) == ([4], {"y": [[1], [2], [3], [4]]})


def test_two_threads_never_increment_a_counter_at_once(backend: Any) -> None:
    """Triton's Python backend would free the memory of the message twice."""
    inside, most = [], []

    def increment(number: int) -> None:
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()

    metric = SimpleNamespace(increment=increment)
    family = SimpleNamespace(Metric=lambda labels: metric)
    backend.pb_utils.MetricFamily = type("MetricFamily", (), {"COUNTER": 0, "__new__": lambda *_, **__: family})
    count = backend._counts({"failures": "", "tokens": ""}, {"model_name": "a", "model_version": "1"})
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: count(1, 2), range(8)))
    assert most == [1] * 16

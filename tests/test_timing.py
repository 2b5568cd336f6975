"""Timing in turn: the same rule for ONNX Runtime on a CPU and for engines, which need a stand-in here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from deepseek.spec import DeploymentSpec
from export.runtimes import tensorrt_predictor, timing, variants
from export.runtimes.tensorrt_engine import engine_from_onnx
from export.runtimes.tensorrt_predictor import RUNS, tensorrt_timers
from export.runtimes.timing import clocks, compared, time_interleaved, wall
from export.runtimes.variants import variant_timers
from tests.stand_ins import install_tensorrt
from tests.test_tensorrt_container import program

IMAGE = DeploymentSpec.load("tests/models/image")


@pytest.mark.parametrize(("slow_s", "rounds"), [(0.25, 10), (1.0, 9), (0.0, 300)], ids=["3 s", "least", "most"])
def test_each_round_times_all_calls_for_three_seconds_within_bounds_in_changing_order(
    slow_s: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, calls = 0.0, ""

    def takes(name: str, seconds: float) -> None:
        nonlocal now_s, calls
        now_s, calls = now_s + seconds, calls + name

    clock = SimpleNamespace(perf_counter=lambda: now_s, monotonic=lambda: now_s)
    monkeypatch.setattr(timing, "time", clock)
    timers = {"a": wall(lambda: takes("a", slow_s)), "b": wall(lambda: takes("b", slow_s / 4))}
    assert time_interleaved(timers) == {"a": [slow_s] * rounds, "b": [slow_s / 4] * rounds}
    each = [calls[at : at + 2] for at in range(0, len(calls), 2)]
    assert (len(each), set(each)) == (rounds + 1, {"ab", "ba"})  # the first round is not timed


@pytest.mark.parametrize(
    ("own", "result", "ratio"),
    [
        ([0.5] * 6 + [2.0] * 2, "faster", 2.0),
        ([0.5] * 5 + [2.0] * 3, "not distinguishable", 2.0),
        ([2.0] * 6 + [0.5] * 2, "slower", 0.5),
        ([1.0] * 8, "not distinguishable", 1.0),
    ],
)
def test_a_variant_is_faster_or_slower_only_if_it_is_in_three_of_four_rounds(
    own: list[float], result: str, ratio: float
) -> None:
    found = compared(own, [1.0] * 8)
    assert (found.result, found.ratio) == (result, ratio)


def test_an_engine_in_a_stand_in_for_tensorrt_is_timed_apart_from_its_copies(
    build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, _ = engine_from_onnx(install_tensorrt(monkeypatch), build / "image" / "fp32" / "model.onnx", IMAGE)
    (tmp_path / "model.plan").write_bytes(plan)
    ran, copied = MagicMock(), MagicMock()
    monkeypatch.setattr(tensorrt_predictor, "_execute", ran)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    run, copy = tensorrt_timers(IMAGE, tmp_path / "model.plan", {"pixels": np.zeros((4, 3, 32, 32), np.float32)})
    assert (run() > 0, ran.call_count, copied.call_count) == (True, RUNS, 0)
    assert (copy() > 0, ran.call_count, copied.call_count) == (True, RUNS, 3 * RUNS)  # one input and two outputs


def test_with_fake_timers_engines_are_timed_on_their_gpu_and_graphs_by_the_whole_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_gpu = (lambda: 2.0, lambda: 1.0)
    monkeypatch.setattr(variants, "tensorrt_timers", lambda *_: on_gpu)
    assert variant_timers(IMAGE, "fp16", "tensorrt", lambda row: row, {}) == on_gpu
    ran: list[Any] = []
    run, copies = variant_timers(IMAGE, "fp16", "onnxruntime", ran.append, {})  # type: ignore[arg-type]
    run()
    assert (ran, copies) == ([{}], None)


def test_the_clocks_of_the_gpu_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program(tmp_path, "nvidia-smi", "echo '1410 MHz, 1593 MHz, 1980 MHz, 2619 MHz, 0x0000000000000004'")
    told = "SM 1410 MHz of 1980 MHz, memory 1593 MHz of 2619 MHz, throttle reasons 0x0000000000000004"
    assert clocks() == told
    program(tmp_path, "nvidia-smi", "exit 9")
    assert clocks() == ""

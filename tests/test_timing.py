"""Timing in turn: the same rule for ONNX Runtime on a CPU and for engines, whose CUDA calls need a fake here."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from deepseek.spec import DeploymentSpec
from export.runtimes import timing, variants
from export.runtimes.onnxruntime_predictor import onnx_predictor
from export.runtimes.tensorrt_predictor import RUNS, tensorrt_timers
from export.runtimes.timing import clocks, compared, time_interleaved, wall
from export.runtimes.variants import variant_timers
from tests.test_tensorrt_container import program

IMAGE = DeploymentSpec.load("tests/models/image")


@pytest.mark.parametrize(("slow_s", "rounds"), [(0.25, 10), (1.0, 9), (0.0, 300)], ids=["3 s", "least", "most"])
def test_calls_are_timed_in_turn_for_three_seconds_within_bounds(
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
    assert calls == "ab" * (rounds + 1)  # the first round is not timed


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


def test_a_graph_in_onnx_runtime_is_slower_with_a_batch_many_times_larger(build: Path) -> None:
    run = onnx_predictor(IMAGE, build / "image" / "fp32" / "model.onnx", "onnxruntime")
    small, large = ({"pixels": np.zeros((batch, 3, 32, 32), np.float32)} for batch in (1, 256))
    seconds = time_interleaved({"small": wall(lambda: run(small)), "large": wall(lambda: run(large))})
    assert compared(seconds["large"], seconds["small"]).result == "slower"


class FakeGpu:
    """A fake of the CUDA calls of torch: a clock that a run advances by 2 ms and a copy by 1 ms."""

    def __init__(self) -> None:
        self.now_ms = 0.0

    def advance(self, by_ms: float) -> bool:
        """Some work on the GPU."""
        self.now_ms += by_ms
        return True

    def event(self, enable_timing: bool) -> Any:
        """An event that reads the clock when it is recorded."""
        event = SimpleNamespace(at_ms=0.0, synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "at_ms", self.now_ms)
        event.elapsed_time = lambda end: end.at_ms - event.at_ms
        return event

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replaces torch's CUDA calls."""
        for name in ("Stream", "current_stream", "stream"):
            monkeypatch.setattr(torch.cuda, name, MagicMock())
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        empty = torch.empty
        monkeypatch.setattr(torch, "empty", lambda shape, dtype, device: empty(shape, dtype=dtype))
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())
        monkeypatch.setattr(torch.Tensor, "copy_", lambda tensor, other, non_blocking: self.advance(1))


def test_with_a_fake_of_cuda_runs_and_copies_are_timed_apart_by_events_over_the_same_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, bound = FakeGpu(), []
    gpu.install(monkeypatch)
    context = MagicMock(execute_async_v3=lambda stream: gpu.advance(2))
    context.set_tensor_address = lambda name, address: bound.append(address)
    context.get_tensor_shape = {"scores": (4, 10), "features": (4, 3)}.__getitem__
    engine = MagicMock(create_execution_context=lambda: context)
    runtime = MagicMock(deserialize_cuda_engine=lambda plan: engine)
    monkeypatch.setitem(sys.modules, "tensorrt", MagicMock(Runtime=lambda logger: runtime))
    (tmp_path / "model.plan").write_bytes(b"ptrt")
    run, copy = tensorrt_timers(IMAGE, tmp_path / "model.plan", {"pixels": np.zeros((4, 3, 32, 32), np.float32)})
    assert [run(), copy(), run()] == pytest.approx([0.002, 0.003, 0.002])
    assert gpu.now_ms == RUNS * (2 + 3 + 2)
    assert len(bound) == len(set(bound)) == 3  # buffers of one input and two outputs, bound once


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

"""Measures this machine's CPU as a device, and an ONNX graph on it, through ONNX Runtime.

Contract: needs onnx and onnxruntime. Writes `$BUILD/this-machine.toml`, which later plans read as the device
"this-machine". Figures are one instance's where two share the cores (`[batching]`'s default): rates are what ONNX
Runtime's matrix products reach at 512 rows, by the fastest of many calls; where an instance has one thread, in
processor time. What others do to caches and memory meanwhile is in them all the same. Nothing is sent anywhere.

Examples:
    write_device(measured_path(), THIS_MACHINE, measure_machine())
    grid = measure_graph("build/minilm/fp32/model.onnx", batches=(1, 8), lengths=(64, 128))
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.sizing.devices import Device
from deepseek.spec import InputError

ROWS, WIDTH = 512, 1024
HEADS, TOKENS, HEAD = 96, 128, 32  # of attention: 8 samples of 12 heads
CHAIN = 64  # operations in the graph that measures what each takes on top


def measure_machine(threads: int | None = None) -> Device:
    """This machine as a device; takes a few seconds."""
    cores = len(os.sched_getaffinity(0))
    threads = threads or instance_threads()
    rates = {"fp32": _rate(_product_graph(int8=False), threads, np.float32)}
    rates["int8"] = _rate(_product_graph(int8=True), threads, np.uint8)
    shares = {kind: min(1.0, _attention_rate(kind == "int8", threads) / rate) for kind, rate in rates.items()}
    return Device(
        name=f"{_processor()}, {cores} cores",
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 2),
        bandwidth_gb_s=round(_bandwidth() / 1e9, 2),
        compute_units=threads,
        rates=rates,  # type: ignore[arg-type]
        efficiency={"fp32": 1.0, "int8": 1.0},
        attention_share=shares,  # type: ignore[arg-type]
        bandwidth_efficiency=1.0,
        launch_us=round(_launch_s(threads) * 1e6, 2),
        elements_g_s=round(_elements_s(threads) / 1e9, 3),
        instances=max(1, cores // threads),
        platform="cpu",
        source=f"measured by make plan MEASURE=1 on {time.strftime('%Y-%m-%d')}, ONNX Runtime, rates as reached",
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point of a grid."""

    batch: int
    length: int
    latency_ms: float
    """Of the fastest call."""


def measure_graph(
    path: str | Path, *, batches: Sequence[int], lengths: Sequence[int], axes: Mapping[str, int] | None = None
) -> list[Measured]:
    """Runs a graph at each size with made-up inputs: ones for integers (all tokens real), noise for others."""
    session = _session(str(path), instance_threads())
    found = []
    for length in lengths:
        for batch in batches:
            feeds = {each.name: _made_up(each, batch, length, axes or {}) for each in session.get_inputs()}
            try:
                seconds = best_s(lambda feeds=feeds: session.run(None, feeds), threads=instance_threads())  # type: ignore[misc]
            except Exception as error:  # what ONNX Runtime raises for a size that the graph does not take
                reason = " ".join(str(error).split())[:200]
                raise InputError(f"{path}: does not run at batch {batch}, length {length}: {reason}") from None
            found.append(Measured(batch=batch, length=length, latency_ms=seconds * 1e3))
    return found


def instance_threads() -> int:
    """Threads of one instance: two share the cores."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def best_s(run: Callable[[], Any], *, threads: int = 1, budget_s: float = 0.6, least: int = 5) -> float:
    """Seconds of the fastest call within a time.

    Of one thread it is the processor's time, in which others on the core have no part; of several it is the clock's.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    run()  # memory is allocated in the first
    best, calls, began = float("inf"), 0, time.perf_counter()
    while calls < least or time.perf_counter() - began < budget_s:
        start = clock()
        run()
        best, calls = min(best, clock() - start), calls + 1
    return best


def _bandwidth() -> float:
    source = np.ones(2**25, np.float32)  # 128 MiB: past every cache
    target = np.empty_like(source)
    return 2 * source.nbytes / best_s(lambda: np.copyto(target, source))


def _rate(model: Any, threads: int, dtype: Any) -> float:
    session = _session(model.SerializeToString(), threads)
    feeds = {"x": np.ones((ROWS, WIDTH), dtype)}
    flops = 2.0 * ROWS * WIDTH * WIDTH
    return round(flops / best_s(lambda: session.run(None, feeds), threads=threads) / 1e12, 4)


def _attention_rate(int8: bool, threads: int) -> float:
    """TFLOPS of queries by keys: many small products, whose second side is no weight that could be arranged before."""
    session = _session(_attention_graph(int8).SerializeToString(), threads)
    dtype = np.uint8 if int8 else np.float32
    feeds = {"x": np.ones((HEADS, TOKENS, HEAD), dtype), "k": np.ones((HEADS, HEAD, TOKENS), dtype)}
    flops = 2.0 * HEADS * TOKENS * TOKENS * HEAD
    return flops / best_s(lambda: session.run(None, feeds), threads=threads) / 1e12


def _launch_s(threads: int) -> float:
    session = _session(_chain_graph().SerializeToString(), threads)
    feeds = {"x": np.ones((1, 8), np.float32)}
    return best_s(lambda: session.run(None, feeds), threads=threads) / CHAIN


def _elements_s(threads: int) -> float:
    """Results a second of the operations between a Transformer's products, each as often as the other."""
    from onnx import TensorProto, helper, numpy_helper

    ones = numpy_helper.from_array(np.ones(WIDTH, np.float32), "w")
    kinds = (("LayerNormalization", ["x", "w", "w"]), ("Gelu", ["a"]), ("Softmax", ["b"]), ("Add", ["c", "x"]))
    names = ["a", "b", "c", "y"]
    nodes = [helper.make_node(kind, taken, [name]) for (kind, taken), name in zip(kinds, names, strict=True)]
    graph = _graph(nodes, TensorProto.FLOAT, TensorProto.FLOAT, WIDTH, [ones])
    session = _session(graph.SerializeToString(), threads)
    feeds = {"x": np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    return len(kinds) * ROWS * WIDTH / best_s(lambda: session.run(None, feeds), threads=threads)


def _product_graph(int8: bool) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    weight = np.full((WIDTH, WIDTH), 1, np.int8 if int8 else np.float32)
    kind = TensorProto.UINT8 if int8 else TensorProto.FLOAT
    out = TensorProto.INT32 if int8 else TensorProto.FLOAT
    node = helper.make_node("MatMulInteger" if int8 else "MatMul", ["x", "w"], ["y"])
    return _graph([node], kind, out, WIDTH, [numpy_helper.from_array(weight, "w")])


def _attention_graph(int8: bool) -> Any:
    from onnx import TensorProto, helper

    kind = TensorProto.UINT8 if int8 else TensorProto.FLOAT
    shapes: dict[str, list[str | int | None]] = {
        "x": ["heads", TOKENS, HEAD],
        "k": ["heads", HEAD, TOKENS],
        "y": ["heads", TOKENS, TOKENS],
    }
    kinds = {"x": kind, "k": kind, "y": TensorProto.INT32 if int8 else TensorProto.FLOAT}
    x, k, y = (helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in shapes)
    node = helper.make_node("MatMulInteger" if int8 else "MatMul", ["x", "k"], ["y"])
    graph = helper.make_graph([node], "measured", [x, k], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _chain_graph() -> Any:
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.eye(8, dtype=np.float32), "w")
    names = ["x", *[f"y{index}" for index in range(CHAIN - 1)], "y"]
    nodes = [helper.make_node("MatMul", [a, "w"], [b]) for a, b in pairwise(names)]
    return _graph(nodes, TensorProto.FLOAT, TensorProto.FLOAT, 8, [weight])


def _graph(nodes: list[Any], kind: int, out: int, width: int, weights: list[Any]) -> Any:
    from onnx import helper

    x = helper.make_tensor_value_info("x", kind, ["batch", width])
    y = helper.make_tensor_value_info("y", out, ["batch", width])
    graph = helper.make_graph(nodes, "measured", [x], [y], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


def _session(model: Any, threads: int) -> Any:
    try:
        import onnx  # noqa: F401  for the graphs
        import onnxruntime
    except ImportError as error:
        raise InputError(f"measuring needs {error.name}; install it with: pip install -e '.[export,cpu]'") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"ONNX Runtime does not load {model if isinstance(model, str) else 'a graph'}: {reason}"
        ) from None


def _made_up(value: Any, batch: int, length: int, axes: Mapping[str, int]) -> np.ndarray:
    shape = [batch, *[dim if isinstance(dim, int) else axes.get(dim, length) for dim in value.shape[1:]]]
    if "int" in value.type or "bool" in value.type:
        dtype = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}
        return np.ones(shape, dtype.get(value.type, np.int8))
    dtype16 = np.float16 if "float16" in value.type else np.float32
    return np.random.default_rng(0).standard_normal(shape).astype(dtype16)


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""Measures this machine's CPU as a device, and an ONNX graph on it, through ONNX Runtime.

Contract: needs onnx and onnxruntime. `deepseek plan` writes the result to `$DEEPSEEK_BUILD/this-machine.toml`, which
later plans read as the device "this-machine". Figures are those of one of two instances that share the cores (the
default of `[batching]`). Rates are those of ONNX Runtime's matrix products at 512 rows, from the fastest of many calls;
in processor time if an instance has one thread. Other load on caches and memory still affects them.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.sizing.devices import Device
from deepseek.sizing.model.onnx_graph import OnnxModel
from deepseek.sizing.roofline import predict
from deepseek.spec import InputError
from deepseek.spec.machine.cpu import memory_bytes, this_cpu

try:
    import onnx
    import onnxruntime
    from onnx import numpy_helper, parser
except ImportError as error:
    raise InputError(f"measuring needs {error.name}; install it with: pip install -e '.[export,cpu]'") from None

ROWS, WIDTH = 512, 1024
HEADS, TOKENS, HEAD = 96, 128, 32  # sizes of attention: 8 samples with 12 heads each
CHAIN = 64  # operations in the graph that measures the launch overhead


def measure_machine() -> Device:
    """Measures this machine as a device; takes a few seconds."""
    cpu, threads = this_cpu(), instance_threads()
    rates, shares = dict[str, float](), dict[str, float]()
    kinds: tuple[tuple[str, str, str, str, type], ...] = (
        ("fp32", "MatMul", "float", "float", np.float32),
        ("int8", "MatMulInteger", "uint8", "int32", np.uint8),
    )
    for name, product, taken, given, dtype in kinds:
        shapes = f"({taken}[rows,{WIDTH}] x) => ({given}[rows,{WIDTH}] y)"
        weight = np.ones((WIDTH, WIDTH), np.int8 if name == "int8" else np.float32)
        feeds: dict[str, Any] = {"x": np.ones((ROWS, WIDTH), dtype)}
        seconds = _graph_s(f"{shapes} {{ y = {product}(x, w) }}", feeds, {"w": weight})
        rates[name] = round(2.0 * ROWS * WIDTH * WIDTH / seconds / 1e12, 4)
        # Queries by keys: many small products. Their second operand is not a weight, so it cannot be packed beforehand.
        shapes = f"({taken}[n,{TOKENS},{HEAD}] x, {taken}[n,{HEAD},{TOKENS}] k) => ({given}[n,{TOKENS},{TOKENS}] y)"
        feeds = {"x": np.ones((HEADS, TOKENS, HEAD), dtype), "k": np.ones((HEADS, HEAD, TOKENS), dtype)}
        seconds = _graph_s(f"{shapes} {{ y = {product}(x, k) }}", feeds)
        shares[name] = min(1.0, 2.0 * HEADS * TOKENS * TOKENS * HEAD / seconds / 1e12 / rates[name])
    return Device(
        name=f"{cpu.model}, {cpu.cores} cores",
        memory_gib=round(memory_bytes() / 2**30, 2),
        bandwidth_gb_s=round(_bandwidth() / 1e9, 2),
        compute_units=threads,
        rates=rates,  # type: ignore[arg-type]
        efficiency={"fp32": 1.0, "int8": 1.0},
        attention_share=shares,  # type: ignore[arg-type]
        bandwidth_efficiency=1.0,
        launch_us=round(_launch_s() * 1e6, 2),
        elements_g_s=round(_elements_s() / 1e9, 3),
        instances=max(1, cpu.cores // threads),
        platform="cpu",
        source=f"measured by make plan MEASURE=1 on {time.strftime('%Y-%m-%d')}, ONNX Runtime, rates as reached",
    )


def compare_graph(
    model: OnnxModel, machine: Device, precision: str, batch: int, length: int
) -> dict[int, dict[str, float]]:
    """Runs a model's graph at a few batch sizes: by size, `measured_ms` and `predicted_ms`."""
    kind = precision if precision in machine.rates else "fp32"
    measured = measure_graph(model.path, sorted({1, 4, batch}), length, model.axes)
    return {
        size: {
            "measured_ms": ms,
            "predicted_ms": 1e3 * predict(model, machine, precision=kind, batch=size, length=length).latency_s,
        }
        for size, ms in measured.items()
    }


def measure_graph(path: Path, batches: Iterable[int], length: int, axes: Mapping[str, int]) -> dict[int, float]:
    """Runs a graph at each batch size; returns the latency of the fastest call of each, in ms.

    Inputs are synthetic: ones for integers (no padding), noise for floats.
    """
    found = {}
    try:
        session = _session(str(path))
        for batch in batches:
            feeds = {each.name: _made_up(each, batch, length, axes) for each in session.get_inputs()}
            found[batch] = 1e3 * best_s(lambda feeds=feeds: session.run(None, feeds))  # type: ignore[misc]
    except Exception as error:  # ONNX Runtime's own errors: a broken graph, an unsupported size
        raise InputError(f"{path}: ONNX Runtime cannot run it: {' '.join(str(error).split())[:200]}") from None
    return found


def instance_threads() -> int:
    """Threads of one of two instances that share the cores."""
    return max(1, this_cpu().cores // 2)


def best_s(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of the calls that fit in 0.6 s, and of at least five.

    With one thread per instance, it is processor time, which excludes other processes; otherwise wall-clock time.
    """
    clock = time.thread_time if instance_threads() == 1 else time.perf_counter
    run()  # the first call allocates memory
    best, calls, began = float("inf"), 0, time.perf_counter()
    while calls < 5 or time.perf_counter() - began < 0.6:
        start = clock()
        run()
        best, calls = min(best, clock() - start), calls + 1
    return best


def _bandwidth() -> float:
    source = np.ones(2**25, np.float32)  # 128 MiB: larger than any cache
    target = np.empty_like(source)
    return 2 * source.nbytes / best_s(lambda: np.copyto(target, source))


def _launch_s() -> float:
    names = ["x", *[f"y{index}" for index in range(CHAIN - 1)], "y"]
    nodes = " ".join(f"{b} = MatMul({a}, w)" for a, b in pairwise(names))
    feeds, weights = {"x": np.ones((1, 8), np.float32)}, {"w": np.eye(8, dtype=np.float32)}
    return _graph_s(f"(float[rows,8] x) => (float[rows,8] y) {{ {nodes} }}", feeds, weights) / CHAIN


def _elements_s() -> float:
    """Results/s of the elementwise operations between a Transformer's products, in equal shares."""
    nodes = "a = LayerNormalization(x, w, w) b = Gelu(a) c = Softmax(b) y = Add(c, x)"
    feeds = {"x": np.random.default_rng(0).standard_normal((ROWS, WIDTH)).astype(np.float32)}
    text = f"(float[rows,{WIDTH}] x) => (float[rows,{WIDTH}] y) {{ {nodes} }}"
    return 4 * ROWS * WIDTH / _graph_s(text, feeds, {"w": np.ones(WIDTH, np.float32)})


def _graph_s(text: str, feeds: Mapping[str, Any], weights: Mapping[str, np.ndarray] | None = None) -> float:
    """Seconds of one run of a graph in ONNX's text format."""
    model: onnx.ModelProto = parser.parse_model(f'<ir_version: 9, opset_import: ["": 20]> measured {text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    session = _session(model.SerializeToString())
    return best_s(lambda: session.run(None, feeds))


def _session(model: Any) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = instance_threads()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _made_up(value: Any, batch: int, length: int, axes: Mapping[str, int]) -> np.ndarray:
    shape = [batch, *[dim if isinstance(dim, int) else axes.get(dim, length) for dim in value.shape[1:]]]
    kind = value.type.removeprefix("tensor(").removesuffix(")")
    dtype = np.dtype({"float": "float32", "double": "float64"}.get(kind, kind))
    return (np.random.default_rng(0).standard_normal(shape) if dtype.kind == "f" else np.ones(shape)).astype(dtype)

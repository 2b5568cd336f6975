"""A TensorRT engine as a function from a dict of arrays to a dict of arrays, and on the clock of its GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.spec import DeploymentSpec, GateFailed
from export.model_folder import Predict
from export.rows import Row
from export.runtimes.tensorrt_engine import tensorrt_module
from export.runtimes.timing import Timer

# Runs between two CUDA events: one run of a small engine is shorter than the events' resolution.
RUNS = 20


def _loaded(spec: DeploymentSpec, path: Path) -> Any:
    """The execution context of an engine on the first GPU; raises GateFailed if TensorRT cannot load it."""
    trt = tensorrt_module("tensorrt")
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    # Such a plan contains code, which TensorRT runs only if allowed.
    runtime.engine_host_code_allowed = spec.tensorrt.version_compatible
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise GateFailed(
            f"{path}: TensorRT {trt.__version__} cannot load it; build it on this machine with this version"
        )
    context = engine.create_execution_context()
    if context is None:
        raise GateFailed(f"{path}: TensorRT {trt.__version__} cannot run it; see nvidia-smi for the GPU's free memory")
    return context


def _bound(context: Any, spec: DeploymentSpec, inputs: Row) -> dict[str, Any]:
    """Device buffers of all tensors, with the inputs copied in; the context reads and writes them."""
    import torch

    held: dict[str, Any] = {
        name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to("cuda") for name in spec.inputs
    }
    for name, tensor in held.items():
        context.set_input_shape(name, tuple(tensor.shape))
    for name, output in spec.outputs.items():
        shape = tuple(context.get_tensor_shape(name))
        held[name] = torch.empty(shape, dtype=getattr(torch, output.dtype), device="cuda")
    for name, tensor in held.items():
        context.set_tensor_address(name, tensor.data_ptr())
    return held


def _execute(context: Any, stream: Any, path: Path) -> None:
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError(f"{path}: the engine did not run")


def tensorrt_predictor(spec: DeploymentSpec, path: Path) -> Predict:
    """A predictor of an engine, with torch tensors as buffers; raises GateFailed if it cannot load."""
    import torch

    context, stream = _loaded(spec, path), torch.cuda.Stream()

    def predict(inputs: Row) -> Row:
        held = _bound(context, spec, inputs)
        stream.wait_stream(torch.cuda.current_stream())
        _execute(context, stream, path)
        stream.synchronize()
        return {name: held[name].cpu().numpy() for name in spec.outputs}

    return predict


def tensorrt_timers(spec: DeploymentSpec, path: Path, inputs: Row) -> tuple[Timer, Timer]:
    """Timers of one run, and of the copies in and out of one run, by CUDA events over buffers that stay on the GPU."""
    import torch

    context, stream = _loaded(spec, path), torch.cuda.Stream()
    held = _bound(context, spec, inputs)
    pinned = {name: tensor.cpu().pin_memory() for name, tensor in held.items()}
    stream.wait_stream(torch.cuda.current_stream())

    def elapsed_s(work: Callable[[], None]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record(stream)
        for _ in range(RUNS):
            work()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000 / RUNS

    def copy() -> None:
        with torch.cuda.stream(stream):
            for name in spec.inputs:
                held[name].copy_(pinned[name], non_blocking=True)
            for name in spec.outputs:
                pinned[name].copy_(held[name], non_blocking=True)

    return lambda: elapsed_s(lambda: _execute(context, stream, path)), lambda: elapsed_s(copy)

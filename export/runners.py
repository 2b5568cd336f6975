"""What runs a variant, all with one face: a dict of arrays in, a dict of arrays out.

Contract: fp32 PyTorch (the reference), a graph in ONNX Runtime, a TensorRT engine, a TorchScript module. A runner takes
batches that the profile allows; `within_batch` lifts that limit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from deepseek.onnxruntime_session import ProviderError, cores, open_session
from deepseek.spec import Axis, DeploymentSpec, GateFailed, InputError, Precision, Target, variables_for
from export.artifact import Row, batches, engine_path, filled, join, need, onnx_path, read_manifest
from export.source import Predict, Source, folder_of, user_code

# Optimizers of ONNX Runtime 1.32.0 that a graph with values of a type has to do without.
_FAULTY = {
    # Moving a Transpose past the Cast to fp32 that a CPU needs, it leaves a node without a definition, which the layout
    # optimizer after it reads: a null pointer (microsoft/onnxruntime#28392; vision Transformers have it).
    onnx.TensorProto.FLOAT16: "MatmulTransposeFusion",
    # Takes fp8 for uint8, and so a Relu before QuantizeLinear for one that its range implies: negative values pass.
    onnx.TensorProto.FLOAT8E4M3FN: "ReluQuantRewrite",
}


def gpu_name() -> str:
    """The first GPU, "" where there is none."""
    import torch  # heavy, and only for what runs on it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def torch_runner(spec: DeploymentSpec, source: Source) -> Predict:
    """fp32 PyTorch, the reference."""
    return module_runner(spec, source.load())


def module_runner(spec: DeploymentSpec, model: Any) -> Predict:
    """A `torch.nn.Module` in eval mode."""
    import torch  # first here: only this runner needs it

    def predict(inputs: Row) -> Row:
        with user_code(folder_of(spec), "forward(...) on samples"), torch.inference_mode():
            values = model(*(torch.from_numpy(np.ascontiguousarray(inputs[name])) for name in spec.inputs))
        values = values if isinstance(values, tuple | list) else [values]
        return {name: value.numpy() for name, value in zip(spec.outputs, values, strict=True)}

    return predict


def optimizers_left_out(path: Path) -> list[str]:
    """Optimizers of ONNX Runtime that the graph at `path` has to do without, here and where it is served."""
    graph = onnx.load(path, load_external_data=False).graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.value_info]}
    types |= {attribute.i for node in graph.node if node.op_type == "Cast" for attribute in node.attribute}
    return [optimizer for type_, optimizer in _FAULTY.items() if type_ in types]


def onnx_runner(spec: DeploymentSpec, path: Path, target: Target, *, optimized: bool = True) -> Predict:
    """The graph in ONNX Runtime with the threads that one served instance has; not `optimized`, as it is written.

    Raises InputError where the execution provider is not there, GateFailed where the graph cannot be loaded.
    """
    batching = spec.for_target(target).batching
    options = onnxruntime.SessionOptions()
    options.inter_op_num_threads = 1
    options.intra_op_num_threads = batching.threads or max(1, cores() // batching.instances)
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or idle threads slow the next variant
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        left_out = optimizers_left_out(path)
        opened = open_session(path, options, spec.onnxruntime.provider, spec.provider_options, left_out=left_out)
    except ProviderError as error:
        raise InputError(str(error)) from None
    except Exception as error:
        raise GateFailed(f"{path}: ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}") from None
    session = opened.session
    return lambda inputs: dict(zip(spec.outputs, session.run(list(spec.outputs), inputs), strict=True))


def tensorrt_runner(spec: DeploymentSpec, path: Path) -> Predict:
    """A TensorRT engine on the first GPU; buffers are torch's."""
    import tensorrt as trt
    import torch

    engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise InputError(
            f"{path}: TensorRT {trt.__version__} cannot load it; build it on this machine with this version"
        )
    context = engine.create_execution_context()
    stream = torch.cuda.Stream()

    def predict(inputs: Row) -> Row:
        held = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])).cuda() for name in spec.inputs}
        for name, tensor in held.items():
            context.set_input_shape(name, tuple(tensor.shape))
            context.set_tensor_address(name, tensor.data_ptr())
        for name, output in spec.outputs.items():
            dtype = getattr(torch, output.dtype)
            held[name] = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device="cuda")
            context.set_tensor_address(name, held[name].data_ptr())
        stream.wait_stream(torch.cuda.current_stream())
        if not context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError(f"{path}: the engine did not run")
        stream.synchronize()
        return {name: held[name].cpu().numpy() for name in spec.outputs}

    return predict


def torchscript_runner(spec: DeploymentSpec, path: Path, device: str) -> Predict:
    """A TorchScript module on the device that it was made for."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript as such
        try:
            module = torch.jit.load(path, map_location=device)
        except RuntimeError as error:
            raise InputError(f"{path}: TorchScript cannot load it: {' '.join(str(error).split())[:300]}") from None

    def predict(inputs: Row) -> Row:
        with torch.inference_mode():
            values = module(*(torch.from_numpy(np.ascontiguousarray(inputs[name])).to(device) for name in spec.inputs))
        values = values if isinstance(values, tuple) else (values,)
        return {name: value.cpu().numpy() for name, value in zip(spec.outputs, values, strict=True)}

    return predict


def variant_runner(spec: DeploymentSpec, precision: Precision, target: Target) -> Predict:
    """What serves a precision on a target. RTX engines need their GPU: their graph runs instead."""
    hint = f"make engine {variables_for(spec.name)} PRECISION={precision}"
    if target == "torchscript":
        path = need(engine_path(spec.name, precision, target), f"{hint} TARGET=torchscript")
        return torchscript_runner(spec, path, read_manifest(path).settings["device"])
    if target == "tensorrt":
        return tensorrt_runner(spec, need(engine_path(spec.name, precision, target), hint))
    return onnx_runner(spec, need(onnx_path(spec.name, precision), hint), target)


def within_batch(predict: Predict, batch: Axis) -> Predict:
    """The same function for any batch: taken apart into parts that the profile allows, the last one filled up."""

    def part(inputs: Row, at: int) -> Row:
        inputs = {name: array[at : at + batch.max] for name, array in inputs.items()}
        rows = len(next(iter(inputs.values())))
        return {name: array[:rows] for name, array in predict(filled(inputs, batch.min)).items()}

    def parts(inputs: Row) -> Row:
        size = len(next(iter(inputs.values())))
        return join([part(inputs, at) for at in range(0, size, batch.max)])

    return parts


def outputs_by_batch(spec: DeploymentSpec, predict: Predict, rows: list[Row]) -> Iterator[tuple[list[int], Row]]:
    """Outputs in batches of opt, with the places of their rows; none is kept."""
    for places, inputs in batches(rows, spec.axes["batch"].opt):
        yield places, predict(filled(inputs, spec.axes["batch"].min))


def outputs_of(spec: DeploymentSpec, predict: Predict, rows: list[Row]) -> list[Row]:
    """Outputs row by row, run in batches of opt."""
    results: list[Row] = [{}] * len(rows)
    for places, outputs in outputs_by_batch(spec, predict, rows):
        for index, place in enumerate(places):
            results[place] = {name: array[index] for name, array in outputs.items()}
    return results

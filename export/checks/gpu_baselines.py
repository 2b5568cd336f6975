"""Times a model on the GPU outside Triton: PyTorch eager, torch.compile and ONNX Runtime on CUDA.

Contract: one batch of the profile's opt shape, made of real rows. PyTorch's inputs stay on the device, and CUDA events
time it. ONNX Runtime copies inputs and outputs, and the host's clock times it. A candidate that fails is one line; exit
code 1 if any failed, 2 without a GPU.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from typing import Any

from deepseek.spec import DeploymentSpec, InputError, build_dir, one_line, variables_for
from deepseek.spec.tables import OnnxRuntimeSpec
from export.artifact import need, onnx_path
from export.model_folder import ModelFolder
from export.rows import Row, load_rows
from export.runtimes.timing import wall

WARM_UP = 10


def main(options: argparse.Namespace) -> int:
    """Prints the median time of a batch for each candidate, lower is better."""
    if reason := without_gpu():
        raise InputError(f"{reason}; run this on a GPU host, with a CUDA build of PyTorch")
    source = ModelFolder(options.model, options.models)
    inputs = opt_batch(source.spec)
    found: dict[str, Any] = {}
    for name, make in candidates(source, inputs).items():
        try:
            found[name] = make(options.runs)
        except Exception as error:  # any fault of a compiler or a runtime is this candidate's result
            found[name] = one_line(f"{type(error).__name__}: {error}")
    lines = [f"{name:24} {f'{it:.3f} ms' if isinstance(it, float) else it}" for name, it in found.items()]
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines))
    return 0 if all(isinstance(it, float) for it in found.values()) else 1


def without_gpu() -> str:
    """Why PyTorch cannot use a GPU here, or ""."""
    try:
        import torch  # heavy; needed only here
    except (ImportError, OSError) as error:  # also a CUDA library that it cannot load
        return f"PyTorch cannot be imported: {' '.join(str(error).split())}"
    return "" if torch.cuda.is_available() else f"PyTorch {torch.__version__} sees no GPU"


def opt_batch(spec: DeploymentSpec) -> Row:
    """Evaluation rows as a batch of the profile's opt shape."""
    from export.runtimes.pytorch_reference import inputs_at  # torch, which `without_gpu` tries first

    rows = load_rows(build_dir(spec.name) / "evaluation.npz")
    return inputs_at(spec, rows, {name: axis.opt for name, axis in spec.axes.items()})


def candidates(source: ModelFolder, inputs: Row) -> dict[str, Callable[[int], float]]:
    """Functions that take a number of runs and return the median milliseconds of one."""
    import torch

    module = source.load().cuda().eval()
    held = [torch.from_numpy(inputs[name]).cuda() for name in source.spec.inputs]

    def run(model: Any, precision: Any) -> Callable[[int], float]:
        def call() -> None:
            with torch.inference_mode(), torch.autocast("cuda", precision, enabled=precision is not torch.float32):
                model(*held)

        return lambda runs: device_ms(call, runs)

    return {
        "PyTorch eager, fp32": run(module, torch.float32),
        "PyTorch eager, fp16": run(module, torch.float16),
        "torch.compile, fp16": run(torch.compile(module), torch.float16),
        "ONNX Runtime CUDA, fp32": lambda runs: host_ms(session_call(source.spec, inputs), runs),
    }


def session_call(spec: DeploymentSpec, inputs: Row) -> Callable[[], Any]:
    """A call of the fp32 graph on ONNX Runtime's CUDA provider, copies included."""
    from export.runtimes.onnxruntime_predictor import onnx_predictor

    graph = need(onnx_path(spec.name, "fp32"), f"make engine {variables_for(spec.name)}")
    on_cuda = spec.model_copy(update={"onnxruntime": OnnxRuntimeSpec(provider="cuda")})
    return functools.partial(onnx_predictor(on_cuda, graph, "onnxruntime"), inputs)


def device_ms(call: Callable[[], Any], runs: int) -> float:
    """Median time between CUDA events around the call."""
    import torch

    for _ in range(WARM_UP):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(float(begin.elapsed_time(end)) for begin, end in events)


def host_ms(call: Callable[[], Any], runs: int) -> float:
    """Median time of the call by the host's clock; the call waits for its result."""
    timer = wall(call)
    return 1000 * statistics.median([timer() for _ in range(WARM_UP + runs)][WARM_UP:])

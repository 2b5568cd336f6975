"""The targets, which are the runtimes of a graph: one row each. ONNX Runtime's execution providers are named here, and
have their rows in `deepseek/onnxruntime_session.py`.

Imports only the standard library.

Example:
    TARGETS["torchscript"].engine                     # "model.pt"
    is_accelerator("auto"), is_accelerator("cuda")    # False, True
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek.onnxruntime_session import PROVIDERS
from deepseek.precisions import HighPrecision, Precision

Target = Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "torchscript"]
Provider = Literal["auto", "cpu", "cuda", "tensorrt", "migraphx", "cann"]
"""A key of PROVIDERS, or "auto": the accelerator of this machine, else the CPU."""
DEFAULT: Target = "onnxruntime"


@dataclass(frozen=True, kw_only=True)
class TargetFacts:
    engine: str
    """Name of the file that it runs, in a version directory and in the build folder."""
    is_graph: bool = False
    """Whether it runs the ONNX graph itself, without compiling."""
    backends: tuple[str, ...]
    """Triton backends that load it, the default first; empty if Triton cannot load it."""
    high_precision: HighPrecision
    """Precision of layers that are not quantized: a CPU has no fast fp16."""
    needs_gpu: bool = False
    only: Precision | None = None
    """The only precision that it can be built in; None: any."""


TARGETS: dict[Target, TargetFacts] = {
    "onnxruntime": TargetFacts(
        engine="model.onnx", is_graph=True, backends=("python", "onnxruntime"), high_precision="fp32"
    ),
    "tensorrt": TargetFacts(engine="model.plan", backends=("tensorrt",), high_precision="fp16", needs_gpu=True),
    "tensorrt_rtx": TargetFacts(engine="model.plan", backends=(), high_precision="fp16"),
    "torchscript": TargetFacts(engine="model.pt", backends=("pytorch",), high_precision="fp16", only="fp32"),
}
PUBLISHABLE: tuple[Target, ...] = tuple(name for name, row in TARGETS.items() if row.backends)


def is_accelerator(provider: str) -> bool:
    """Whether an execution provider names an accelerator; "auto" does not, as it may fall back to the CPU."""
    return provider in PROVIDERS and PROVIDERS[provider].is_accelerator


def is_nvidia(provider: str) -> bool:
    """Whether an execution provider names an NVIDIA GPU; "auto" does not."""
    return provider in PROVIDERS and PROVIDERS[provider].is_nvidia


def in_tf32(target: Target, provider: str | None, found: Mapping[str, object]) -> bool:
    """Whether fp32 is multiplied in TF32.

    On an NVIDIA GPU that is the default of TensorRT, of ONNX Runtime and of PyTorch's convolutions. `provider` is ONNX
    Runtime's, `found` are the facts in the engine's manifest.
    """
    if target == "onnxruntime":
        return is_nvidia(provider or "")
    return target != "tensorrt_rtx" and bool(found.get("tf32"))  # the build runs the graph of RTX on the CPU

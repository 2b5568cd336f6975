"""Tables of `deploy.toml`: signature, axes, precision, parity, batching, and what runs the graph."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from deepseek.spec.checks import Table, at, identifier, matching

Precision = Literal["fp32", "fp16", "int8", "fp8"]
Target = Literal["onnxruntime", "tensorrt", "tensorrt_rtx", "torchscript"]
# Execution providers of ONNX Runtime, as deepseek.onnxruntime_session opens them.
Provider = Literal["auto", "cpu", "cuda", "tensorrt", "migraphx", "cann"]
# Types that ONNX, TensorRT and Triton all carry; numpy knows each by the same name.
DType = Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32"]
TRITON_DTYPES: Mapping[str, str] = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
}
BATCH = "batch"  # the axis that Triton batches over: first in every tensor
# Labels, warm-up files and rows of an .npz are named after tensors; torch.export makes a Python name of an axis.
TensorName = Annotated[str, matching(r"\w[\w.:-]*", "letters, digits and _ . : -, no blank or slash")]
AxisName = Annotated[str, identifier("a name as Python has them: letters, digits and _")]
INT32 = 2**31 - 1  # what Triton's configuration holds of a count
MOST_COPIES = 1024  # of a model, or of its threads: beyond it lies a slip of the finger, not a machine


class Axis(Table):
    """Sizes that a named axis takes: the ONNX dynamic dim and the TensorRT profile."""

    min: int = Field(ge=1)
    """Least size that a request may have."""
    opt: int = Field(ge=1)
    """The usual size, for which TensorRT chooses its kernels."""
    max: int = Field(ge=1, le=INT32)
    """Largest size; of the axis `batch` Triton's max_batch_size."""

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min}, opt {self.opt}, max {self.max}: min <= opt <= max is needed")
        return self


class TensorSpec(Table):
    """Type and shape of one input or output; a dimension is a size or the name of an axis."""

    dtype: DType
    """As numpy names it."""
    shape: tuple[int | str, ...]
    """`["batch", ...]`: after the axis batch sizes, and names of other axes."""

    @field_validator("shape", mode="before")
    @classmethod
    def _batch_first(cls, shape: Any) -> Any:
        if not isinstance(shape, list | tuple) or not shape or shape[0] != BATCH:
            raise ValueError(f'seen {shape!r}; the first dimension must be the axis "{BATCH}": ["{BATCH}", ...]')
        for dim in shape[1:]:
            size = isinstance(dim, int) and not isinstance(dim, bool) and 1 <= dim <= INT32
            if not size and (not isinstance(dim, str) or dim == BATCH):
                raise ValueError(f'seen {list(shape)}; after "{BATCH}" come sizes from 1 on, or names of other axes')
        if len(shape) == 1:
            raise ValueError(
                f'seen ["{BATCH}"]; Triton needs a dimension beside the batch: write ["{BATCH}", 1], and squeeze(1) '
                "the input or unsqueeze(1) the output in forward"
            )
        return tuple(shape)


class PrecisionSpec(Table):
    """The accuracy budget: the fastest of `candidates` that loses at most `max_drop` is served."""

    candidates: tuple[Precision, ...] = Field(("fp16", "int8"), min_length=1)
    """What is built and compared beside fp32, which is what is left where none is inside the budget, or faster."""
    metric: str | None = None
    """Key of what model.py's evaluate() returns, larger being better; absent: similarity of the outputs."""
    max_drop: float = Field(0.01, ge=0, le=1)
    """Allowed loss relative to fp32 PyTorch."""
    calibration_method: Literal["auto", "max", "entropy"] = "auto"
    """Where ranges end: the largest magnitude, least KL divergence, or whichever leaves the outputs nearer to fp32."""
    calibration_samples: int = Field(512, ge=2)
    """Rows of samples("calibration") that are used at most."""
    per_channel: bool = True
    """A scale for each output channel of the weights; false: one for each tensor."""
    weight_only: bool = False
    """int8 of the weights alone: activations stay high, no range can clip them; small, but hardly faster."""
    op_types: tuple[Literal["MatMul", "Gemm", "Conv"], ...] = Field(("MatMul", "Gemm", "Conv"), min_length=1)
    """Operators that are brought to 8 bits; all others stay high."""
    keep_high: tuple[str, ...] = ()
    """Regular expressions of ONNX node names that are never quantized."""

    @field_validator("keep_high")
    @classmethod
    def _compiles(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"seen {pattern!r}: not a regular expression ({error})") from None
        return patterns


class BatchingSpec(Table):
    """Dynamic batching and what happens when it cannot keep up; the queue is never unbounded."""

    max_queue_delay_us: int = Field(0, ge=0, le=INT32)
    """How long a batch waits to fill, less than `queue_timeout_ms`; 0 still batches what queued up while the model was
    busy."""
    max_queue_size: int = Field(512, ge=1, le=INT32)
    """Requests that may wait; one more is refused at once (503, UNAVAILABLE)."""
    queue_timeout_ms: int = Field(200, ge=1, le=INT32)
    """Longest wait in the queue; then the request is refused."""
    instances: int = Field(2, ge=1, le=MOST_COPIES)
    """Copies of the model that run side by side. With one, a Triton that this project does not start can stall: see
    docs/triton.md."""
    threads: int | None = Field(None, ge=1, le=MOST_COPIES)
    """ONNX Runtime threads of one instance; absent: the cores divided by the instances."""
    max_batch: int | None = Field(None, ge=1)
    """Rows that Triton puts into one batch, and takes in one request; absent: the batch axis' max."""

    @model_validator(mode="after")
    def _served_in_time(self) -> BatchingSpec:
        if self.max_queue_delay_us >= self.queue_timeout_ms * 1000:
            raise at(
                "batching.max_queue_delay_us",
                f"seen {self.max_queue_delay_us}, but what waits {self.queue_timeout_ms} ms (queue_timeout_ms) is "
                "refused: a request alone would always be; less is needed",
            )
        return self


class TensorrtSpec(Table):
    """How an engine of the targets `tensorrt` and `tensorrt_rtx` is built, and how Triton runs it."""

    optimization_level: int = Field(3, ge=0, le=5)
    """TensorRT's own scale: 0 builds fastest, 5 tries the most kernels."""
    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory that layers may use; absent: all of the GPU's."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """GPUs that the engine runs on: the model it was built on, or more of them at some loss of speed."""
    version_compatible: bool = False
    """A later TensorRT of the same major version may load the engine, which brings code that Triton then runs."""
    timing_cache: bool = True
    """Reuse what earlier builds of the model measured on this GPU."""
    cuda_graphs: bool = False
    """Triton replays a batch as one launch; pays where kernels are short and only the batch varies."""
    cuda_graph_batches: tuple[int, ...] = ()
    """Batch sizes to capture; absent: 1, 2, 4, ... and the batch axis' opt and max."""

    @model_validator(mode="after")
    def _graphs_wanted(self) -> TensorrtSpec:
        if self.cuda_graph_batches and not self.cuda_graphs:
            raise at(
                "tensorrt.cuda_graph_batches", f"seen {list(self.cuda_graph_batches)}, but cuda_graphs is not true"
            )
        return self


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
WorstError = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Tolerance(Table):
    """How far served outputs may be from fp32 PyTorch: what holds for fp32.

    Sums run in another order, which costs about 1e-6; 1e-3 is what `export.to_onnx` allows, too. TensorRT's TF32
    keeps 10 bits of mantissa, so a deep network there may need what fp16 has.
    """

    worst_error: WorstError = 1e-3
    """Of any value of a float output, relative to the output's largest magnitude."""
    cosine: Cosine = 0.9999
    """Least mean cosine of a float output's rows."""
    common: Share = 0.99
    """Least share of equal entries of an integer output; one entry more may differ, since ties fall either way."""


class Fp16Tolerance(Tolerance):
    """10 bits of mantissa: each value is off by up to 5e-4, and 20 layers of that add up to no more than 1e-2."""

    worst_error: WorstError = 1e-2
    cosine: Cosine = 0.999
    common: Share = 0.95


class Int8Tolerance(Tolerance):
    """A tensor has 255 steps up to its calibrated range and is clipped past it.

    One value may be far off while the row still points where it did: here the cosine is the sharper bound.
    """

    worst_error: WorstError = 0.25
    cosine: Cosine = 0.98
    common: Share = 0.8


class Fp8Tolerance(Int8Tolerance):
    """3 bits of mantissa: each value is off by up to 6 %, large and small ones alike; as far as int8 in all."""


class ParitySpec(Table):
    """Tolerances of `export.parity` by the precision that is served; a key left out keeps that precision's own."""

    fp32: Tolerance = Tolerance()
    fp16: Fp16Tolerance = Fp16Tolerance()
    int8: Int8Tolerance = Int8Tolerance()
    fp8: Fp8Tolerance = Fp8Tolerance()
    nonfinite_inputs: Literal["gate", "report"] = "report"
    """Whether a row with a NaN or an Inf in its input must give what PyTorch gives, where fp32 or fp16 is served.
    "report" says where it does not: a runtime's LSTM, ReduceMax or Gelu may see to it otherwise (docs/parity.md)."""

    def of(self, precision: Precision) -> Tolerance:
        """The tolerance of a precision."""
        return getattr(self, precision)


class OnnxRuntimeSpec(Table):
    """What runs the graph of the target `onnxruntime`; see docs/targets.md."""

    provider: Provider = "auto"
    """auto: the accelerator that the installed ONNX Runtime and the machine both have, else the CPU."""
    options: dict[str, bool | int | float | str] = {}
    """Of that provider, by the names that ONNX Runtime documents, e.g. gpu_mem_limit."""
    backend: Literal["python", "onnxruntime"] = "python"
    """Of Triton: serving/onnxruntime_backend.py, or its own, which NVIDIA's full images have."""

    @model_validator(mode="after")
    def _fits(self) -> OnnxRuntimeSpec:
        if self.options and self.provider in ("auto", "cpu"):
            raise at("onnxruntime.options", f"provider is {self.provider}; options need an accelerator's by name")
        if self.backend == "onnxruntime" and self.provider in ("migraphx", "cann"):
            raise at("onnxruntime.backend", f"Triton's own has no {self.provider}; python has, or leave the key out")
        return self


class TargetSpec(Table):
    """What one target overrides; the same keys as `[batching]` and `[slo]`, each optional."""

    batching: dict[str, Any] = {}
    """Keys of `[batching]`."""
    slo: dict[str, Any] = {}
    """Keys of `[slo]`."""

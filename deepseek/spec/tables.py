"""Tables of `deploy.toml`: signature, axes, precision, parity, batching, and what runs the graph."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, create_model, field_validator, model_validator

from deepseek.onnxruntime_session import cores
from deepseek.precisions import PRECISIONS, MethodChoice, OpType, Precision, PrecisionFacts
from deepseek.spec.checks import RegularExpression, Table, at, fitting
from deepseek.targets import PROVIDERS, Provider, is_accelerator

# Types that ONNX, TensorRT and Triton all support; numpy uses the same names.
BuiltDType = Literal["bool", "uint8", "int8", "int32", "int64", "float16", "float32"]
# With Triton's other types, for models that are not built here.
DType = Literal[BuiltDType, "uint16", "uint32", "uint64", "int16", "bfloat16", "float64", "string"]
BUILT_DTYPES: tuple[str, ...] = get_args(BuiltDType)
TRITON_DTYPES: Mapping[str, str] = {
    name: name.upper().replace("BFLOAT", "BF").replace("FLOAT", "FP") for name in get_args(DType)
}
ONLINE, BULK = 1, 2  # priorities of requests: bulk ones wait in a queue behind the others
BATCH = "batch"  # the axis that Triton batches over: first in every tensor
# Labels, warm-up files and rows of an .npz are named after tensors; torch.export turns an axis into a Python name.
_TENSOR_NAME = re.compile(r"\w[\w.:-]*")
TensorName = Annotated[str, fitting(_TENSOR_NAME.fullmatch, "letters, digits and _ . : -, no space or slash")]
AxisName = Annotated[str, fitting(str.isidentifier, "a Python identifier: letters, digits and _")]
INT32 = 2**31 - 1  # largest count in Triton's configuration
MOST_COPIES = 1024  # of a model or of its threads: no machine needs more, so a larger number is a typing error


class Axis(Table):
    """Range of sizes of a named axis: the dynamic dimension in ONNX and the profile in TensorRT."""

    min: int = Field(ge=1)
    """Smallest size in a request."""
    opt: int = Field(ge=1)
    """The usual size, for which TensorRT chooses its kernels."""
    max: int = Field(ge=1, le=INT32)
    """Largest size. For the axis `batch`, also Triton's max_batch_size unless `batching.max_batch` sets it."""

    @model_validator(mode="after")
    def _ordered(self) -> "Axis":
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"seen min {self.min}, opt {self.opt}, max {self.max}; allowed: min <= opt <= max")
        return self


class TensorSpec(Table):
    """Type and shape of one input or output."""

    dtype: DType = Field(
        description=f"numpy name of the type, or `string`. A build takes {', '.join(BUILT_DTYPES)}; the others are for "
        "load tests of a model that was not built here."
    )
    shape: tuple[int | str, ...]
    """Dimensions, `"batch"` first. Each other one is a fixed size or the name of an axis: `["batch", "length", 64]`.
    `["batch"]` is one number per row."""

    @model_validator(mode="before")
    @classmethod
    def _required(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "optional" in data:
            raise ValueError(
                "seen optional; every input is sent with each request: let callers send a neutral value, such as zeros "
                "with a mask as one more input, or deploy a second model without the input"
            )
        return data

    @field_validator("shape", mode="before")
    @classmethod
    def _batch_first(cls, shape: Any) -> Any:
        if not isinstance(shape, list | tuple) or not shape or shape[0] != BATCH:
            raise ValueError(
                f'seen {shape!r}; the first dimension must be the axis "{BATCH}": ["{BATCH}", ...]; for a tensor '
                f"without it, add it, set [axes.{BATCH}] to min = opt = max = 1, and drop or add it in forward"
            )
        for dim in shape[1:]:
            size = isinstance(dim, int) and not isinstance(dim, bool) and 1 <= dim <= INT32
            if not size and (not isinstance(dim, str) or dim == BATCH):
                raise ValueError(f'seen {list(shape)}; after "{BATCH}", use sizes from 1 or names of other axes')
        return tuple(shape)

    @property
    def triton_dims(self) -> tuple[int | str, ...]:
        """Dimensions after the batch in Triton, which needs at least one: a number per row has the dimension 1."""
        return self.shape[1:] or (1,)


class PrecisionSpec(Table):
    """The accuracy budget: the server uses the fastest of `candidates` that loses at most `max_drop`."""

    candidates: tuple[Precision, ...] = Field(("fp16", "int8"), min_length=1)
    """Precisions to build and compare with fp32. fp32 is served if no candidate is faster within the budget."""
    metric: str | None = None
    """A key of the dict that `evaluate()` in model.py returns; larger is better. Absent: similarity of the outputs.
    A metric row by row gives each loss an interval."""
    max_drop: float = Field(0.01, ge=0, le=1)
    """Largest allowed loss, relative to fp32 PyTorch: 0.01 is 1 %."""
    calibration_method: MethodChoice = "auto"
    """How to choose the int8 and fp8 ranges: `max` by the largest magnitude, `entropy` by the smallest KL divergence,
    `auto` whichever keeps the outputs closer to fp32."""
    calibration_samples: int = Field(512, ge=2)
    """Largest number of rows of `samples("calibration")` to use."""
    per_channel: bool = True
    """One scale per output channel of the weights; false: one per tensor."""
    weight_only: bool = False
    """Quantize only the weights to int8. Activations keep the high precision, without clipping: the file is small,
    but hardly faster."""
    op_types: tuple[OpType, ...] = Field(get_args(OpType), min_length=1)
    """Operators to quantize to 8 bits; all others keep the high precision."""
    keep_high: tuple[RegularExpression, ...] = ()
    """Regular expressions of ONNX node names that are never quantized."""

    @field_validator("candidates")
    @classmethod
    def _once_each(cls, names: tuple[Precision, ...]) -> tuple[Precision, ...]:
        if len(set(names)) < len(names):  # the confidence of each interval depends on their number
            raise ValueError(f"seen {list(names)}; name each precision once")
        return names


class BatchingSpec(Table):
    """Dynamic batching, and the limits of the queue."""

    max_queue_delay_us: int = Field(0, ge=0, le=INT32)
    """How long Triton waits for a batch to fill; must be less than `queue_timeout_ms`. With 0, it still batches the
    requests that queued up while the model was busy. The embedded Triton always uses 0 (docs/triton.md)."""
    max_queue_size: int | None = Field(None, ge=1, le=INT32)
    """Requests that may wait. When the queue is full, further requests are refused at once (HTTP 503, gRPC
    UNAVAILABLE). Absent: four times what the measured batches serve within the queue time-out, from 128 to 100,000;
    512 if nothing was measured."""
    queue_timeout_ms: int | None = Field(None, ge=1, le=INT32)
    """Requests that wait longer in the queue are refused. Absent: `slo.p99_ms` less two measured batches and what one
    costs the server beside the model, but at least one batch; half of `slo.p99_ms` if nothing was measured; 200
    without a latency in the SLO."""
    instances: int = Field(default_factory=lambda: min(2, cores()), ge=1, le=MOST_COPIES)
    """Copies of the model that run in parallel. Absent: 2, or 1 if the machine that publishes has one core. With 1, a
    Triton that this project did not start can stall: see docs/triton.md."""
    threads: int | None = Field(None, ge=1, le=MOST_COPIES)
    """ONNX Runtime threads per instance; absent: the number of cores divided by `instances`."""
    max_batch: int | None = Field(None, ge=1)
    """Most rows in one request, and in one batch; absent: `axes.batch.max`."""
    preferred_batch: int | None = Field(None, ge=1)
    """Most rows that Triton joins into one batch; a request with more rows is a batch of its own. Absent: on a CPU with
    ONNX Runtime, the build measures it (docs/explanation/batching.md); elsewhere `max_batch`. A queue delay above 0
    lifts this limit."""

    @model_validator(mode="after")
    def _served_in_time(self) -> "BatchingSpec":
        if self.queue_timeout_ms is not None and self.max_queue_delay_us >= self.queue_timeout_ms * 1000:
            raise at(
                "max_queue_delay_us",
                f"seen {self.max_queue_delay_us}; allowed: less than queue_timeout_ms ({self.queue_timeout_ms} ms), "
                "or every request that comes alone is refused",
            )
        return self


class TensorrtSpec(Table):
    """How to build an engine for the targets `tensorrt` and `tensorrt_rtx`, and how Triton runs it."""

    optimization_level: int = Field(3, ge=0, le=5)
    """TensorRT's builder optimization level: 0 builds fastest, 5 tries the most kernels."""
    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory that layers may use; absent: all memory of the GPU."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """GPUs that can run the engine: only the GPU model it was built on, or more models at some loss of speed."""
    version_compatible: bool = False
    """Lets a later TensorRT of the same major version load the engine. Such an engine contains code that Triton
    executes: load only engines that you trust."""
    timing_cache: bool = True
    """Reuse kernel timings from earlier builds of the model on this GPU."""
    cuda_graphs: bool = False
    """Triton replays a whole batch as one launch. It pays if kernels are short and only the batch size varies."""
    cuda_graph_batches: tuple[int, ...] = ()
    """Batch sizes to capture; absent: 1, 2, 4, ..., the axis' `opt` and the largest batch. Sizes above
    `batching.max_batch` are left out."""

    @model_validator(mode="after")
    def _graphs_wanted(self) -> "TensorrtSpec":
        if self.cuda_graph_batches and not self.cuda_graphs:
            raise at("cuda_graph_batches", f"seen {list(self.cuda_graph_batches)}, but cuda_graphs is not true")
        return self


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
WorstError = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Tolerance(Table):
    """How far served outputs may be from fp32 PyTorch. `deepseek.precisions` has the defaults of each precision."""

    worst_error: WorstError
    """Largest error of any value of a float output, relative to the largest magnitude in that output."""
    cosine: Cosine
    """Smallest mean cosine similarity of the rows of a float output."""
    common: Share
    """Smallest share of equal entries in an integer output. One more entry may differ: ties can fall either way."""


def _table_of(name: str, facts: PrecisionFacts) -> tuple[type[Tolerance], Tolerance]:
    """The class of `[parity.<name>]` and its default; a key left out keeps the precision's default."""
    fields: dict[str, Any] = {
        key: (field.rebuild_annotation(), Field(getattr(facts, key), description=field.description))
        for key, field in Tolerance.model_fields.items()
    }
    table = create_model(f"{name.capitalize()}Tolerance", __base__=Tolerance, __doc__=facts.why_tolerances, **fields)
    return table, table.model_validate({})


_tables: dict[str, Any] = {name: _table_of(name, facts) for name, facts in PRECISIONS.items()}
_Tolerances: Any = create_model("_Tolerances", __base__=Table, **_tables)


class ParitySpec(_Tolerances):
    """How far served outputs may be from PyTorch's, for each served precision: the gate of `deepseek parity`."""

    nonfinite_inputs: Literal["gate", "report"] = "report"
    """What to do when an input row with NaN or Inf gives another result than in PyTorch, for fp32 and fp16: `gate`
    fails, `report` only reports it. LSTM, ReduceMax and Gelu of a runtime may differ here: see docs/parity.md."""

    def of(self, precision: Precision) -> Tolerance:
        """The tolerance of a precision."""
        return getattr(self, precision)

    def of_tf32(self) -> Tolerance:
        """The tolerance of fp32 in TF32, which has fp16's mantissa: fp16's default, or fp32's if that is larger."""
        fp16, fp32 = ParitySpec().of("fp16"), self.of("fp32")
        return Tolerance(
            worst_error=max(fp16.worst_error, fp32.worst_error),
            cosine=min(fp16.cosine, fp32.cosine),
            common=min(fp16.common, fp32.common),
        )


class OnnxRuntimeSpec(Table):
    """How ONNX Runtime runs the graph of the target `onnxruntime`; see docs/targets.md."""

    provider: Provider = "auto"
    """Execution provider. `auto`: the accelerator that this machine has and the installed ONNX Runtime supports, else
    the CPU."""
    options: dict[str, bool | int | float | str] = {}
    """Options of that provider, with the names that ONNX Runtime documents, e.g. `gpu_mem_limit`."""
    backend: Literal["python", "onnxruntime"] = "python"
    """Triton backend: `python` is this project's (serving/backend/onnxruntime_backend.py), `onnxruntime` is Triton's
    own, which comes with NVIDIA's full images."""

    @model_validator(mode="after")
    def _fits(self) -> "OnnxRuntimeSpec":
        if self.options and not is_accelerator(self.provider):
            raise at("options", f"provider is {self.provider}; name an accelerator as the provider")
        if self.backend == "onnxruntime" and is_accelerator(self.provider) and not PROVIDERS[self.provider].is_nvidia:
            raise at("backend", f"seen onnxruntime, which has no {self.provider}; use python, the default")
        return self


class TargetSpec(Table):
    """Overrides for one target, with the keys of `[batching]` and `[slo]`."""

    batching: dict[str, Any] = {}
    """Keys of `[batching]` with this target's values."""
    slo: dict[str, Any] = {}
    """Keys of `[slo]` with this target's values."""

"""What `deploy.toml` says: the one file that drives export, engine, server, load test and verdict.

Contract: `DeploymentSpec` is the only thing of ours that both islands (build and use) import, so
this module needs pydantic and nothing heavier, and it also holds what every command shares: the
errors that become exit codes, and `run_command`.

Exit codes: 0 holds, 1 a gate failed, 2 the user's input is wrong, 3 the measurement is invalid.

Examples:
    python -m deepseek.spec models/recommender
    python -m deepseek.spec models/recommender --json
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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


class InputError(ValueError):
    """The user's input is wrong: one line that says what, seen, allowed and what to do. Exit 2."""


class GateFailed(Exception):
    """A gate did not hold: accuracy, parity, SLO. Exit 1."""


class InvalidMeasurement(Exception):
    """Nothing can be concluded from what was measured. Exit 3."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Axis(_Table):
    """Sizes that a named axis takes: the ONNX dynamic dim and the TensorRT profile."""

    min: int = Field(ge=1)
    opt: int = Field(ge=1)
    max: int = Field(ge=1, le=2**31 - 1)  # Triton's max_batch_size is an int32

    @model_validator(mode="after")
    def _ordered(self) -> Axis:
        if not self.min <= self.opt <= self.max:
            raise ValueError(f"min {self.min}, opt {self.opt}, max {self.max}: min <= opt <= max is needed")
        return self


class TensorSpec(_Table):
    """Type and shape of one input or output; a dimension is a size or the name of an axis."""

    dtype: DType
    shape: tuple[int | str, ...]

    @field_validator("shape")
    @classmethod
    def _batch_first(cls, shape: tuple[int | str, ...]) -> tuple[int | str, ...]:
        if not shape or shape[0] != BATCH:
            raise ValueError(f'seen {list(shape)}; the first dimension must be the axis "{BATCH}"')
        for dim in shape[1:]:
            if dim == BATCH or (isinstance(dim, int) and dim < 1):
                raise ValueError(f'seen {list(shape)}; after "{BATCH}" come sizes >= 1 or names of other axes')
        if len(shape) == 1:
            raise ValueError(
                f'seen ["{BATCH}"]; Triton needs a dimension beside the batch: write ["{BATCH}", 1], and squeeze(1) '
                "the input or unsqueeze(1) the output in forward"
            )
        return shape


class PrecisionSpec(_Table):
    """The accuracy budget: the fastest of `candidates` that loses at most `max_drop` is served."""

    candidates: tuple[Precision, ...] = Field(("fp16", "int8"), min_length=1)
    metric: str | None = None
    """Key of what model.py's evaluate() returns; absent: similarity of the outputs."""
    max_drop: float = Field(0.01, ge=0, le=1)
    """Allowed loss relative to fp32 PyTorch."""
    calibration_method: Literal["auto", "max", "entropy"] = "auto"
    """Where ranges end: the largest magnitude, least KL divergence, or whichever leaves the outputs nearer to fp32."""
    calibration_samples: int = Field(512, ge=2)
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


class BatchingSpec(_Table):
    """Dynamic batching and what happens when it cannot keep up; the queue is never unbounded."""

    max_queue_delay_us: int = Field(0, ge=0)
    """How long a batch waits to fill; 0 still batches what queued up while the model was busy."""
    max_queue_size: int = Field(512, ge=1)
    queue_timeout_ms: int = Field(200, ge=1)
    instances: int = Field(2, ge=1)
    """Copies of the model that run side by side. With one, Triton's bounded queue can stall: see
    docs/triton.md."""
    threads: int | None = Field(None, ge=1)
    """ONNX Runtime threads of one instance; absent: the cores divided by the instances."""


Relation = Literal["<", "<=", ">", ">="]
_OBJECTIVE = re.compile(
    r"(?P<measure>[^\s<>=]+)\s*(?P<relation><=|>=|<|>)\s*(?P<limit>\d+\.?\d*|\.\d+)\s*(?P<unit>%|ms|rps)?"
    r"(?P<baseline>\s*\*\s*baseline)?(\s*@\s*(?P<rate>\d+\.?\d*)\s*rps)?"
)
_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)_ms")
_MEASURES = "p<percent>_ms, mean_ms, max_ms, error_rate, throughput"
_UNITS = {"ms": (None, "ms"), "error_rate": (None, "%"), "throughput": (None, "rps"), "quality": (None,)}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One line of an SLO: `p99_ms < 50`, `p50_ms < 10 @ 200 rps`, `error_rate < 0.1%`, `throughput >= 150`,
    `ndcg@10 >= 0.99 * baseline`."""

    name: str
    """As deploy.toml has it: a key such as `p99_ms`, or the line's measure."""
    measure: str
    relation: Relation
    limit: float
    """In ms, as a share, in requests/s, or of the quality metric (with `of_baseline` a share of the baseline)."""
    of_baseline: bool = False
    rate_rps: float | None = None
    """The rate at which it must hold; None: at the SLO's own."""

    @property
    def percent(self) -> float | None:
        """99 of p99_ms; None where no percentile is meant."""
        found = _PERCENTILE.fullmatch(self.measure)
        return float(found[1]) if found else None

    @property
    def kind(self) -> Literal["ms", "error_rate", "throughput", "quality"]:
        """What is measured: a latency, a share, a rate, or the model's task metric."""
        if self.percent is not None or self.measure in ("mean_ms", "max_ms"):
            return "ms"
        return self.measure if self.measure in ("error_rate", "throughput") else "quality"  # type: ignore[return-value]

    def holds(self, seen: float) -> bool:
        """Whether a measured value keeps to it; nothing does that is not a number."""
        relations = {"<": seen < self.limit, "<=": seen <= self.limit}
        return {**relations, ">": seen > self.limit, ">=": seen >= self.limit}[self.relation]

    @classmethod
    def parse(cls, text: str) -> Objective:
        """The objective that a line states; ValueError in one line where it states none."""
        found = _OBJECTIVE.fullmatch(text.strip())
        if found is None:
            example = "p50_ms < 10 @ 200 rps, error_rate < 0.1%, ndcg@10 >= 0.99 * baseline"
            raise ValueError(f"seen {text!r}; an objective is <measure> <relation> <limit>, such as {example}")
        self = cls(
            name=found["measure"],
            measure=found["measure"],
            relation=found["relation"],  # type: ignore[arg-type]
            limit=float(found["limit"]) / (100 if found["unit"] == "%" else 1),
            of_baseline=found["baseline"] is not None,
            rate_rps=float(found["rate"]) if found["rate"] else None,
        )
        if fault := self._fault(found["unit"]):
            raise ValueError(f"seen {text!r}; {fault}")
        return self

    def _fault(self, unit: str | None) -> str | None:
        """What makes no sense of it."""
        upper = self.kind in ("ms", "error_rate")
        if (self.relation[0] == "<") != upper:
            way = "above: < or <=" if upper else "below: > or >="
            unknown = f" (if it is a quality metric: it is none of {_MEASURES})" if self.kind == "quality" else ""
            return f"{self.measure} is bounded from {way}{unknown}"
        if unit not in _UNITS[self.kind]:
            return f"{self.measure} is not given in {unit}"
        if self.percent is not None and not 0 < self.percent < 100:
            return "a percentile lies between 0 and 100"
        if self.kind == "error_rate" and self.limit > 1:
            return "a share is at most 1, or 100%"
        if self.kind != "quality" and self.of_baseline:
            return "only a quality metric has a baseline (fp32 PyTorch)"
        if self.rate_rps is not None and (self.kind == "quality" or self.rate_rps <= 0):
            return "a rate, of more than 0, belongs to what load changes: " + _MEASURES
        return None


class SloSpec(_Table):
    """Objectives of the service, judged by `loadtests.slo` at `rate_rps`."""

    p50_ms: float | None = Field(None, gt=0)
    p95_ms: float | None = Field(None, gt=0)
    p99_ms: float | None = Field(None, gt=0)
    rate_rps: float | None = Field(None, gt=0)
    max_error_rate: float = Field(0.001, ge=0, le=1)
    objectives: tuple[str, ...] = ()
    """Further ones, a line each: see `Objective`."""

    @field_validator("objectives")
    @classmethod
    def _parses(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            Objective.parse(line)
        return lines

    def all_objectives(self) -> list[Objective]:
        """Those of the simple keys, then the lines. A line on errors takes the place of the default limit."""
        lines = [Objective.parse(line) for line in self.objectives]
        found = [
            Objective(name=name, measure=name, relation="<=", limit=limit)
            for name in ("p50_ms", "p95_ms", "p99_ms")
            if (limit := getattr(self, name)) is not None
        ]
        if self.rate_rps is not None:
            found.append(Objective(name="rate_rps", measure="throughput", relation=">=", limit=self.rate_rps))
        if "max_error_rate" in self.model_fields_set or all(line.kind != "error_rate" for line in lines):
            limit = self.max_error_rate
            found.append(Objective(name="max_error_rate", measure="error_rate", relation="<=", limit=limit))
        return found + lines


class TensorrtSpec(_Table):
    """How an engine of the targets `tensorrt` and `tensorrt_rtx` is built, and how Triton runs it."""

    optimization_level: int = Field(3, ge=0, le=5)
    """TensorRT's own scale: 0 builds fastest, 5 tries the most kernels."""
    workspace_mib: int | None = Field(None, ge=1)
    """Scratch memory that layers may use; absent: all of the GPU's."""
    hardware_compatibility: Literal["none", "ampere_plus", "same_compute_capability"] = "none"
    """GPUs that the engine runs on: the model it was built on, or more of them at some loss of speed."""
    version_compatible: bool = False
    """A later TensorRT of the same major version may load the engine; Triton needs a flag, see docs/tensorrt.md."""
    timing_cache: bool = True
    """Reuse what earlier builds of the model measured on this GPU."""
    cuda_graphs: bool = False
    """Triton replays a batch as one launch; pays where kernels are short and only the batch varies."""
    cuda_graph_batches: tuple[int, ...] = ()
    """Batch sizes to capture; absent: 1, 2, 4, ... and the batch axis' opt and max."""

    @model_validator(mode="after")
    def _graphs_wanted(self) -> TensorrtSpec:
        if self.cuda_graph_batches and not self.cuda_graphs:
            raise _at(
                "tensorrt.cuda_graph_batches", f"seen {list(self.cuda_graph_batches)}, but cuda_graphs is not true"
            )
        return self


Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]
WorstError = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Tolerance(_Table):
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


class ParitySpec(_Table):
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


class OnnxRuntimeSpec(_Table):
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
            raise _at("onnxruntime.options", f"provider is {self.provider}; options need an accelerator's by name")
        if self.backend == "onnxruntime" and self.provider in ("migraphx", "cann"):
            raise _at("onnxruntime.backend", f"Triton's own has no {self.provider}; python has, or leave the key out")
        return self


class TargetSpec(_Table):
    """What one target overrides; the same keys as `[batching]` and `[slo]`, each optional."""

    batching: dict[str, Any] = {}
    slo: dict[str, Any] = {}


class DeploymentSpec(_Table):
    """One deployable model, as its `deploy.toml` has it. Sizes in elements, times as the names say."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    inputs: dict[str, TensorSpec] = Field(min_length=1)
    outputs: dict[str, TensorSpec] = Field(min_length=1)
    axes: dict[str, Axis]
    precision: PrecisionSpec = PrecisionSpec()
    parity: ParitySpec = ParitySpec()
    batching: BatchingSpec = BatchingSpec()
    slo: SloSpec = SloSpec()
    tensorrt: TensorrtSpec = TensorrtSpec()
    onnxruntime: OnnxRuntimeSpec = OnnxRuntimeSpec()
    targets: dict[Target, TargetSpec] = {}

    @model_validator(mode="after")
    def _consistent(self) -> DeploymentSpec:
        on_inputs = {dim for tensor in self.inputs.values() for dim in tensor.shape if isinstance(dim, str)}
        for table, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            for name, tensor in tensors.items():
                for dim in tensor.shape:
                    if isinstance(dim, str) and dim not in self.axes:
                        raise _at(
                            f"{table}.{name}.shape",
                            f"seen {dim!r}; axes are {_listed(self.axes)}: add [axes.{dim}] with min, opt and max",
                        )
                    if isinstance(dim, str) and dim not in on_inputs:
                        raise _at(
                            f"{table}.{name}.shape", f"axis {dim!r} is on no input; they have {_listed(on_inputs)}"
                        )
        for name in self.axes:
            if name not in on_inputs:
                raise _at(f"axes.{name}", f"is on no input; their axes are {_listed(on_inputs)}")
        for name in self.inputs.keys() & self.outputs.keys():
            raise _at(f"outputs.{name}", "an input has the same name; each tensor needs its own")
        for size in self.tensorrt.cuda_graph_batches:
            if BATCH in self.axes and not self.axes[BATCH].min <= size <= self.axes[BATCH].max:
                axis = self.axes[BATCH]
                raise _at("tensorrt.cuda_graph_batches", f"seen {size}; axis batch takes {axis.min} to {axis.max}")
        for target in self.targets:
            for part, table_type in (("batching", BatchingSpec), ("slo", SloSpec)):
                merged = self._merged(target, part)
                try:
                    table_type.model_validate(merged)
                except ValidationError as error:
                    raise _at(*_first_error(error, table_type, f"targets.{target}.{part}.")) from None
        self._check_measures(self.slo, "slo")
        for target in self.targets:
            self._check_measures(self.for_target(target).slo, f"targets.{target}.slo")
        return self

    def _check_measures(self, slo: SloSpec, key: str) -> None:
        """Each objective names something that is measured."""
        metric = self.precision.metric
        for line in slo.objectives:
            if (measure := Objective.parse(line).measure) != metric and Objective.parse(line).kind == "quality":
                known = f"{_MEASURES}, {metric}" if metric else f"{_MEASURES}, and precision.metric, which is not set"
                raise _at(f"{key}.objectives", f"seen {line!r}; nothing measures {measure!r}; known: {known}")

    def _merged(self, target: Target, part: str) -> dict[str, Any]:
        return {**getattr(self, part).model_dump(exclude_unset=True), **getattr(self.targets[target], part)}

    def for_target(self, target: Target) -> DeploymentSpec:
        """The same spec with what `[targets.<target>]` overrides put in place."""
        if target not in self.targets:
            return self
        batching = BatchingSpec.model_validate(self._merged(target, "batching"))
        slo = SloSpec.model_validate(self._merged(target, "slo"))
        return self.model_copy(update={"batching": batching, "slo": slo})

    def shape(self, tensor: str, corner: Literal["min", "opt", "max"], **sizes: int) -> tuple[int, ...]:
        """Shape of an input or output with every axis at one corner of the profile, or at `sizes`."""
        dims = (self.inputs.get(tensor) or self.outputs[tensor]).shape
        return tuple(dim if isinstance(dim, int) else sizes.get(dim, getattr(self.axes[dim], corner)) for dim in dims)

    @property
    def provider_options(self) -> dict[str, str]:
        """Options of ONNX Runtime's execution provider, as strings.

        TensorRT's get the profile (`input:1x50,...`): without one it builds an engine for each new range of shapes.
        """
        given = self.onnxruntime.options.items()
        options = {name: str(int(value) if isinstance(value, bool) else value) for name, value in given}
        if self.onnxruntime.provider != "tensorrt":
            return options
        dynamic = [
            name
            for name, tensor in self.inputs.items()
            if any(self.axes[dim].min < self.axes[dim].max for dim in tensor.shape if isinstance(dim, str))
        ]
        corners: tuple[Literal["min", "opt", "max"], ...] = ("min", "opt", "max")
        profile = {
            f"trt_profile_{corner}_shapes": ",".join(
                f"{name}:{'x'.join(map(str, self.shape(name, corner)))}" for name in dynamic
            )
            for corner in corners
        }
        return {**(profile if dynamic else {}), **options}

    @property
    def max_batch(self) -> int:
        """Largest batch of the profile, which is Triton's max_batch_size."""
        return self.axes[BATCH].max

    @classmethod
    def load(cls, path: str | Path) -> DeploymentSpec:
        """Reads a `deploy.toml`, or the one in a model folder. Raises InputError in one line."""
        path = Path(path)
        path = path / "deploy.toml" if path.is_dir() else path
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; a model folder holds deploy.toml and model.py") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML: {error}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            return cls.model_validate_json(json.dumps(data, default=str))  # JSON: an array may fill a tuple
        except ValidationError as error:
            key, message = _first_error(error, cls)
            raise InputError(f"{path}: {key}: {message}" if key else f"{path}: {message}") from None

    @classmethod
    def of_model(cls, model: str, models: str | Path = "models") -> DeploymentSpec:
        """The spec of the model folder `<models>/<model>`; its name must be the folder's."""
        models = Path(models)
        if not (models / model / "deploy.toml").is_file():
            found = sorted(path.parent.name for path in models.glob("*/deploy.toml"))
            raise InputError(f"no model {model!r} (no {models / model / 'deploy.toml'}); {models} has {_listed(found)}")
        spec = cls.load(models / model)
        if spec.name != model:
            path = models / model / "deploy.toml"
            raise InputError(f"{path}: name: seen {spec.name!r}; it must be the folder's, {model!r}")
        return spec


class FileDigest(_Table):
    """What a file held when it was written."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)

    @classmethod
    def of(cls, path: Path) -> FileDigest:
        """Reads all of a file."""
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=file.tell())


class Manifest(BaseModel):
    """What an artifact is and came from; `manifest.json` beside it."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    precision: Precision
    """Asked for; what was found in the artifact is `found`."""
    target: Target | None = None
    """None for the ONNX graph itself, which any target takes."""
    found: dict[str, Any]
    """Proof of the precision: counted in the graph, or told by the compiled engine."""
    sources: dict[str, str]
    """sha256 by source: weights, onnx, calibration."""
    settings: dict[str, Any] = {}
    axes: dict[str, dict[str, int]]
    versions: dict[str, str]
    """Tools by name; `triton_tag` is the release of NVIDIA's container in which it was built, if it was in one."""
    compute_capability: str | None = None
    """Of the GPU that a TensorRT engine was built on, e.g. "9.0"."""
    accuracy: dict[str, Any] | None = None
    size_bytes: int = Field(ge=0)
    build_s: float = Field(ge=0)
    files: dict[str, FileDigest] = {}
    """By name: the artifact and its external data, as they were written."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a manifest; raises InputError with the first key that is wrong, in one line."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            key, message = _first_error(error, cls)
            raise InputError(f"{path}: {key}: {message}" if key else f"{path}: {message}") from None


class PublishedManifest(Manifest):
    """A manifest in a version directory of a model repository: what it takes to run the engine there."""

    target: Target
    inputs: dict[str, TensorSpec] = Field(min_length=1)
    outputs: dict[str, TensorSpec] = Field(min_length=1)
    files: dict[str, FileDigest] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_a_profile(self) -> PublishedManifest:
        for tensor in (*self.inputs.values(), *self.outputs.values()):
            for dim in tensor.shape:
                if isinstance(dim, str) and self.axes.get(dim, {}).keys() != {"min", "opt", "max"}:
                    raise _at(f"axes.{dim}", f"seen {self.axes.get(dim)}; a shape has it: min, opt and max are needed")
        return self


def build_dir(name: str) -> Path:
    """Where a model's intermediate artifacts lie: `$BUILD/<name>`, by default `build/<name>`."""
    return Path(os.environ.get("BUILD", "build")) / name


def _listed(names: Any) -> str:
    return ", ".join(map(str, sorted(names))) or "none"


def _at(key: str, message: str) -> ValueError:
    return ValueError(f"@{key}@{message}")


def _allowed_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys that the table at `loc` may have."""
    node: Any = model
    for part in loc:
        if isinstance(node, type) and issubclass(node, BaseModel):
            node = node.model_fields[str(part)].annotation if part in node.model_fields else None
        else:  # dict[str, Table]
            node = get_args(node)[-1] if get_args(node) else None
    return sorted(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def _first_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> tuple[str, str]:
    """Key and one-line message of the first error that pydantic found."""
    found = error.errors(include_url=False)  # a misspelt key is also a missing one: say the former
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    loc = tuple(part for part in first["loc"] if part != "[key]")
    key = prefix + ".".join(map(str, loc))
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("@"):
        _, key, message = message.split("@", 2)
        return key, message
    if first["type"] in ("extra_forbidden", "missing"):
        allowed = _allowed_keys(model, loc[:-1])
        if first["type"] == "missing":
            return key, "missing; it has to be given"
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return key, f"unknown key (seen {first['input']!r}); allowed: {', '.join(allowed)}{hint}"
    if first["type"] == "value_error":
        return key, message
    message = message[0].lower() + message[1:].replace("\n", " ")
    return key, f"seen {first['input']!r}; {message}"


class Parser(argparse.ArgumentParser):
    """argparse with help from the module's docstring and errors in one line, exit code 2."""

    def __init__(self, doc: str | None, **kwargs: Any) -> None:
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model and --models, as every command that works on one model takes them."""
    parser.add_argument("--model", default="recommender", help="name of the model folder (default: %(default)s)")
    parser.add_argument("--models", default="models", help="folder of model folders (default: %(default)s)")


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command and ends the process with the exit code that its outcome has."""
    try:
        code = main() or 0
    except InputError as error:
        code = _say(error, 2)
    except GateFailed as error:
        code = _say(error, 1)
    except InvalidMeasurement as error:
        code = _say(error, 3)
    except KeyboardInterrupt:
        code = _say("interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _say(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def main() -> None:
    """Checks a deploy.toml and prints what it says."""
    parser = Parser(__doc__, prog="python -m deepseek.spec")
    parser.add_argument("path", nargs="?", help="deploy.toml or a model folder (default: that of --model)")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the whole spec, defaults included, as JSON")
    parser.add_argument("--make", action="store_true", help="print what the Makefile needs, as variables")
    args = parser.parse_args()
    spec = DeploymentSpec.load(args.path) if args.path else DeploymentSpec.of_model(args.model, args.models)
    if args.json:
        print(spec.model_dump_json(indent=2))
    elif args.make:
        print(f"CANDIDATES := {' '.join(spec.precision.candidates)}")
    else:
        for kind, tensors in (("input", spec.inputs), ("output", spec.outputs)):
            for name, tensor in tensors.items():
                print(f"{kind:<7} {name}: {tensor.dtype} {json.dumps(tensor.shape)}")
        for name, axis in spec.axes.items():
            print(f"axis    {name}: {axis.min} / {axis.opt} / {axis.max}")


if __name__ == "__main__":
    run_command(main)

"""`DeploymentSpec`: one deployable model, as its `deploy.toml` has it."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from deepseek.spec.checks import Table, at, first_error, listed, matching
from deepseek.spec.command import InputError
from deepseek.spec.objectives import MEASURES, Objective, SloSpec
from deepseek.spec.tables import (
    BATCH,
    Axis,
    AxisName,
    BatchingSpec,
    OnnxRuntimeSpec,
    ParitySpec,
    PrecisionSpec,
    Target,
    TargetSpec,
    TensorName,
    TensorrtSpec,
    TensorSpec,
)
from deepseek.spec.tuned import TunedFile

# What lies in build/ beside the folders of the models, which have their names.
NO_MODELS = frozenset({"gateway", "gateway-authority", "key", "kubernetes", "observe", "serving", "stack"})


def _not_ours(name: str) -> str:
    if name in NO_MODELS:
        raise ValueError(
            f"seen {name!r}, but build/{name} is no model's; any but {listed(NO_MODELS)}, and so the model's folder"
        )
    return name


ModelName = Annotated[
    str, matching("[A-Za-z0-9][A-Za-z0-9_-]*", "ASCII letters, digits, - and _"), AfterValidator(_not_ours)
]
TomlName = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.toml", "a file's name, such as tuned.toml")]


_Overridden = TypeVar("_Overridden", bound=Table)
_MODELS = Path("models")
_models_of: dict[str, Path] = {}  # where each model was last looked for


class DeploymentSpec(Table):
    """One deployable model, as its `deploy.toml` has it. Sizes in elements, times as the names say."""

    name: ModelName
    """That of the folder: how callers name the model."""
    inputs: dict[TensorName, TensorSpec] = Field(min_length=1)
    outputs: dict[TensorName, TensorSpec] = Field(min_length=1)
    axes: dict[AxisName, Axis]
    precision: PrecisionSpec = PrecisionSpec()
    parity: ParitySpec = ParitySpec()
    batching: BatchingSpec = BatchingSpec()
    slo: SloSpec = SloSpec()
    tensorrt: TensorrtSpec = TensorrtSpec()
    onnxruntime: OnnxRuntimeSpec = OnnxRuntimeSpec()
    targets: dict[Target, TargetSpec] = {}
    tuned: TomlName | None = None
    """File beside this one where `make tune` writes what it found better on this machine; it need not be there."""

    @model_validator(mode="after")
    def _consistent(self) -> DeploymentSpec:
        on_inputs = {dim for tensor in self.inputs.values() for dim in tensor.shape if isinstance(dim, str)}
        for table, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            for name, tensor in tensors.items():
                for dim in tensor.shape:
                    if isinstance(dim, str) and dim not in self.axes:
                        raise at(
                            f"{table}.{name}.shape",
                            f"seen {dim!r}; axes are {listed(self.axes)}: add [axes.{dim}] with min, opt and max",
                        )
                    if isinstance(dim, str) and dim not in on_inputs:
                        raise at(f"{table}.{name}.shape", f"axis {dim!r} is on no input; they have {listed(on_inputs)}")
        for name in self.axes:
            if name not in on_inputs:
                raise at(f"axes.{name}", f"is on no input; their axes are {listed(on_inputs)}")
        for name in self.inputs.keys() & self.outputs.keys():
            raise at(f"outputs.{name}", "an input has the same name; each tensor needs its own")
        for size in self.tensorrt.cuda_graph_batches:
            if BATCH in self.axes and not self.axes[BATCH].min <= size <= self.axes[BATCH].max:
                axis = self.axes[BATCH]
                raise at("tensorrt.cuda_graph_batches", f"seen {size}; axis batch takes {axis.min} to {axis.max}")
        for target in self.targets:
            for part, table_type in (("batching", BatchingSpec), ("slo", SloSpec)):
                try:
                    self._overridden(target, part, table_type)
                except ValidationError as error:
                    raise at(*first_error(error, table_type, f"targets.{target}.{part}.")) from None
        if self.tuned == "deploy.toml":
            raise at("tuned", "seen 'deploy.toml'; tuned values need a file of their own, such as tuned.toml")
        self._check_max_batch(self.batching, "batching")
        self._check_measures(self.slo, "slo")
        for target in self.targets:
            self._check_max_batch(self.for_target(target).batching, f"targets.{target}.batching")
            self._check_measures(self.for_target(target).slo, f"targets.{target}.slo")
        return self

    def _check_max_batch(self, batching: BatchingSpec, key: str) -> None:
        """Batches that Triton forms are ones that the engine takes."""
        axis, size = self.axes.get(BATCH), batching.max_batch
        if axis is not None and size is not None and not axis.min <= size <= axis.max:
            raise at(f"{key}.max_batch", f"seen {size}; axis batch takes {axis.min} to {axis.max}")

    def _check_measures(self, slo: SloSpec, key: str) -> None:
        """Each objective names something that is measured."""
        metric = self.precision.metric
        for line in slo.objectives:
            objective = Objective.parse(line)
            if objective.kind == "quality" and objective.measure != metric:
                known = f"{MEASURES}, {metric}" if metric else f"{MEASURES}, and precision.metric, which is not set"
                raise at(f"{key}.objectives", f"seen {line!r}; nothing measures {objective.measure!r}; known: {known}")

    def _overridden(self, target: Target, part: str, table_type: type[_Overridden]) -> _Overridden:
        """The table `part` with what the target has in place of its own."""
        merged = {**getattr(self, part).model_dump(exclude_unset=True), **getattr(self.targets[target], part)}
        return table_type.model_validate_json(json.dumps(merged, default=str))  # JSON: an array may fill a tuple

    def for_target(self, target: Target) -> DeploymentSpec:
        """The same spec with what `[targets.<target>]` overrides put in place."""
        if target not in self.targets:
            return self
        batching = self._overridden(target, "batching", BatchingSpec)
        slo = self._overridden(target, "slo", SloSpec)
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
        """Largest batch of the profile, for which the engine is built."""
        return self.axes[BATCH].max

    @property
    def max_served_batch(self) -> int:
        """Triton's max_batch_size, of the target that `for_target` was given."""
        return self.batching.max_batch or self.max_batch

    def with_batches_up_to(self, size: int) -> DeploymentSpec:
        """The same profile cut off at a batch size: what a server takes whose max_batch_size that is."""
        axis = self.axes[BATCH]
        cut = axis.model_copy(update={"opt": min(axis.opt, size), "max": min(axis.max, size)})
        return self.model_copy(update={"axes": {**self.axes, BATCH: cut}})

    def model_facts(self) -> dict[str, Any]:
        """What graphs are made from: all but how they are served."""
        return self.model_dump(mode="json", exclude={"parity", "batching", "slo", "targets", "tuned"})

    @classmethod
    def load(cls, path: str | Path, *, tuned: str | Path | None = None) -> DeploymentSpec:
        """Reads a `deploy.toml`, or the one in a model folder. Raises InputError in one line.

        Tuned values take the place of its own: those of the file that its key `tuned` names, or of the file `tuned`
        (os.devnull: none).
        """
        path = Path(path)
        path = path / "deploy.toml" if path.is_dir() else path
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a mark in front
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; a model folder holds deploy.toml and model.py") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid TOML: {error}") from None
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        spec = cls._validated(path, data)
        place = tuned or (path.parent / spec.tuned if spec.tuned else None)
        values = TunedFile.read(Path(place)) if place else TunedFile()
        return cls._validated(Path(place), values.over(data)) if place and values.targets else spec

    @classmethod
    def _validated(cls, path: Path, data: dict[str, Any]) -> DeploymentSpec:
        """The spec that parsed TOML states; `path` is named where it is wrong."""
        try:
            return cls.model_validate_json(json.dumps(data, default=str))  # JSON: an array may fill a tuple
        except ValidationError as error:
            key, message = first_error(error, cls)
            raise InputError(f"{path}: {key}: {message}" if key else f"{path}: {message}") from None

    @classmethod
    def of_model(cls, model: str, models: str | Path = "models", *, tuned: str | Path | None = None) -> DeploymentSpec:
        """The spec of the model folder `<models>/<model>`; its name must be the folder's. `tuned`: see `load`."""
        models = Path(models)
        _models_of[model] = models
        if not (models / model / "deploy.toml").is_file():
            found = sorted(path.parent.name for path in models.glob("*/deploy.toml"))
            raise InputError(f"no model {model!r} (no {models / model / 'deploy.toml'}); {models} has {listed(found)}")
        spec = cls.load(models / model, tuned=tuned)
        if spec.name != model:
            path = models / model / "deploy.toml"
            raise InputError(f"{path}: name: seen {spec.name!r}; it must be the folder's, {model!r}")
        return spec


def flags_for(name: str) -> str:
    """The flags that name a model to a stage, as a hint has them: `--models` where it was last opened elsewhere."""
    models = _models_of.get(name, _MODELS)
    return f"--model {name}" + ("" if models == _MODELS else f" --models {models}")


def variables_for(name: str) -> str:
    """The same as variables for make."""
    models = _models_of.get(name, _MODELS)
    return f"MODEL={name}" + ("" if models == _MODELS else f" MODELS={models}")


def build_dir(name: str) -> Path:
    """Where a model's intermediate artifacts lie: `$BUILD/<name>`, by default `build/<name>`."""
    return Path(os.environ.get("BUILD", "build")) / name

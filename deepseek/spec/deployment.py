"""`DeploymentSpec`: one deployable model, as its `deploy.toml` describes it."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError, model_validator

from deepseek.spec.checks import Table, at, checked, first_error, fitting, listed, read_toml
from deepseek.spec.command import InputError
from deepseek.spec.objectives import MEASURES, Objective, SloSpec
from deepseek.spec.tables import (
    BATCH,
    BUILT_DTYPES,
    Axis,
    AxisName,
    BatchingSpec,
    OnnxRuntimeSpec,
    ParitySpec,
    PrecisionSpec,
    TargetSpec,
    TensorName,
    TensorrtSpec,
    TensorSpec,
)
from deepseek.spec.text import TextSpec, check_text
from deepseek.spec.tuned import TunedFile
from deepseek.spec.vocabulary import VocabularySpec, check_vocabulary
from deepseek.targets import PUBLISHABLE, Target

if TYPE_CHECKING:
    from deepseek.vocabulary import Vocabulary

# Folders in build/ that do not belong to a model; every other folder there has the name of its model.
NO_MODELS = frozenset(
    ("bench", "gateway", "gateway-authority", "gpu-check", "key", "kubernetes", "observe", "serving", "site", "stack")
)


def _not_ours(name: str) -> str:
    if name in NO_MODELS:
        raise ValueError(
            f"seen {name!r}, but build/{name} is reserved; rename the model and its folder to anything but "
            f"{listed(NO_MODELS)}"
        )
    return name


_MODEL_NAME, _TOML_NAME = re.compile("[A-Za-z0-9][A-Za-z0-9_-]*"), re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.toml")
ModelName = Annotated[str, fitting(_MODEL_NAME.fullmatch, "ASCII letters, digits, - and _"), AfterValidator(_not_ours)]
TomlName = Annotated[str, fitting(_TOML_NAME.fullmatch, "a file name, such as tuned.toml")]


_CAST = "use one of these, and cast in forward"
_INSTEAD = {
    "string": "let callers send token ids or category ids (int64), or their names ([text], [vocabulary]), and name the "
    "ids of an output in labels"
}
_Overridden = TypeVar("_Overridden", bound=Table)
_MODELS = Path("models")
_models_of: dict[str, Path] = {}  # the folder in which each model was last looked up


class DeploymentSpec(Table):
    """One deployable model, as its `deploy.toml` describes it. The names of times end in their unit.

    Read one with `DeploymentSpec.load(path)`; a mistake raises InputError in one line.
    """

    name: ModelName
    """The model's name, which callers use. Must equal the folder's name."""
    inputs: dict[TensorName, TensorSpec] = Field(min_length=1)
    outputs: dict[TensorName, TensorSpec] = Field(min_length=1)
    axes: dict[AxisName, Axis]
    precision: PrecisionSpec = PrecisionSpec()
    parity: ParitySpec = ParitySpec()
    batching: BatchingSpec = BatchingSpec()
    slo: SloSpec = SloSpec()
    tensorrt: TensorrtSpec = TensorrtSpec()
    onnxruntime: OnnxRuntimeSpec = OnnxRuntimeSpec()
    text: TextSpec | None = None
    vocabulary: VocabularySpec | None = None
    targets: dict[Target, TargetSpec] = {}
    tuned: TomlName | None = None
    """File in the same folder to which `make tune` writes faster settings for this machine. It may be missing."""

    @model_validator(mode="after")
    def _consistent(self) -> DeploymentSpec:
        self._check_axes()
        for name in self.inputs.keys() & self.outputs.keys():
            raise at(f"outputs.{name}", "an input has the same name; give each tensor its own name")
        axis = self.axes[BATCH]  # every shape begins with it
        for size in self.tensorrt.cuda_graph_batches:
            if not axis.min <= size <= axis.max:
                raise at("tensorrt.cuda_graph_batches", f"seen {size}; axis batch allows {axis.min} to {axis.max}")
        if self.tuned == "deploy.toml":
            raise at("tuned", "seen 'deploy.toml'; name a separate file for tuned values, such as tuned.toml")
        if self.text is not None:
            check_text(self.text, self.inputs, self.outputs, self.axes)
        if self.vocabulary is not None:
            if self.text is not None:
                raise at("vocabulary", "seen with [text]; remove one of them")
            check_vocabulary(self.vocabulary, self.inputs, self.outputs, self.axes)
        self._check_max_batch(self.batching, "batching")
        self._check_measures(self.slo, "slo")
        for target in self.targets:
            self._check_target(target)
        return self

    def _check_axes(self) -> None:
        """Checks that each axis of a shape is declared, and that an input has it."""
        on_inputs = {dim for tensor in self.inputs.values() for dim in tensor.shape if isinstance(dim, str)}
        for name, tensor in self.inputs.items():
            for dim in tensor.shape:
                if isinstance(dim, str) and dim not in self.axes:
                    declared = f"axes are {listed(self.axes)}: add [axes.{dim}] with min, opt and max"
                    raise at(f"inputs.{name}.shape", f"seen {dim!r}; {declared}")
        for name, tensor in self.outputs.items():
            for dim in tensor.shape:
                if isinstance(dim, str) and dim not in on_inputs:
                    raise at(
                        f"outputs.{name}.shape",
                        f"seen {dim!r}; allowed: a number, or an axis of an input ({listed(on_inputs)}): pad an output "
                        "of another size in forward, and return its true size as one more output",
                    )
        for name in self.axes:
            if name not in on_inputs:
                raise at(f"axes.{name}", f"no input has this axis; inputs have {listed(on_inputs)}")

    def _check_target(self, target: Target) -> None:
        """Checks the tables of `[targets.<target>]`, and what they make of this spec."""
        for part, table_type in (("batching", BatchingSpec), ("slo", SloSpec)):
            try:
                self._overridden(target, part, table_type)
            except ValidationError as error:
                raise at(*first_error(error, table_type, f"targets.{target}.{part}.")) from None
        own = self.for_target(target)
        self._check_max_batch(own.batching, f"targets.{target}.batching")
        self._check_measures(own.slo, f"targets.{target}.slo")

    def _check_max_batch(self, batching: BatchingSpec, key: str) -> None:
        """Checks that the engine accepts the batches that Triton forms."""
        axis, size, preferred = self.axes[BATCH], batching.max_batch, batching.preferred_batch
        if size is not None and not axis.min <= size <= axis.max:
            raise at(f"{key}.max_batch", f"seen {size}; axis batch allows {axis.min} to {axis.max}")
        if preferred is not None and not axis.min <= preferred <= (size or axis.max):
            allowed = f"{axis.min} to {size or axis.max}, the largest batch"
            raise at(f"{key}.preferred_batch", f"seen {preferred}; allowed: {allowed}")

    def _check_measures(self, slo: SloSpec, key: str) -> None:
        """Checks that each objective names a known measure."""
        metric = self.precision.metric
        for line in slo.objectives:
            objective = Objective.parse(line)
            if objective.kind == "quality" and objective.measure != metric:
                known = f"{MEASURES}, {metric}" if metric else f"{MEASURES}, and precision.metric, which is not set"
                raise at(f"{key}.objectives", f"seen {line!r}; unknown measure {objective.measure!r}; known: {known}")

    def _overridden(self, target: Target, part: str, table_type: type[_Overridden]) -> _Overridden:
        """The table `part` with the target's overrides applied."""
        merged = {**getattr(self, part).model_dump(exclude_unset=True), **getattr(self.targets[target], part)}
        return table_type.model_validate_json(json.dumps(merged, default=str))  # JSON: an array may fill a tuple

    def for_target(self, target: Target) -> DeploymentSpec:
        """A copy with the overrides of `[targets.<target>]` applied."""
        if target not in self.targets:
            return self
        batching = self._overridden(target, "batching", BatchingSpec)
        slo = self._overridden(target, "slo", SloSpec)
        return self.model_copy(update={"batching": batching, "slo": slo})

    def shape(self, tensor: str, corner: Literal["min", "opt", "max"], **sizes: int) -> tuple[int, ...]:
        """Shape of an input or output, with every axis at one corner of the profile unless `sizes` gives its size."""
        dims = (self.inputs.get(tensor) or self.outputs[tensor]).shape
        return tuple(dim if isinstance(dim, int) else sizes.get(dim, getattr(self.axes[dim], corner)) for dim in dims)

    @property
    def provider_options(self) -> dict[str, str]:
        """Options of ONNX Runtime's execution provider, as strings.

        The TensorRT provider also gets the profile (`input:1x50,...`): without it, TensorRT builds an engine for each
        new range of shapes.
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
        """Largest batch that the engine is built for: `axes.batch.max`."""
        return self.axes[BATCH].max

    @property
    def max_served_batch(self) -> int:
        """Triton's max_batch_size. Call it on the result of `for_target`."""
        return self.batching.max_batch or self.max_batch

    def text_for(self, target: Target) -> TextSpec | None:
        """`[text]` if Triton can serve the target; else None."""
        return self.text if target in PUBLISHABLE else None

    def vocabulary_for(self, target: Target) -> VocabularySpec | None:
        """The same for `[vocabulary]`."""
        return self.vocabulary if target in PUBLISHABLE else None

    def has_front(self, target: Target) -> bool:
        """Whether a model that takes strings stands in front of the engine's, which a backend of Triton's own runs."""
        strings = self.text_for(target) or self.vocabulary_for(target)
        return strings is not None and not self.runs_in_python(target)

    def runs_in_python(self, target: Target) -> bool:
        """Whether Triton's Python backend runs the engine: the only one of the embedded Triton."""
        return target == "onnxruntime" and self.onnxruntime.backend == "python"

    def with_batches_up_to(self, size: int) -> DeploymentSpec:
        """A copy whose batch axis ends at `size`: the profile of a server with that max_batch_size."""
        axis = self.axes[BATCH]
        cut = axis.model_copy(update={"opt": min(axis.opt, size), "max": min(axis.max, size)})
        return self.model_copy(update={"axes": {**self.axes, BATCH: cut}})

    @classmethod
    def load(cls, path: str | Path, *, tuned: str | Path | None = None) -> DeploymentSpec:
        """Reads a `deploy.toml`, or the one in a model folder. Raises InputError in one line.

        Tuned values override those of `deploy.toml`. They come from the file `tuned`, by default from the one that the
        key `tuned` names; `os.devnull` turns them off.
        """
        path = Path(path)
        path = path / "deploy.toml" if path.is_dir() else path
        data = read_toml(path)
        spec = checked(cls, data, path)
        place = tuned or (path.parent / spec.tuned if spec.tuned else None)
        values = TunedFile.read(Path(place)) if place else TunedFile()
        return checked(cls, values.over(data), place) if values.targets else spec

    @classmethod
    def of_model(cls, model: str, models: str | Path = "models", *, tuned: str | Path | None = None) -> DeploymentSpec:
        """The spec of the model folder `<models>/<model>`; `tuned` as in `load`.

        Raises InputError if there is no such folder, or if `name` differs from the folder's name.
        """
        models = Path(models)
        _models_of[model] = models
        if not (models / model / "deploy.toml").is_file():
            found = sorted(path.parent.name for path in models.glob("*/deploy.toml"))
            raise InputError(f"no model {model!r} (no {models / model / 'deploy.toml'}); {models} has {listed(found)}")
        spec = cls.load(models / model, tuned=tuned)
        if spec.name != model:
            path = models / model / "deploy.toml"
            raise InputError(f"{path}: name: seen {spec.name!r}; it must equal the folder's name, {model!r}")
        return spec

    @classmethod
    def to_build(cls, model: str, models: str | Path = "models", *, tuned: str | Path | None = None) -> DeploymentSpec:
        """The same for a build. Raises InputError also for a type that is only for models that are not built here."""
        spec = cls.of_model(model, models, tuned=tuned)
        for kind, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
            for name, tensor in tensors.items():
                if tensor.dtype not in BUILT_DTYPES:
                    place = f"{Path(models) / model / 'deploy.toml'}: {kind}.{name}.dtype"
                    raise InputError(
                        f"{place}: seen {tensor.dtype!r}, which is only for load tests of a model that was not built "
                        f"here; a build takes {', '.join(BUILT_DTYPES)}: {_INSTEAD.get(tensor.dtype, _CAST)}"
                    )
        return spec


def flags_for(name: str) -> str:
    """Flags that select a model, for hints; with `--models` if the model was last read from another folder."""
    models = _models_of.get(name, _MODELS)
    return f"--model {name}" + ("" if models == _MODELS else f" --models {shlex.quote(str(models))}")


def variables_for(name: str, models: Path | None = None) -> str:
    """The same selection as `flags_for`, as variables for make; or the model in the folder `models`."""
    models = models or _models_of.get(name, _MODELS)
    return f"MODEL={name}" + ("" if models == _MODELS else f" MODELS={shlex.quote(str(models))}")


def build_dir(name: str) -> Path:
    """The folder of a model's intermediate artifacts: `$DEEPSEEK_BUILD/<name>`, by default `build/<name>`."""
    return Path(os.environ.get("DEEPSEEK_BUILD", "build")) / name


def tokenizer_path(spec: DeploymentSpec) -> Path:
    """The file that `text.tokenizer` names: in the model folder, else in the build folder. Raises InputError."""
    assert spec.text is not None
    return _beside_the_model(spec, "text.tokenizer", spec.text.tokenizer, "the tokenizer.json")


def catalogue_of(spec: DeploymentSpec) -> tuple[Path, Vocabulary]:
    """The file that `vocabulary.file` names, found in the same way, and the names in it. Raises InputError."""
    assert spec.vocabulary is not None
    path = _beside_the_model(spec, "vocabulary.file", spec.vocabulary.file, "a csv with id,item,title")
    return path, read_catalogue(path)


def read_catalogue(path: Path) -> Vocabulary:
    """The names in a catalogue. Raises InputError."""
    from deepseek.vocabulary import Vocabulary

    try:
        return Vocabulary(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None


def _beside_the_model(spec: DeploymentSpec, key: str, name: str, what: str) -> Path:
    places = [folder / name for folder in (_models_of.get(spec.name, _MODELS) / spec.name, build_dir(spec.name))]
    for path in places:
        if path.is_file():
            return path
    raise InputError(f"{key}: no file {' and no file '.join(map(str, places))}; put {what} there")

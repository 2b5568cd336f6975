"""`manifest.json`: what is said of an artifact, beside it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deepseek.spec.checks import Table, at, first_error
from deepseek.spec.command import InputError
from deepseek.spec.tables import Precision, Target, TensorSpec


class FileDigest(Table):
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
            key, message = first_error(error, cls)
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
                    raise at(f"axes.{dim}", f"seen {self.axes.get(dim)}; a shape has it: min, opt and max are needed")
        return self

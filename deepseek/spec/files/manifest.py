"""`manifest.json`, which lies beside each artifact and describes it."""

import hashlib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deepseek.precisions import Precision
from deepseek.spec.checks import Table, at, checked
from deepseek.spec.files.measured_batches import BatchingPlan
from deepseek.spec.tables import TensorSpec
from deepseek.targets import Target

OWN_DATA = "own_data"
"""A setting of a published manifest: the model was trained on what DATA= names, not on its example data."""


class FileDigest(Table):
    """Hash and size of a file when it was written."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)

    @classmethod
    def of(cls, path: Path) -> "FileDigest":
        """Reads the whole file."""
        with path.open("rb") as file:
            return cls(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size_bytes=file.tell())


class Manifest(BaseModel):
    """What an artifact is and what it was built from."""

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1] = 1
    model: str
    precision: Precision
    """The precision asked for; `found` has what the artifact contains."""
    target: Target | None = None
    """None for the ONNX graph itself, which any target accepts."""
    found: dict[str, Any]
    """Evidence of the precision: counts from the graph, or what the compiled engine reports."""
    sources: dict[str, str]
    """sha256 of each source: weights, onnx, calibration."""
    settings: dict[str, Any] = {}
    axes: dict[str, dict[str, int]]
    versions: dict[str, str]
    """Version of each tool; `triton_tag` is the release of NVIDIA's container, if the artifact was built in one."""
    compute_capability: str | None = None
    """Compute capability of the GPU that a TensorRT engine was built on, e.g. "9.0"."""
    accuracy: dict[str, Any] | None = None
    size_bytes: int = Field(ge=0)
    build_s: float = Field(ge=0)
    files: dict[str, FileDigest] = {}
    """Digests by file name: the artifact and its external data."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Reads a manifest. Raises InputError with the first wrong key, in one line."""
        return checked(cls, path.read_bytes(), path)


class PublishedManifest(Manifest):
    """A manifest in a version directory of a model repository, with all that is needed to run the engine there."""

    target: Target
    inputs: dict[str, TensorSpec] = Field(min_length=1)
    outputs: dict[str, TensorSpec] = Field(min_length=1)
    files: dict[str, FileDigest] = Field(min_length=1)
    batching: BatchingPlan | None = None
    """Batching and queue, where each value comes from, and the measurement; None in versions of earlier releases."""

    @model_validator(mode="after")
    def _has_a_profile(self) -> "PublishedManifest":
        for tensor in (*self.inputs.values(), *self.outputs.values()):
            for dim in tensor.shape:
                if isinstance(dim, str) and self.axes.get(dim, {}).keys() != {"min", "opt", "max"}:
                    raise at(f"axes.{dim}", f"seen {self.axes.get(dim)}; a shape uses it: give min, opt and max")
        return self

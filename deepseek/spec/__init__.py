"""What `deploy.toml` says: the one file that drives export, engine, server, load test and verdict.

Contract: `DeploymentSpec` is the only thing of ours that both islands (build and use) import, so this package needs
pydantic and nothing heavier. With it stand what every command shares (`deepseek.spec.command`) and the manifest of an
artifact.
"""

from deepseek.spec.command import (
    GateFailed,
    InputError,
    InvalidMeasurement,
    Parser,
    add_model_arguments,
    kept_for_json,
    run_command,
)
from deepseek.spec.deployment import DeploymentSpec, build_dir, flags_for, variables_for
from deepseek.spec.manifest import FileDigest, Manifest, PublishedManifest
from deepseek.spec.objectives import Objective, Relation, SloSpec, histogram_bounds_ms
from deepseek.spec.tables import (
    BATCH,
    TRITON_DTYPES,
    Axis,
    ParitySpec,
    Precision,
    Provider,
    Target,
    TensorrtSpec,
    TensorSpec,
    Tolerance,
)
from deepseek.spec.tuned import TunedBatching, TunedFile, TunedTarget

__all__ = [
    "BATCH",
    "TRITON_DTYPES",
    "Axis",
    "DeploymentSpec",
    "FileDigest",
    "GateFailed",
    "InputError",
    "InvalidMeasurement",
    "Manifest",
    "Objective",
    "ParitySpec",
    "Parser",
    "Precision",
    "Provider",
    "PublishedManifest",
    "Relation",
    "SloSpec",
    "Target",
    "TensorSpec",
    "TensorrtSpec",
    "Tolerance",
    "TunedBatching",
    "TunedFile",
    "TunedTarget",
    "add_model_arguments",
    "build_dir",
    "flags_for",
    "histogram_bounds_ms",
    "kept_for_json",
    "run_command",
    "variables_for",
]

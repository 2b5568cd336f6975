"""`deploy.toml`: the one file that drives export, engine, server, load test and verdict.

`deepseek spec` shows it. Both islands (build and use) import this room, so pydantic is its heaviest dependency. May
import `deepseek.precisions` and `deepseek.targets`.

| module | holds |
| `deployment`, `tables`, `text`, `vocabulary`, `objectives`, `tuned` | the tables of `deploy.toml`, and tuned values |
| `tokenizer` | the tokenizer of a model with `[text]` |
| `paired_drop` | when the accuracy budget accepts a drop: for build, parity and release |
| `checks`, `keys`, `show_spec` | one-line errors; all keys; the command |
| `command` | errors and exit codes of every command |
| `metric_windows` | Prometheus rate windows, and the buckets of a histogram |
| `files/` | atomic writes, locked folders, manifests, measured batches and what follows, versions, releases |
| `processes/` | child processes: environment, free ports, end with their parent; a Triton server over a repository |
| `machine/` | this machine's CPU and GPUs, tags of NVIDIA's containers |
"""

from deepseek.precisions import Precision
from deepseek.spec.command import (
    ExitCode,
    GateFailed,
    InputError,
    InvalidMeasurement,
    kept_for_json,
    one_line,
)
from deepseek.spec.deployment import DeploymentSpec, build_dir, flags_for, tokenizer_path, variables_for
from deepseek.spec.files.manifest import FileDigest, Manifest, PublishedManifest
from deepseek.spec.objectives import Objective, Relation, SloSpec, histogram_bounds_ms
from deepseek.spec.tables import (
    BATCH,
    BUILT_DTYPES,
    BULK,
    ONLINE,
    TRITON_DTYPES,
    Axis,
    ParitySpec,
    TensorrtSpec,
    TensorSpec,
    Tolerance,
)
from deepseek.spec.text import TEXT, TOKENIZER, TOKENS, TextSpec
from deepseek.spec.tuned import TunedBatching, TunedFile, TunedTarget
from deepseek.targets import Target

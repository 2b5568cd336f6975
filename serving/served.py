"""What each model of a repository asks of the stack around it: sizes, rates, time-outs, objectives, versions.

Contract: reads the repository and, where it is in the folder of model folders, each model's `deploy.toml`, for the
target that it was built for. The gateway's limits, memory, alerts and dashboard all come from these facts.

Example:
    for model in served_models(Path("model_repository"), Path("models")):
        print(model.name, model.body_bytes, model.latency_limits_ms)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek.spec import BATCH, DeploymentSpec, Objective, Precision, PublishedManifest, Target
from deepseek.spec.repository import versions_of
from serving.repository import MANIFEST, config_of, models_in, wanted_versions

MIB = 2**20
JSON_BYTES = 26  # a number as JSON has it, at the most: -1.2345678901234567e-308 and a comma
HEADER_BYTES = 64 * 1024  # names, shapes and parameters around the numbers
LATENESS = 10  # times the p99 of the SLO after which an answer is not waited for
LEAST_TIMEOUT_S = 1
DEFAULT_P99_MS = 3000  # of a model whose SLO names none


@dataclass(frozen=True, kw_only=True)
class Served:
    """What one model asks of the stack."""

    name: str
    needs_gpu: bool
    instances: int
    weights_bytes: int
    input_bytes: int
    """Of the largest request, as raw tensors."""
    output_bytes: int
    input_numbers: int
    queue_timeout_ms: float
    p99_ms: float
    rate_rps: float
    target: Target = "onnxruntime"
    """What runs the graph of the newest version that is served."""
    precision: Precision | None = None
    """Of that graph; None of a model that was not made here."""
    objectives: tuple[Objective, ...] = ()
    """Of the SLO, those that hold at any rate; none where the model's `deploy.toml` is not known."""
    queue_size: int = 0
    """Requests that may wait; 0: no bound."""
    versions: tuple[int, ...] = ()
    """Of those in the repository, the ones that its version policy serves, newest first."""
    models: Path | None = None
    """The folder of model folders that has its `deploy.toml`; None where none is known: neither is its SLO then."""

    @property
    def body_bytes(self) -> int:
        """Of the largest request, as JSON, which is larger than raw tensors."""
        return max(self.input_numbers * JSON_BYTES, self.input_bytes) + HEADER_BYTES

    @property
    def timeout_s(self) -> int:
        """How long an answer may take: longer, and Triton or the model has stalled."""
        return max(LEAST_TIMEOUT_S, math.ceil((self.queue_timeout_ms + LATENESS * self.p99_ms) / 1000))

    @property
    def latency_limits_ms(self) -> dict[float, float]:
        """By percent, the latency that so many of the requests are to keep: the strictest that is named."""
        found: dict[float, float] = {}
        for line in self.objectives:
            if line.percent is not None:
                found[line.percent] = min(line.limit, found.get(line.percent, math.inf))
        return found

    @property
    def max_error_rate(self) -> float | None:
        """Share of the requests that may fail; None where no SLO is known."""
        return min((line.limit for line in self.objectives if line.kind == "error_rate"), default=None)

    @property
    def shm_bytes(self) -> int:
        """Of the Python backend, for each instance: 1 MiB to start, the batch in work and the one being answered."""
        return self.instances * (2 * (self.input_bytes + self.output_bytes) + MIB)


def served_models(repository: Path, models: Path, others: Mapping[str, Path] | None = None) -> list[Served]:
    """What each model of a repository asks for; one that is not in `models` by the folder that `others` has for it."""
    found = []
    for folder in models_in(repository):
        places = (models, (others or {}).get(folder.name))
        known = (place for place in places if place and (place / folder.name / "deploy.toml").is_file())
        found.append(_served(folder, next(known, None)))
    return found


def _served(folder: Path, models: Path | None) -> Served:
    config = config_of(folder)
    manifest = _manifest(folder, config)
    target: Target = manifest.target if manifest else "onnxruntime"
    spec = DeploymentSpec.of_model(folder.name, models).for_target(target) if models else None
    inputs = _tensors(config, manifest, "input")
    policy = config.dynamic_batching.default_queue_policy
    group = config.instance_group[0] if config.instance_group else ModelInstanceGroup(count=1)
    provider = config.parameters["provider"].string_value if "provider" in config.parameters else "auto"
    lines = spec.slo.all_objectives() if spec else []
    rates = [line.rate_rps for line in lines if line.rate_rps]
    return Served(
        name=folder.name,
        needs_gpu=config.backend not in ("", "python") or provider not in ("auto", "cpu"),
        instances=max(1, group.count),
        weights_bytes=manifest.size_bytes if manifest else 0,
        input_bytes=sum(numbers * size for numbers, size in inputs),
        output_bytes=sum(numbers * size for numbers, size in _tensors(config, manifest, "output")),
        input_numbers=sum(numbers for numbers, _ in inputs),
        queue_timeout_ms=policy.default_timeout_microseconds / 1000,
        p99_ms=(spec.slo.p99_ms if spec else None) or DEFAULT_P99_MS,
        rate_rps=max([*rates, (spec.slo.rate_rps if spec else None) or 0]),
        target=target,
        precision=manifest.precision if manifest else None,
        objectives=tuple(line for line in lines if line.rate_rps is None),
        queue_size=policy.max_queue_size,
        versions=tuple(wanted_versions(config, versions_of(folder))),
        models=models,
    )


def _manifest(folder: Path, config: ModelConfig) -> PublishedManifest | None:
    """That of the newest version that is served; None of a model that was not made here."""
    for version in wanted_versions(config, versions_of(folder)):
        if (path := folder / str(version) / MANIFEST).is_file():
            return PublishedManifest.load(path)
    return None


def _tensors(config: ModelConfig, manifest: PublishedManifest | None, kind: str) -> list[tuple[int, int]]:
    """Numbers and bytes a number of each tensor of the largest request."""
    if manifest is None:  # what a variable dimension may be is known to nobody: 1024 is as good a guess as any
        entries = config.input if kind == "input" else config.output
        batch = max(1, config.max_batch_size)
        return [(batch * math.prod(dim if dim > 0 else 1024 for dim in entry.dims), 8) for entry in entries]
    found = []
    for tensor in (manifest.inputs if kind == "input" else manifest.outputs).values():
        sizes = [dim if isinstance(dim, int) else manifest.axes[dim]["max"] for dim in tensor.shape]
        sizes[0] = min(manifest.axes[BATCH]["max"], config.max_batch_size or 1)
        found.append((math.prod(sizes), np.dtype(tensor.dtype).itemsize))
    return found


def bound_s(limit_ms: float) -> str:
    """A latency as the bound of a histogram has it, in seconds: `0.08`, `3.0`; Prometheus 3 writes whole ones so."""
    return repr(round(limit_ms / 1000, 6))

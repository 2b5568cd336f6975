"""What each model of a repository needs from the stack: sizes, rates, time-outs, objectives, versions.

Contract: reads the repository and, if found, each model's `deploy.toml` for the target that the model was built for.
Limits, memory, alerts and dashboard are all computed from these facts.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek.spec import BATCH, TEXT, DeploymentSpec, Objective, Precision, PublishedManifest, Target
from deepseek.spec.files.repository import ENGINE, versions_of
from deepseek.spec.objectives import latency_limits
from deepseek.spec.vocabulary import VOCABULARY
from deepseek.targets import is_accelerator, is_nvidia
from serving.repository.checks import config_of, models_in, served_manifests, wanted_versions

MIB = 2**20
JSON_BYTES = 26  # the longest number in JSON: -1.2345678901234567e-308 and a comma
HEADER_BYTES = 64 * 1024  # names, shapes and parameters around the numbers
LATENESS = 10  # times the p99 of the SLO: how long to wait for an answer
LEAST_TIMEOUT_S = 1
DEFAULT_P99_MS = 3000  # if the SLO has no p99


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    name: str
    needs_gpu: bool
    """Whether it needs NVIDIA's Triton and a GPU."""
    instances: int
    weights_bytes: int
    input_bytes: int
    """Size of the largest request as raw tensors."""
    output_bytes: int
    input_numbers: int
    queue_timeout_ms: float
    p99_ms: float
    rate_rps: float
    provider: str = "auto"
    """Execution provider of the Python backend's ONNX Runtime."""
    target: Target = "onnxruntime"
    """Target of the newest served version."""
    precision: Precision | None = None
    """Precision of the newest served version; None for a model that this project did not publish."""
    objectives: tuple[Objective, ...] = ()
    """The SLO's objectives that are not tied to a rate; empty if the model's `deploy.toml` was not found."""
    queue_size: int = 0
    """Requests that may wait in the queue; 0: unbounded."""
    versions: tuple[int, ...] = ()
    """Versions that the version policy serves, newest first."""
    text_bytes: int = 0
    """Size of the texts in the largest request; 0 for a model that takes none."""
    models: Path | None = None
    """The folder of model folders with its `deploy.toml`; None if it was not found: the SLO is then unknown."""

    @property
    def has_image(self) -> bool:
        """Whether an image of the stack can run it: none has a provider for AMD or Ascend."""
        return not is_accelerator(self.provider) or is_nvidia(self.provider)

    @property
    def body_bytes(self) -> int:
        """Size of the largest request body: JSON, which is larger than raw tensors."""
        return max(self.input_numbers * JSON_BYTES, self.input_bytes, self.text_bytes) + HEADER_BYTES

    @property
    def timeout_s(self) -> int:
        """How long an answer may take; if it takes longer, Triton or the model has stalled."""
        return max(LEAST_TIMEOUT_S, math.ceil((self.queue_timeout_ms + LATENESS * self.p99_ms) / 1000))

    @property
    def latency_limits_ms(self) -> dict[float, float]:
        """The strictest limit in the SLO for each percentile."""
        return latency_limits(self.objectives)

    @property
    def max_error_rate(self) -> float | None:
        """Share of the requests that may fail; None without an SLO."""
        return min((line.limit for line in self.objectives if line.kind == "error_rate"), default=None)

    @property
    def shm_bytes(self) -> int:
        """Shared memory of the Python backend: per instance 1 MiB, the running batch and the one being answered."""
        return self.instances * (2 * (max(self.input_bytes, self.text_bytes) + self.output_bytes) + MIB)


def has_openai_routes(models: list[ServedModel]) -> bool:
    """Whether the stack has `/v1/embeddings`: a model takes texts."""
    return any(model.text_bytes for model in models)


def served_models(repository: Path, models: Path, others: Mapping[str, Path] | None = None) -> list[ServedModel]:
    """All models of a repository. `others`: model name -> folder of model folders, if `models` has no `deploy.toml`."""
    found = []
    for folder in models_in(repository):
        places = (models, (others or {}).get(folder.name))
        known = (place for place in places if place and (place / folder.name / "deploy.toml").is_file())
        found.append(_served(folder, next(known, None)))
    return found


def _served(folder: Path, models: Path | None) -> ServedModel:
    config = config_of(folder)
    manifest = next(served_manifests(folder), None)  # None: this project did not publish the model
    target: Target = manifest.target if manifest else "onnxruntime"
    spec = DeploymentSpec.of_model(folder.name, models).for_target(target) if models else None
    inputs = _tensors(config, manifest, "input")
    policy = config.dynamic_batching.default_queue_policy
    group = config.instance_group[0] if config.instance_group else ModelInstanceGroup(count=1)
    provider = config.parameters["provider"].string_value if "provider" in config.parameters else "auto"
    lines = spec.slo.all_objectives() if spec else []
    rates = [line.rate_rps for line in lines if line.rate_rps]
    sent, answered = _name_bytes(config)
    return ServedModel(
        name=folder.name,
        needs_gpu=(config.backend or config.platform) not in ("", "python")
        or ENGINE in config.parameters
        or is_nvidia(provider),
        provider=provider,
        instances=max(1, group.count),
        weights_bytes=manifest.size_bytes if manifest else 0,
        input_bytes=max(sum(numbers * size for numbers, size in inputs), sent),
        output_bytes=sum(numbers * size for numbers, size in _tensors(config, manifest, "output")) + answered,
        input_numbers=sum(numbers for numbers, _ in inputs),
        text_bytes=_text_bytes(config),
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


def _name_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of the names in the largest request and answer of a model with `[vocabulary]`, with their lengths."""
    if VOCABULARY not in config.parameters:
        return 0, 0
    settings = json.loads(config.parameters[VOCABULARY].string_value)
    sent = len(settings["fills"]) * settings["names"] * (settings["name_bytes"] + 4)
    answered = settings["most"] * (settings["name_bytes"] + settings["title_bytes"] + 8)
    return config.max_batch_size * sent, config.max_batch_size * answered


def _text_bytes(config: ModelConfig) -> int:
    """Bytes of the largest texts that a request may have, each after its length in four bytes."""
    if TEXT not in config.parameters:
        return 0
    settings = json.loads(config.parameters[TEXT].string_value)
    return config.max_batch_size * (2 if settings.get("pairs") else 1) * (settings["max_bytes"] + 4)


def _tensors(config: ModelConfig, manifest: PublishedManifest | None, kind: str) -> list[tuple[int, int]]:
    """(numbers, bytes per number) of each tensor of the largest request."""
    if manifest is None:  # the size of a variable dimension is unknown: guess 1024
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
    """A latency in seconds as a histogram bound: `0.08`, `3.0`; Prometheus 3 writes whole numbers with `.0`."""
    return repr(round(limit_ms / 1000, 6))

"""Checks whether an engine runs on a machine: its target's runtime, chip and release.

Contract: `check_engine` compares one engine's manifest and configuration with a `Machine`; each finding is one line
with one fix.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tritonclient.grpc.model_config_pb2 import ModelConfig

from deepseek.spec import TEXT, TOKENIZER, PublishedManifest
from deepseek.spec.machine.gpus import Gpu, runs_engine
from deepseek.spec.vocabulary import CATALOGUE, VOCABULARY
from deepseek.targets import TARGETS
from serving.doctor.machine import Machine
from serving.repository.checks import Finding, mismatch


@dataclass(frozen=True, kw_only=True)
class ServedEngine:
    """A version that Triton would serve."""

    model: str
    version: int
    manifest: PublishedManifest
    config: ModelConfig
    """The configuration of the engine's own model."""
    public: ModelConfig
    """The configuration of the model that callers name: the same, or the one in front that takes strings."""

    @property
    def where(self) -> str:
        return f"{self.model}/{self.version}"

    @property
    def memory_bytes(self) -> int:
        """Least memory for its weights: each instance of the Python backend is a process with its own, and each of the
        TensorRT backend loads the plan once more if an axis varies (CreateEngine in its model_state.cc)."""
        copies = self.config.instance_group[0].count if self.config.instance_group else 1
        varies = any(axis["min"] < axis["max"] for axis in self.manifest.axes.values())
        own = self.config.backend == "python" or (self.manifest.target == "tensorrt" and varies)
        return self.manifest.size_bytes * (copies if own else 1)

    @property
    def on_gpu(self) -> bool:
        """Whether Triton loads it only on an NVIDIA GPU, as TensorRT and ONNX Runtime's CUDA provider need it."""
        groups = self.config.instance_group
        return TARGETS[self.manifest.target].needs_gpu or any(group.kind == group.KIND_GPU for group in groups)

    def loads_on(self, number: int, gpu: Gpu) -> bool:
        """Whether Triton loads it on a GPU, and it runs there."""
        named = self.config.instance_group[0].gpus if self.config.instance_group else ()
        fits = runs_engine(gpu, self.manifest.compute_capability, self.manifest.settings)
        return fits and (not named or number in named)


def check_engine(engine: ServedEngine, machine: Machine) -> list[Finding]:
    """Findings that keep an engine from running on the machine; empty if it runs."""
    checks = (_check_chip, *_TARGET_CHECKS.get(engine.manifest.target, ()), _check_strings)
    return [finding for check in checks for finding in check(engine, machine)]


def _rebuild(engine: ServedEngine) -> str:
    return f"rebuild it for this machine: make engine MODEL={engine.model} TARGET={engine.manifest.target}"


def _check_chip(engine: ServedEngine, machine: Machine) -> Iterator[Finding]:
    where, manifest = engine.where, engine.manifest
    built = manifest.compute_capability
    if not engine.on_gpu:
        return
    if not machine.gpus:
        kind = f" of compute capability {built}" if built else ""
        what = f"needs a GPU{kind}, but this machine has none: {machine.no_gpu}"
        yield mismatch(where, what, "give it a GPU (docker run --gpus all), or make engine TARGET=onnxruntime")
        return
    others = {
        number: str(gpu) for number, gpu in enumerate(machine.gpus) if not runs_engine(gpu, built, manifest.settings)
    }
    if len(others) == len(machine.gpus):
        here = ", ".join(others.values())
        yield mismatch(where, f"was built for compute capability {built}, this machine has {here}", _rebuild(engine))
        return
    loaded = set(engine.config.instance_group[0].gpus) if engine.config.instance_group else set()
    matching = [number for number in range(len(machine.gpus)) if number not in others]
    named = ", ".join(f"GPU {number} ({gpu})" for number, gpu in others.items())
    if absent := loaded - set(range(len(machine.gpus))):
        here = f"this machine has {len(machine.gpus)} GPU{'s' * (len(machine.gpus) > 1)}"
        what = f"instance_group names GPU {', '.join(map(str, sorted(absent)))}, but {here}"
        yield mismatch(where, what, _rebuild(engine))
    elif others and (not loaded or loaded & others.keys()):
        what = f"was built for compute capability {built}, which {named} cannot run"
        yield mismatch(where, what, f"set gpus: {matching} in instance_group, or {_rebuild(engine)}")
    elif others:
        what = f"was built for compute capability {built}: {named} will not serve it"
        yield Finding(level="warning", where=where, what=what, fix=f"GPU {', '.join(map(str, matching))} will")


def _check_release(engine: ServedEngine, machine: Machine) -> Iterator[Finding]:
    """Compares TensorRT inside Triton's container, else the container tags: the host's own TensorRT is not used."""
    where, manifest = engine.where, engine.manifest
    built, tag = manifest.versions.get("tensorrt"), manifest.versions.get("triton_tag")
    here = machine.tensorrt if machine.in_container else None
    rebuild = f"{_rebuild(engine)} TRITON_TAG={machine.triton_tag}"
    if here and built:
        if not _loads(manifest, built, here):
            yield mismatch(where, f"was built by TensorRT {built}, this container has {here}", rebuild)
    elif tag is None or (manifest.settings.get("version_compatible") and tag < machine.triton_tag):
        place = f"in the container of {tag}" if tag else "outside the containers"
        builder = f"TensorRT {built or 'of unknown version'} {place}"
        what = f"was built by {builder}; only Triton {machine.triton_tag} itself can tell at start-up if it loads"
        yield Finding(level="warning", where=where, what=what, fix=rebuild)
    elif tag != machine.triton_tag:
        what = f"was built in the container of {tag}, but Triton will be {machine.triton_tag}"
        yield mismatch(where, what, rebuild)


def _loads(manifest: PublishedManifest, built: str, here: str) -> bool:
    """Whether TensorRT `here` loads the plan: the same version, or for a version-compatible plan a later minor one."""
    old, new = built.split(".")[:3], here.split(".")[:3]
    if manifest.settings.get("version_compatible"):
        return old[0] == new[0] and [int(part) for part in new] >= [int(part) for part in old]
    return old == new


def _check_onnxruntime(engine: ServedEngine, machine: Machine) -> Iterator[Finding]:
    """The Python backend needs ONNX Runtime with the execution provider that the configuration names."""
    if engine.config.backend != "python":
        return
    if machine.onnxruntime is None:
        fix = f"{sys.executable} -m pip install onnxruntime"
        yield mismatch(engine.where, "ONNX Runtime cannot be imported here", fix)
        return
    asked = engine.config.parameters["provider"].string_value
    names = {name.lower().removesuffix("executionprovider") for name in machine.onnxruntime}
    if asked not in ("", "auto") and asked not in names:
        what = f"needs the execution provider {asked!r}, ONNX Runtime here has {', '.join(sorted(names))}"
        yield mismatch(engine.where, what, f"install a build that has it, or {_rebuild(engine)}")


def _check_strings(engine: ServedEngine, machine: Machine) -> Iterator[Finding]:
    """Texts need the tokenizer and its package, and names of items need the catalogue."""
    where = engine.where
    if TEXT in engine.public.parameters:
        if TOKENIZER not in engine.manifest.files:
            yield mismatch(where, f"takes texts, but has no {TOKENIZER}", _rebuild(engine))
        if machine.tokenizers is False:
            fix = f"{sys.executable} -m pip install tokenizers"
            yield mismatch(where, "takes texts, but the package tokenizers is not installed here", fix)
    if VOCABULARY in engine.public.parameters and CATALOGUE not in engine.manifest.files:
        yield mismatch(where, f"takes names of items, but has no {CATALOGUE}", _rebuild(engine))


def _check_batches(engine: ServedEngine, machine: Machine) -> Iterator[Finding]:
    """Batches measured on another CPU may be too large for the SLO here, and the queue too long."""
    plan = engine.manifest.batching
    measured = plan.measured if plan else None
    if measured is not None and machine.cpu is not None and measured.cpu != machine.cpu:
        what = f"its batching and queue follow from batches measured on {measured.cpu}; this machine has {machine.cpu}"
        if measured.precision == "int8" and measured.cpu.model != machine.cpu.model:
            what += ". int8 may be less accurate on a CPU without VNNI"
        fix = f"measure here: make engine MODEL={engine.model} TARGET={engine.manifest.target}"
        yield Finding(level="warning", where=engine.where, what=what, fix=fix)


_TARGET_CHECKS = {"tensorrt": (_check_release,), "onnxruntime": (_check_onnxruntime, _check_batches)}

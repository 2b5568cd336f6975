"""The plan of a build, with every `auto` resolved: target, precisions, container.

Example:
    plan = build_plan_of(options)     # raises InputError if this machine cannot build it
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek.precisions import PRECISIONS, Precision
from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.machine.triton_release import TRITON_TAG
from deepseek.targets import TARGETS, Target
from export.artifact import pruned_path, pruning_path
from export.machine import gpu, inside_container, missing_for_container

Compiler = Literal["", "container", "inside", "native"]
WITHOUT = (
    "without them: make check-engine compiles with TensorRT for RTX, make engine TARGET=onnxruntime serves on the CPU"
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a build makes, with every `auto` resolved."""

    model: str
    models: Path
    spec: DeploymentSpec
    target: Target
    not_tensorrt: str = ""
    """Why target auto is not tensorrt."""
    precision: Precision | None
    """The one asked for by name; None selects the best of deploy.toml's candidates."""
    prune: str = ""
    data: str = ""
    triton_tag: str = ""
    compiler: Compiler = ""
    """Where target tensorrt compiles: in NVIDIA's container, in this process inside it, or natively."""
    repository: Path = Path("model_repository")
    anyway: bool = False

    @property
    def folder(self) -> Path:
        return self.models / self.model

    @property
    def precisions(self) -> list[Precision]:
        """The precisions to build; fp32 is always included as the baseline."""
        wanted = self.spec.precision.candidates if self.precision is None else (self.precision,)
        return sorted({"fp32", *wanted})

    @property
    def pruned(self) -> tuple[Path, ...]:
        """Files of the pruned module; empty without pruning."""
        return (pruned_path(self.model), pruning_path(self.model)) if self.prune else ()


def resolved_target(target: str, compiler: Compiler) -> tuple[Target, str]:
    """The target, and what keeps `auto` from tensorrt; it is onnxruntime if this machine cannot compile for a GPU."""
    if target != "auto":
        return next(known for known in TARGETS if known == target), ""
    missing = missing_for_container()
    if compiler in ("inside", "native"):
        missing = missing if not gpu() else []
    return ("onnxruntime", f"this machine lacks {' and '.join(missing[:1])}") if missing else ("tensorrt", "")


def compiler_of(native: bool, triton_tag: str) -> Compiler:
    """Where TensorRT engines are compiled: in the container of the server's tag, unless `native`."""
    if inside_container(triton_tag):
        return "inside"
    return "native" if native else "container"


def build_plan_of(options: argparse.Namespace) -> Plan:
    """The plan that options ask for; raises InputError if this machine cannot build it."""
    spec = DeploymentSpec.to_build(options.model, options.models)
    tag = options.triton_tag or TRITON_TAG
    compiler = compiler_of(bool(options.native), tag)
    target, why = resolved_target(options.target, compiler)
    precision = next((known for known in PRECISIONS if known == options.precision), None)
    if (only := TARGETS[target].only) is not None:
        if precision not in (None, only):
            raise InputError(f"PRECISION: seen {precision!r}; target {target} has {only} only")
        precision = only
    if target == "tensorrt" and compiler == "container" and (missing := missing_for_container()):
        raise InputError(f"TARGET=tensorrt: this machine lacks {' and '.join(missing)}; {WITHOUT}")
    return Plan(
        model=options.model,
        models=Path(options.models),
        spec=spec,
        target=target,
        not_tensorrt=why,
        precision=precision,
        prune="" if options.prune is None else f"{options.prune:g}",
        data=str(options.data or ""),
        triton_tag=tag,
        compiler=compiler if target == "tensorrt" else "",
        repository=Path(options.repository),
        anyway=bool(options.anyway),
    )

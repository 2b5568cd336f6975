"""PyTorch to TorchScript: what Triton's PyTorch backend runs.

Contract: writes `build/<name>/fp32/torchscript/model.pt` and its manifest. The module is traced, frozen, loaded again
and run against PyTorch at the corners of the profile, so that a size that was baked in is found. Tracing follows one
side of a branch on values: where it meets one, or the check fails, the module is scripted instead, if TorchScript can
compile it. `forward` takes the inputs by the names of deploy.toml and returns a tensor, or a tuple in the order of
[outputs]: the backend finds inputs by name and outputs by place. Where there is a GPU it is the device, and the only
one that the file then runs on. fp32 only: on a GPU, TARGET=tensorrt serves the other precisions. Takes what
`export.to_onnx` left.

Examples:
    python -m export.to_torchscript --model recommender
    python -m export.to_torchscript --models /some/dir --model other --json
"""

from __future__ import annotations

import json
import keyword
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    Manifest,
    Parser,
    Precision,
    add_model_arguments,
    build_dir,
    kept_for_json,
    run_command,
)
from deepseek.spec.folders import scratch_in
from export.artifact import (
    Clock,
    Row,
    axes_of,
    engine_path,
    human_bytes,
    load_rows,
    pruned_settings,
    pruning_of,
    publish,
    read_manifest,
    sha256,
    tool_versions,
    write_manifest,
)
from export.cache import alone_with, fetch_checked, key_of, store
from export.reference import check_corners, checked_at, inputs_at, run_torch, traced_sizes, weights_digest
from export.runners import gpu_name, torchscript_runner
from export.source import Source

PRECISION: Precision = "fp32"
Check = Callable[[Any], list[dict[str, Any]]]
_TAKEN = ("self", "returned")  # by the forward that _served writes


class Made(NamedTuple):
    """A frozen module and how it came about."""

    way: str
    module: Any
    baked: list[str]
    """Where inputs decide on a branch or a number, which stays what it was for the example."""
    checks: list[dict[str, Any]]


def torchscript_from_torch(
    spec: DeploymentSpec, load: Callable[[], torch.nn.Module], example: tuple[torch.Tensor, ...], check: Check
) -> Made:
    """The module traced, or scripted where a trace does not hold; raises GateFailed where neither does."""
    made, problems = [], []
    for way in (traced, scripted):
        try:
            module, baked = way(spec, load(), example)
            made.append(Made(way.__name__, module, baked, check(module)))
        except InputError:
            raise
        except Exception as error:  # the tracer and the compiler raise errors of many types
            problems.append(f"{way.__name__}: {' '.join(str(error).split())[:300]}")
        else:
            if not baked:
                return made[-1]
    if made:
        return made[0]
    raise GateFailed(f"model.py: no TorchScript gives what PyTorch gives; {'; '.join(problems)}")


def traced(spec: DeploymentSpec, model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, list[str]]:
    """The module as it ran on `example`, and what was baked in on the way."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        module = _served(spec, torch.jit.trace(model, example, check_trace=False, strict=False), example)
    baked = [each for each in caught if issubclass(each.category, torch.jit.TracerWarning)]
    return module, [f"{Path(each.filename).name}:{each.lineno}" for each in baked]


def scripted(spec: DeploymentSpec, model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, list[str]]:
    """The module compiled from its source, branches and loops kept. What TorchScript cannot compile raises."""
    if model._forward_pre_hooks:
        raise RuntimeError("its 16-bit weights are widened by a hook, which is not part of the source")
    model._forward_hooks.clear()  # of Source.load, which puts outputs in order: _served does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _served(spec, torch.jit.script(model), example), []


def _served(spec: DeploymentSpec, inner: Any, example: tuple[torch.Tensor, ...]) -> Any:
    """`inner` frozen, with the signature's argument names and its outputs as a tensor or a tuple."""
    names = list(spec.inputs)
    if not all(name.isidentifier() and not keyword.iskeyword(name) and name not in _TAKEN for name in names):
        names = [f"argument_{place}" for place in range(len(names))]
    arguments = ", ".join(names)
    returned = inner(*example)
    if isinstance(returned, torch.Tensor):
        values = ["returned"]
    elif isinstance(returned, dict):
        values = [f"returned[{json.dumps(name)}]" for name in spec.outputs]
    else:
        values = [f"returned[{place}]" for place in range(len(spec.outputs))]
    holder = torch.nn.Module()
    holder.model = inner
    module = torch.jit.script(holder.eval())
    module.define(
        f"def forward(self, {arguments}):\n    returned = self.model({arguments})\n    return {', '.join(values)}\n"
    )
    module = torch.jit.freeze(module)
    module(*example)
    return module


def check_names(spec: DeploymentSpec) -> None:
    """Raises InputError where Triton's PyTorch backend would take names for places, and other ones than ours.

    It keeps names as they are and counts, unless all of them end in `__<number>`
    (GetNamingConvention in its model_instance_state.cc).
    """
    for table, tensors in (("inputs", spec.inputs), ("outputs", spec.outputs)):
        numbers = [re.fullmatch(r"(?:(?!__).)*__(\d*)", name) for name in tensors]
        places = [int(number[1] or 0) for number in numbers if number]
        if len(places) == len(tensors) and places != list(range(len(places))):
            raise InputError(
                f"[{table}]: seen {', '.join(tensors)}; Triton's PyTorch backend takes the number after __ for the "
                "place of the tensor: number them 0, 1, 2, ... in order, or rename one"
            )


def export_model(source: Source) -> dict[str, Any]:
    """Runs the stage; returns what it made and measured."""
    spec = source.spec
    check_names(spec)
    data = build_dir(spec.name) / "evaluation.npz"
    rows = load_rows(data)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    path = engine_path(spec.name, PRECISION, "torchscript")
    reference = source.load()
    key = key_of(
        "to_torchscript",
        weights=weights_digest(reference),
        evaluation=sha256(data),
        reads=source.reads(),
        spec=spec.model_facts(),
        pruning=pruning_of(spec.name),
        device=[device, gpu_name()],
    )
    with scratch_in(path.parent) as scratch, alone_with(key):

        def check() -> list[dict[str, Any]]:
            file = scratch / path.name
            return check_corners(spec, reference, torchscript_runner(spec, file, device), file.name, rows)

        if not fetch_checked(key, scratch, check):
            _export(source, reference, rows, device, scratch, check)
            store(key, scratch)
        publish(scratch, path)
    manifest = read_manifest(path)
    return {
        "path": str(path),
        "made_by": manifest.found["made_by"],
        "device": device,
        "baked_in": manifest.settings["baked_in"],
        "checks": manifest.found["checks"],
        "size_bytes": manifest.size_bytes,
        "build_s": manifest.build_s,
    }


def _export(
    source: Source,
    reference: torch.nn.Module,
    rows: list[Row],
    device: str,
    scratch: Path,
    check: Callable[[], list[dict[str, Any]]],
) -> None:
    """Writes module and manifest into the folder `scratch`, the module checked against PyTorch by `check`."""
    spec, clock, path = source.spec, Clock(), scratch / "model.pt"
    inputs = inputs_at(spec, rows, traced_sizes(spec))
    example = tuple(torch.from_numpy(inputs[name]).to(device) for name in spec.inputs)
    run_torch(spec, reference, inputs)

    def checked(module: Any) -> list[dict[str, Any]]:
        module.save(path)
        return check()

    made = torchscript_from_torch(spec, lambda: source.load().to(device), example, checked)
    made.module.save(path)
    manifest = Manifest(
        model=spec.name,
        precision=PRECISION,
        target="torchscript",
        found={"made_by": made.way, "dtypes": _dtypes(made.module), "checks": made.checks},
        sources={"weights": weights_digest(reference)},
        settings={"device": device, "baked_in": made.baked, **pruned_settings(spec.name)},
        axes=axes_of(spec),
        versions=tool_versions(),
        size_bytes=path.stat().st_size,
        build_s=clock.elapsed_s,
    )
    write_manifest(scratch / "manifest.json", manifest)


def _dtypes(module: Any) -> dict[str, int]:
    """Values by type among the constants of a frozen module: the proof of its precision."""
    found: Counter[str] = Counter()
    graph = module.inlined_graph  # held: its nodes go with it
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            tensor = node.t("value")
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(found)


def main() -> None:
    """Exports one model."""
    parser = Parser(__doc__, prog="python -m export.to_torchscript")
    add_model_arguments(parser)
    parser.add_argument("--precision", default=PRECISION, choices=(PRECISION,), help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    with kept_for_json(args.json):
        source = Source(args.model, args.models)
        result = export_model(source)
    if result["baked_in"]:
        print(
            "warning: tracing kept one side of a branch, or one number, that inputs decide "
            f"({', '.join(result['baked_in'])}): what is served is right only for inputs that take the same way",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(result, indent=2))
        return
    worst = max(error for check in result["checks"] for error in check["worst_error"].values())
    print(
        f"{result['path']}: {human_bytes(result['size_bytes'])}, {result['made_by']} on {result['device']}, as PyTorch "
        f"{checked_at(source.spec, result['checks'])} (worst error {worst:.2g})"
    )


if __name__ == "__main__":
    run_command(main)

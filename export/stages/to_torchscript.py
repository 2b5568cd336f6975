"""PyTorch to TorchScript: what Triton's PyTorch backend runs.

Contract: writes `build/<name>/fp32/torchscript/model.pt` and its manifest. The module is traced, frozen, reloaded
and compared with PyTorch at the corners of the profile. If tracing meets a branch on values, or the comparison fails,
the module is scripted instead, provided TorchScript can compile it. `forward` takes the inputs by the names of
deploy.toml and returns a tensor, or a tuple in the order of [outputs]. The file runs only on the device it was made on:
the GPU if there is one. fp32 only.
"""

import argparse
import json
import keyword
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Precision, build_dir, kept_for_json, one_line
from export.artifact import Stopwatch, engine_path, human_bytes, read_manifest, record_build
from export.cache import put_in_place, refined, stage_key
from export.model_folder import ModelFolder, model_py
from export.rows import Row, load_rows
from export.runtimes.pytorch_reference import (
    check_corners,
    checked_at,
    inputs_at,
    run_torch,
    traced_sizes,
    weights_digest,
)
from export.runtimes.torchscript_predictor import torchscript_predictor, without_deprecations

PRECISION: Precision = "fp32"
Check = Callable[[Any], list[dict[str, Any]]]
_TAKEN = ("self", "returned")  # names used by the forward that _served writes


class TorchScript(NamedTuple):
    """A frozen module and how it was made."""

    way: str
    module: Any
    baked: list[str]
    """Code lines where the trace fixed a branch or a number that depends on inputs."""
    checks: list[dict[str, Any]]


def torchscript_from_torch(
    spec: DeploymentSpec, load: Callable[[], torch.nn.Module], example: tuple[torch.Tensor, ...], check: Check
) -> TorchScript:
    """The module traced, or scripted if the trace is not exact; raises GateFailed if neither works."""
    made, problems = [], []
    for way in (traced, scripted):
        try:
            module, baked = way(spec, load(), example)
            made.append(TorchScript(way.__name__, module, baked, check(module)))
        except InputError:
            raise
        except Exception as error:  # the tracer and the compiler raise errors of many types
            problems.append(f"{way.__name__}: {one_line(error)}")
        else:
            if not baked:
                return made[-1]
    if made:
        return made[0]
    raise GateFailed(f"{model_py(spec)}: neither tracing nor scripting reproduces PyTorch; {'; '.join(problems)}")


def traced(spec: DeploymentSpec, model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, list[str]]:
    """The module as it ran on `example`, and the code lines where a value was baked in."""
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        module = _served(spec, torch.jit.trace(model, example, check_trace=False, strict=False), example)
    baked = [each for each in caught if issubclass(each.category, torch.jit.TracerWarning)]
    return module, [f"{Path(each.filename).name}:{each.lineno}" for each in baked]


def scripted(spec: DeploymentSpec, model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, list[str]]:
    """The module compiled from its source, with branches and loops; raises if TorchScript cannot compile it."""
    if model._forward_pre_hooks:
        raise RuntimeError("its 16-bit weights are widened by a hook, which is not part of the source")
    model._forward_hooks.clear()  # those of ModelFolder.load order the outputs, which _served does
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _served(spec, torch.jit.script(model), example), []


def _served(spec: DeploymentSpec, inner: Any, example: tuple[torch.Tensor, ...]) -> Any:
    """`inner` frozen, with the signature's argument names and its outputs as a tensor or a tuple."""
    names = list(spec.inputs)
    if not all(name.isascii() and name.isidentifier() and name not in (*keyword.kwlist, *_TAKEN) for name in names):
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


def export_model(source: ModelFolder) -> dict[str, Any]:
    spec = source.spec
    data = build_dir(spec.name) / "evaluation.npz"
    rows = load_rows(data)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    path = engine_path(spec.name, PRECISION, "torchscript")
    reference = source.load()
    key = refined(stage_key(), weights=weights_digest(reference))

    def check(folder: Path) -> list[dict[str, Any]]:
        file = folder / path.name
        predict = torchscript_predictor(spec, file, device)
        return check_corners(spec, reference, predict, file.name, rows, tf32=device != "cpu")

    put_in_place(key, path, lambda folder: _export(source, reference, rows, device, folder, check), check)
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
    source: ModelFolder,
    reference: torch.nn.Module,
    rows: list[Row],
    device: str,
    scratch: Path,
    check: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Writes module and manifest into the folder `scratch`; `check` compares the module with PyTorch."""
    spec, clock, path = source.spec, Stopwatch(), scratch / "model.pt"
    inputs = inputs_at(spec, rows, traced_sizes(spec))
    example = tuple(torch.from_numpy(inputs[name]).to(device) for name in spec.inputs)
    run_torch(spec, reference, inputs)

    def checked(module: Any) -> list[dict[str, Any]]:
        with without_deprecations():
            module.save(path)
        return check(scratch)

    made = torchscript_from_torch(spec, lambda: source.load().to(device), example, checked)
    with without_deprecations():
        made.module.save(path)
    record_build(
        path,
        spec,
        PRECISION,
        clock,
        target="torchscript",
        # PyTorch's default for convolutions on a GPU, also in Triton
        found={"made_by": made.way, "dtypes": _dtypes(made.module), "checks": made.checks, "tf32": device != "cpu"},
        sources={"weights": weights_digest(reference)},
        settings={"device": device, "baked_in": made.baked},
    )


def _dtypes(module: Any) -> dict[str, int]:
    """Number of values by type in the constants of a frozen module: the proof of its precision."""
    found: Counter[str] = Counter()
    graph = module.inlined_graph  # keeps its nodes alive
    for node in graph.findAllNodes("prim::Constant"):
        if node.hasAttribute("value") and node.kindOf("value") == "t":
            tensor = node.t("value")
            found[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return dict(found)


def main(options: argparse.Namespace) -> None:
    with kept_for_json(options.json):
        source = ModelFolder(options.model, options.models)
        result = export_model(source)
    if result["baked_in"]:
        print(
            "warning: tracing fixed a branch or a number that depends on inputs "
            f"({', '.join(result['baked_in'])}): the result is right only for inputs that take the same branch",
            file=sys.stderr,
        )
    if options.json:
        print(json.dumps(result, indent=2))
        return
    worst = max(error for check in result["checks"] for error in check["worst_error"].values())
    print(
        f"{result['path']}: {human_bytes(result['size_bytes'])}, {result['made_by']} on {result['device']}, matches "
        f"PyTorch {checked_at(source.spec, result['checks'])} (worst error {worst:.2g})"
    )

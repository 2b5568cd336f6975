"""PyTorch to TorchScript: what Triton's PyTorch backend runs.

Contract: writes `build/<name>/fp32/torchscript/model.pt` and its manifest. The module is traced, frozen, reloaded
and compared with PyTorch at the corners of the profile. `forward` takes the inputs by the names of deploy.toml and
returns a tensor, or a tuple in the order of [outputs]. The file runs only on the device it was made on: the GPU if
there is one. fp32 only.
"""

from __future__ import annotations

import argparse
import json
import keyword
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from deepseek.spec import DeploymentSpec, GateFailed, Precision, build_dir, kept_for_json
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
_TAKEN = ("self", "returned")  # names used by the forward that `_served` writes


def traced(spec: DeploymentSpec, model: torch.nn.Module, example: tuple[torch.Tensor, ...]) -> tuple[Any, list[str]]:
    """The module as it ran on `example`, and the code lines where the trace fixed a branch or a number.

    Raises GateFailed if the module cannot be traced.
    """
    try:
        with warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            module = _served(spec, torch.jit.trace(model, example, check_trace=False, strict=False))
    except Exception as error:  # the tracer raises errors of many types
        raise GateFailed(f"{model_py(spec)}: cannot be traced: {' '.join(str(error).split())[:300]}") from error
    baked = [each for each in caught if issubclass(each.category, torch.jit.TracerWarning)]
    return module, [f"{Path(each.filename).name}:{each.lineno}" for each in baked]


def _served(spec: DeploymentSpec, inner: Any) -> Any:
    """`inner`, which returns a tuple, frozen and with the signature's argument names; one output is a tensor."""
    names = list(spec.inputs)
    if not all(name.isidentifier() and not keyword.iskeyword(name) and name not in _TAKEN for name in names):
        names = [f"argument_{place}" for place in range(len(names))]
    arguments = ", ".join(names)
    values = ", ".join(f"returned[{place}]" for place in range(len(spec.outputs)))
    holder = torch.nn.Module()
    holder.model = inner
    module = torch.jit.script(holder.eval())
    module.define(f"def forward(self, {arguments}):\n    returned = self.model({arguments})\n    return {values}\n")
    return torch.jit.freeze(module)


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
        return check_corners(spec, reference, torchscript_predictor(spec, file, device), file.name, rows)

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

    module, baked = traced(spec, source.load().to(device), example)
    with without_deprecations():
        module.save(path)
    record_build(
        path,
        spec,
        PRECISION,
        clock,
        target="torchscript",
        found={"made_by": "traced", "dtypes": _dtypes(module), "checks": check(scratch)},
        sources={"weights": weights_digest(reference)},
        settings={"device": device, "baked_in": baked},
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

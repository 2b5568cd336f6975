"""Compiles every precision of every model with a real TensorRT builder, without a GPU.

Contract: compiles `build/<name>/<precision>/model.onnx` of each model named (default: all) with TensorRT for RTX, ahead
of time, proves each plan's precision and prints one table; keeps no engine. Exit 1 if a graph does not parse, does not
build or is not in its precision; the others are still built. A graph that could not be made is shown as refused. That
is a failure if the precision was asked for by name or is one of deploy.toml's candidates.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.precisions import PRECISIONS
from deepseek.spec import DeploymentSpec, GateFailed, InputError, Precision, variables_for
from deepseek.spec.command import stdout_to_stderr
from export.artifact import Stopwatch, human_bytes, need, onnx_path, read_manifest, refusal
from export.build import build_graphs
from export.plan import Plan
from export.runtimes.isolation import in_child
from export.runtimes.tensorrt_engine import (
    check_layout,
    engine_from_onnx,
    prove,
    tensorrt_module,
)

log = Console(file=sys.stderr, markup=False)


def check(trt: Any, spec: DeploymentSpec, precision: Precision, *, asked: bool) -> dict[str, Any]:
    """Compiles and checks one graph. "failure" says what failed, "refused" why there is no graph, each in a line."""
    clock = Stopwatch()
    row: dict[str, Any] = {"model": spec.name, "precision": precision, "failure": "", "refused": ""}
    try:
        source = need(onnx_path(spec.name, precision), f"make check-engine {variables_for(spec.name)}")
        if reason := refusal(source):
            row["refused"] = " ".join(reason.split())
            if asked or precision in spec.precision.candidates:
                raise GateFailed(f"the graph could not be made: {reason}")
            return row
        check_layout(source, spec, "tensorrt_rtx")
        size, found = in_child("TensorRT", lambda: _compiled(trt, source, spec))
        row |= {**{key: found[key] for key in ("compute_layers", "read_from", "tf32")}, "size_bytes": size}
        prove(precision, found, size, read_manifest(source), spec.tensorrt)
    except (InputError, GateFailed) as error:
        row["failure"] = " ".join(str(error).split())
    return row | {"build_s": clock.elapsed_s}


def _compiled(trt: Any, source: Path, spec: DeploymentSpec) -> tuple[int, dict[str, Any]]:
    """Size of the plan in bytes, and the layers of the network."""
    with stdout_to_stderr():
        plan, found = engine_from_onnx(trt, source, spec)
    return len(plan), found


def check_all(specs: list[DeploymentSpec], asked: list[Precision]) -> dict[str, Any]:
    """Runs the stage; one row per model and precision (default: all), with its size over fp32's plan."""
    trt = tensorrt_module("tensorrt_rtx")
    rows = []
    for spec in specs:
        sizes: dict[str, int] = {}
        for precision in asked or get_args(Precision):
            with log.status(f"TensorRT for RTX {trt.__version__}: {precision} of {spec.name}"):
                row = check(trt, spec, precision, asked=bool(asked))
            if "size_bytes" in row:
                sizes[precision] = row["size_bytes"]
                row["size_over_fp32"] = round(row["size_bytes"] / sizes["fp32"], 3) if "fp32" in sizes else None
            rows.append(row)
    return {"tensorrt_rtx": trt.__version__, "rows": rows}


def show(result: dict[str, Any]) -> None:
    """Prints the table, and under it each failure in full."""
    table = Table("model", "precision", "compute layers", box=box.SIMPLE_HEAD)
    for column in ("plan", "of fp32's", "built in"):
        table.add_column(column, justify="right")
    table.add_column("proof")
    for row in result["rows"]:
        ratio = row.get("size_over_fp32")
        table.add_row(
            row["model"],
            row["precision"],
            _layers(row),
            human_bytes(row["size_bytes"]) if "size_bytes" in row else "",
            f"{ratio:.2f}x" if ratio else "",
            f"{row['build_s']:.1f} s" if "build_s" in row else "",
            "refused" if row["refused"] else "failed" if row["failure"] else "passed",
            style="red" if row["failure"] else None,
        )
    read = " and ".join(sorted({row["read_from"] for row in result["rows"] if "read_from" in row})) or "nothing"
    print(f"TensorRT for RTX {result['tensorrt_rtx']}, ahead of time; compute layers read from the {read}")
    Console(width=max(Console().width, 100), markup=False).print(table)
    for row in result["rows"]:
        if row["failure"] or row["refused"]:
            print(f"{row['model']} {row['precision']}: {row['failure'] or row['refused']}")
    print(summary(result["rows"]))


def _layers(row: dict[str, Any]) -> str:
    """Compute layers by type; for fp32 also whether TF32 is on."""
    counts = ", ".join(f"{count} {name}" for name, count in row.get("compute_layers", {}).items())
    return counts + (f" (TF32 {'on' if row['tf32'] else 'off'})" if row["precision"] == "fp32" and counts else "")


def summary(rows: list[dict[str, Any]]) -> str:
    """How many passed, failed and were refused."""
    failed = sum(bool(row["failure"]) for row in rows)
    apart = sum(bool(row["refused"]) and not row["failure"] for row in rows)
    line = f"{len(rows) - failed - apart} of {len(rows)} passed"
    line += f", {failed} failed" if failed else ""
    return line + (f", {apart} refused (not candidates)" if apart else "")


def specs_of(models: Path, names: list[str]) -> list[DeploymentSpec]:
    """The specs of the models named, or of every model folder; raises InputError if there is none."""
    found = names or sorted(path.parent.name for path in models.glob("*/deploy.toml"))
    if not found:
        raise InputError(f"{models}: contains no model folder; a model folder holds deploy.toml and model.py")
    return [DeploymentSpec.to_build(name, models) for name in found]


def main(options: argparse.Namespace) -> None:
    specs = specs_of(Path(options.models), options.model)
    asked = [precision for precision in options.precision if precision != "auto"]
    if not options.no_build:
        tensorrt_module("tensorrt_rtx")  # raises InputError before anything is built
        for spec in specs:
            plan = Plan(model=spec.name, models=Path(options.models), spec=spec, target="tensorrt_rtx", precision=None)
            build_graphs(plan, asked or list(PRECISIONS))
    result = check_all(specs, asked)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    failed = [f"{row['model']} {row['precision']}" for row in result["rows"] if row["failure"]]
    if failed:
        raise GateFailed(f"{len(failed)} of {len(result['rows'])} engines failed: {', '.join(failed)}")

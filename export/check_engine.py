"""Every precision of every model through a real TensorRT builder, without a GPU.

Contract: compiles `build/<name>/<precision>/model.onnx` of each model named (default: all in the folder of models) with
TensorRT for RTX, ahead of time, proves each plan's precision and prints one table; keeps no engine. Exit 1 where one
graph does not parse, does not build (or brings the builder down), or is not in the precision that it is named after;
the rest are built all the same. A graph that `export.quantize` could not make is shown as refused. That fails where
the precision was asked for by name, or is one of deploy.toml's candidates; else it is counted apart.
What it cannot tell: speed, and whether the engine of another TensorRT fits its GPU.

Examples:
    python -m export.check_engine
    python -m export.check_engine --model recommender --precision int8 --json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, get_args

from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, GateFailed, InputError, Parser, Precision, run_command, variables_for
from export.artifact import Clock, human_bytes, need, onnx_path, read_manifest, refusal
from export.engine import engine_from_onnx, library_prints_to_stderr, prove, tensorrt_module, weight_bytes
from export.isolation import in_child

log = Console(file=sys.stderr, markup=False)


def check(trt: Any, spec: DeploymentSpec, precision: Precision, *, asked: bool) -> dict[str, Any]:
    """Compiles and proves one graph: "failure" says what failed, "refused" why there is no graph, each in one line."""
    clock = Clock()
    row: dict[str, Any] = {"model": spec.name, "precision": precision, "failure": "", "refused": ""}
    try:
        source = need(onnx_path(spec.name, precision), f"make check-engine {variables_for(spec.name)}")
        if reason := refusal(source):
            row["refused"] = " ".join(reason.split())
            if asked or precision in spec.precision.candidates:
                raise GateFailed(f"the graph could not be made: {reason}")
            return row
        size, found = in_child("TensorRT", lambda: _compiled(trt, source, spec))
        row |= {"compute_layers": found["compute_layers"], "size_bytes": size}
        prove(precision, found, size, weight_bytes(read_manifest(source)), spec.tensorrt)
    except (InputError, GateFailed) as error:
        row["failure"] = " ".join(str(error).split())
    return row | {"build_s": clock.elapsed_s}


def _compiled(trt: Any, source: Path, spec: DeploymentSpec) -> tuple[int, dict[str, Any]]:
    """Bytes of the plan, and what the network holds."""
    with library_prints_to_stderr():
        plan, found = engine_from_onnx(trt, source, spec, spec.tensorrt)
    return len(plan), found


def check_all(specs: list[DeploymentSpec], asked: list[Precision]) -> dict[str, Any]:
    """Runs the stage; a row a model and precision, all where none is asked for, with its size over fp32's plan."""
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
    """The table for people, and under it each failure in full."""
    table = Table("model", "precision", "compute layers", box=box.SIMPLE_HEAD)
    for column in ("plan", "of fp32's", "built in"):
        table.add_column(column, justify="right")
    table.add_column("proof")
    for row in result["rows"]:
        ratio = row.get("size_over_fp32")
        table.add_row(
            row["model"],
            row["precision"],
            ", ".join(f"{count} {name}" for name, count in row.get("compute_layers", {}).items()),
            human_bytes(row["size_bytes"]) if "size_bytes" in row else "",
            f"{ratio:.2f}x" if ratio else "",
            f"{row['build_s']:.1f} s" if "build_s" in row else "",
            "refused" if row["refused"] else "failed" if row["failure"] else "holds",
            style="red" if row["failure"] else None,
        )
    print(f"TensorRT for RTX {result['tensorrt_rtx']}, ahead of time, no GPU")
    Console(width=max(Console().width, 100), markup=False).print(table)
    for row in result["rows"]:
        if row["failure"] or row["refused"]:
            print(f"{row['model']} {row['precision']}: {row['failure'] or row['refused']}")
    print(summary(result["rows"]))


def summary(rows: list[dict[str, Any]]) -> str:
    """How many hold, and what became of the others."""
    failed = sum(bool(row["failure"]) for row in rows)
    apart = sum(bool(row["refused"]) and not row["failure"] for row in rows)
    line = f"{len(rows) - failed - apart} of {len(rows)} hold"
    line += f", {failed} failed" if failed else ""
    return line + (f", {apart} refused, of which deploy.toml wants none" if apart else "")


def specs_of(models: Path, names: list[str]) -> list[DeploymentSpec]:
    """The specs named, or of every model folder; raises InputError where there is none."""
    found = names or sorted(path.parent.name for path in models.glob("*/deploy.toml"))
    if not found:
        raise InputError(f"{models}: no model folder in it; one holds deploy.toml and model.py")
    return [DeploymentSpec.of_model(name, models) for name in found]


def main() -> None:
    """Checks all, or the models and precisions named."""
    choices = get_args(Precision)
    parser = Parser(__doc__, prog="python -m export.check_engine")
    parser.add_argument("--models", default="models", help="folder of model folders (default: %(default)s)")
    parser.add_argument("--model", action="append", default=[], help="only this one; may be given again")
    parser.add_argument("--precision", action="append", choices=choices, help="only this one; may be given again")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    result = check_all(specs_of(Path(args.models), args.model), args.precision or [])
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)
    failed = [f"{row['model']} {row['precision']}" for row in result["rows"] if row["failure"]]
    if failed:
        raise GateFailed(f"{len(failed)} of {len(result['rows'])} engines do not hold: {', '.join(failed)}")


if __name__ == "__main__":
    run_command(main)

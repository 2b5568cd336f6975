"""PyTorch to ONNX: the fp32 graph that every later stage starts from.

Contract: reads a model folder; writes `build/<name>/fp32/model.onnx` with the names, types and dynamic
axes of `deploy.toml`, and the real inputs that later stages need (`calibration.npz`,
`evaluation.npz`), so that they need neither torch nor model.py. The stage runs the graph in
ONNX Runtime and compares it with PyTorch at the smallest and the largest corner of the profile, one shape between,
and where `forward` takes another path; none of them is the traced one if there is another. This finds what tracing
baked in.
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from deepseek.spec import DeploymentSpec, GateFailed, InputError, kept_for_json, one_line
from export.artifact import Stopwatch, human_bytes, onnx_path, read_manifest, record_build, rows_path, sha256
from export.cache import put_in_place, refined, stage_key
from export.graphs.branches import sizes_of_branches
from export.graphs.graph_file import save_graph
from export.graphs.model_lines import line_in, untranslated_line, with_line
from export.graphs.traceable import innermost, traceable, with_any_attention
from export.graphs.translations import TRANSLATIONS
from export.model_folder import ModelFolder, folder_of, model_py, place_of
from export.precision.accuracy import check_metric
from export.precision.calibration import MOST_READ, check_disjoint, disjoint, left_out, pool_size, stratified
from export.quiet import quiet
from export.rows import EVALUATION_ROWS, Row, save_rows
from export.runtimes.batching import outputs_by_batch
from export.runtimes.onnxruntime_predictor import opened
from export.runtimes.pytorch_reference import (
    check_corners,
    check_memory,
    check_repeatable,
    check_rows_independent,
    checked_at,
    checked_sizes,
    inputs_at,
    module_predictor,
    sizes_text,
    traced_sizes,
    weights_digest,
)

OPSET = 20  # ModelOpt needs 19 for fp8 scales; at 23 attention becomes one op that TensorRT may not take

log = Console(file=sys.stderr, markup=False)  # created now: the exporter's output is discarded below


def onnx_from_torch(
    spec: DeploymentSpec, model: torch.nn.Module, example: Row
) -> tuple[onnx.ModelProto, list[dict[str, int]], dict[str, str]]:
    """The dynamo exporter's graph with the signature's names and axes, sizes where `forward` may differ from it, and
    lines of `model.py` by node.

    Raises InputError if the export fails.
    """
    fixed = {name for name, axis in spec.axes.items() if axis.min == axis.max}
    dims = {
        name: torch.export.Dim(name, min=axis.min, max=axis.max)
        for name, axis in spec.axes.items()
        if name not in fixed
    }
    shapes = tuple(
        {place: dims[dim] for place, dim in enumerate(tensor.shape) if isinstance(dim, str) and dim in dims}
        for tensor in spec.inputs.values()
    )

    def export() -> torch.onnx.ONNXProgram | None:
        with quiet(), traceable(model):
            return torch.onnx.export(
                model,
                tuple(torch.from_numpy(example[name]) for name in spec.inputs),
                input_names=[_placeholder(name) for name in spec.inputs],
                dynamic_shapes=_as_declared(model, shapes),
                custom_translation_table=TRANSLATIONS,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )

    try:
        program = with_any_attention(export)
    except torch.onnx.errors.OnnxExporterError as error:
        raise InputError(_why_not_exported(error, folder_of(spec))) from error
    assert program is not None
    assert program.exported_program is not None
    for node in program.exported_program.graph.nodes:
        if node.target is torch.ops.aten.scatter_reduce.two and "mean" in (*node.args, *node.kwargs.values()):
            raise InputError(
                f"{model_py(spec)}: ONNX has no scatter_reduce with 'mean', and the exporter writes one without a "
                "reduction: divide the one with 'sum' by that of ones"
            )
    lines = {
        str(made.name): line_in(folder_of(spec), made.metadata_props.pop("pkg.torch.onnx.stack_trace", None))
        for made in program.model.graph.all_nodes()
    }
    graph = program.model_proto
    _name_signature(spec, graph, fixed)
    return graph, sizes_of_branches(spec, program.exported_program, traced_sizes(spec), checked_sizes(spec)), lines


def _as_declared(model: torch.nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Dynamic shapes by argument of forward; the inputs that it takes as `*args` are one argument."""
    for place, parameter in enumerate(inspect.signature(model.forward).parameters.values()):
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return (*shapes[:place], shapes[place:])
    return shapes


def _why_not_exported(error: BaseException, folder: Path) -> str:
    """One line from the innermost exception."""
    error = innermost(error)
    told = str(error).partition("\nThe error above occurred")[0]  # advice for callers of torch.export
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    place = untranslated_line(folder, error) or place_of(error, folder)[0]
    if "data-dependent" in str(error) or "FakeTensor" in str(error):
        return (
            f"{place}: cannot be exported: Python code depends on a tensor's values here; use "
            f"torch.where for values, torch.cond for branches at a batch of 1, a mask for lengths ({lines[0]})"
        )
    if operator := re.match(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", lines[0] if lines else ""):
        return (
            f"{place}: cannot be exported: PyTorch's exporter has no ONNX operator for {operator[1]}: compute it in "
            "another way, or outside the model"
        )
    return f"{place}: cannot be exported: {' '.join(lines[:2]) or type(error).__name__}"


def _placeholder(name: str) -> str:
    """Temporary name of an input: in the exporter its own name could clash with a value inside."""
    return f"{name}__input"


def _name_signature(spec: DeploymentSpec, model: onnx.ModelProto, fixed: set[str]) -> None:
    """Gives inputs, outputs and axes their declared names; inner values with these names are renamed."""
    graph = model.graph
    if len(graph.output) != len(spec.outputs):
        raise InputError(
            f"{model_py(spec)}: the graph has {len(graph.output)} outputs; deploy.toml names {', '.join(spec.outputs)}"
        )
    for node in [node for node in graph.node if node.input == node.output]:
        graph.node.remove(node)  # the exporter writes a returned input like this, which is not valid ONNX
    inputs = {_placeholder(name): name for name in spec.inputs}
    constants = {tensor.name for tensor in graph.initializer}
    named = zip([value.name for value in graph.output], spec.outputs, strict=True)
    wanted = {inside: name for inside, name in named if inside not in constants}
    renamed = {name: f"{name}__inner" for name in (*spec.inputs, *spec.outputs)} | wanted | inputs
    _rename(graph, renamed)
    for value, (name, tensor) in zip(graph.output, spec.outputs.items(), strict=True):
        if renamed.get(value.name) != name:  # a returned input or constant, or one tensor returned twice
            graph.node.append(onnx.helper.make_node("Identity", [renamed.get(value.name, value.name)], [name]))
        value.name = name
        _name_axes(value, tensor.shape, fixed)
    for value in graph.input:
        value.name = inputs[value.name]
        _name_axes(value, spec.inputs[value.name].shape, fixed)


def _rename(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    """Renames values in a graph and in the branches inside it, which read the outer graph's values by name."""
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
        node.output[:] = [renamed.get(name, name) for name in node.output]
        for branch in [attribute.g for attribute in node.attribute if attribute.HasField("g")]:
            _rename(branch, renamed)
            for value in [*branch.input, *branch.output]:
                value.name = renamed.get(value.name, value.name)
    for named in [*graph.initializer, *graph.value_info]:
        named.name = renamed.get(named.name, named.name)


def _name_axes(value: onnx.ValueInfoProto, shape: tuple[int | str, ...], fixed: set[str]) -> None:
    for dim, name in zip(value.type.tensor_type.shape.dim, shape, strict=True):
        if isinstance(name, str) and name not in fixed:
            dim.dim_param = name


def export_model(source: ModelFolder) -> dict[str, Any]:
    spec = source.spec
    path = onnx_path(spec.name, "fp32")
    rows, shared, note = _rows(source)
    check_memory(spec, rows["evaluation"])
    model = source.load()
    files = {split: rows_path(spec.name, split) for split in rows}
    for split, file in files.items():
        save_rows(file, rows[split])
    put_in_place(
        refined(stage_key(), weights=weights_digest(model), **{file.name: sha256(file) for file in files.values()}),
        path,
        lambda folder: _export(source, model, rows, folder / path.name),
        check=lambda folder: _check(spec, model, rows["evaluation"], folder / path.name),
    )
    manifest = read_manifest(path)
    return {
        "path": str(path),
        "size_bytes": manifest.size_bytes,
        "checks": manifest.found["checks"],
        "rows": {split: len(found) for split, found in rows.items()},
        "shared_rows": shared,
        "note": note,
        "build_s": manifest.build_s,
    }


def _rows(source: ModelFolder) -> tuple[dict[str, list[Row]], int, str]:
    """Real inputs by split, disjoint; the number of calibration rows left out for that, and a note."""
    spec = source.spec
    with log.status("reading samples"):
        evaluation = list(source.rows("evaluation", EVALUATION_ROWS))
        pool = pool_size(spec)
        left, shared = disjoint(source.rows("calibration", MOST_READ * pool), evaluation, pool)
    if set(spec.precision.candidates) != {"fp32"}:
        check_disjoint(left, shared, f"{source.folder / 'model.py'}: samples('calibration')")
    calibration = stratified(left, spec.precision.calibration_samples)
    return {"calibration": calibration, "evaluation": evaluation}, shared, left_out(left, shared)


def _export(source: ModelFolder, model: torch.nn.Module, rows: dict[str, list[Row]], path: Path) -> None:
    """Writes the graph to `path`, compares it with PyTorch, and writes its manifest beside it."""
    spec, clock = source.spec, Stopwatch()
    evaluation = rows["evaluation"]
    example = inputs_at(spec, evaluation, traced_sizes(spec))
    check_repeatable(spec, model, example)
    check_rows_independent(spec, model, example)
    predict = module_predictor(spec, model)
    with log.status("running PyTorch over all samples"):  # InputError here, not in a later stage
        for split in rows.values():
            for _ in outputs_by_batch(spec, predict, split):
                pass
    with log.status("running evaluate()"):
        check_metric(source, predict)
    with log.status("exporting with the dynamo exporter"):
        graph, branches, lines = onnx_from_torch(spec, model, example)
        save_graph(graph, path)
    with with_line(lines):
        _check_valid(spec, path)
        checks = _check(spec, model, evaluation, path, branches)
    found = {"operators": len(graph.graph.node), "opset": OPSET, "checks": checks}
    record_build(path, spec, "fp32", clock, found=found, sources={"weights": weights_digest(model)})


def _check_valid(spec: DeploymentSpec, path: Path) -> None:
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(
            f"{model_py(spec)}: the graph is not valid ONNX: {one_line(error)}; if ONNX has no such operator for this "
            "type, compute in another one, such as int32 in place of bool"
        ) from None


def _check(
    spec: DeploymentSpec,
    model: torch.nn.Module,
    evaluation: list[Row],
    path: Path,
    branches: Sequence[dict[str, int]] = (),
) -> list[dict[str, Any]]:
    """Compares the graph with PyTorch; raises GateFailed if they differ, InputError if ONNX Runtime cannot load it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised
    with log.status("comparing with PyTorch"):
        try:
            session = opened(path, options)
        except GateFailed as error:
            raise InputError(
                f"{model_py(spec)}: {str(error).removeprefix(f'{path}: ')}; if forward computes in 16 bits, let it use "
                "float32: the build chooses the precision"
            ) from None

        def predict(inputs: Row) -> Row:
            return dict(zip(spec.outputs, session.run(list(spec.outputs), inputs), strict=True))

        return check_corners(spec, model, predict, path.name, evaluation, branches)


def main(options: argparse.Namespace) -> None:
    with kept_for_json(options.json):
        source = ModelFolder(options.model, options.models)
        result = export_model(source)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    where = checked_at(source.spec, result["checks"])
    print(f"{result['path']}: {human_bytes(result['size_bytes'])}, matches PyTorch {where}")
    if result["note"]:
        print(result["note"])
    table = Table("checked at", "output", "worst error", box=box.SIMPLE_HEAD)
    for check in result["checks"]:
        for name, error in check["worst_error"].items():
            table.add_row(sizes_text(check["sizes"]), name, f"{error:.2g}")
    Console(markup=False).print(table)

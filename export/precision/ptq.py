"""Calls ModelOpt, and turns its failures into one-line errors.

Contract: `autocast_onnx` makes graphs of 16 bits; `qdq_from_onnx` is post-training quantization to 8 bits, with Q/DQ
pairs around weights that are still wide. ModelOpt rewrites the graph that it reads and leaves files beside it: give it
a copy in a folder of its own. Its exceptions become GateFailed: this precision fails for this model, others may work.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import onnx

from deepseek.quantization import QuantConfig
from deepseek.spec import GateFailed, InputError, one_line
from export.precision.calibration import Calibration
from export.precision.lookup_tables import WithTables, put_back, taken_out
from export.quiet import quiet
from export.rows import save_arrays

OLDEST_OPSET = 19  # the first whose Q/DQ operators take fp16 scales and fp8
AUTOCAST_BATCHES = 4  # batches of real inputs in which AutoCast looks for values too large for fp16
CONTROL_FLOW = ("If", "Loop", "Scan")
_END = "~"  # behind each node's name


@contextlib.contextmanager
def _modelopt(what: str) -> Iterator[None]:
    """Silences ModelOpt, which logs and prints each step, and raises its errors as one line."""
    try:
        with quiet():
            yield
    except Exception as error:
        reason = one_line(error) or "it gave no reason"
        raise GateFailed(f"ModelOpt cannot convert this graph to {what}: {type(error).__name__}: {reason}") from error


def check_source(path: Path, config: QuantConfig) -> None:
    """Raises InputError if the fp32 graph is broken, or its opset too old for Q/DQ."""
    try:
        imports = onnx.load(path, load_external_data=False).opset_import
        opset = next(each.version for each in imports if each.domain in ("", "ai.onnx"))
        if opset >= OLDEST_OPSET:
            onnx.checker.check_model(path)
    except Exception as error:
        raise InputError(
            f"{path}: not a valid ONNX file ({' '.join(str(error).split())[:200]}); build it again"
        ) from None
    if opset < OLDEST_OPSET:
        raise InputError(
            f"{path}: opset {opset}; {config.precision} needs {OLDEST_OPSET} or newer, for Q/DQ and fp16 scales: "
            "export it again with deepseek to-onnx"
        )


def high_nodes(path: Path, config: QuantConfig) -> list[str]:
    """Names of the nodes that match `keep_high`; raises InputError for a pattern that matches none."""
    names = [node.name for node in onnx.load(path, load_external_data=False).graph.node]
    for pattern in config.keep_high:
        if not any(re.search(pattern, name) for name in names):
            raise InputError(f"keep_high: {pattern!r} matches no node; names are for example {', '.join(names[:5])}")
    return [name for name in names if any(re.search(pattern, name) for pattern in config.keep_high)]


def _exactly(names: list[str]) -> list[str]:
    """Exact-match patterns: ModelOpt matches only the beginning of a name."""
    return [f"{re.escape(name)}$" for name in names]


def autocast_onnx(path: Path, config: QuantConfig, calibration: Calibration) -> onnx.ModelProto:
    """Runs AutoCast: 16 bits for nodes whose values fit in them at real inputs. Inputs and outputs keep their types."""
    from modelopt.onnx.autocast import convert_to_mixed_precision  # slow to import: only where it runs

    samples = path.parent / "samples"
    samples.mkdir()
    for index, inputs in enumerate([calibration.get_first(), *calibration.batches][:AUTOCAST_BATCHES]):
        save_arrays(samples / f"{index}.npz", inputs)
    known = _dim_names(onnx.load(path, load_external_data=False).graph)
    with _modelopt(config.precision):
        model = convert_to_mixed_precision(
            str(path),
            low_precision_type=config.precision,
            keep_io_types=True,
            nodes_to_exclude=_exactly(high_nodes(path, config)) or None,
            op_types_to_exclude=list(CONTROL_FLOW),  # their subgraphs share values with the rest
            op_types_to_include=["Gather"],  # AutoCast mistakes large ids for values that fp16 cannot hold
            calibration_data=str(samples),
            providers=["cpu"],
        )
    _forget_dims(model.graph, known)
    return model


def _shapes(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto]:
    """Shapes of all declared values of a graph, including those of its branches."""
    for value in [*graph.input, *graph.output, *graph.value_info]:
        yield value.type.tensor_type.shape
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _shapes(attribute.g)


def _dim_names(graph: onnx.GraphProto) -> set[str]:
    return {dim.dim_param for shape in _shapes(graph) for dim in shape.dim}


def _forget_dims(graph: onnx.GraphProto, known: set[str]) -> None:
    """Removes the names of dimensions that are not `known`.

    ModelOpt names every unknown dimension `unk`, and ONNX Runtime takes equal names for equal sizes: it gives a value
    the memory of a smaller one and fails (for example in the halves of rotary embeddings).
    """
    for shape in _shapes(graph):
        for dim in shape.dim:
            if dim.dim_param and dim.dim_param not in known:
                dim.Clear()


def qdq_from_onnx(path: Path, config: QuantConfig, calibration: Calibration) -> onnx.ModelProto:
    """Runs post-training quantization: the graph with Q/DQ pairs around activations and (still wide) weights."""
    from modelopt.onnx import trt_utils  # slow to import: only where it runs
    from modelopt.onnx.quantization import quantize

    # An installed TensorRT (NATIVE=1) would parse the graph on the GPU, and ModelOpt would take operators that TensorRT
    # runs as plugins for ones that ONNX Runtime does not have.
    trt_utils.TRT_PYTHON_AVAILABLE = False
    high, known = high_nodes(path, config), _dim_names(onnx.load(path, load_external_data=False).graph)
    made = path.parent / "made.onnx"
    betas = _with_ends(path)
    tables = taken_out(path) if config.high_precision == "fp32" else []  # ModelOpt would make them fp16
    with _modelopt(config.precision):
        quantize(
            str(path),
            quantize_mode=config.precision,
            calibration_data_reader=WithTables(calibration, tables),
            calibration_method=config.calibration_method,
            calibration_eps=["cpu"],
            op_types_to_quantize=list(config.op_types),
            nodes_to_exclude=_exactly([f"{name}{_END}" for name in high]) or None,
            high_precision_dtype=config.high_precision,
            enable_gemv_detection_for_trt=calibration.largest_batch > 1,  # otherwise every product counts as a GEMV
            use_external_data_format=path.with_name(f"{path.name}.data").exists(),
            output_path=str(made),
            log_level="ERROR",
        )
        model = onnx.load(made)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "beta" and node.name in betas:  # ModelOpt makes it 1
                attribute.f = betas[node.name]
        node.name = node.name.removesuffix(_END)
    put_back(model.graph, tables)
    _forget_dims(model.graph, known)
    return model


def _with_ends(path: Path) -> dict[str, float]:
    """Marks the end of each node's name, and returns the factor of each Gemm's bias by name.

    ModelOpt skips small layers, and all whose names begin with one of theirs: a `node_linear` of 13 inputs would keep
    `node_linear_1` wide.
    """
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        if node.name:
            node.name += _END
    onnx.save(model, path)
    gemms = [node for node in model.graph.node if node.op_type == "Gemm"]
    return {node.name: attribute.f for node in gemms for attribute in node.attribute if attribute.name == "beta"}

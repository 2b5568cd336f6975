"""The fp32 graph brought to fp16, int8 or fp8: precision is written into the graph itself.

Contract: reads `build/<name>/fp32/model.onnx` and real calibration inputs; writes
`build/<name>/<precision>/model.onnx`, inputs and outputs typed as before. fp16 is ModelOpt AutoCast;
int8 and fp8 are ModelOpt PTQ, which leaves Q/DQ nodes that ONNX Runtime and TensorRT both take. What
the graph then holds is counted and must be what was asked. No calibration data is an error.

Examples:
    python -m export.quantize --model recommender --precision int8
    python -m export.quantize --model recommender --precision int8 --high-precision fp32 --method max
    python -m export.quantize --model recommender --precision int8 --calibration-data val_dataset.bin
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader
from rich.console import Console

from deepseek.quantization import QuantConfig
from deepseek.spec import (
    DeploymentSpec,
    GateFailed,
    InputError,
    Manifest,
    Parser,
    add_model_arguments,
    build_dir,
    run_command,
)
from export.artifact import (
    Clock,
    Row,
    axes_of,
    batches,
    human_bytes,
    load_rows,
    need,
    onnx_path,
    publish,
    read_manifest,
    scratch_in,
    sha256,
    tool_versions,
    write_manifest,
)

# Of more than one: ModelOpt leaves matrices alone whose batch was 1 in calibration (GEMV).
CALIBRATION_BATCH = 8
_FLOAT_TYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32",
    onnx.TensorProto.FLOAT16: "fp16",
    onnx.TensorProto.BFLOAT16: "bf16",
}
_COMPUTE_OPS = ("MatMul", "Gemm", "Conv")

log = Console(file=sys.stderr)  # bound now: ModelOpt's own output is discarded below


class Calibration(CalibrationDataReader):
    """Batches of real inputs, as ONNX Runtime's calibrators read them."""

    def __init__(self, rows: list[Row]) -> None:
        self._batches = [inputs for _, inputs in batches(rows, CALIBRATION_BATCH)]
        self._batches.sort(key=lambda inputs: -len(next(iter(inputs.values()))))
        if len(next(iter(self._batches[0].values()))) < 2:  # all lengths differ: ModelOpt reads shapes off the first
            self._batches.insert(0, {name: np.repeat(array, 2, axis=0) for name, array in self._batches[0].items()})
        self.rewind()

    def get_first(self) -> Row:
        """The first batch; ModelOpt finds its GEMV shapes with it."""
        return self._batches[0]

    def get_next(self) -> Row | None:
        """The next batch, None at the end."""
        return next(self._rest, None)

    def rewind(self) -> None:
        """Starts again."""
        self._rest: Iterator[Row] = iter(self._batches)


def calibration_rows(spec: DeploymentSpec, path: Path, limit: int) -> list[Row]:
    """Rows out of a calibration file, spread evenly over it.

    Formats: our own `.npz` (one array a row and input); `.npz` of one array an input, samples first;
    `.npy` for a model of one input; anything else is raw records, each the inputs of one sample in the
    signature's order, native byte order, which needs a signature without further dynamic axes.
    """
    with path.open("rb") as file:
        head = file.read(6)
    if head[:2] == b"PK":
        with np.load(path) as arrays:
            if all("/" in key for key in arrays.files):
                rows = load_rows(path)
            else:
                rows = _unstacked(spec, {key: arrays[key] for key in arrays.files}, path)
    elif head == b"\x93NUMPY":
        rows = _unstacked(spec, dict.fromkeys(spec.inputs, np.load(path)), path)
    else:
        rows = _raw_rows(spec, path)
    if not rows:
        raise InputError(f"{path}: holds no samples; calibration needs real inputs")
    for name, tensor in spec.inputs.items():
        seen = rows[0].get(name)
        if seen is None or seen.dtype != tensor.dtype or seen.ndim != len(tensor.shape):
            found = "none" if seen is None else f"{seen.dtype} {list(seen.shape)}"
            raise InputError(
                f"{path}: input {name!r}: seen {found}; deploy.toml says {tensor.dtype} {list(tensor.shape)}"
            )
    return [rows[index] for index in np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int)]


def _unstacked(spec: DeploymentSpec, arrays: dict[str, np.ndarray], path: Path) -> list[Row]:
    if arrays.keys() != spec.inputs.keys():
        raise InputError(f"{path}: holds {', '.join(sorted(arrays))}; the inputs are {', '.join(spec.inputs)}")
    lengths = {name: len(array) for name, array in arrays.items() if array.ndim}
    if len(set(lengths.values())) != 1:
        raise InputError(f"{path}: the inputs' sample counts differ: {lengths}")
    count = next(iter(lengths.values()))
    return [{name: array[row : row + 1] for name, array in arrays.items()} for row in range(count)]


def _raw_rows(spec: DeploymentSpec, path: Path) -> list[Row]:
    for name, tensor in spec.inputs.items():
        if any(isinstance(dim, str) for dim in tensor.shape[1:]):
            raise InputError(f"{path}: raw records need fixed sizes; {name} is {list(tensor.shape)}: use an .npz file")
    record = np.dtype([(name, tensor.dtype, tensor.shape[1:]) for name, tensor in spec.inputs.items()])
    size = path.stat().st_size
    if size == 0 or size % record.itemsize:
        raise InputError(f"{path}: {size} bytes; raw records of this signature take {record.itemsize} bytes each")
    records = np.fromfile(path, record)
    return [{name: records[name][row : row + 1] for name in spec.inputs} for row in range(len(records))]


def quantize_onnx(source: Path, destination: Path, config: QuantConfig, rows: list[Row]) -> None:
    """Writes `source` at the precision of `config` to `destination`; `rows` calibrate at 8 bits."""
    logging.disable(logging.WARNING)  # ModelOpt and ONNX Runtime report each step, and print besides
    try:
        with (
            warnings.catch_warnings(),
            open(os.devnull, "w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            warnings.simplefilter("ignore")
            if config.precision == "fp16":
                _to_fp16(source, destination, config)
            else:
                _to_8_bits(source, destination, config, rows)
    finally:
        logging.disable(logging.NOTSET)


def _to_fp16(source: Path, destination: Path, config: QuantConfig) -> None:
    from modelopt.onnx.autocast import convert_to_mixed_precision  # slow to import: only where it runs

    model = convert_to_mixed_precision(
        str(source),
        low_precision_type="fp16",
        keep_io_types=True,
        nodes_to_exclude=list(config.keep_high) or None,
        providers=["cpu"],
    )
    _save(model, destination)


def _to_8_bits(source: Path, destination: Path, config: QuantConfig, rows: list[Row]) -> None:
    from modelopt.onnx.quantization import quantize  # slow to import: only where it runs

    keep = [node for node in _node_names(source) if any(re.search(pattern, node) for pattern in config.keep_high)]
    quantize(
        str(source),
        quantize_mode=config.precision,
        calibration_data_reader=Calibration(rows),
        calibration_method=config.calibration_method,
        calibration_eps=["cpu"],
        op_types_to_quantize=list(config.op_types),
        nodes_to_exclude=[re.escape(name) for name in keep] or None,
        high_precision_dtype=config.high_precision,
        dq_only=True,  # weights are stored at 8 bits, not quantized anew at each load
        output_path=str(destination),
        log_level="ERROR",
    )
    model = onnx.load(destination)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)  # scales that ModelOpt made and did not wire
    _save(model, destination)


def _node_names(path: Path) -> list[str]:
    return [node.name for node in onnx.load(path, load_external_data=False).graph.node]


def _save(model: onnx.ModelProto, path: Path) -> None:
    onnx.save(model, path, save_as_external_data=model.ByteSize() > 1 << 30, location=f"{path.name}.data")


def found_precision(path: Path) -> dict[str, Any]:
    """Counts what a graph holds: the compute operators by the type they run in, and bytes of weights."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    counts: Counter[str] = Counter()
    for node in model.graph.node:
        if node.op_type in _COMPUTE_OPS:
            counts[_compute_type(node, producers, types)] += 1
    weights: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        weights[onnx.TensorProto.DataType.Name(tensor.data_type).lower()] += _tensor_bytes(tensor)
    return {"compute_operators": dict(counts), "weight_bytes": dict(weights)}


def _compute_type(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], types: dict[str, int]) -> str:
    """The type a MatMul, Gemm or Conv runs in: that of its Q/DQ pairs where both operands have one."""
    quantized = []
    for name in node.input[:2]:
        producer = producers.get(name)
        while producer is not None and producer.op_type in ("Transpose", "Reshape", "Cast"):
            producer = producers.get(producer.input[0])
        if producer is not None and producer.op_type == "DequantizeLinear":
            data = types.get(producer.input[2], 0) if len(producer.input) > 2 else types.get(producer.input[0], 0)
            quantized.append("fp8" if data == onnx.TensorProto.FLOAT8E4M3FN else "int8")
    if len(quantized) == 2:
        return quantized[0]
    return _FLOAT_TYPES.get(types.get(node.input[0], 0), "other")


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    return int(np.prod(tensor.dims)) * bits // 8


def prove(config: QuantConfig, found: dict[str, Any]) -> None:
    """Raises GateFailed where the graph has no operator in the precision that was asked for."""
    counts = found["compute_operators"]
    if counts and not counts.get(config.precision):
        raise GateFailed(
            f"{config.precision} was asked for, but no {'/'.join(_COMPUTE_OPS)} of the graph runs in it "
            f"(found: {counts}); the layers may be too small to gain (ModelOpt leaves sizes under 16 alone), "
            "or all in keep_high"
        )


def quantize_model(spec: DeploymentSpec, config: QuantConfig) -> dict[str, Any]:
    """Runs the stage; returns what it made."""
    clock = Clock()
    source = need(onnx_path(spec.name, "fp32"), f"python -m export.to_onnx --model {spec.name}")
    fp32 = read_manifest(source)
    path = onnx_path(spec.name, config.precision)
    sources = {"weights": fp32.sources["weights"], "onnx": sha256(source)}
    rows: list[Row] = []
    if config.precision != "fp16":
        if config.calibration_data is None:
            raise InputError(f"{config.precision}: no calibration data; random data would make a graph that is wrong")
        rows = calibration_rows(spec, Path(config.calibration_data), config.num_samples)
        sources["calibration"] = sha256(Path(config.calibration_data))
    _check_onnx(source)
    with scratch_in(path.parent) as scratch:
        with scratch_in(scratch) as work, log.status(f"{config.precision} from {source}"):
            # ModelOpt rewrites its input in place and leaves files beside it: give it a copy.
            for file in source.parent.glob("model.onnx*"):
                shutil.copyfile(file, work / file.name)
            (work / "made").mkdir()
            quantize_onnx(work / source.name, work / "made" / source.name, config, rows)
            for made in (work / "made").iterdir():
                made.rename(scratch / made.name)
        found = found_precision(scratch / "model.onnx")
        prove(config, found)
        manifest = Manifest(
            model=spec.name,
            precision=config.precision,
            found=found,
            sources=sources,
            settings={
                "calibration_method": config.calibration_method,
                "samples": len(rows),
                "op_types": config.op_types,
                "keep_high": config.keep_high,
                "high_precision": config.high_precision,
            },
            axes=axes_of(spec),
            versions=tool_versions(),
            size_bytes=sum(file.stat().st_size for file in scratch.glob("model.onnx*")),
            build_s=clock.elapsed_s,
        )
        write_manifest(scratch / "manifest.json", manifest)
        publish(scratch, path)
    return {
        "path": str(path),
        **manifest.model_dump(include={"precision", "found", "settings", "size_bytes", "build_s"}),
    }


def _check_onnx(path: Path) -> None:
    try:
        onnx.checker.check_model(path)
    except Exception as error:
        raise InputError(
            f"{path}: not a valid ONNX file ({' '.join(str(error).split())[:200]}); build it again"
        ) from None


def main() -> None:
    """Quantizes one model to one precision."""
    parser = Parser(__doc__, prog="python -m export.quantize")
    add_model_arguments(parser)
    parser.add_argument("--precision", required=True, choices=("fp16", "int8", "fp8"))
    parser.add_argument("--calibration-data", help="real inputs (default: build/<name>/calibration.npz)")
    parser.add_argument("--method", choices=("max", "entropy"), help="calibration method (default: deploy.toml's)")
    parser.add_argument("--samples", type=int, help="calibration samples at most (default: deploy.toml's)")
    parser.add_argument(
        "--high-precision",
        default="fp16",
        choices=("fp16", "fp32"),
        help="of what is not quantized (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    args = parser.parse_args()
    spec = DeploymentSpec.of_model(args.model, args.models)
    calibration = args.calibration_data
    if calibration is None and args.precision != "fp16":
        calibration = need(build_dir(spec.name) / "calibration.npz", f"python -m export.to_onnx --model {spec.name}")
    config = QuantConfig.of_precision(
        args.precision,
        calibration_data=calibration,
        calibration_method=args.method or spec.precision.calibration_method,
        num_samples=spec.precision.calibration_samples if args.samples is None else args.samples,
        keep_high=spec.precision.keep_high,
        high_precision=args.high_precision,
    )
    result = quantize_model(spec, config)
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        counts = ", ".join(f"{count} in {name}" for name, count in result["found"]["compute_operators"].items())
        print(f"{result['path']}: {human_bytes(result['size_bytes'])}; {'/'.join(_COMPUTE_OPS)}: {counts}")


if __name__ == "__main__":
    run_command(main)

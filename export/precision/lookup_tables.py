"""Keeps large lookup tables (embeddings) out of the graph while ModelOpt works on it.

ModelOpt quantizes no Gather, but copies the whole graph several times. With a table of 1.15 GiB a build took 14.3 GiB
of memory, and takes 6.3 GiB this way.

Contract: `taken_out` makes each large table an input of the graph, `WithTables` feeds it, `put_back` undoes it.
"""

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnxruntime.quantization import CalibrationDataReader

from export.graphs.graph_file import tensor_bytes
from export.precision.calibration import Calibration
from export.precision.cpu.pairs import readers_of
from export.rows import Row

LARGE_BYTES = 16 << 20


class WithTables(CalibrationDataReader):
    """The calibration batches, each with the tables that are inputs now."""

    def __init__(self, calibration: Calibration, tables: Sequence[onnx.TensorProto]) -> None:
        self._calibration = calibration
        self._tables = {table.name: onnx.numpy_helper.to_array(table) for table in tables}

    def get_first(self) -> Row:
        return self._calibration.get_first() | self._tables

    def get_next(self) -> Row | None:
        batch = self._calibration.get_next()
        return None if batch is None else batch | self._tables


def taken_out(path: Path) -> list[onnx.TensorProto]:
    """Makes the large initializers that only Gather nodes look up inputs of the graph at `path`; returns them."""
    model = onnx.load(path, load_external_data=False)
    graph, readers = model.graph, readers_of(model.graph)
    kept = {value.name for value in graph.output}

    def only_looked_up(name: str) -> bool:
        return name not in kept and all(node.op_type == "Gather" and node.input[1] != name for node in readers[name])

    tables = [
        tensor
        for tensor in graph.initializer
        if tensor_bytes(tensor) >= LARGE_BYTES and tensor.name in readers and only_looked_up(tensor.name)
    ]
    for table in tables:
        graph.initializer.remove(table)
        graph.input.append(onnx.helper.make_tensor_value_info(table.name, table.data_type, list(table.dims)))
        if onnx.external_data_helper.uses_external_data(table):
            onnx.external_data_helper.load_external_data_for_tensor(table, str(path.parent))
    if tables:
        onnx.save(model, path)
    return tables


def put_back(graph: onnx.GraphProto, tables: Sequence[onnx.TensorProto]) -> None:
    """Makes the tables initializers again."""
    names = {table.name for table in tables}
    for value in [value for value in graph.input if value.name in names]:
        graph.input.remove(value)
    graph.initializer.extend(tables)

"""Writes ONNX graphs; weights over 1 GiB go to a separate file beside the graph."""

from pathlib import Path

import numpy as np
import onnx

EXTERNAL_DATA_BYTES = 1 << 30


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Size of a tensor's values in bytes, whether they are stored in the graph or outside it."""
    return int(np.prod(tensor.dims)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def save_graph(model: onnx.ModelProto, path: Path) -> None:
    """Writes a graph. Weights over 1 GiB leave `model` for `<path>.data`, since one protobuf holds at most 2 GiB."""
    large = sum(map(tensor_bytes, model.graph.initializer)) > EXTERNAL_DATA_BYTES
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx would append to an existing file
    onnx.save(model, path, save_as_external_data=large, location=data.name if large else None)
    if large:
        data.chmod(path.stat().st_mode)  # onnx makes it readable only by its owner

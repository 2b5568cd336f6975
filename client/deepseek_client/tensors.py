"""Converts tensors to bytes or JSON and back.

Contract: reading raises one of `metadata.UNREADABLE` if type, shape and content do not fit each other exactly.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deepseek_client.errors import InvalidInput
from deepseek_client.metadata import DTYPES, ModelMetadata, TensorMetadata
from deepseek_client.transport import Placement, Tensor

MOST_AXES = 64  # as numpy


def tensors_of(metadata: ModelMetadata, arrays: Sequence[np.ndarray | None]) -> tuple[Tensor, ...]:
    """Encodes arrays in the order of the metadata; None is a missing optional input."""
    return tuple(
        Tensor(name=spec.name, datatype=spec.datatype, shape=array.shape, data=to_bytes(spec, array))
        for spec, array in zip(metadata.inputs, arrays, strict=True)
        if array is not None
    )


def result_sizes(metadata: ModelMetadata, tensors: Sequence[Tensor], outputs: Sequence[str] | None) -> dict[str, int]:
    """Bytes of each requested output. Empty unless all are known: no strings, and no dynamic axis but the batch."""
    batch = tensors[0].shape[0] if metadata.max_batch_size and tensors else None
    sizes = {}
    for spec in metadata.outputs:
        if outputs and spec.name not in outputs:
            continue
        shape = spec.shape if batch is None else (batch, *spec.shape[1:])
        if spec.datatype == "BYTES" or -1 in shape:
            return {}
        sizes[spec.name] = _count(shape) * spec.dtype.itemsize
    return sizes


def to_bytes(spec: TensorMetadata, array: np.ndarray) -> bytes:
    """The array in wire format, row-major."""
    if spec.datatype != "BYTES":
        return array.tobytes()
    pieces: list[bytes] = []
    for value in array.flat:  # tritonclient's encoder sends the repr of a subclass of bytes or str
        try:
            data = value if isinstance(value, bytes) else str.encode(value)
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"input {spec.name!r} holds {value!r}, which UTF-8 cannot encode: {error.reason}"
            ) from None
        pieces += (len(data).to_bytes(4, "little"), data)
    return b"".join(pieces)


def to_numpy(datatype: str, shape: Sequence[int], data: bytes) -> np.ndarray:
    """A read-only view of `data`, in Triton's binary format."""
    count, dtype = _count(shape), DTYPES[datatype]
    if datatype == "BYTES":
        return _strings(data, count).reshape(tuple(shape))
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes for {datatype} {list(shape)}")
    return np.frombuffer(data, dtype).reshape(tuple(shape))


def listed_to_numpy(datatype: str, shape: Sequence[int], data: Any) -> np.ndarray:
    """A read-only array of values in row-major order, flat or nested; text becomes UTF-8 bytes."""
    count = _count(shape)
    array = np.array(data, dtype=object) if datatype == "BYTES" else exact_array(data, datatype)
    if array.size != count:
        raise ValueError(f"{array.size} values for {datatype} {list(shape)}")
    if datatype == "BYTES":
        encoded = [value if isinstance(value, bytes) else str.encode(value) for value in array.ravel()]
        array = np.empty(count, object)
        array[:] = encoded
    array.flags.writeable = False
    return array.reshape(tuple(shape))


def exact_array(value: Any, datatype: str) -> np.ndarray:
    """JSON numbers, or truths, as an array; only the last digits of a decimal may be lost. Raises ValueError."""
    try:
        array = np.array(value)
    except ValueError:
        raise ValueError("the lists in it differ in length") from None
    target, objects = DTYPES[datatype], np.array(value, dtype=object)
    if array.dtype.kind in "fO" and target.kind in "iu":
        array = objects  # numpy would join 1.0 and 2**53 + 1, or 1 and 2**63, to inexact float64
    with np.errstate(all="ignore"):
        try:
            if not set(map(type, objects.ravel())) <= ({bool} if datatype == "BOOL" else {int, float}):
                raise TypeError  # numpy would take [1, True] for integers
            cast = array.astype(target)
        except (OverflowError, TypeError, ValueError):
            raise ValueError(f"holds something other than {datatype}: {str(value)[:60]}") from None
        if array.dtype.kind == "f" and datatype.startswith(("FP", "BF")):
            lost = np.isfinite(array) & ~np.isfinite(cast.astype(np.float64))
        else:
            lost = (cast.astype(array.dtype) != array) | ((cast < 0) != (array < 0))
    if lost.any():
        raise ValueError(f"{array[lost].flat[0]!s} does not fit {datatype}")
    return cast


def restored(array: np.ndarray) -> np.ndarray:
    """An array of an .npz file in its own type: numpy writes BF16, which it does not know, as two bytes without one."""
    return array.view(DTYPES["BF16"]) if array.dtype == np.dtype("V2") else array


def placed_array(placement: Placement, output: str, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """A copy of an output in shared memory."""
    return to_numpy(datatype, shape, placement.read(output, _count(shape) * DTYPES[datatype].itemsize))


def _count(shape: Sequence[int]) -> int:
    if len(shape) > MOST_AXES:  # the product of a million sizes would take hours
        raise ValueError(f"a shape of {len(shape)} dimensions")
    count = 1
    for size in shape:
        if type(size) is not int or size < 0:
            raise ValueError(f"a shape of {list(shape)}")
        count *= size
    return count


def _strings(data: bytes, count: int) -> np.ndarray:
    """`count` strings, each after its length in four bytes."""
    if count > len(data) // 4:
        raise ValueError(f"{len(data)} bytes for {count} strings")
    found, start = np.empty(count, object), 0
    for index in range(count):
        end = start + 4 + int.from_bytes(data[start : start + 4], "little")
        found[index] = data[start + 4 : end]
        start = end
    if start != len(data):
        raise ValueError(f"{len(data)} bytes for strings of {start}")
    return found

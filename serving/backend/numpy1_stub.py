"""Lets a stub of the Python backend that was compiled for numpy 1 read and send strings under numpy 2.

Contract: `fix_strings()` is called while the model is initialized, before the stub makes its first array. Without it,
each byte of a string reads as the first one, and answers lose theirs (docs/research/2026-11-numpy-2.md). A stub for
numpy 2 is not affected.

The stub reads an array's item size at the place that it has in numpy 1. Under numpy 2 it finds 0 there, and asks
`PyArray_NewFromDescr` for an array whose strides are all 0. The stub takes that function from the table
`numpy.core.multiarray._ARRAY_API`, numpy 1's name. This module puts a copy of the table there, in which the function
ignores strides of 0. Everything else finds the table in `numpy._core`, which stays as it is.

To send strings, the stub calls `serialize_byte_tensor` of its module and asks the array that it returns for its item
size. `_serialized` takes its place: it returns bytes of a type of its own, whose item size reads as 1 in both places.
"""

import contextlib
import ctypes
import functools
import struct
import warnings
from typing import Any

import numpy as np

NEW_FROM_DESCR = 94  # place in the table: numpy/_core/code_generators/numpy_api.py
ITEM_SIZE = 32  # where numpy 1 has the item size of a type, an int; in numpy 2 these are flags of the type
ENTRIES = 366  # of numpy 2.0; later versions only add some
_Pointer = ctypes.c_void_p
_Sizes = ctypes.POINTER(ctypes.c_ssize_t)
# type, descriptor, dimensions, sizes, strides, data, flags, base -> array
_NewFromDescr = ctypes.PYFUNCTYPE(
    _Pointer, _Pointer, _Pointer, ctypes.c_int, _Pointer, _Sizes, _Pointer, ctypes.c_int, _Pointer
)
_capsule_pointer = ctypes.PYFUNCTYPE(_Pointer, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, _Pointer, ctypes.c_char_p, _Pointer)(("PyCapsule_New", ctypes.pythonapi))
_kept: list[Any] = []  # what the table points to must stay alive


def fix_strings(stub: Any) -> None:
    """Replaces what a stub for numpy 1 looks up in numpy and in its module `stub`; does nothing under numpy 1."""
    if np.lib.NumpyVersion(np.__version__) < "2.0.0" or _kept:
        return
    stub.serialize_byte_tensor = _serialized
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from numpy.core import multiarray

        table = (_Pointer * ENTRIES)(*(_Pointer * ENTRIES).from_address(_capsule_pointer(multiarray._ARRAY_API, None)))
        original = _NewFromDescr(table[NEW_FROM_DESCR] or 0)

        @_NewFromDescr
        def new_from_descr(
            kind: int, descr: int, dims: int, sizes: int, strides: Any, data: int, flags: int, base: int
        ) -> int:
            zeros = dims and strides and not strides[dims - 1]  # the others are multiples of it
            return original(kind, descr, dims, sizes, None if zeros else strides, data, flags, base)

        table[NEW_FROM_DESCR] = ctypes.cast(new_from_descr, _Pointer).value
        _kept.extend((table, new_from_descr, original))
        vars(multiarray)["_ARRAY_API"] = _capsule(ctypes.addressof(table), None, None)


def _serialized(strings: np.ndarray) -> np.ndarray:
    """The bytes of an array of bytes, each string after its length."""
    # A type of its own, since its flags change. The array does not own its bytes, so numpy acts on no flag.
    array = np.frombuffer(b"".join(map(_with_length, strings.ravel().tolist())), np.dtype(np.uint8, copy=True))
    ctypes.c_int.from_address(id(array.dtype) + ITEM_SIZE).value = 1
    return array


@functools.lru_cache(16384)
def _with_length(string: bytes) -> bytes:
    """A string as Triton sends it. Popular items are answered again and again."""
    return struct.pack("<I", len(string)) + string

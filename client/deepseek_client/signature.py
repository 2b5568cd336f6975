"""What a model takes and gives, and whether a request fits it: checked here, before anything is sent.

Contract: `ModelMetadata.check(inputs)` returns the arrays in the model's order or raises InvalidInput
with one line. It never casts: a silent float64 -> float32, or int64 -> int32 of ids, is a wrong
answer that nobody notices.

Example:
    >>> metadata = client.metadata("recommender")
    >>> [(tensor.name, tensor.datatype, tensor.shape) for tensor in metadata.inputs]
    [('item_ids', 'INT64', (-1, 50))]
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from tritonclient.utils import triton_to_np_dtype

from deepseek_client.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """Name, type and shape of one input or output."""

    name: str
    datatype: str
    """Triton's name of the type: INT64, FP32, BYTES and so on."""
    shape: tuple[int, ...]
    """-1 is any size; where the model batches, the first is the batch."""
    optional: bool = False
    """Also true where the server does not tell."""

    @cached_property
    def dtype(self) -> np.dtype:
        """The numpy type of its arrays; strings are `object`."""
        return np.dtype(triton_to_np_dtype(self.datatype))

    def fits(self, array: np.ndarray) -> bool:
        """Whether type and shape are right; never said of strings, which are looked at one by one."""
        if array.dtype != self.dtype or self.datatype == "BYTES" or array.ndim != len(self.shape):
            return False
        return all(allowed in (-1, size) for size, allowed in zip(array.shape, self.shape, strict=True))

    def __str__(self) -> str:
        return f"{self.name} ({self.datatype} {list(self.shape)})"


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """What the server says of a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int | None
    """0: the model does not batch. None: the server does not tell (a gateway may hide the configuration)."""
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Those of the configuration; empty where it has none or the server does not tell."""

    def check(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[np.ndarray | None]:
        """The arrays in the order of `self.inputs`, None for an optional one left out. Raises InvalidInput."""
        if not isinstance(inputs, Mapping):
            raise InvalidInput(f"inputs is a {type(inputs).__name__}; pass a dict of numpy arrays by input name")
        if isinstance(outputs, str | np.ndarray) or not isinstance(outputs, Collection | None):
            raise InvalidInput(f"outputs={outputs!r}; pass a list of names: [{outputs!r}]")
        if not all(isinstance(name, str) for name in outputs or ()):
            raise InvalidInput(f"outputs={outputs!r}; pass a list of names, each a text")
        self._check_names("input", inputs, self.inputs)
        self._check_names("output", outputs or (), self.outputs)
        arrays = [inputs.get(spec.name) for spec in self.inputs]
        for spec, array in zip(self.inputs, arrays, strict=True):
            if array is not None:
                self._check_array(spec, array)
            elif not spec.optional or spec.name in inputs:
                raise InvalidInput(f"{self.name}: input {spec.name!r} is missing; it takes {_listed(self.inputs)}")
        if self.max_batch_size:
            self._check_batch(arrays)
        return arrays

    @cached_property
    def _known_names(self) -> dict[str, frozenset[str]]:
        return {
            kind: frozenset(spec.name for spec in specs)
            for kind, specs in (("input", self.inputs), ("output", self.outputs))
        }

    def _check_names(self, kind: str, names: Iterable[str], specs: tuple[TensorSpec, ...]) -> None:
        known = self._known_names[kind]
        for name in names:
            if name not in known:
                raise InvalidInput(f"{self.name} has no {kind} {name!r}; its {kind}s are {_listed(specs)}")

    def _check_array(self, spec: TensorSpec, array: np.ndarray) -> None:
        if type(array) is np.ndarray and spec.fits(array):  # nearly always; the rest finds the words for what is wrong
            return
        where = f"{self.name}: input {spec.name!r}"
        if not isinstance(array, np.ndarray):
            raise InvalidInput(
                f"{where} is a {type(array).__name__}; pass a numpy array: np.asarray(..., dtype={_named(spec.dtype)})"
            )
        if spec.datatype == "BYTES":
            _check_strings(where, array)
        elif array.dtype != spec.dtype:
            raise InvalidInput(
                f"{where} is {array.dtype}, the model takes {spec.dtype.name}; "
                f"cast it yourself if that loses nothing: inputs[{spec.name!r}].astype({_named(spec.dtype)})"
            )
        if array.ndim != len(spec.shape):
            raise InvalidInput(
                f"{where} has shape {list(array.shape)}, of {array.ndim} dimensions; the model takes "
                f"{len(spec.shape)}: {list(spec.shape)}{self._batch_hint(spec, array)}"
            )
        for axis, (size, allowed) in enumerate(zip(array.shape, spec.shape, strict=True)):
            if allowed not in (-1, size):
                raise InvalidInput(
                    f"{where} has shape {list(array.shape)}; dimension {axis} must be {allowed}, not {size}: "
                    f"the model takes {list(spec.shape)}"
                )

    def _batch_hint(self, spec: TensorSpec, array: np.ndarray) -> str:
        if self.max_batch_size and array.ndim == len(spec.shape) - 1:
            return f" with the batch first; for a batch of one: inputs[{spec.name!r}][None]"
        return ""

    def _check_batch(self, arrays: list[np.ndarray | None]) -> None:
        sizes = {spec.name: len(array) for spec, array in zip(self.inputs, arrays, strict=True) if array is not None}
        if len(set(sizes.values())) > 1:
            seen = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InvalidInput(f"{self.name}: batch sizes disagree ({seen}); make the first dimensions equal")
        size = next(iter(sizes.values()), 1)
        if not 1 <= size <= (self.max_batch_size or size):
            advice = f"split it into batches of {self.max_batch_size}" if size else "there is nothing to infer"
            raise InvalidInput(f"{self.name}: a batch of {size}; from 1 to {self.max_batch_size} are allowed: {advice}")


def _check_strings(where: str, array: np.ndarray) -> None:
    """Arrays of bytes or text, or `object` arrays of nothing else. Text is sent as UTF-8."""
    if array.dtype.kind in "SU":
        return
    if array.dtype != np.object_:
        raise InvalidInput(f"{where} is {array.dtype}, the model takes strings; cast it yourself: .astype(str)")
    for value in array.flat:
        if not isinstance(value, bytes | str):
            raise InvalidInput(f"{where} holds {value!r} ({type(value).__name__}); the model takes only bytes and str")


def _listed(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(map(str, specs))


def _named(dtype: np.dtype) -> str:
    """How the type is written in code."""
    return {"object": "object", "bool": "bool", "bfloat16": "ml_dtypes.bfloat16"}.get(dtype.name, f"np.{dtype.name}")

"""A model's inputs and outputs; checks a request against them before anything is sent.

Contract: `ModelMetadata.check(inputs)` returns the arrays in the model's order or raises InvalidInput with one line.
It never casts: a silent cast of float64 to float32, or of int64 ids to int32, gives wrong answers unnoticed.

Example:
    >>> metadata = client.metadata("recommender")
    >>> [(tensor.name, tensor.datatype, tensor.shape) for tensor in metadata.inputs]
    [('item_ids', 'INT64', (-1, 50))]
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tritonclient.utils import np_to_triton_dtype, triton_to_np_dtype

from deepseek_client.errors import InvalidInput, ServerError

INTEGERS = [f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)]
DTYPES = {
    name: np.dtype(triton_to_np_dtype(name)) for name in ("BOOL", *INTEGERS, "FP16", "FP32", "FP64", "BF16", "BYTES")
}
Inputs = Mapping[str, np.ndarray | Sequence[str | bytes] | Sequence[Sequence[str | bytes]]]
"""Arrays by input name; an input of strings may be a list of texts, or of pairs or lists of texts."""
UNREADABLE = (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError)
"""What reading a malformed answer raises."""


@dataclass(frozen=True, kw_only=True)
class TensorMetadata:
    """Name, type and shape of one input or output."""

    name: str
    datatype: str
    """Triton's type name: INT64, FP32, BYTES and so on."""
    shape: tuple[int, ...]
    """-1 is any size. If the model batches, the first dimension is the batch."""
    optional: bool = False
    """True also if the server does not report it."""

    @property
    def dtype(self) -> np.dtype:
        """The numpy type of its arrays; strings are `object`."""
        return DTYPES[self.datatype]

    def __str__(self) -> str:
        return f"{self.name} ({self.datatype} {list(self.shape)})"


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """A model as the server describes it."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]
    max_batch_size: int | None
    """0: the model does not batch. None: unknown (a gateway may hide the configuration)."""
    instances: int | None = None
    """Copies that run in parallel; None: unknown."""
    max_queue_delay_us: int | None = None
    """How long the dynamic batcher waits for more requests; None: no dynamic batching, or unknown."""
    preferred_batch_sizes: tuple[int, ...] = ()
    """Batches that the dynamic batcher aims at, in rows; requests may have up to `max_batch_size`."""
    parameters: Mapping[str, str] = field(default_factory=dict, hash=False)
    """From the configuration; empty if it has none or a gateway hides it."""
    binary: bool = True
    """Whether the server takes tensors as bytes over HTTP; without this extension of KServe v2 they are JSON."""

    def with_inputs(self, inputs: Inputs) -> "ModelMetadata":
        """The same; if the server describes no inputs, as MLServer may, those of the request count as its inputs."""
        if self.inputs or not isinstance(inputs, Mapping):
            return self
        arrays = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        if others := [name for name in inputs if name not in arrays]:
            raise InvalidInput(
                f"{self.name}: input {others[0]!r} is a {type(inputs[others[0]]).__name__}; pass a numpy array"
            )
        types = {name: "BYTES" if a.dtype.kind in "OSU" else np_to_triton_dtype(a.dtype) for name, a in arrays.items()}
        if unknown := [name for name, datatype in types.items() if datatype not in DTYPES]:
            raise InvalidInput(f"{self.name}: input {unknown[0]!r} is {arrays[unknown[0]].dtype}; cast it to a number")
        specs = (TensorMetadata(name=name, datatype=types[name], shape=a.shape) for name, a in arrays.items())
        return dataclasses.replace(self, inputs=tuple(specs))

    def check_answer(self, arrays: Mapping[str, np.ndarray], outputs: Collection[str] = ()) -> None:
        """Raises ServerError unless the answer has these outputs (all by default), with their types and shapes."""
        expected = {spec.name: spec for spec in self.outputs if not outputs or spec.name in outputs}
        if not self.outputs:
            return
        if arrays.keys() != expected.keys():
            raise ServerError(f"{self.name} answered {list(arrays)}; expected {list(expected)}")
        for name, array in arrays.items():
            spec = expected[name]
            sizes = array.shape
            fits = len(spec.shape) == len(sizes) and all(map(_allows, spec.shape, sizes))
            if not fits or array.dtype != spec.dtype:
                raise ServerError(f"{self.name} answered {name!r} as {array.dtype} {list(sizes)}; expected {spec}")

    def check(self, inputs: Inputs, outputs: Sequence[str] | None = None) -> list[np.ndarray | None]:
        """The arrays in the order of `self.inputs`; None for a missing optional input. Raises InvalidInput."""
        if not isinstance(inputs, Mapping):
            raise InvalidInput(f"inputs is a {type(inputs).__name__}; pass a dict of numpy arrays by input name")
        if isinstance(outputs, str | np.ndarray) or not isinstance(outputs, Collection | None):
            raise InvalidInput(f"outputs={outputs!r}; pass a list of names: [{outputs!r}]")
        if not all(isinstance(name, str) for name in outputs or ()):
            raise InvalidInput(f"outputs={outputs!r}; pass a list of names, each a text")
        self._check_names("input", inputs, self.inputs)
        if self.outputs:  # else the server does not describe them
            self._check_names("output", outputs or (), self.outputs)
        arrays = [_as_column(spec, inputs.get(spec.name)) for spec in self.inputs]
        for spec, array in zip(self.inputs, arrays, strict=True):
            if array is not None:
                self._check_array(spec, array)
            elif not spec.optional or spec.name in inputs:
                raise InvalidInput(f"{self.name}: input {spec.name!r} is missing; it takes {_listed(self.inputs)}")
        if self.max_batch_size:
            self._check_batch(arrays)
        return arrays

    def _check_names(self, kind: str, names: Iterable[str], specs: tuple[TensorMetadata, ...]) -> None:
        known = {spec.name for spec in specs}
        for name in names:
            if name not in known:
                raise InvalidInput(f"{self.name} has no {kind} {name!r}; its {kind}s are {_listed(specs)}")

    def _check_array(self, spec: TensorMetadata, array: np.ndarray) -> None:
        where = f"{self.name}: input {spec.name!r}"
        if isinstance(array, np.ma.MaskedArray):  # asarray would send what the mask hides
            raise InvalidInput(f"{where} is a masked array; say what stands for the masked values: array.filled(value)")
        if not isinstance(array, np.ndarray):
            wanted = "a list of texts, or a numpy array" if spec.datatype == "BYTES" else "a numpy array"
            raise InvalidInput(
                f"{where} is a {type(array).__name__}; pass {wanted}: np.asarray(..., dtype={_named(spec.dtype)})"
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

    def _batch_hint(self, spec: TensorMetadata, array: np.ndarray) -> str:
        if self.max_batch_size and array.ndim == len(spec.shape) - 1:
            one = "[inputs[{!r}]]" if spec.datatype == "BYTES" else "inputs[{!r}][None]"  # strings may be a list
            return f" with the batch first; for a batch of one: {one.format(spec.name)}"
        return ""

    def _check_batch(self, arrays: list[np.ndarray | None]) -> None:
        sizes = {spec.name: len(array) for spec, array in zip(self.inputs, arrays, strict=True) if array is not None}
        if not sizes:
            raise InvalidInput(f"{self.name}: no input; it takes {_listed(self.inputs)}")
        if len(set(sizes.values())) > 1:
            seen = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise InvalidInput(f"{self.name}: batch sizes disagree ({seen}); make the first dimensions equal")
        size, most = next(iter(sizes.values())), self.max_batch_size
        if most and size > most:
            raise InvalidInput(f"{self.name}: a batch of {size}; at most {most} are allowed: split it")
        if size == 0:
            raise InvalidInput(f"{self.name}: a batch of 0; there is nothing to infer")


def metadata_from_json(where: str, signature: Any, config: Any, *, binary: bool = True) -> ModelMetadata:
    """Parses the answers of the metadata and configuration endpoints; gRPC's JSON has int64 as strings.

    `where` names the server in an error. Raises ServerError.
    """
    try:
        return _parsed(signature, config, binary)
    except UNREADABLE as error:
        raise ServerError(f"{where}: not a model's metadata ({error!r}); is this Triton?") from None


def _parsed(signature: dict, config: dict | None, binary: bool) -> ModelMetadata:
    optional = {tensor["name"]: tensor.get("optional", False) for tensor in (config or {}).get("input", ())}

    def specs(kind: str) -> tuple[TensorMetadata, ...]:
        found = tuple(
            TensorMetadata(
                name=_text(tensor["name"]),
                datatype=_text(tensor["datatype"], DTYPES),
                shape=tuple(_whole(size, -1) for size in tensor.get("shape") or ()),
                optional=kind == "inputs" and bool(optional.get(tensor["name"], config is None)),
            )
            for tensor in signature.get(kind) or ()
        )
        if len({spec.name for spec in found}) < len(found):
            raise ValueError(f"two {kind} have one name: {[spec.name for spec in found]}")
        return found

    batching = (config or {}).get("dynamic_batching")
    return ModelMetadata(
        name=_text(signature["name"]),
        versions=tuple(map(_text, signature.get("versions") or ())),
        platform=_text(signature.get("platform") or ""),
        inputs=specs("inputs"),
        outputs=specs("outputs"),
        max_batch_size=None if config is None else _whole(config.get("max_batch_size", 0)),
        instances=sum(_whole(group.get("count", 1)) for group in (config or {}).get("instance_group", ())) or None,
        max_queue_delay_us=None if batching is None else _whole(batching.get("max_queue_delay_microseconds", 0)),
        preferred_batch_sizes=tuple(map(_whole, (batching or {}).get("preferred_batch_size") or ())),
        parameters={key: value.get("string_value", "") for key, value in (config or {}).get("parameters", {}).items()},
        binary=binary,
    )


def _allows(wanted: int, size: int) -> bool:
    return wanted in (-1, size)


def _text(value: Any, allowed: Collection[str] | None = None) -> str:
    if not isinstance(value, str) or (allowed is not None and value not in allowed):
        raise ValueError(f"{value!r} is not {'a text' if allowed is None else 'one of ' + ', '.join(allowed)}")
    return value


def _whole(value: Any, least: int = 0) -> int:
    """The number, which gRPC's JSON may write as a text."""
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,19}", value, re.ASCII):
        value = int(value)
    if type(value) is not int or not least <= value < 2**63:
        raise ValueError(f"{value!r} is not a whole number from {least} on")
    return value


def _as_column(spec: TensorMetadata, array: Any) -> Any:
    """One value per row, passed as [batch], in the shape [batch, 1] that Triton takes; any other array as it is.

    Texts may also come as a list, `{"text": ["one", "another"]}`, and pairs as a list of tuples.
    """
    if spec.datatype == "BYTES" and isinstance(array, list | tuple):
        array = np.array(array, dtype=object)
    if isinstance(array, np.ndarray) and array.ndim == 1 and spec.shape == (-1, 1):
        return array.reshape(-1, 1)
    return array


def _check_strings(where: str, array: np.ndarray) -> None:
    """Allows arrays of bytes or text, and `object` arrays that hold only these. Text is sent as UTF-8."""
    if array.dtype.kind in "SU":
        return
    if array.dtype != np.object_:
        raise InvalidInput(f"{where} is {array.dtype}, the model takes strings; cast it yourself: .astype(str)")
    for value in array.ravel():  # an iterator, array.flat, takes at most 32 dimensions
        if isinstance(value, list | tuple):
            raise InvalidInput(f"{where} has rows of different lengths; make them equal: names may be filled with ''")
        if not isinstance(value, bytes | str):
            raise InvalidInput(f"{where} holds {value!r} ({type(value).__name__}); the model takes only bytes and str")


def _listed(specs: tuple[TensorMetadata, ...]) -> str:
    return ", ".join(map(str, specs))


def _named(dtype: np.dtype) -> str:
    """The type as written in code."""
    return {"object": "object", "bool": "bool", "bfloat16": "ml_dtypes.bfloat16"}.get(dtype.name, f"np.{dtype.name}")

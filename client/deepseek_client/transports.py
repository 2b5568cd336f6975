"""What HTTP and gRPC have in common: the face of a transport, deadlines, requests, tensors as bytes.

Contract: a transport may be used by many threads at once, or by one asyncio loop; each failure leaves it as an error
of `deepseek_client.errors`; nothing waits past the deadline of the call (the system's name resolution excepted).

Both speak Triton's KServe v2 protocol with binary tensors, and are built from tritonclient's parts: its gRPC
messages, type names and string encoding. Its ready-made clients are not used, because
- tritonclient.http is for one thread only, and its time-outs are set per client and per socket operation, so that a
  server that sends a byte now and then holds a call for ever;
- all of them encode a request anew for each sending; here `encode` gives bytes that can be sent many times.
"""

import contextlib
import email.utils
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor, triton_to_np_dtype

from deepseek_client.errors import (
    AccessDenied,
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ModelNotReady,
    ServerBusy,
    ServerError,
)
from deepseek_client.runtimes import Cancel
from deepseek_client.signature import ModelMetadata, TensorSpec

Headers = Mapping[str, str]
NO_HEADERS: Headers = {}


class Deadline:
    """When a call must be over, retries and all."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def left_s(self) -> float:
        """Seconds left; negative when it is over."""
        return self._end - time.monotonic()

    def left_us(self) -> int:
        """Microseconds left, as Triton's request parameter `timeout` has it; at least 1, since 0 means none."""
        return max(1, int(self.left_s() * 1e6))

    def socket_timeout_s(self) -> float:
        """Seconds left for a socket to wait, which would take 0 as "do not wait". Raises TimeoutError."""
        left_s = self.left_s()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def exceeded(self, url: str) -> DeadlineExceeded:
        """The error to raise when it is over."""
        return DeadlineExceeded(f"{url} did not answer within timeout_s={self.timeout_s:g}; allow more, or send less")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An input as it is sent."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A request checked and encoded, to be sent any number of times by the client that made it."""

    model: str
    version: str
    request_id: str
    outputs: tuple[str, ...]
    """The names asked for; none: all."""
    parts: tuple[bytes, ...]
    """The transport's own encoding of all but the time-out; none where shared memory may take the tensors."""
    tensors: tuple[Tensor, ...]
    """None where `parts` hold them."""
    result_sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Bytes of each output, where the signature fixes that of every one; else empty."""

    @property
    def size_bytes(self) -> int:
        """Of its tensors."""
        return sum(len(tensor.data) for tensor in self.tensors)


class Placement(Protocol):
    """Where in a shared memory region the tensors of one attempt lie."""

    region: str
    inputs: Mapping[str, tuple[int, int]]
    """Offset and size in bytes."""
    outputs: Mapping[str, tuple[int, int]]

    def read(self, output: str, size: int) -> bytes:
        """A copy of what the server wrote."""


class Transport(Protocol):
    """The face of both protocols."""

    async def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """Whether the server, or the model, can take requests."""

    async def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """The signature; with the batch size and which inputs are optional, where the configuration may be read."""

    def encode(self, request: PreparedRequest) -> tuple[bytes, ...]:
        """The parts of a request that has tensors."""

    async def send(
        self,
        request: PreparedRequest,
        deadline: Deadline,
        headers: Headers = NO_HEADERS,
        cancel: Cancel | None = None,
        placement: Placement | None = None,
    ) -> dict[str, np.ndarray]:
        """One attempt: adds what is left of the time as the server's time-out, and sends.

        With a placement the tensors are in shared memory, and the message only says where.
        """

    async def register(self, region: str, size_bytes: int, deadline: Deadline, cancel: Cancel | None = None) -> None:
        """Has the server map /dev/shm/<region>."""

    async def unregister(self, region: str, deadline: Deadline) -> None:
        """Has the server let go of it."""

    async def close(self) -> None:
        """Closes the connections."""


def tensors_of(metadata: ModelMetadata, arrays: Sequence[np.ndarray | None]) -> tuple[Tensor, ...]:
    """Of arrays in the order of the metadata; None is an optional input left out."""
    return tuple(
        Tensor(name=spec.name, datatype=spec.datatype, shape=array.shape, data=to_bytes(spec, array))
        for spec, array in zip(metadata.inputs, arrays, strict=True)
        if array is not None
    )


def result_sizes(metadata: ModelMetadata, tensors: Sequence[Tensor], outputs: Sequence[str] | None) -> dict[str, int]:
    """Bytes of each output asked for, where all are known beforehand: only the batch may be free, and no strings."""
    batch = tensors[0].shape[0] if metadata.max_batch_size and tensors else None
    sizes = {}
    for spec in metadata.outputs:
        if outputs and spec.name not in outputs:
            continue
        shape = spec.shape if batch is None else (batch, *spec.shape[1:])
        if spec.datatype == "BYTES" or -1 in shape:
            return {}
        sizes[spec.name] = int(np.prod(shape)) * spec.dtype.itemsize
    return sizes


def to_bytes(spec: TensorSpec, array: np.ndarray) -> bytes:
    """The array as it goes over the wire, row-major."""
    if spec.datatype != "BYTES":
        return array.tobytes()
    pieces: list[bytes] = []
    for value in array.flat:  # tritonclient's encoder sends the repr of a subclass of bytes or str
        try:
            data = value if isinstance(value, bytes) else str.encode(value)
        except UnicodeEncodeError as error:
            raise InvalidInput(f"input {spec.name!r} holds {value!r}, which is no UTF-8: {error.reason}") from None
        pieces += (len(data).to_bytes(4, "little"), data)
    return b"".join(pieces)


def to_numpy(datatype: str, shape: Sequence[int], data: bytes) -> np.ndarray:
    """A read-only view of `data`. Raises ValueError or struct.error where they do not belong together."""
    flat = deserialize_bytes_tensor(data) if datatype == "BYTES" else np.frombuffer(data, triton_to_np_dtype(datatype))
    return flat.reshape(tuple(shape))


def placed_array(placement: Placement, output: str, datatype: str, shape: Sequence[int]) -> np.ndarray:
    """A copy of an output that the server put into shared memory. Raises ValueError where it is larger than told."""
    size = int(np.prod(shape)) * np.dtype(triton_to_np_dtype(datatype)).itemsize
    return to_numpy(datatype, shape, placement.read(output, size))


def metadata_from_json(signature: dict, config: dict | None) -> ModelMetadata:
    """From the answers of the metadata and configuration endpoints; gRPC's JSON has int64 as strings."""
    optional = {tensor["name"]: tensor.get("optional", False) for tensor in (config or {}).get("input", ())}

    def specs(kind: str) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=tensor["name"],
                datatype=tensor["datatype"],
                shape=tuple(int(size) for size in tensor.get("shape", ())),
                optional=kind == "inputs" and optional.get(tensor["name"], config is None),
            )
            for tensor in signature.get(kind, ())
        )

    return ModelMetadata(
        name=signature["name"],
        versions=tuple(signature.get("versions", ())),
        platform=signature.get("platform", ""),
        inputs=specs("inputs"),
        outputs=specs("outputs"),
        max_batch_size=None if config is None else int(config.get("max_batch_size", 0)),
        parameters={key: value.get("string_value", "") for key, value in (config or {}).get("parameters", {}).items()},
    )


def one_line(reason: str) -> str:
    """A server's message without its line breaks and its empty request id."""
    return " ".join(reason.replace("[request id: <id_unknown>]", "").split())


def means_not_ready(reason: str) -> bool:
    """Triton says so of a model that it knows and that is not loaded, under various codes."""
    return "no available versions" in reason or "not at ready state" in reason or "is not ready" in reason


def error_of_status(status: int, reason: str, wait_s: float | None = None) -> InferenceError:
    """The error for an HTTP status from Triton, or from a gateway before it."""
    if status != 500 and means_not_ready(reason):  # 500 is a model's own failure, which may say so of another one
        return ModelNotReady(reason)
    if status in (429, 503):
        return ServerBusy(reason if wait_s is None else f"{reason}; it asks to wait {wait_s:g} s", wait_s)
    kinds: dict[int, type[InferenceError]] = {
        400: InvalidInput,
        401: AccessDenied,
        403: AccessDenied,
        404: ModelNotFound,
        413: InvalidInput,
        502: ConnectionLost,  # the gateway lost the server, perhaps in the middle of it
        504: DeadlineExceeded,
    }
    return kinds.get(status, ServerError)(reason)


def retry_after_s(value: str) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or a date; None where it is neither."""
    with contextlib.suppress(ValueError, OverflowError):
        if value.strip().isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return None

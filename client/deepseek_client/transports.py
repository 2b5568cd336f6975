"""What HTTP and gRPC have in common: the face of a transport, deadlines, tensors as bytes.

Contract: a transport may be used by many threads at once; each failure leaves it as an error of
`deepseek_client.errors`; nothing waits past the deadline of the call (the system's name resolution excepted).

Both speak Triton's KServe v2 protocol with binary tensors, and are built from tritonclient's parts: its gRPC
messages, type names and string encoding. Its ready-made clients are not used, because
- tritonclient.http is for one thread only, and its time-outs are set per client and per socket operation, so that a
  server that sends a byte now and then holds a call for ever;
- both encode a request anew for each sending; here `encode` gives bytes that can be sent many times.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from deepseek_client.errors import DeadlineExceeded
from deepseek_client.signature import ModelMetadata, TensorSpec


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
class PreparedRequest:
    """A request checked and encoded, to be sent any number of times by the client that made it."""

    model: str
    version: str
    parts: tuple[bytes, ...]
    """The transport's own."""


class Transport(Protocol):
    """The face of both protocols."""

    def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """Whether the server, or the model, can take requests."""

    def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """The signature; with the batch size and which inputs are optional, where the configuration may be read."""

    def encode(
        self,
        metadata: ModelMetadata,
        version: str,
        arrays: Sequence[np.ndarray | None],
        outputs: Sequence[str] | None,
        request_id: str,
    ) -> PreparedRequest:
        """All of the request but its time-out. `arrays` are in the order of the metadata."""

    def send(self, request: PreparedRequest, deadline: Deadline) -> dict[str, np.ndarray]:
        """One attempt: adds what is left of the time as the server's time-out, and sends."""

    def close(self) -> None:
        """Closes the connections."""


def to_bytes(spec: TensorSpec, array: np.ndarray) -> bytes:
    """The array as it goes over the wire, row-major."""
    if spec.datatype != "BYTES":
        return array.tobytes()
    if array.dtype.kind == "U":
        array = array.astype(object)  # what tritonclient encodes
    return serialize_byte_tensor(array).item() if array.size else b""


def to_numpy(datatype: str, shape: Sequence[int], data: bytes) -> np.ndarray:
    """A read-only view of `data`. Raises ValueError or struct.error where they do not belong together."""
    flat = deserialize_bytes_tensor(data) if datatype == "BYTES" else np.frombuffer(data, triton_to_np_dtype(datatype))
    return flat.reshape(tuple(shape))


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

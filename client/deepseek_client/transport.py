"""The interface of both transports: deadlines, prepared requests, the calls of KServe v2.

Contract: many threads, or one asyncio loop, may use a transport at once. It raises only errors of
`deepseek_client.errors`. Nothing waits past the deadline of the call, except the system's name resolution.

Both transports use tritonclient's parts (gRPC messages, type names), not its clients. `tritonclient.http` serves one
thread, and its time-outs are per socket operation: a server that sends a byte now and then blocks a call without end.
All of its clients encode a request again for each attempt.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from deepseek_client.concurrency import Cancel
from deepseek_client.errors import DeadlineExceeded
from deepseek_client.metadata import ModelMetadata

Headers = Mapping[str, str]
NO_HEADERS: Headers = {}
Parameters = Mapping[str, str | float]
"""Parameters of a request in KServe v2: texts, numbers, and True or False."""
BULK: Parameters = {"priority": 2, "bulk": True}
"""Those of a bulk request, which waits behind all others: in the queue of Triton, and in this project's backend."""


class Deadline:
    """The time by which a call must end, retries included."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def part(self, count: int) -> "Deadline":
        """An equal share of the time left. Its error names the caller's time-out, not the share."""
        share = Deadline(self.left_s() / count)
        share.timeout_s = self.timeout_s
        return share

    def left_s(self) -> float:
        """Seconds left; negative after the deadline."""
        return self._end - time.monotonic()

    def left_us(self) -> int:
        """Microseconds left, for Triton's request parameter `timeout`; at least 1, since 0 means none."""
        return max(1, int(self.left_s() * 1e6))

    def socket_timeout_s(self) -> float:
        """Seconds left as a socket's time-out, always above 0. Raises TimeoutError after the deadline."""
        left_s = self.left_s()
        if left_s <= 0:
            raise TimeoutError
        return left_s

    def exceeded(self, url: str) -> DeadlineExceeded:
        """The error to raise after the deadline."""
        return DeadlineExceeded(f"{url} did not answer within timeout_s={self.timeout_s:g}; allow more, or send less")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, kw_only=True)
class PreparedRequest:
    """A checked and encoded request that can be sent many times."""

    model: str
    version: str
    request_id: str
    outputs: tuple[str, ...]
    """The requested outputs; empty: all."""
    parts: tuple[bytes, ...]
    """The encoded request without its time-out; empty if the tensors may go through shared memory."""
    tensors: tuple[Tensor, ...]
    """Empty if `parts` contain them."""
    protocol: str = ""
    """For which `parts` are encoded: "grpc" or "http"."""
    binary: bool = True
    """Whether `parts` have the tensors as bytes; else they are JSON."""
    parameters: Parameters = field(default_factory=dict, hash=False)
    """Sent with the request, beside its time-out."""
    result_sizes: Mapping[str, int] = field(default_factory=dict, hash=False)
    """Bytes of each output if the metadata fixes all sizes; else empty."""

    @property
    def size_bytes(self) -> int:
        return sum(len(tensor.data) for tensor in self.tensors)


class Placement(Protocol):
    """The location of one attempt's tensors in a shared memory region."""

    region: str
    inputs: Mapping[str, tuple[int, int]]
    """Offset and size in bytes."""
    outputs: Mapping[str, tuple[int, int]]

    def read(self, output: str, size: int) -> bytes:
        """A copy of the output that the server wrote."""


class Transport(Protocol):
    """The calls of KServe v2 to one server."""

    async def ready(self, model: str | None, version: str, deadline: Deadline) -> bool:
        """Whether the server, or the model, can take requests."""

    async def metadata(
        self, model: str, version: str, deadline: Deadline, cancel: Cancel | None = None
    ) -> ModelMetadata:
        """The model's metadata, with batch size and optional inputs if the configuration can be read."""

    async def model_statistics(self, model: str, deadline: Deadline) -> dict:
        """The JSON of the server's statistics endpoint."""

    def encode(self, request: PreparedRequest) -> tuple[bytes, ...]:
        """Encodes a request that has tensors into parts."""

    async def send(
        self,
        request: PreparedRequest,
        deadline: Deadline,
        headers: Headers = NO_HEADERS,
        cancel: Cancel | None = None,
        placement: Placement | None = None,
    ) -> dict[str, np.ndarray]:
        """Makes one attempt and tells the server the time left. `placement`: the tensors are in shared memory."""

    async def register(self, region: str, size_bytes: int, deadline: Deadline, cancel: Cancel | None = None) -> None:
        """Makes the server map /dev/shm/<region>."""

    async def unregister(self, region: str, deadline: Deadline) -> None:
        """Makes the server unmap the region."""

    async def close(self) -> None:
        """Closes the connections."""

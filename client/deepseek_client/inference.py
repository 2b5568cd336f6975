"""`InferenceClient`: numpy in, numpy out, within a deadline, over HTTP or gRPC.

Contract
- Checked first: names, types and shapes against the server's metadata, fetched once a model and version. A request
  that does not fit fetches it once more, so that a new version of the model needs no new client.
- Deadline: `timeout_s` is for the whole call, with its retries, waits and first fetch of the metadata. It ends the
  call on this side, and goes with each attempt to the server in microseconds: a dynamic batcher whose queue policy
  has `allow_timeout_override` and a longer default drops the request instead of computing for nobody; over gRPC the
  server also sees the call cancelled.
- Retries: up to `retries` more attempts after errors that certainly did not run (Unreachable, ServerBusy,
  ModelNotReady), with `idempotent=True` also after ConnectionLost. Before the k-th of these it waits a random
  time between 0 and min(2 s, 25 ms * 2^k) ("full jitter"); where that would pass the deadline, the error comes at once.
- Threads: one client may be used by many at once. gRPC shares one connection; HTTP keeps one for each call in flight.

Example:
    >>> with InferenceClient("127.0.0.1:8001", timeout_s=0.5) as client:
    ...     client.infer("recommender", {"item_ids": np.zeros((1, 50), np.int64)})["items"].shape
    (1, 20)
"""

import contextlib
import math
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

import numpy as np

from deepseek_client.errors import InferenceError, InvalidInput, ModelNotFound
from deepseek_client.over_grpc import GrpcTransport
from deepseek_client.over_http import HttpTransport
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import Deadline, PreparedRequest, Transport

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0

Result = TypeVar("Result")


class InferenceClient:
    """A client of one server. Close it, or use it in a `with` block.

    Args:
        url: host:port, without a scheme; 8001 is Triton's gRPC port, 8000 its HTTP port.
        protocol: "grpc" or "http".
        timeout_s: deadline of a call that names none of its own.
        retries: attempts after the first, for errors that are safe to retry.
        idempotent: running a request twice does no harm (true of every stateless model), so a lost connection is
            retried, too.
        tls: speak TLS; implied by `ca_cert`.
        ca_cert: PEM file of the authority to trust instead of the system's.
        api_key: sent as `Authorization: Bearer ...`, over TLS only.
    """

    def __init__(
        self,
        url: str = "127.0.0.1:8001",
        protocol: Literal["grpc", "http"] = "grpc",
        *,
        timeout_s: float = 10.0,
        retries: int = 3,
        idempotent: bool = False,
        tls: bool = False,
        ca_cert: str | Path | None = None,
        api_key: str | None = None,
    ) -> None:
        _check_settings(url, protocol, retries, api_key, tls or ca_cert is not None)
        self.timeout_s = _checked_timeout(timeout_s)
        self.retries = retries
        self.idempotent = idempotent
        make: Callable[..., Transport] = GrpcTransport if protocol == "grpc" else HttpTransport
        authority = _read_pem(ca_cert) if ca_cert is not None else None
        self._transport = make(url, tls=tls or ca_cert is not None, ca_cert=authority, api_key=api_key)
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; no call after it."""
        self._closed = True
        self._transport.close()

    def ready(self, model: str | None = None, *, version: str = "", timeout_s: float | None = None) -> bool:
        """Whether the server, or the model, can take requests; Unreachable where nothing answers."""
        deadline = self._deadline(timeout_s)
        return self._retrying(lambda: self._transport.ready(model, version, deadline), deadline)

    def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """What the model takes and gives, asked of the server now."""
        return self._fetch_metadata(model, version, self._deadline(timeout_s))

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
    ) -> dict[str, np.ndarray]:
        """The outputs by name: all of them, or those in `outputs`.

        The arrays are read-only views of what was received; copy one to change it. `version` "" leaves the choice
        to the server. `request_id` appears in Triton's log and traces. Raises InferenceError.
        """
        deadline = self._deadline(timeout_s)
        return self._send(self._prepare(model, inputs, outputs, version, request_id, deadline), deadline)

    def prepare(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
    ) -> PreparedRequest:
        """Checks and encodes a request once, for `send` to send many times, from any thread."""
        return self._prepare(model, inputs, outputs, version, request_id, self._deadline(timeout_s))

    def send(self, request: PreparedRequest, *, timeout_s: float | None = None) -> dict[str, np.ndarray]:
        """As `infer`, for a request that `prepare` of this client made."""
        return self._send(request, self._deadline(timeout_s))

    def _prepare(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] | None,
        version: str,
        request_id: str,
        deadline: Deadline,
    ) -> PreparedRequest:
        metadata = self._metadata.get((model, version))
        if metadata is not None:
            with contextlib.suppress(InvalidInput):  # by an old signature perhaps: what the server says now decides
                arrays = metadata.check(inputs, outputs)
                return self._transport.encode(metadata, version, arrays, outputs, request_id)
        metadata = self._fetch_metadata(model, version, deadline)
        arrays = metadata.check(inputs, outputs)
        return self._transport.encode(metadata, version, arrays, outputs, request_id)

    def _fetch_metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        if not re.fullmatch(r"\d*", version, re.ASCII):
            raise InvalidInput(f"version={version!r}; it must be a number such as '1', or '' for the server's choice")
        metadata = self._retrying(lambda: self._transport.metadata(model, version, deadline), deadline)
        self._metadata[model, version] = metadata
        return metadata

    def _send(self, request: PreparedRequest, deadline: Deadline) -> dict[str, np.ndarray]:
        try:
            return self._retrying(lambda: self._transport.send(request, deadline), deadline)
        except (InvalidInput, ModelNotFound):  # what passed the check here does not pass there: forget the signature
            self._metadata.pop((request.model, request.version), None)
            raise

    def _retrying(self, call: Callable[[], Result], deadline: Deadline) -> Result:
        attempt = 0
        while True:
            try:
                return call()
            except InferenceError as error:
                worth_it = error.did_not_run or (error.may_have_run and self.idempotent)
                pause_s = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempt))
                if not worth_it or attempt >= self.retries or pause_s >= deadline.left_s():
                    raise
            time.sleep(pause_s)
            attempt += 1

    def _deadline(self, timeout_s: float | None) -> Deadline:
        if self._closed:
            raise RuntimeError("this InferenceClient is closed")
        return Deadline(self.timeout_s if timeout_s is None else _checked_timeout(timeout_s))


def _checked_timeout(timeout_s: float) -> float:
    if not 0 < timeout_s < math.inf:
        raise InvalidInput(f"timeout_s={timeout_s!r}; it must be a positive number of seconds")
    return timeout_s


def _check_settings(url: str, protocol: str, retries: int, api_key: str | None, tls: bool) -> None:
    if protocol not in ("grpc", "http"):
        raise InvalidInput(f"protocol={protocol!r}; it must be 'grpc' or 'http'")
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d+)", url, re.ASCII)
    if not match or not 0 < int(match[2]) < 65536:
        raise InvalidInput(f"url={url!r}; it must be host:port without a scheme, such as 127.0.0.1:8001")
    if retries < 0:
        raise InvalidInput(f"retries={retries}; it must be 0 or more")
    if api_key is not None and not tls:
        raise InvalidInput("api_key is only sent over TLS; give ca_cert=FILE, or tls=True for the system's authorities")
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise InvalidInput(
            "api_key holds a blank, control or non-ASCII character; pass the bare key, without a newline"
        )


def _read_pem(path: str | Path) -> bytes:
    try:
        pem = Path(path).read_bytes()
        ssl.create_default_context(cadata=pem.decode("ascii"))  # refuses what is no certificate
    except (OSError, ValueError) as error:
        raise InvalidInput(f"ca_cert={str(path)!r}: {error}; it must be a PEM file of certificates") from None
    return pem

"""`InferenceClient` and `AsyncInferenceClient`: numpy in, numpy out, within a deadline, over HTTP or gRPC.

Contract
- Checked first: names, types and shapes against the server's metadata, fetched once a model and version. A request
  that does not fit fetches it once more, so that a new version of the model needs no new client.
- Deadline: `timeout_s` is for the whole call, with its retries, hedges, waits and first fetch of the metadata, over
  however many replicas. It ends the call on this side, and what is left of it goes with each attempt to the server in
  microseconds: a dynamic batcher whose queue policy has `allow_timeout_override` and a longer default drops the
  request instead of computing for nobody; over gRPC the server also sees the call cancelled.
- Retries: up to `retries` more attempts after errors that certainly did not run (Unreachable, ServerBusy,
  ModelNotReady), with `idempotent=True` also after ConnectionLost; within the budget (`budget.py`). A replica not yet
  tried is tried at once. Else the k-th waits a random time between 0 and min(2 s, 25 ms * 2^k) ("full jitter"), and
  what Retry-After asks for on top; where that would pass the deadline, the error comes at once.
- Threads: one client may be used by many at once, an asynchronous one by the tasks of one loop. gRPC shares one
  connection a replica; HTTP keeps one for each call in flight.

Example:
    >>> with InferenceClient("127.0.0.1:8001", timeout_s=0.5) as client:
    ...     client.infer("recommender", {"item_ids": np.zeros((1, 50), np.int64)})["items"].shape
    (1, 20)
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Literal, Self

import numpy as np

from deepseek_client.calls import Calls
from deepseek_client.counters import Statistics
from deepseek_client.http_connections import AsyncConnection, BlockingConnection
from deepseek_client.http_pool import AsyncPool, BlockingPool, OpenConnection
from deepseek_client.over_grpc import GrpcTransport, async_wire, blocking_wire
from deepseek_client.over_http import HttpTransport
from deepseek_client.runtimes import AsyncRuntime, ThreadRuntime, is_gevent_patched, run
from deepseek_client.settings import Settings, read_pem
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import PreparedRequest, Transport


class _Client:
    """What both clients have in common."""

    _runtime: ClassVar[type[ThreadRuntime | AsyncRuntime]]

    def __init__(
        self,
        url: str | Sequence[str] = "127.0.0.1:8001",
        protocol: Literal["grpc", "http"] = "grpc",
        *,
        timeout_s: float = 10.0,
        retries: int = 3,
        retry_budget: float | None = 0.1,
        idempotent: bool = False,
        hedge_after_ms: float | str | None = None,
        shared_memory: bool | Literal["auto"] = False,
        tls: bool = False,
        ca_cert: str | Path | None = None,
        api_key: str | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            url: host:port without a scheme, or a list of them, replicas of one service; 8001 is Triton's gRPC port,
                8000 its HTTP port.
            protocol: "grpc" or "http".
            timeout_s: deadline of a call that names none of its own.
            retries: attempts after the first, for errors that are safe to retry.
            retry_budget: retries and hedges of the last ten seconds, as a share of the calls; 10 are always allowed.
                None: no limit.
            idempotent: running a request twice does no harm (true of every stateless model), so a lost connection is
                retried, too, and hedging is allowed.
            hedge_after_ms: where there is no answer after so long, the request is sent once more, to another replica if
                there is one; the first answer counts. Milliseconds, or a percentile of the latest calls to the model
                such as "p95".
            shared_memory: tensors through /dev/shm, where the server is on this machine and allows it: False, True
                (required) or "auto" (for large ones, where possible).
            tls: speak TLS; implied by `ca_cert`.
            ca_cert: PEM file of the authority to trust instead of the system's.
            api_key: sent as `Authorization: Bearer ...`, over TLS only.
        """
        settings = Settings(
            urls=tuple(url) if isinstance(url, Iterable) and not isinstance(url, str) else (url,),
            protocol=protocol,
            timeout_s=timeout_s,
            retries=retries,
            retry_budget=retry_budget,
            idempotent=idempotent,
            hedge_after_ms=hedge_after_ms,
            shared_memory=shared_memory,
            tls=tls,
            ca_cert=ca_cert,
            api_key=api_key,
        )
        self.timeout_s, self.retries, self.idempotent = timeout_s, retries, idempotent
        self._calls = Calls(settings, self._runtime(), _transports(settings, self._runtime is AsyncRuntime))

    def statistics(self) -> Statistics:
        """Calls, errors, retries, hedges, latency percentiles by model, and the state of the replicas."""
        return self._calls.statistics()


def _transports(settings: Settings, asynchronous: bool) -> dict[str, Transport]:
    """One for each address."""
    authority = read_pem(settings.ca_cert) if settings.ca_cert is not None else None
    tls, api_key = settings.speaks_tls, settings.api_key
    transports: dict[str, Transport] = {}
    for url in settings.urls:
        if settings.protocol == "grpc":
            wire = async_wire if asynchronous else blocking_wire
            transports[url] = GrpcTransport(url, wire, tls=tls, ca_cert=authority, api_key=api_key)
        else:
            pool = (
                partial(AsyncPool, AsyncConnection.open)
                if asynchronous
                else partial(BlockingPool, _blocking_connection(tls))
            )
            transports[url] = HttpTransport(
                url, pool, idempotent=settings.idempotent, tls=tls, ca_cert=authority, api_key=api_key
            )
    return transports


def _blocking_connection(tls: bool) -> OpenConnection:
    """Of a socket; under gevent, whose sockets cost a good part of a small request, one of our own."""
    if not tls and is_gevent_patched():
        from deepseek_client.green_connection import GreenConnection

        return GreenConnection.open
    return BlockingConnection.open


class InferenceClient(_Client):
    """A client of one server, or of several replicas. Close it, or use it in a `with` block."""

    _runtime = ThreadRuntime

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; no call after it."""
        run(self._calls.close())

    def ready(self, model: str | None = None, *, version: str = "", timeout_s: float | None = None) -> bool:
        """Whether the server, or the model, can take requests; of several replicas any. Unreachable: none answers."""
        return run(self._calls.ready(model, version, timeout_s))

    def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """What the model takes and gives, asked of the server now."""
        return run(self._calls.metadata(model, version, self._calls.deadline(timeout_s)))

    def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, np.ndarray]:
        """The outputs by name: all of them, or those in `outputs`.

        The arrays are read-only views of what was received; copy one to change it. `version` "" leaves the choice
        to the server. `request_id` appears in Triton's log and traces, and travels as the header x-request-id.
        `headers` go with every attempt, over gRPC as metadata: a W3C `traceparent`, say. Raises InferenceError.
        """
        deadline = self._calls.deadline(timeout_s)
        return run(self._calls.infer(model, inputs, outputs, version, request_id, headers, deadline))

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
        deadline = self._calls.deadline(timeout_s)
        return run(self._calls.prepare(model, inputs, outputs, version, request_id, deadline))

    def send(
        self, request: PreparedRequest, *, timeout_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        """As `infer`, for a request that `prepare` of this client made."""
        return run(self._calls.send(request, headers, self._calls.deadline(timeout_s)))


class AsyncInferenceClient(_Client):
    """As `InferenceClient`, awaited, on one asyncio loop. Close it, or use it in an `async with` block."""

    _runtime = AsyncRuntime

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections; no call after it."""
        await self._calls.close()

    async def ready(self, model: str | None = None, *, version: str = "", timeout_s: float | None = None) -> bool:
        """See InferenceClient."""
        return await self._calls.ready(model, version, timeout_s)

    async def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """See InferenceClient."""
        return await self._calls.metadata(model, version, self._calls.deadline(timeout_s))

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, np.ndarray]:
        """See InferenceClient."""
        deadline = self._calls.deadline(timeout_s)
        return await self._calls.infer(model, inputs, outputs, version, request_id, headers, deadline)

    async def prepare(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
    ) -> PreparedRequest:
        """See InferenceClient."""
        deadline = self._calls.deadline(timeout_s)
        return await self._calls.prepare(model, inputs, outputs, version, request_id, deadline)

    async def send(
        self, request: PreparedRequest, *, timeout_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        """See InferenceClient."""
        return await self._calls.send(request, headers, self._calls.deadline(timeout_s))

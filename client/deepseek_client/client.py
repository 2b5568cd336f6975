"""`InferenceClient` and `AsyncInferenceClient`: numpy in, numpy out, within a deadline, over HTTP or gRPC.

Contract
- The client checks names, types and shapes against the server's metadata before it sends anything. It fetches the
  metadata once per model and version, and again when a request does not fit: the model may have a new version.
- `timeout_s` covers the whole call, on all replicas: retries, hedges, waits and the first fetch of the metadata. Each
  attempt sends the time left, in microseconds. A dynamic batcher drops the request when that time is over, if its
  queue policy has `allow_timeout_override` and a longer default. Over gRPC the server also sees a cancelled call.
- Retries: see `retry`. Several addresses: see `replicas`.
- Threads: many may use one client at once; the tasks of one loop may share one asynchronous client. gRPC uses one
  connection per replica, HTTP one per call in flight.

Example:
    >>> with InferenceClient("127.0.0.1:8001", timeout_s=0.5) as client:
    ...     client.infer("recommender", {"item_ids": np.zeros((1, 50), np.int64)})["items"].shape
    (1, 20)
"""

import asyncio
import ssl
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal, Self
from urllib.parse import urlsplit

import grpc
import numpy as np

from deepseek_client.concurrency import AsyncConcurrency, ThreadConcurrency, run
from deepseek_client.core import ClientCore
from deepseek_client.grpc.channel import AsyncChannel, BlockingChannel
from deepseek_client.grpc.transport import GrpcTransport
from deepseek_client.http.connection import AsyncConnection, BlockingConnection
from deepseek_client.http.pool import AsyncPool, BlockingPool
from deepseek_client.http.transport import HttpTransport
from deepseek_client.metadata import Inputs, ModelMetadata
from deepseek_client.options import ClientOptions, read_pem, system_authorities
from deepseek_client.statistics import Statistics
from deepseek_client.transport import Deadline, Parameters, PreparedRequest, Transport


class _Client:
    _on_loop: ClassVar[bool]

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
        max_response_bytes: int | None = 128 * 2**20,
        tls: bool = False,
        ca_cert: str | Path | None = None,
        api_key: str | None = None,
    ) -> None:
        """Checks the options; the first call connects.

        Args:
            url: host:port without a scheme, or a list of them (replicas of one service); 8001 is Triton's gRPC port,
                8000 its HTTP port.
            protocol: "grpc" or "http".
            timeout_s: default deadline of a call, in seconds.
            retries: attempts after the first, for errors that are safe to retry.
            retry_budget: limit on retries and hedges in the last ten seconds, as a share of the calls, plus 10.
                None: no limit.
            idempotent: True if running a request twice does no harm, as with every stateless model. Lost connections
                are then retried too, and hedging is allowed.
            hedge_after_ms: without an answer after this time, the client sends the request once more, to another
                replica if there is one, and takes the first answer. Milliseconds, or a percentile of the latest
                calls to the model such as "p95".
            shared_memory: pass tensors through /dev/shm to a server on this machine that allows it: False, True
                (required) or "auto" (large tensors, if possible).
            max_response_bytes: the largest answer; a larger one is a ServerError. None: 2 GiB, all that gRPC allows.
            tls: use TLS; implied by `ca_cert`.
            ca_cert: PEM file of the certificate authority to trust instead of the system's.
            api_key: sent as `Authorization: Bearer ...`, over TLS only.
        """
        options = ClientOptions(
            urls=tuple(url) if isinstance(url, Iterable) and not isinstance(url, str) else (url,),
            protocol=protocol,
            timeout_s=timeout_s,
            retries=retries,
            retry_budget=retry_budget,
            idempotent=idempotent,
            hedge_after_ms=hedge_after_ms,
            shared_memory=shared_memory,
            max_response_bytes=max_response_bytes,
            tls=tls,
            ca_cert=ca_cert,
            api_key=api_key,
        )
        self.protocol, self.timeout_s = protocol, timeout_s
        self._begin(options, {url: self._transport(url, options) for url in options.urls})

    def _begin(self, options: ClientOptions, transports: Mapping[str, Transport]) -> None:
        raise NotImplementedError

    def _transport(self, url: str, options: ClientOptions) -> Transport:
        """To one address. The load generator's client brings connections of its own."""
        authority = None if options.ca_cert is None else read_pem(options.ca_cert)
        if options.protocol == "grpc":
            credentials = None
            if options.speaks_tls:
                credentials = grpc.ssl_channel_credentials(authority or system_authorities())
            channel = (AsyncChannel if self._on_loop else BlockingChannel)(url, credentials, options.response_limit)
            return GrpcTransport(url, channel, options.api_key)
        cadata = authority and authority.decode()
        tls = ssl.create_default_context(cadata=cadata) if options.speaks_tls else None
        place = (*address_of(url), tls)
        if self._on_loop:
            return HttpTransport(url, AsyncPool(partial(AsyncConnection.open, *place)), options)
        return HttpTransport(url, BlockingPool(partial(BlockingConnection.open, *place)), options)


def address_of(url: str) -> tuple[str, int]:
    parsed = urlsplit(f"//{url}")
    return parsed.hostname or "", parsed.port or 0


class InferenceClient(_Client):
    """A client of one server, or of several replicas. Close it, or use it in a `with` block."""

    _on_loop = False

    def _begin(self, options: ClientOptions, transports: Mapping[str, Transport]) -> None:
        self._core = ClientCore(options, ThreadConcurrency(), transports)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; no call after it."""
        run(self._core.close())

    def statistics(self) -> Statistics:
        """Calls, errors, retries, hedges and latency percentiles by model, and the state of the replicas."""
        return self._core.statistics()

    def ready(self, model: str | None = None, *, version: str = "", timeout_s: float | None = None) -> bool:
        """Whether the server, or the model, can take requests on any replica. Raises InferenceError if none says."""
        return run(self._core.ready(model, version=version, timeout_s=timeout_s))

    def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """The model's inputs and outputs, fetched now."""
        return run(self._core.metadata(model, version=version, timeout_s=timeout_s))

    def model_statistics(self, model: str, *, timeout_s: float | None = None) -> dict:
        """Triton's statistics since it started: `{"model_stats": [...]}`, one entry per version."""
        return run(self._core.model_statistics(model, timeout_s=timeout_s))

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
        parameters: Parameters | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs the model and returns its outputs by name: all, or those in `outputs`. Raises InferenceError.

        An input of strings may be a list of texts, `{"text": ["one", "another"]}`, or of pairs of texts.
        The arrays are read-only views of the response; copy one to change it. With `version` "" the server chooses.
        `request_id` appears in Triton's log and traces, and is sent as the header x-request-id. `parameters` are those
        of the request in KServe v2, such as `BULK`: a bulk request, which waits behind the others.
        `headers`, such as a W3C `traceparent`, are sent with every attempt; over gRPC as metadata.
        """
        call = self._core.infer(
            model,
            inputs,
            outputs=outputs,
            timeout_s=timeout_s,
            version=version,
            request_id=request_id,
            parameters=parameters,
            headers=headers,
        )
        return run(call)

    def prepare(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
        parameters: Parameters | None = None,
    ) -> PreparedRequest:
        """Checks and encodes a request once, for `send` to send many times, from any thread."""
        call = self._core.prepare(
            model,
            inputs,
            outputs=outputs,
            timeout_s=timeout_s,
            version=version,
            request_id=request_id,
            parameters=parameters,
        )
        return run(call)

    def send(
        self, request: PreparedRequest, *, timeout_s: float | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, np.ndarray]:
        """Like `infer`, for a request made by this client's `prepare`."""
        return run(self._core.send(request, timeout_s=timeout_s, headers=headers))


class AsyncInferenceClient(_Client, ClientCore):
    """`InferenceClient` with awaitable calls, on one asyncio loop. Close it, or use it in an `async with` block."""

    _on_loop = True
    _loop: asyncio.AbstractEventLoop | None = None

    def _begin(self, options: ClientOptions, transports: Mapping[str, Transport]) -> None:
        ClientCore.__init__(self, options, AsyncConcurrency(), transports)

    def _deadline(self, timeout_s: float | None) -> Deadline:
        deadline, loop = super()._deadline(timeout_s), asyncio.get_running_loop()
        if self._loop not in (None, loop):  # the connections belong to the first one: a call would wait for nothing
            raise RuntimeError("this client was used on another asyncio loop; make a client for each loop")
        self._loop = loop
        return deadline

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

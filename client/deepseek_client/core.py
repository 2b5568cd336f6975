"""The calls of both clients: checks, metadata, statistics. `retry` makes the attempts.

Contract: written as coroutines that `concurrency` runs. Many threads may use it at once. `client` documents the
behaviour that callers see.
"""

import contextlib
import dataclasses
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from deepseek_client.concurrency import Cancel, Concurrency
from deepseek_client.errors import InferenceError, InvalidInput, ModelNotFound, ServerError
from deepseek_client.metadata import Inputs, ModelMetadata
from deepseek_client.options import (
    ClientOptions,
    as_header,
    check_headers,
    check_texts,
    check_version,
    checked_parameters,
    checked_timeout,
)
from deepseek_client.resilience.replicas import Replica, Replicas
from deepseek_client.resilience.retry import Retrier
from deepseek_client.shared_memory import Regions
from deepseek_client.statistics import Counters, Statistics
from deepseek_client.tensors import result_sizes, tensors_of
from deepseek_client.transport import NO_HEADERS, Deadline, Headers, Parameters, PreparedRequest, Transport

Result = TypeVar("Result")
MOST_METADATA = 1000  # models and versions; a server may answer every name that a user sends


class ClientCore:
    def __init__(self, options: ClientOptions, concurrency: Concurrency, transports: Mapping[str, Transport]) -> None:
        self._options = options
        self._concurrency = concurrency
        self._replicas = Replicas(
            [Replica(url, transport, self._regions(transport)) for url, transport in transports.items()], concurrency
        )
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._counters = Counters()
        self._retrier = Retrier(options, concurrency, self._replicas, self._counters)
        self._closed = False

    def _regions(self, transport: Transport) -> Regions | None:
        shared = self._options.shared_memory
        return Regions(transport, self._concurrency, required=shared is True) if shared else None

    @property
    def transport(self) -> Transport:
        return self._replicas.all[0].transport

    def _deadline(self, timeout_s: float | None) -> Deadline:
        """The deadline of a call that starts now."""
        if self._closed:
            raise RuntimeError("this client is closed")
        return Deadline(self._options.timeout_s if timeout_s is None else checked_timeout(timeout_s))

    async def close(self) -> None:
        """Closes the connections, ends the probes and frees the shared memory; no call after it."""
        self._closed = True
        self._retrier.close()
        self._replicas.close()
        for replica in self._replicas.all:
            if replica.regions is not None:
                await replica.regions.close()
        self._concurrency.close()
        for replica in self._replicas.all:
            await replica.transport.close()

    def statistics(self) -> Statistics:
        """Calls, errors, retries, hedges and latency percentiles by model, and the state of the replicas."""
        return Statistics(
            models=self._counters.statistics(),
            replicas={replica.url: not replica.ejected for replica in self._replicas.all},
            ejections=self._replicas.ejections,
            readmissions=self._replicas.readmissions,
        )

    async def ready(self, model: str | None = None, *, version: str = "", timeout_s: float | None = None) -> bool:
        """Whether any replica can take requests. Raises the last replica's error if none answers."""
        check_texts(model="" if model is None else model, version=version)
        check_version(version)
        if model == "":
            raise InvalidInput("model=''; pass a model's name, or None for the server itself")
        deadline = self._deadline(timeout_s)
        replicas = sorted(self._replicas.all, key=lambda replica: replica.ejected)
        if len(replicas) == 1:
            return await self._retrier.call(lambda r, _: r.transport.ready(model, version, deadline), deadline, model)
        failure, answered = None, False
        for left, replica in zip(range(len(replicas), 0, -1), replicas, strict=True):
            try:  # each gets an equal share of the time left: a replica that never answers does not hide the others
                if await replica.transport.ready(model, version, deadline.part(left)):
                    return True
                answered = True
            except InferenceError as error:
                failure = error
        if not answered and failure is not None:
            raise failure
        return False

    async def metadata(self, model: str, *, version: str = "", timeout_s: float | None = None) -> ModelMetadata:
        """The model's inputs and outputs, fetched now."""
        check_texts(model=model, version=version)
        check_version(version)
        return await self._fetch_metadata(model, version, self._deadline(timeout_s))

    async def _fetch_metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        metadata = await self._retrier.call(
            lambda r, cancel: r.transport.metadata(model, version, deadline, cancel),
            deadline,
            model,
            hedged=self._options.hedge_after_ms is not None,
        )
        if len(self._metadata) >= MOST_METADATA:
            self._metadata.clear()
        self._metadata[model, version] = metadata
        return metadata

    async def model_statistics(self, model: str, *, timeout_s: float | None = None) -> dict:
        """Triton's statistics since it started."""
        check_texts(model=model)
        deadline = self._deadline(timeout_s)
        try:
            return await self._retrier.call(lambda r, _: r.transport.model_statistics(model, deadline), deadline, model)
        except InvalidInput as error:  # as Triton refuses a model that it does not have
            raise ModelNotFound(str(error)) from None

    async def prepare(
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
        """Checks and encodes a request once, for `send` to send many times."""
        return await self._prepare(model, inputs, outputs, version, request_id, parameters, self._deadline(timeout_s))

    async def _prepare(
        self,
        model: str,
        inputs: Inputs,
        outputs: Sequence[str] | None,
        version: str,
        request_id: str,
        parameters: Parameters | None,
        deadline: Deadline,
    ) -> PreparedRequest:
        check_texts(model=model, version=version, request_id=request_id)
        check_version(version)
        own = {"version": version, "request_id": request_id, "parameters": checked_parameters(parameters or {})}
        metadata = self._metadata.get((model, version))
        if metadata is not None:
            with contextlib.suppress(InvalidInput):  # the cached metadata may be outdated: ask the server
                return self._encode(metadata, inputs, outputs, own)
        return self._encode(await self._fetch_metadata(model, version, deadline), inputs, outputs, own)

    def _encode(
        self, described: ModelMetadata, inputs: Inputs, outputs: Sequence[str] | None, own: dict[str, Any]
    ) -> PreparedRequest:
        """Raises InvalidInput if the inputs do not fit. `own` are further fields of the request."""
        metadata = described.with_inputs(inputs)
        tensors = tensors_of(metadata, metadata.check(inputs, outputs))
        shared = bool(self._options.shared_memory) and self._want_memory(sum(len(tensor.data) for tensor in tensors))
        draft = PreparedRequest(
            model=metadata.name,
            outputs=tuple(outputs or ()),
            parts=(),
            tensors=tensors,
            protocol=self._options.protocol,
            binary=metadata.binary,
            result_sizes=result_sizes(metadata, tensors, outputs) if shared else {},
            **own,
        )
        return draft if shared else dataclasses.replace(draft, parts=self.transport.encode(draft), tensors=())

    def _want_memory(self, size_bytes: int) -> bool:
        return any(each.regions is not None and each.regions.want(size_bytes) for each in self._replicas.all)

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Sequence[str] | None = None,
        timeout_s: float | None = None,
        version: str = "",
        request_id: str = "",
        parameters: Parameters | None = None,
        headers: Headers | None = None,
    ) -> dict[str, np.ndarray]:
        """Runs the model and returns its outputs by name, as `InferenceClient.infer`; one call in the statistics."""
        check_texts(model=model)  # the statistics are by its name
        deadline = self._deadline(timeout_s)

        async def both() -> dict[str, np.ndarray]:
            request = await self._prepare(model, inputs, outputs, version, request_id, parameters, deadline)
            return await self._send(request, headers, deadline)

        return await self._counted(model, both())

    async def send(
        self, request: PreparedRequest, *, timeout_s: float | None = None, headers: Headers | None = None
    ) -> dict[str, np.ndarray]:
        """Like `infer`, for a request made by this client's `prepare`."""
        if request.parts and request.protocol != self._options.protocol:
            raise InvalidInput(
                f"a request prepared by a client with protocol={request.protocol!r}; this client sends "
                f"protocol={self._options.protocol!r}: prepare it with this client"
            )
        deadline = self._deadline(timeout_s)
        return await self._counted(request.model, self._send(request, headers, deadline))

    async def _counted(self, model: str, call: Coroutine[Any, Any, Result]) -> Result:
        start_s = time.perf_counter()
        try:
            answer = await call
        except BaseException as error:
            if not isinstance(error, ModelNotFound) or self._counters.get(model):  # unknown names use no memory
                self._counters.of(model).failed(error)
            raise
        self._counters.of(model).answered(time.perf_counter() - start_s)
        return answer

    async def _send(
        self, request: PreparedRequest, headers: Headers | None, deadline: Deadline
    ) -> dict[str, np.ndarray]:
        if headers:
            check_headers(headers)
        if request.request_id:
            headers = {**(headers or {}), "x-request-id": as_header(request.request_id)}
        sent = headers or NO_HEADERS
        try:
            answer, replica = await self._retrier.call(
                lambda replica, cancel: self._attempt(replica, request, sent, deadline, cancel),
                deadline,
                request.model,
                repeatable=self._options.idempotent,
                hedged=self._options.hedge_after_ms is not None,
            )
        except (InvalidInput, ModelNotFound):  # passed the check here, refused by the server: drop the cached metadata
            self._metadata.pop((request.model, request.version), None)
            raise
        await self._check(request, answer, replica, deadline)
        return answer

    async def _check(
        self, request: PreparedRequest, answer: dict[str, np.ndarray], replica: Replica, deadline: Deadline
    ) -> None:
        """Raises ServerError unless the answer fits the metadata, which is fetched again: the model may be new.

        It is fetched from the replica that answered: others may have another version.
        """
        known = self._metadata.get((request.model, request.version))
        if known is None:
            return
        try:
            known.check_answer(answer, request.outputs)
        except ServerError as misfit:
            try:
                known = await replica.transport.metadata(request.model, request.version, deadline)
            except InferenceError:  # it says nothing about this request, which has run
                raise misfit from None
            self._metadata[request.model, request.version] = known
            known.check_answer(answer, request.outputs)

    async def _attempt(
        self, replica: Replica, request: PreparedRequest, headers: Headers, deadline: Deadline, cancel: Cancel | None
    ) -> tuple[dict[str, np.ndarray], Replica]:
        if replica.regions is None or not request.tensors:
            return await replica.transport.send(request, deadline, headers, cancel), replica
        answer, was_shared = await replica.regions.send(request, deadline, headers, cancel)
        if was_shared:
            self._counters.of(request.model).add("through_shared_memory")
        return answer, replica

"""What a call is, whoever makes it: checks, attempts, retries, hedges, replicas, statistics.

Contract: written once as coroutines, which `runtimes` drives in a thread or on a loop; see `inference` for what they
promise to the caller. Everything here may be used by many threads at once.
"""

import contextlib
import dataclasses
import random
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from deepseek_client.budget import RetryBudget
from deepseek_client.counters import ModelCounters, Statistics
from deepseek_client.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    InvalidInput,
    ModelNotFound,
    ServerBusy,
    Unreachable,
)
from deepseek_client.replicas import Replica, Replicas
from deepseek_client.runtimes import Attempt, Cancel, Runtime
from deepseek_client.settings import Settings, as_header, check_headers, check_texts, check_version, checked_timeout
from deepseek_client.shared_memory import Regions, is_unknown_region
from deepseek_client.signature import ModelMetadata
from deepseek_client.transports import (
    NO_HEADERS,
    Deadline,
    Headers,
    PreparedRequest,
    Transport,
    result_sizes,
    tensors_of,
)

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0

Result = TypeVar("Result")
Operation = Callable[[Replica, Cancel | None], Coroutine[Any, Any, Result]]


class Calls:
    """The calls of one client."""

    def __init__(self, settings: Settings, runtime: Runtime, transports: Mapping[str, Transport]) -> None:
        self._settings = settings
        self._runtime = runtime
        self._replicas = Replicas(
            [Replica(url, transport, self._regions(transport)) for url, transport in transports.items()], runtime
        )
        self._budget = RetryBudget(settings.retry_budget)
        self._metadata: dict[tuple[str, str], ModelMetadata] = {}
        self._counters: dict[str, ModelCounters] = {}
        self._closed = False

    def _regions(self, transport: Transport) -> Regions | None:
        shared = self._settings.shared_memory
        return Regions(transport, self._runtime, required=shared is True) if shared else None

    def deadline(self, timeout_s: float | None) -> Deadline:
        """Of a call that begins now."""
        if self._closed:
            raise RuntimeError("this client is closed")
        return Deadline(self._settings.timeout_s if timeout_s is None else checked_timeout(timeout_s))

    async def close(self) -> None:
        """Ends the connections, the probes and the shared memory."""
        self._closed = True
        self._replicas.close()
        for replica in self._replicas.all:
            if replica.regions is not None:
                await replica.regions.close()
        self._runtime.close()
        for replica in self._replicas.all:
            await replica.transport.close()

    def statistics(self) -> Statistics:
        """What was counted so far."""
        return Statistics(
            models={model: counters.statistics() for model, counters in list(self._counters.items())},
            replicas={replica.url: not replica.ejected for replica in self._replicas.all},
            ejections=self._replicas.ejections,
            readmissions=self._replicas.readmissions,
        )

    async def ready(self, model: str | None, version: str, timeout_s: float | None) -> bool:
        """Whether any replica can take requests; the error of the last one where none answers."""
        check_texts(model="" if model is None else model, version=version)
        check_version(version)
        if model == "":
            raise InvalidInput("model=''; pass a model's name, or None for the server itself")
        deadline = self.deadline(timeout_s)
        replicas = sorted(self._replicas.all, key=lambda replica: replica.ejected)
        if len(replicas) == 1:
            return await self._retrying(lambda r, _: r.transport.ready(model, version, deadline), deadline, model)
        failure, answers = None, 0
        for left, replica in zip(range(len(replicas), 0, -1), replicas, strict=True):
            try:  # each gets a like share of what is left: one that is mute does not hide the others
                if await replica.transport.ready(model, version, Deadline(deadline.left_s() / left)):
                    return True
                answers += 1
            except InferenceError as error:
                failure = error
        if not answers and failure is not None:
            raise failure
        return False

    async def metadata(self, model: str, version: str, deadline: Deadline) -> ModelMetadata:
        """The signature as the server has it now."""
        check_texts(model=model, version=version)
        check_version(version)
        metadata = await self._retrying(lambda r, _: r.transport.metadata(model, version, deadline), deadline, model)
        self._metadata[model, version] = metadata
        return metadata

    async def prepare(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] | None,
        version: str,
        request_id: str,
        deadline: Deadline,
    ) -> PreparedRequest:
        """Checks and encodes."""
        check_texts(model=model, version=version, request_id=request_id)
        metadata = self._metadata.get((model, version))
        if metadata is not None:
            with contextlib.suppress(InvalidInput):  # by an old signature perhaps: what the server says now decides
                arrays = metadata.check(inputs, outputs)
                return self._encode(metadata, version, arrays, outputs, request_id)
        metadata = await self.metadata(model, version, deadline)
        return self._encode(metadata, version, metadata.check(inputs, outputs), outputs, request_id)

    def _encode(
        self,
        metadata: ModelMetadata,
        version: str,
        arrays: list[np.ndarray | None],
        outputs: Sequence[str] | None,
        request_id: str,
    ) -> PreparedRequest:
        tensors = tensors_of(metadata, arrays)
        shared = bool(self._settings.shared_memory) and self._want_memory(sum(len(tensor.data) for tensor in tensors))
        draft = PreparedRequest(
            model=metadata.name,
            version=version,
            request_id=request_id,
            outputs=tuple(outputs or ()),
            parts=(),
            tensors=tensors,
            result_sizes=result_sizes(metadata, tensors, outputs) if shared else {},
        )
        if shared:
            return draft
        parts = self._replicas.all[0].transport.encode(draft)
        return dataclasses.replace(draft, parts=parts, tensors=())

    def _want_memory(self, size_bytes: int) -> bool:
        return any(each.regions is not None and each.regions.want(size_bytes) for each in self._replicas.all)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, np.ndarray],
        outputs: Sequence[str] | None,
        version: str,
        request_id: str,
        headers: Headers | None,
        deadline: Deadline,
    ) -> dict[str, np.ndarray]:
        """Prepares and sends; one call in the statistics."""

        async def both() -> dict[str, np.ndarray]:
            request = await self.prepare(model, inputs, outputs, version, request_id, deadline)
            return await self._send_retrying(request, headers, deadline)

        return await self._counted(model, both())

    async def send(
        self, request: PreparedRequest, headers: Headers | None, deadline: Deadline
    ) -> dict[str, np.ndarray]:
        """Sends a prepared request; one call in the statistics."""
        return await self._counted(request.model, self._send_retrying(request, headers, deadline))

    async def _counted(self, model: str, call: Coroutine[Any, Any, Result]) -> Result:
        start_s = time.perf_counter()
        try:
            answer = await call
        except BaseException as error:
            if not isinstance(error, ModelNotFound) or model in self._counters:  # names of nothing are not collected
                self._counters_of(model).failed(error)
            raise
        self._counters_of(model).answered(time.perf_counter() - start_s)
        return answer

    async def _send_retrying(
        self, request: PreparedRequest, headers: Headers | None, deadline: Deadline
    ) -> dict[str, np.ndarray]:
        if headers:
            check_headers(headers)
        sent = {**(headers or {}), "x-request-id": as_header(request.request_id)} if request.request_id else headers
        try:
            return await self._retrying(
                lambda replica, cancel: self._send(replica, request, sent or NO_HEADERS, deadline, cancel),
                deadline,
                request.model,
                hedged=self._settings.hedge_after_ms is not None,
            )
        except (InvalidInput, ModelNotFound):  # what passed the check here does not pass there: forget the signature
            self._metadata.pop((request.model, request.version), None)
            raise

    async def _send(
        self, replica: Replica, request: PreparedRequest, headers: Headers, deadline: Deadline, cancel: Cancel | None
    ) -> dict[str, np.ndarray]:
        """One attempt, through shared memory where that is wanted and possible."""
        regions = replica.regions
        region = await regions.take(request, deadline, cancel) if regions is not None and request.tensors else None
        if regions is None or region is None:
            return await replica.transport.send(request, deadline, headers, cancel)
        try:
            answer = await replica.transport.send(request, deadline, headers, cancel, region)
        except InferenceError as error:
            if is_unknown_region(error):
                region.free()
                regions.forget()
                return await replica.transport.send(request, deadline, headers, cancel)
            was_answered = not isinstance(error, ConnectionLost | DeadlineExceeded)
            (regions.give_back if was_answered else regions.give_up)(region)
            raise
        except BaseException:  # stopped in the middle
            regions.give_up(region)
            raise
        regions.give_back(region)
        self._counters_of(request.model).add("through_shared_memory")
        return answer

    def _counters_of(self, model: str) -> ModelCounters:
        counters = self._counters.get(model)
        return counters or self._counters.setdefault(model, ModelCounters())  # atomic, as a defaultdict's is not

    # -- attempts --------------------------------------------------------------------------------

    async def _retrying(
        self, operation: Operation[Result], deadline: Deadline, model: str | None, hedged: bool = False
    ) -> Result:
        self._budget.count_call()
        tried: list[Replica] = []
        while True:
            replica = self._replicas.pick(tried)
            tried.append(replica)
            try:
                if hedged and (after_s := self._hedge_after_s(model)) is not None:
                    return await self._hedged(operation, replica, tried, model, after_s)
                return await self._attempt(operation, replica, model, None)
            except InferenceError as error:
                pause_s = self._pause_s(error, tried, deadline)
                if pause_s is None or not self._may_retry(error, model):
                    raise
                if pause_s:
                    await self._runtime.sleep(pause_s)
                if self._closed:  # meanwhile: what is opened now would stay open
                    raise

    async def _attempt(
        self, operation: Operation[Result], replica: Replica, model: str | None, cancel: Cancel | None
    ) -> Result:
        try:
            result = await operation(replica, cancel)
        except InferenceError as error:
            if cancel is None or not cancel.cancelled:
                self._replicas.failed(replica, error, model)
            raise
        self._replicas.answered(replica)
        return result

    def _pause_s(self, error: InferenceError, tried: Sequence[Replica], deadline: Deadline) -> float | None:
        """How long to wait before the next attempt; None where there is to be none."""
        attempt = len(tried) - 1
        if not (error.did_not_run or (error.may_have_run and self._settings.idempotent)):
            return None
        if attempt >= self._settings.retries:
            return None
        if self._replicas.another(tried):
            return 0.0 if deadline.left_s() > 0 else None  # of which nothing bad is known
        pause_s = random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(attempt, 10)))
        if isinstance(error, ServerBusy) and error.retry_after_s is not None:
            pause_s += error.retry_after_s
        return pause_s if pause_s < deadline.left_s() else None

    def _may_retry(self, error: InferenceError, model: str | None) -> bool:
        """By the budget. Nothing reached a server that is Unreachable, so that a retry adds nothing to its load."""
        allowed = isinstance(error, Unreachable) or self._budget.take()
        if model:
            self._counters_of(model).add("retries" if allowed else "denied")
        return allowed

    # -- hedges ----------------------------------------------------------------------------------

    def _hedge_after_s(self, model: str | None) -> float | None:
        """The time after which a second request goes out; None before enough is known of a percentile."""
        percent = self._settings.hedge_percent()
        after_ms = (
            self._settings.hedge_after_ms if percent is None else self._counters_of(model or "").recent_ms(percent)
        )
        return None if after_ms is None else float(after_ms) / 1000

    async def _hedged(
        self, operation: Operation[Result], replica: Replica, tried: list[Replica], model: str | None, after_s: float
    ) -> Result:
        counters = self._counters_of(model or "")

        def second() -> Attempt[Result] | None:
            if self._closed:
                return None
            if not self._budget.take():
                counters.add("denied")
                return None
            other = self._replicas.pick(tried)
            counters.add("hedges")
            return lambda cancel: won(other, cancel)

        async def won(other: Replica, cancel: Cancel | None) -> Result:
            result = await self._attempt(operation, other, model, cancel)
            counters.add("hedges_won")
            return result

        return await self._runtime.race(
            lambda cancel: self._attempt(operation, replica, model, cancel), second, after_s
        )

"""Bulk requests of one instance: they wait in its process, and run in a thread that gets the CPU time others leave.

Contract: the build copies this file beside the backend's model.py. It imports nothing of the project.

A batch cannot be interrupted. Bulk requests that saturate the server would keep all instances busy, and an online
request would wait for one of them, then run in a batch with bulk requests. So `execute` only takes bulk requests: the
instance is free again at once. The thread has a lower priority than the server's others (`NICE`), so an online request
that arrives while it computes gets the core.

A request is bulk if it has the parameter `bulk`: Triton keeps the parameter `priority` for itself. The places and the
longest wait are those of Triton's own queue for bulk requests, from `config.pbtxt`.
A refusal begins with the words of Triton's own, from which clients know that the request did not run.

The memory that Triton shares with this process is small. So a request that waits is a copy (`Copy`).
"""

import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any

import numpy as np

NICE = 10  # beside a thread of the server's own priority, a tenth of a core


class CopiedTensor:
    """A tensor in this process's own memory, with what the backend reads of Triton's."""

    def __init__(self, tensor: Any, is_text: bool) -> None:
        self._name = tensor.name()
        self._array = tensor.as_numpy() if is_text else np.array(np.from_dlpack(tensor))
        self.__dlpack__, self.__dlpack_device__ = self._array.__dlpack__, self._array.__dlpack_device__

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class Copy:
    """A request in this process's own memory, with what the backend reads of Triton's."""

    def __init__(self, request: Any, texts: Collection[str]) -> None:
        self._tensors = [CopiedTensor(tensor, tensor.name() in texts) for tensor in request.inputs()]
        self._parameters, self._outputs = request.parameters(), request.requested_output_names()
        self._sender = request.get_response_sender()

    def inputs(self) -> list[CopiedTensor]:
        return self._tensors

    def parameters(self) -> str:
        return self._parameters

    def requested_output_names(self) -> Any:
        return self._outputs

    def get_response_sender(self) -> Any:
        return self._sender


@dataclass(frozen=True)
class Waiting:
    request: Copy
    rows: int
    kind: tuple
    """Only requests of one kind can run in one batch: names and shapes of the inputs, without the rows."""
    until_s: float
    """It is refused if it still waits then: monotonic time."""


class BulkRequests:
    """The queue, and the thread that runs it."""

    def __init__(
        self,
        policy: Mapping[str, Any],
        most_rows: int,
        texts: Collection[str],
        answer: Callable[[Sequence[Copy]], None],
        refuse: Callable[[Copy, str], None],
    ) -> None:
        """`policy` is that of Triton's queue for bulk requests; `most_rows` are those of a batch.

        `texts` names the inputs that hold strings.
        `answer` runs a batch of requests; `refuse` answers one with the reason.
        """
        self._places = policy["max_queue_size"] or math.inf
        self._wait_s = int(policy["default_timeout_microseconds"]) / 1e6 or math.inf
        self._most_rows, self._texts, self._answer, self._refuse = most_rows, texts, answer, refuse
        self._waiting: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._ended = False
        self._thread.start()

    def take(self, request: Any) -> bool:
        """Whether the request is a bulk one; then it is answered later, or refused because too many wait."""
        try:
            parameters = request.parameters()
        except UnicodeDecodeError:  # Triton does not check it; an error here would fail the whole batch
            return False
        if '"bulk"' not in parameters or json.loads(parameters).get("bulk") not in (True, "true"):
            return False
        copy = Copy(request, self._texts)
        shapes = {tensor.name(): tensor.as_numpy().shape or (0,) for tensor in copy.inputs()}  # () has no rows
        wait_s = min(self._wait_s, request.timeout() / 1e6 or self._wait_s)
        kind = tuple(sorted((name, shape[1:]) for name, shape in shapes.items()))
        waiting = Waiting(copy, next(iter(shapes.values()))[0], kind, monotonic() + wait_s)
        with self._changed:
            if taken := len(self._waiting) < self._places:
                self._waiting.append(waiting)
                self._changed.notify()
        if not taken:
            self._refuse(copy, f"Exceeds maximum queue size: {self._places} bulk requests wait already")
        return True

    def close(self) -> None:
        """Ends the thread; refuses what still waits."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()
        for waiting in self._waiting:
            self._refuse(waiting.request, "not at ready state: the server ends this model")

    def _run(self) -> None:
        os.nice(NICE)  # of this thread alone
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                if self._ended:
                    return
                late, batch = self._next()
            for waiting in late:
                self._refuse(waiting.request, "Request timeout expired: a bulk request waited too long")
            if batch:
                self._answer([waiting.request for waiting in batch])

    def _next(self) -> tuple[list[Waiting], list[Waiting]]:
        """Those that waited too long, and the next batch: the first that waits, and those behind it that fit."""
        late, batch, others, rows = list[Waiting](), list[Waiting](), list[Waiting](), 0
        now_s = monotonic()
        for waiting in self._waiting:
            if waiting.until_s < now_s:
                late.append(waiting)
            elif not batch or (waiting.kind == batch[0].kind and rows + waiting.rows <= self._most_rows):
                batch.append(waiting)
                rows += waiting.rows
            else:
                others.append(waiting)
        self._waiting = deque(others)
        return late, batch

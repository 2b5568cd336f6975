"""Several addresses of one service: round-robin, ejection, readmission.

Contract
- Calls go round-robin over the replicas in use. A retry or a hedge goes to another replica if there is one.
- A refused connection ejects a replica; so do `FAILURES` failures in a row: lost connections, exceeded deadlines,
  models that are not ready, calls on which a later hedge to another replica won.
- ServerBusy does not eject: calls avoid the replica for a while (Retry-After, else up to `LONGEST_REST_S`) if another
  one is free.
- The client probes an ejected replica, and the model it lacked, for readiness: first after a random 0.25 to 0.5 s,
  then after twice as long each time, up to 30 s. A ready replica is readmitted; if it fails again soon, the first
  wait is longer.
- If all replicas are ejected, all are used. A single address is never ejected.
"""

import random
import threading
import time
from collections.abc import Collection, Sequence
from itertools import count

from deepseek_client.concurrency import Concurrency
from deepseek_client.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    ModelNotReady,
    ServerBusy,
    Unreachable,
)
from deepseek_client.shared_memory import Regions
from deepseek_client.transport import Deadline, Transport

FAILURES = 3
FIRST_PROBE_S, LONGEST_PROBE_S = 0.5, 30.0
PROBE_TIMEOUT_S = 1.0
SOUND = 20  # after this many answers in a row, earlier ejections no longer count
FIRST_REST_S, LONGEST_REST_S = 0.05, 1.0


class Replica:
    def __init__(self, url: str, transport: Transport, regions: Regions | None) -> None:
        self.url = url
        self.transport = transport
        self.regions = regions
        """Shared memory with this server; None: not used."""
        self.ejected = False
        self.rests_until = 0.0
        self.failures = self.refusals = self.answers = 0  # in a row
        self.setbacks = 0  # ejections since it last gave SOUND answers in a row


class Replicas:
    def __init__(self, replicas: Sequence[Replica], concurrency: Concurrency) -> None:
        self.all = tuple(replicas)
        self.ejections = self.readmissions = 0
        self._concurrency = concurrency
        self._turn = count(random.randrange(len(self.all)))  # random, so that clients start with different replicas
        self._lock = threading.Lock()
        self._closed = False

    def pick(self, tried: Collection[Replica] = ()) -> Replica:
        """The next of the best replicas, round-robin; for a retry or a hedge a random one of the best."""
        if len(self.all) == 1:
            return self.all[0]
        now = time.monotonic()
        ranks = [(replica.ejected, replica in tried, replica.rests_until > now) for replica in self.all]
        best = [replica for replica, rank in zip(self.all, ranks, strict=True) if rank == min(ranks)]
        return random.choice(best) if tried else best[next(self._turn) % len(best)]

    def another(self, tried: Collection[Replica]) -> bool:
        return any(not replica.ejected and replica not in tried for replica in self.all)

    def answered(self, replica: Replica) -> None:
        if len(self.all) == 1:
            return
        with self._lock:
            replica.failures = replica.refusals = 0
            replica.rests_until = 0.0
            replica.answers += 1
            if replica.answers >= SOUND:
                replica.setbacks = 0

    def failed(self, replica: Replica, error: InferenceError, model: str | None) -> None:
        """Records a failed attempt: may eject the replica, or avoid it for a while."""
        if len(self.all) == 1:
            return
        if isinstance(error, ServerBusy):
            self._let_rest(replica, error.retry_after_s)
        elif isinstance(error, Unreachable | ConnectionLost | DeadlineExceeded | ModelNotReady):
            most = 1 if isinstance(error, Unreachable) or replica.setbacks else FAILURES
            self._count_failure(replica, most, model if isinstance(error, ModelNotReady) else None)
        else:
            self.answered(replica)

    def overtaken(self, replica: Replica) -> None:
        """Records that it had not answered when a hedge, sent later to another replica, had: slow once, or dead."""
        self._count_failure(replica, FAILURES, None)

    def _count_failure(self, replica: Replica, most: int, missing_model: str | None) -> None:
        with self._lock:
            replica.answers = 0
            replica.failures += 1
            eject = replica.failures >= most and not replica.ejected
            if eject:
                replica.ejected = True
                replica.setbacks += 1
                self.ejections += 1
        if eject and not self._concurrency.spawn(lambda: self._probe(replica, missing_model)):
            replica.ejected = False  # nothing would readmit it

    def close(self) -> None:
        self._closed = True

    def _let_rest(self, replica: Replica, asked_s: float | None) -> None:
        with self._lock:
            replica.failures = 0
            replica.refusals += 1
            rest_s = min(FIRST_REST_S * 2 ** min(replica.refusals - 1, 10), LONGEST_REST_S) * random.uniform(0.5, 1)
            replica.rests_until = time.monotonic() + (rest_s if asked_s is None else asked_s)

    async def _probe(self, replica: Replica, model: str | None) -> None:
        """Probes an ejected replica until it is ready or the client is closed."""
        doubled = replica.setbacks - 1
        while not self._closed:
            pause_s = min(FIRST_PROBE_S * 2 ** min(doubled, 10), LONGEST_PROBE_S) * random.uniform(0.5, 1)
            await self._concurrency.sleep(pause_s)
            if not self._closed and await _is_ready(replica.transport, model):
                with self._lock:
                    replica.ejected = False
                    replica.failures = 0
                    self.readmissions += 1
                return
            doubled += 1


async def _is_ready(transport: Transport, model: str | None) -> bool:
    try:
        deadline = Deadline(PROBE_TIMEOUT_S)
        return await transport.ready(None, "", deadline) and (not model or await transport.ready(model, "", deadline))
    except (InferenceError, RuntimeError):  # the last: the client was closed
        return False

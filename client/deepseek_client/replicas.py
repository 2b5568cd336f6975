"""Several addresses of one service: whose turn it is, who is left out, and how they come back.

Contract
- Calls go round-robin over the replicas in use. A retry or hedge goes to another one, where there is one.
- A replica is ejected when a connection to it is refused, or after `FAILURES` failures in a row: lost connections,
  deadlines that passed, models that are not ready. A refusal (ServerBusy) ejects nobody: it is passed over for a moment
  (Retry-After, else up to `LONGEST_REST_S`), as long as another one is free.
- An ejected replica is asked for its readiness, and that of the model that was missed, after a random 0.25 to 0.5 s,
  and twice as long each further time, up to half a minute; ready, it is back in use. One that fails at once again
  starts from the longer wait.
- Where all are ejected, all are used: better a try than a certain failure. A single address is never ejected.
"""

import random
import threading
import time
from collections.abc import Collection, Sequence
from itertools import count

from deepseek_client.errors import (
    ConnectionLost,
    DeadlineExceeded,
    InferenceError,
    ModelNotReady,
    ServerBusy,
    Unreachable,
)
from deepseek_client.runtimes import Runtime
from deepseek_client.shared_memory import Regions
from deepseek_client.transports import Deadline, Transport

FAILURES = 3
FIRST_PROBE_S, LONGEST_PROBE_S = 0.5, 30.0
PROBE_TIMEOUT_S = 1.0
SOUND = 20  # answers in a row after which earlier ejections are forgotten
FIRST_REST_S, LONGEST_REST_S = 0.05, 1.0


class Replica:
    """One address, its transport, and how it has behaved."""

    def __init__(self, url: str, transport: Transport, regions: Regions | None) -> None:
        self.url = url
        self.transport = transport
        self.regions = regions
        """Shared memory with it; None where it is not wanted."""
        self.ejected = False
        self.rests_until = 0.0
        self.failures = self.refusals = self.answers = 0  # in a row
        self.setbacks = 0  # ejections since it was last sound


class Replicas:
    """All addresses of a client."""

    def __init__(self, replicas: Sequence[Replica], runtime: Runtime) -> None:
        self.all = tuple(replicas)
        self.ejections = self.readmissions = 0
        self._runtime = runtime
        self._turn = count(random.randrange(len(self.all)))  # not every client starts with the first
        self._lock = threading.Lock()
        self._closed = False

    def pick(self, tried: Collection[Replica] = ()) -> Replica:
        """The next one in turn, of the best there are; after others were tried, any of them, whose turn it stays."""
        if len(self.all) == 1:
            return self.all[0]
        now = time.monotonic()
        ranks = [(replica.ejected, replica in tried, replica.rests_until > now) for replica in self.all]
        best = [replica for replica, rank in zip(self.all, ranks, strict=True) if rank == min(ranks)]
        return random.choice(best) if tried else best[next(self._turn) % len(best)]

    def another(self, tried: Collection[Replica]) -> bool:
        """Whether one is in use that has not been tried."""
        return any(not replica.ejected and replica not in tried for replica in self.all)

    def answered(self, replica: Replica) -> None:
        """It is well, whatever it answered."""
        if len(self.all) == 1:
            return
        with self._lock:
            replica.failures = replica.refusals = 0
            replica.rests_until = 0.0
            replica.answers += 1
            if replica.answers >= SOUND:
                replica.setbacks = 0

    def failed(self, replica: Replica, error: InferenceError, model: str | None) -> None:
        """Judges what an attempt ended with."""
        if len(self.all) == 1:
            return
        if isinstance(error, ServerBusy):
            self._let_rest(replica, error.retry_after_s)
        elif isinstance(error, Unreachable | ConnectionLost | DeadlineExceeded | ModelNotReady):
            with self._lock:
                replica.answers = 0
                replica.failures += 1
                most = 1 if isinstance(error, Unreachable) or replica.setbacks else FAILURES
                eject = replica.failures >= most and not replica.ejected
                if eject:
                    replica.ejected = True
                    replica.setbacks += 1
                    self.ejections += 1
            if eject:
                asked = model if isinstance(error, ModelNotReady) else None
                self._runtime.spawn(lambda: self._probe(replica, asked))
        else:
            self.answered(replica)

    def close(self) -> None:
        """Ends the probes."""
        self._closed = True

    def _let_rest(self, replica: Replica, asked_s: float | None) -> None:
        with self._lock:
            replica.failures = 0
            replica.refusals += 1
            rest_s = min(FIRST_REST_S * 2 ** min(replica.refusals - 1, 10), LONGEST_REST_S) * random.uniform(0.5, 1)
            replica.rests_until = time.monotonic() + (rest_s if asked_s is None else asked_s)

    async def _probe(self, replica: Replica, model: str | None) -> None:
        """Until it is ready, or the client is closed."""
        doubled = replica.setbacks - 1
        while not self._closed:
            pause_s = min(FIRST_PROBE_S * 2 ** min(doubled, 10), LONGEST_PROBE_S) * random.uniform(0.5, 1)
            await self._runtime.sleep(pause_s)
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
    except (InferenceError, RuntimeError, ValueError):  # the last two: closed meanwhile
        return False

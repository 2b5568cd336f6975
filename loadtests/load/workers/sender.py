"""Sends the requests of one model, each at its planned time, and records the outcomes.

Contract: in an open loop a free greenlet takes up each request at its planned time; with `max_in_flight` requests
unanswered it is dropped. In a closed loop each user sends its next request after the last answer. Requests are checked
and encoded once. Over gRPC at most MOST_STREAMS greenlets share a connection, so that none waits for a stream inside
the client, where nothing measures it. Runs in a process that gevent has patched.
"""

import errno
import heapq
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from operator import itemgetter
from typing import Any

import gevent
import numpy as np
from deepseek_client import InferenceClient, InferenceError, ServerError

from deepseek.spec import DeploymentSpec
from loadtests.load.inputs import length_classes, shuffled
from loadtests.load.preflight import TRIES, checked_rows
from loadtests.load.replay import rows_in
from loadtests.load.request_log import RequestRecorder
from loadtests.load.wire.client import WireClient
from loadtests.load.wire.route import RouteClient
from loadtests.load.workers.clock import Clock
from loadtests.load.workers.recorder import Recorder
from loadtests.results.schedule import Segment, send_times_s
from loadtests.results.settings import IN_FLIGHT, LoadSettings
from loadtests.results.stretch import NO_FILE, NO_PORT
from loadtests.slo.slo_demands import TIMEOUT_S

MOST_STREAMS = 100  # of a connection: no server should allow fewer (RFC 9113, 6.5.2); the gateway allows 256
PART = 4096  # planned times
SPARE_FILES = 100  # open files of this process kept for other uses than connections, such as writing the results
KIND_OF_ERRNO = {errno.EMFILE: NO_FILE, errno.ENFILE: NO_FILE, errno.EADDRNOTAVAIL: NO_PORT}


def planned_times_s(settings: LoadSettings, *, warmup_only: bool = False) -> np.ndarray:
    """Planned times of all workers, in seconds of the measured window; none in a closed loop."""
    if not settings.open_loop:
        return np.empty(0)
    warmup = Segment(duration_s=settings.warmup_s, rate_rps=settings.segments[0].rate_rps)
    segments = () if warmup_only else settings.segments
    return send_times_s((warmup, *segments), settings.arrivals, settings.seed) - settings.warmup_s


def share_of(plan: np.ndarray, worker: int, workers: int) -> Iterator[Any]:
    """Every `workers`-th element from the `worker`-th; as Python objects all of a long run would fill the memory."""
    for first in range(worker, len(plan), PART * workers):
        yield from plan[first : first + PART * workers : workers].tolist()


class ModelSender:
    """One model's share of the load of a process. Times without `_at` are seconds of the measured window."""

    def __init__(
        self,
        settings: LoadSettings,
        recorder: Recorder | RequestRecorder,
        *,
        models: int = 1,
        plan: np.ndarray | None = None,
        fire: Callable[..., None] = lambda **_: None,
        **client_options: Any,
    ) -> None:
        """Prepares the requests of one of `models` models; of a replay, those of its `plan` (of `replay.PLAN`).

        `fire` is called for each request, like Locust's event. The client makes one attempt per request unless its
        options say otherwise. Raises InputError, or InferenceError if the server does not return the model's metadata.
        """
        self.settings, self.recorder = settings, recorder
        self._fire = fire
        self._client_options: dict[str, Any] = {"retries": 0, "retry_budget": None, **client_options}
        spec = DeploymentSpec.of_model(settings.model, settings.models, tuned=os.devnull)  # only signature and axes
        only = None if plan is None else rows_in(plan)
        found = checked_rows(settings, spec, only)
        numbers = shuffled(list(found), settings.seed)
        rows = [found[number] for number in numbers]
        self._plan, self._place_of = plan, {number: place for place, number in enumerate(numbers)}
        self._times_s = planned_times_s(settings, warmup_only=plan is not None)
        with self._client(retries=TRIES, idempotent=True, timeout_s=max(TIMEOUT_S, settings.timeout_s)) as client:
            self._served = None if settings.route else client.metadata(settings.model)
            self._right: set[tuple] = set()  # batches, names, types and shapes that were checked: a look takes 1 us
            self._requests = [client.prepare(settings.model, row) for row in rows]
        self._batches = [len(next(iter(row.values()))) for row in rows]
        self._outputs = list(spec.outputs)
        self._clients, self._senders = [self._client()], 0
        with suppress(InferenceError):
            self._clients[0].ready()  # so that the first request finds a connection
        self._lengths = length_classes(rows, spec, on_route=settings.route is not None)
        self._most_in_flight = settings.max_in_flight or IN_FLIGHT
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = math.inf if limit == resource.RLIM_INFINITY else (limit - SPARE_FILES) // models
        self._most_carried = files * (MOST_STREAMS if self._shares_connections else 1)
        self.window_at = 0.0
        """Start of the measured window, in the time of `time.perf_counter()`."""
        self.stopped = False
        """Set to stop sending."""
        self._free: list[gevent.Greenlet] = []

    def _client(self, **changes: Any) -> InferenceClient:
        if self.settings.route is not None:
            return RouteClient(self.settings.route, timeout_s=self.settings.timeout_s, **self.settings.access)
        kind = InferenceClient if self._client_options["retries"] else WireClient  # which makes one attempt
        options = {"timeout_s": self.settings.timeout_s, **self._client_options, **changes, **self.settings.access}
        return kind(self.settings.url, self.settings.protocol, **options)

    @property
    def _shares_connections(self) -> bool:
        return self.settings.protocol == "grpc" and self.settings.route is None

    def _client_of_next_sender(self) -> InferenceClient:
        """A client for a greenlet with one request in flight at a time; clients can send each other's requests."""
        if self._shares_connections and self._senders == MOST_STREAMS * len(self._clients):
            self._clients.append(self._client())
        self._senders += 1
        return self._clients[-1]

    def planned(self, worker: int, workers: int) -> "Iterator[tuple[float, int, ModelSender]]":
        """A worker's share of the schedule: planned time, number of the input, this sender."""
        for number, planned_s in zip(count(worker, workers), share_of(self._times_s, worker, workers), strict=False):
            yield planned_s, number, self
        if self._plan is not None:
            for planned_s, row in share_of(self._plan, worker, workers):
                yield planned_s, self._place_of[row], self

    def take_up(self, planned_s: float, number: int, now_at: float) -> None:
        """Lets a free greenlet send the due request, or drops it; returns once it is sent."""
        recorder = self.recorder
        recorder.attempt(now_at - self.window_at)
        place = number % len(self._requests)
        if recorder.in_flight > self._most_in_flight:
            recorder.drop(planned_s, self._lengths[place])
            self._tell_locust(0.0, "dropped")
        elif recorder.in_flight > self._most_carried:
            self._lack_file(planned_s, now_at - self.window_at, place)
        elif self._free:
            gevent.get_hub().loop.run_callback(gevent.getcurrent().switch)  # back to here once the request is sent
            self._free.pop().switch((place, planned_s))
        else:
            gevent.spawn(self._send_whenever_asked, place, planned_s)

    def _send_whenever_asked(self, place: int, planned_s: float) -> None:
        """Open loop: a greenlet that sends one request after another; a new one for each would map a stack."""
        client = self._client_of_next_sender()
        while True:
            self._send(client, place, planned_s)
            self._free.append(gevent.getcurrent())
            place, planned_s = gevent.get_hub().switch()

    def send_back_to_back(self, first: int) -> None:
        """Closed loop: one request after the other until the window ends."""
        gevent.sleep(max(0.0, self.window_at - self.settings.warmup_s - time.perf_counter()))
        if self._senders >= self._most_carried:  # no file left for a connection: the user only records NO_FILE
            gevent.sleep(max(0.0, self.window_at - time.perf_counter()))
            self.recorder.attempt(0.0)
            self._lack_file(0.0, 0.0, first % len(self._requests))
            return
        client, number = self._client_of_next_sender(), first
        while (now_s := time.perf_counter() - self.window_at) < self.settings.duration_s and not self.stopped:
            self.recorder.attempt(now_s)
            self._send(client, number % len(self._requests))
            number += 1

    def _lack_file(self, planned_s: float, now_s: float, place: int) -> None:
        self.recorder.finish(planned_s, now_s, now_s, NO_FILE, self._lengths[place])
        self._tell_locust(0.0, NO_FILE)

    def _send(self, client: InferenceClient, place: int, planned_s: float | None = None) -> None:
        error: str | None = None
        sent_at = time.perf_counter()
        try:
            answer = client.send(self._requests[place])
            if self._served is not None:
                batch = self._batches[place]
                seen = (batch, *[(name, array.dtype, array.shape) for name, array in answer.items()])
                if seen not in self._right:
                    self._served.check_answer(answer)
                    self._check_rows(answer, batch)
                    self._right.add(seen)
        except Exception as failure:  # every kind of error means that the request was not answered
            error = described(failure)
        finished_at = time.perf_counter()
        sent_s = sent_at - self.window_at
        self.recorder.finish(
            sent_s if planned_s is None else planned_s,
            sent_s,
            finished_at - self.window_at,
            error,
            self._lengths[place],
        )
        self._tell_locust(finished_at - sent_at, error)

    def _check_rows(self, answer: Mapping[str, np.ndarray], batch: int) -> None:
        """Raises ServerError unless each output of deploy.toml has a row for each row of the request.

        A model without batches has no rows: its inputs and outputs may differ in the first dimension.
        """
        if self._served is not None and self._served.max_batch_size == 0:
            return
        for name in self._outputs:
            if name in answer and len(answer[name]) != batch:
                raise ServerError(
                    f"{self.settings.model} answered {name!r} with {len(answer[name])} rows for the {batch} sent"
                )

    def _tell_locust(self, seconds: float, error: str | None) -> None:
        """With the arguments that Locust documents. It groups failures by `exception`, which is their kind alone."""
        self._fire(
            request_type=self.settings.over,
            name=self.settings.model,
            response_time=seconds * 1000,
            response_length=0,
            response=None,
            context={},
            exception=error and error.partition(": ")[0],
        )


def start(senders: Sequence[ModelSender], window_at: float, worker: int = 0, workers: int = 1) -> list[gevent.Greenlet]:
    """Starts a worker's share of all models' load; the greenlets end with the load or when the senders are stopped."""
    for sender in senders:
        sender.window_at = window_at
    users = [sender for sender in senders for _ in range(sender.settings.users or 0)]
    greenlets = [
        gevent.spawn(sender.send_back_to_back, 997 * user)  # users start far apart in the inputs
        for user, sender in enumerate(users)
        if user % workers == worker
    ]
    if scheduled := [sender for sender in senders if sender.settings.open_loop]:
        greenlets.append(gevent.spawn(_run_schedules, scheduled, worker, workers))
    return greenlets


def _run_schedules(senders: Sequence[ModelSender], worker: int, workers: int) -> None:
    """Open loop: takes up each request at its planned time, late ones until the last deadline."""
    clock, window_at = Clock(), senders[0].window_at
    give_up_at = window_at + max(sender.settings.duration_s + sender.settings.timeout_s for sender in senders)
    streams = [sender.planned(worker, workers) for sender in senders]
    planned = streams[0] if len(streams) == 1 else heapq.merge(*streams, key=itemgetter(0))
    for planned_s, number, sender in planned:
        due_at = window_at + planned_s
        now_at = time.perf_counter()
        if now_at < due_at:
            clock.wait_until(due_at)
            now_at = time.perf_counter()
        elif now_at < give_up_at:
            gevent.sleep(0)  # late: still process answers between two requests
        else:
            break
        if sender.stopped:
            break
        sender.take_up(planned_s, number, now_at)
    clock.close()


def described(failure: Exception) -> str:
    """Kind and message of a failure; the kind is the error's name, or the resource that this machine lacked."""
    kind = type(failure).__name__
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in KIND_OF_ERRNO:
            kind = KIND_OF_ERRNO[cause.errno]
        cause = cause.__context__
    return f"{kind}: {failure}"

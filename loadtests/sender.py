"""What one worker of a load test sends, and how it watches itself.

Contract: a `Part` is the load of one model; several of them make mixed traffic. In an open loop one greenlet takes up
each request of all parts at its planned time and gives it to a greenlet that is free, as long as fewer than
`max_in_flight` of its part are unanswered; else it is dropped. Nothing is re-anchored when the server stalls. In a
closed loop each user sends its next request when the last was answered. Requests are checked and encoded once. Over
gRPC so many greenlets share a connection that none waits in the client for one of the server's streams, unseen.

Example (in a process that gevent has patched, as Locust's are):
    share = Share([settings], tell=print, fire=lambda **_: None)
    share.begin(time.time() + 1, worker=0, workers=1)
    share.finished.wait()
"""

from __future__ import annotations

import errno
import gc
import heapq
import math
import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import psutil
from deepseek_client import InferenceClient, InferenceError
from gevent.event import Event

from deepseek.spec import BATCH, DeploymentSpec
from loadtests.check import TRIES
from loadtests.clock import Clock, take_precedence
from loadtests.inputs import length_classes, read_inputs, shuffled
from loadtests.limits import TIMEOUT_S
from loadtests.recorder import NO_FILE, NO_PORT, Recorder
from loadtests.results import IN_FLIGHT, Settings
from loadtests.schedule import Schedule, Segment

Tell = Callable[..., None]
MOST_STREAMS = 100  # of a connection: no server should allow fewer (RFC 9113, 6.5.2); the gateway allows 256
SPARE_FILES = 100  # of this process, for all but connections: without one, what was measured could not be written
KIND_OF_ERRNO = {errno.EMFILE: NO_FILE, errno.ENFILE: NO_FILE, errno.EADDRNOTAVAIL: NO_PORT}


def planned_blocks_s(settings: Settings, worker: int = 0, workers: int = 1) -> Iterator[np.ndarray]:
    """Planned times of a worker, in seconds of the measured window, some thousand at once; none in a closed loop."""
    if settings.open_loop:
        warmup = Segment(duration_s=settings.warmup_s, rate_rps=settings.segments[0].rate_rps)
        schedule = Schedule((warmup, *settings.segments), settings.arrivals, settings.seed)
        for times in schedule.blocks(worker, workers):
            yield times - settings.warmup_s


class Part:
    """One model's share of a worker's load. Times without `_at` are seconds of the measured window."""

    def __init__(self, settings: Settings, fire: Callable[..., None], parts: int = 1) -> None:
        """One of so many. Raises InputError, and InferenceError where the server does not say what it takes."""
        self.settings = settings
        self._fire = fire
        spec = DeploymentSpec.of_model(settings.model, settings.models, tuned=os.devnull)  # signature and axes alone
        rows = shuffled(read_inputs(Path(settings.inputs), spec.axes[BATCH].min), settings.seed)
        with self._client(retries=TRIES, idempotent=True, timeout_s=max(TIMEOUT_S, settings.timeout_s)) as client:
            self._requests = [client.prepare(settings.model, row) for row in rows]
        self._clients, self._senders = [self._client()], 0
        with suppress(InferenceError):
            self._clients[0].ready()  # so that the first request finds a connection
        self._lengths = length_classes(rows, spec.inputs)
        self._most_in_flight = settings.max_in_flight or IN_FLIGHT
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        files = math.inf if limit == resource.RLIM_INFINITY else (limit - SPARE_FILES) // parts
        self._most_carried = files * (MOST_STREAMS if settings.protocol == "grpc" else 1)
        self._window_at = 0.0
        self._free: list[gevent.Greenlet] = []
        self.recorder = self._new_recorder()

    def _client(self, **changes: Any) -> InferenceClient:
        """One that sends each request once, whatever becomes of it."""
        fixed: dict[str, Any] = {"timeout_s": self.settings.timeout_s, "retries": 0, "retry_budget": None}
        return InferenceClient(self.settings.url, self.settings.protocol, **fixed | changes, **self.settings.access)

    def _client_of_next_sender(self) -> InferenceClient:
        """For a greenlet that has a request in flight, never two; what another client prepared it sends as well."""
        if self.settings.protocol == "grpc" and self._senders == MOST_STREAMS * len(self._clients):
            self._clients.append(self._client())
        self._senders += 1
        return self._clients[-1]

    def _new_recorder(self) -> Recorder:
        return Recorder(open_loop=self.settings.open_loop, duration_s=self.settings.duration_s)

    def begin(self, window_at: float) -> None:
        """The measured window starts at this point of `time.perf_counter()`."""
        self._window_at = window_at
        self.recorder = self._new_recorder()

    def planned(self, worker: int, workers: int) -> Iterator[tuple[float, int, Part]]:
        """When a worker is to send which request of the schedule."""
        number = worker
        for block in planned_blocks_s(self.settings, worker, workers):
            for planned_s in block.tolist():
                yield planned_s, number, self
                number += workers

    def take_up(self, planned_s: float, number: int, now_at: float) -> None:
        """Has a free greenlet send what is due, or drops it; returns once it is sent, and others run meanwhile."""
        recorder = self.recorder
        recorder.attempt(now_at - self._window_at)
        place = number % len(self._requests)
        if recorder.in_flight > self._most_in_flight:
            recorder.drop(planned_s, self._lengths[place])
            self._tell_locust(0.0, "dropped")
        elif recorder.in_flight > self._most_carried:
            self._lack_file(planned_s, now_at - self._window_at, place)
        elif self._free:
            gevent.get_hub().loop.run_callback(gevent.getcurrent().switch)  # us, once the request is sent
            self._free.pop().switch((place, planned_s))
        else:
            gevent.spawn(self._send_whenever_asked, place, planned_s)

    def _send_whenever_asked(self, place: int, planned_s: float) -> None:
        """Open loop: a greenlet's life. A new one for each request would map, fault in and unmap a stack for it."""
        client = self._client_of_next_sender()
        while True:
            self._send(client, place, planned_s)
            self._free.append(gevent.getcurrent())
            place, planned_s = gevent.get_hub().switch()

    def send_back_to_back(self, first: int) -> None:
        """Closed loop: one request after the other until the window ends."""
        gevent.sleep(max(0.0, self._window_at - self.settings.warmup_s - time.perf_counter()))
        if self._senders >= self._most_carried:  # a user without a file for a connection sends nothing, and is told
            gevent.sleep(max(0.0, self._window_at - time.perf_counter()))
            self.recorder.attempt(0.0)
            self._lack_file(0.0, 0.0, first % len(self._requests))
            return
        client, number = self._client_of_next_sender(), first
        while (now_s := time.perf_counter() - self._window_at) < self.settings.duration_s:
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
            client.send(self._requests[place])
        except Exception as failure:  # whatever it is, the request was not answered; its kind is told
            error = kind_of(failure)
        finished_at = time.perf_counter()
        sent_s = sent_at - self._window_at
        self.recorder.finish(
            sent_s if planned_s is None else planned_s,
            sent_s,
            finished_at - self._window_at,
            error,
            self._lengths[place],
        )
        self._tell_locust(finished_at - sent_at, error)

    def _tell_locust(self, seconds: float, error: str | None) -> None:
        self._fire(
            request_type=self.settings.protocol,
            name=self.settings.model,
            response_time=seconds * 1000,
            response_length=0,
            exception=error,
        )


def kind_of(failure: Exception) -> str:
    """What a failed request counts as: its error's name, or what this machine had none of to make a connection."""
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in KIND_OF_ERRNO:
            return KIND_OF_ERRNO[cause.errno]
        cause = cause.__context__
    return type(failure).__name__


class Share:
    """What one worker sends of a run: its part of every model's load."""

    def __init__(self, settings: Sequence[Settings], *, tell: Tell, fire: Callable[..., None]) -> None:
        self._settings = settings[0]  # what all parts have in common: kind of loop, warm-up, window, deadline
        self._tell_coordinator = tell
        self.parts = [Part(each, fire, len(settings)) for each in settings]
        self.finished = Event()
        self._window_at = 0.0
        self._precedence = False
        self._sending: list[gevent.Greenlet] = []

    def begin(self, starts_at: float, worker: int, workers: int) -> None:
        """Starts it: the measured window begins at `starts_at`, of the coordinator's `time.time()`."""
        gc.collect()
        gc.freeze()  # later collections pass over all that is there now, and so are short
        # In a closed loop there is no time to keep, and it would only take from the server.
        self._precedence = self._settings.open_loop and take_precedence()
        self._window_at = time.perf_counter() + starts_at - time.time()
        for part in self.parts:
            part.begin(self._window_at)
        if self._settings.open_loop:
            self._sending = [gevent.spawn(self._run_schedule, worker, workers)]
        else:
            self._sending = [
                gevent.spawn(part.send_back_to_back, 997 * user)  # users start far apart in the inputs
                for user, part in enumerate(self._users())
                if user % workers == worker
            ]
        gevent.spawn(self._watch)

    def _users(self) -> list[Part]:
        return [part for part in self.parts for _ in range(part.settings.users or 0)]

    def stop(self) -> None:
        """Sends no more; what was to come stays unsent."""
        gevent.killall(self._sending, block=False)

    def _run_schedule(self, worker: int, workers: int) -> None:
        """Open loop: takes up each request at its planned time, as long as that takes."""
        clock = Clock()
        give_up_at = self._window_at + self._settings.duration_s + self._settings.timeout_s
        streams = [part.planned(worker, workers) for part in self.parts]
        planned = streams[0] if len(streams) == 1 else heapq.merge(*streams, key=itemgetter(0))
        for planned_s, number, part in planned:
            due_at = self._window_at + planned_s
            now_at = time.perf_counter()
            if now_at < due_at:
                clock.wait_until(due_at, now_at)
                now_at = time.perf_counter()
            elif now_at < give_up_at:
                gevent.sleep(0)  # late: still let answers in between two requests
            else:
                break
            part.take_up(planned_s, number, now_at)
        clock.close()

    @property
    def in_flight(self) -> int:
        """Requests sent and not answered."""
        return sum(part.recorder.in_flight for part in self.parts)

    def _watch(self) -> None:
        """Hands each second on when it can no longer change, and the rest when all is answered or given up."""
        settings, clock = self._settings, Clock()
        cpu = None
        for second in range(-int(settings.warmup_s), int(settings.duration_s) + 1):
            clock.wait_until(self._window_at + second, time.perf_counter())
            if second == 0:
                cpu = _CpuClock()
            self._tell("second", self._rows(second - settings.timeout_s - 2), second=second)
        generator = {**(cpu.shares() if cpu else {}), "precedence": self._precedence}
        give_up_at = time.perf_counter() + settings.timeout_s + 1
        while (self.in_flight or not all(each.ready() for each in self._sending)) and time.perf_counter() < give_up_at:
            gevent.sleep(0.01)
        clock.close()
        lengths = [list(part.recorder.take_lengths()) for part in self.parts]
        self._tell("finished", self._rows(), lengths=lengths, generator=generator)
        self.finished.set()

    def _rows(self, before_s: float = np.inf) -> list[list[dict[str, Any]]]:
        """Of each part; others may send between two of them."""
        rows = []
        for part in self.parts:
            rows.append(list(part.recorder.take(before_s)))
            gevent.sleep(0)
        return rows

    def _tell(self, what: str, rows: list[list[dict[str, Any]]], **facts: Any) -> None:
        totals = [part.recorder.totals(facts.get("second", 0) - 1) for part in self.parts]
        completed, failed = (sum(counts) for counts in zip(*totals, strict=True))
        now = {"completed": completed, "failed": failed, "in_flight": self.in_flight}
        self._tell_coordinator(what, {"rows": rows, "now": now, **facts})


class _CpuClock:
    """How busy the generator was: its Python thread (at 1 it cannot keep up), its process, the machine."""

    def __init__(self) -> None:
        with suppress(OSError):  # no file left to read it from
            psutil.cpu_percent()
        self._start = self._times()

    @staticmethod
    def _times() -> np.ndarray:
        return np.array([time.perf_counter(), time.thread_time(), time.process_time()])

    def shares(self) -> dict[str, float]:
        """Since it was made; 1 is one core for thread and process, all cores for the machine."""
        wall_s, thread_s, process_s = (self._times() - self._start).tolist()
        found = {"thread_cpu": thread_s / wall_s, "process_cpu": process_s / wall_s}
        with suppress(OSError):
            found["machine_cpu"] = psutil.cpu_percent() / 100
        return found

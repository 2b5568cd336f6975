"""One worker of a load test: sends its share of every model's load and measures its own CPU use.

Runs in a process that gevent has patched, such as Locust's.
"""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gevent
import numpy as np
import psutil
from gevent.event import Event

from loadtests.load.replay import open_plan
from loadtests.load.workers.clock import Clock, take_precedence
from loadtests.load.workers.recorder import Recorder
from loadtests.load.workers.sender import ModelSender, start
from loadtests.results.settings import LoadSettings

Tell = Callable[..., None]


class Worker:
    """The share of a run that one worker sends: its part of every model's load."""

    def __init__(
        self, settings: Sequence[LoadSettings], folder: Path, *, tell: Tell, fire: Callable[..., None]
    ) -> None:
        """`folder` has the settings file, and the plan of a replay."""
        self._settings = settings[0]  # for the fields that all models share: loop, warm-up, window, time-out
        self._tell_master = tell
        self._recorders = [Recorder(open_loop=each.open_loop, duration_s=each.duration_s) for each in settings]
        self.senders = [
            ModelSender(each, recorder, models=len(settings), plan=open_plan(folder, each), fire=fire)
            for each, recorder in zip(settings, self._recorders, strict=True)
        ]
        self.finished = Event()
        self._window_at = 0.0
        self._precedence = False
        self._sending: list[gevent.Greenlet] = []

    def begin(self, rank: int, workers: int, starts_in_s: float, starts_at: float | None = None) -> None:
        """Starts sending; the measured window begins `starts_in_s` from now, or at the master's `starts_at`.

        `starts_at` is a time of `time.perf_counter()`, for workers on the master's machine.
        """
        self._window_at = time.perf_counter() + starts_in_s if starts_at is None else starts_at
        gc.collect()
        gc.freeze()  # later collections skip all present objects and are short
        # A closed loop has no planned times, and real-time priority would only take CPU from the server.
        self._precedence = self._settings.priority and self._settings.open_loop and take_precedence()
        self._sending = start(self.senders, self._window_at, rank, workers)
        gevent.spawn(self._watch)

    def stop(self) -> None:
        """Stops sending; the rest of the schedule stays unsent."""
        gevent.killall(self._sending, block=False)

    @property
    def in_flight(self) -> int:
        return sum(recorder.in_flight for recorder in self._recorders)

    def _watch(self) -> None:
        """Hands on each second once it can no longer change, and the rest when all requests are done or timed out."""
        settings, clock = self._settings, Clock()
        cpu = None
        for second in range(-int(settings.warmup_s), int(settings.duration_s) + 1):
            clock.wait_until(self._window_at + second)
            if second == 0:
                cpu = _CpuClock()
            self._tell("second", self._rows(second - settings.timeout_s - 2), second=second)
        generator = {**(cpu.shares() if cpu else {}), "precedence": self._precedence}
        give_up_at = time.perf_counter() + settings.timeout_s + 1
        while (self.in_flight or not all(each.ready() for each in self._sending)) and time.perf_counter() < give_up_at:
            gevent.sleep(0.01)
        clock.close()
        lengths = [list(recorder.take_lengths()) for recorder in self._recorders]
        self._tell("finished", self._rows(), lengths=lengths, generator=generator)
        self.finished.set()

    def _rows(self, before_s: float = np.inf) -> list[list[dict[str, Any]]]:
        """The rows of each model; requests may be sent between two models."""
        rows = []
        for recorder in self._recorders:
            rows.append(list(recorder.take(before_s)))
            gevent.sleep(0)
        return rows

    def _tell(self, what: str, rows: list[list[dict[str, Any]]], **facts: Any) -> None:
        totals = [recorder.totals(facts.get("second", 0) - 1) for recorder in self._recorders]
        completed, failed = (sum(counts) for counts in zip(*totals, strict=True))
        now = {"completed": completed, "failed": failed, "in_flight": self.in_flight}
        self._tell_master(what, {"rows": rows, "now": now, **facts})


class _CpuClock:
    """CPU use of the generator: its Python thread (which cannot keep up at 1), its process, the machine."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._start = self._times()

    @staticmethod
    def _times() -> np.ndarray:
        return np.array([time.perf_counter(), time.thread_time(), time.process_time()])

    def shares(self) -> dict[str, float]:
        """CPU shares since this object was made; 1 is one core for thread and process, all cores for the machine."""
        wall_s, thread_s, process_s = (self._times() - self._start).tolist()
        machine = psutil.cpu_percent() / 100
        return {"thread_cpu": thread_s / wall_s, "process_cpu": process_s / wall_s, "machine_cpu": machine}

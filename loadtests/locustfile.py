"""The Locust file: users that send a model's real inputs to Triton over HTTP or gRPC.

Contract: everything is decided by a settings file (`results.Settings` as JSON). Open loop: one user a
worker sends each request at its planned time, from a bounded pool of greenlets; nothing is re-anchored
when the server stalls. Closed loop: each user sends its next request when the last was answered. What
was measured is written beside the settings file, and Locust's own statistics are fed as well, for its
web page. Of the two kinds of user, the one that speaks the settings' protocol runs.

`python -m loadtests.run` checks everything first and then starts this; alone it runs so:
    locust -f loadtests/locustfile.py --headless --users 1 --settings build/load/settings.json
"""

from __future__ import annotations

import gc
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import gevent
import numpy as np
import psutil
from deepseek_client import InferenceClient, InferenceError, PreparedRequest
from gevent.pool import Pool
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser

from loadtests import server_statistics
from loadtests.clock import Clock, take_precedence
from loadtests.inputs import read_inputs
from loadtests.results import Recorder, Settings
from loadtests.schedule import Schedule, Segment

START_DELAY_S = 0.5  # from Locust's start signal to the first request: time for every user to be there


class Load:
    """One worker's share of a run. Times without `_at` are seconds of the measured window."""

    def __init__(self, environment: Environment, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self._folder = folder
        self._environment = environment
        self._request_event = environment.events.request
        self._client = InferenceClient(
            settings.url, protocol=settings.protocol, timeout_s=settings.timeout_s, retries=0
        )
        self._requests = prepare_requests(self._client, settings)
        self._times_s: np.ndarray | None = None
        if settings.open_loop:
            first = settings.segments[0]
            warmup = Segment(duration_s=settings.warmup_s, rate_rps=first.rate_rps)
            schedule = Schedule((warmup, *settings.segments), settings.arrivals, settings.seed)
            self._times_s = schedule.times_s() - settings.warmup_s
        self.recorder = Recorder(self._times_s)
        self._rows: list[dict[str, Any]] = []
        self._window_at = 0.0
        self._precedence = False

    def start(self) -> None:
        """Fixes the time of the first request and watches over the run until it is written."""
        gc.collect()
        gc.freeze()  # later collections pass over all that is there now, and so are short
        # In a closed loop there is no time to keep, and it would only take from the server.
        self._precedence = self.settings.open_loop and take_precedence()
        self._window_at = time.perf_counter() + START_DELAY_S + self.settings.warmup_s
        gevent.spawn(self._watch)

    def run_schedule(self) -> None:
        """Open loop: takes up each request at its planned time, as long as that takes."""
        assert self._times_s is not None
        pool, clock, recorder = Pool(self.settings.max_in_flight), Clock(), self.recorder
        give_up_at = self._window_at + self.settings.duration_s + self.settings.timeout_s
        for index, planned_s in enumerate(self._times_s.tolist()):
            due_at = self._window_at + planned_s
            now_at = time.perf_counter()
            if now_at < due_at:
                clock.wait_until(due_at, now_at)
                now_at = time.perf_counter()
            elif now_at < give_up_at:
                gevent.sleep(0)  # late: still let answers in between two requests
            else:
                break
            recorder.attempt(now_at - self._window_at)
            if pool.full():
                recorder.drop(planned_s)
            else:
                pool.spawn(self._send, index, planned_s)
        clock.close()

    def run_back_to_back(self, first: int) -> None:
        """Closed loop: one request after the other until the window ends."""
        gevent.sleep(self._window_at - self.settings.warmup_s - time.perf_counter())
        index = first
        while (now_s := time.perf_counter() - self._window_at) < self.settings.duration_s:
            self.recorder.attempt(now_s)
            self._send(index)
            index += 1

    def _send(self, index: int, planned_s: float | None = None) -> None:
        error: InferenceError | None = None
        sent_at = time.perf_counter()
        try:
            self._client.send(self._requests[index % len(self._requests)])
        except InferenceError as failure:
            error = failure
        finished_at = time.perf_counter()
        sent_s = sent_at - self._window_at
        self.recorder.finish(
            sent_s if planned_s is None else planned_s,
            sent_s,
            finished_at - self._window_at,
            None if error is None else type(error).__name__,
        )
        self._request_event.fire(
            request_type=self.settings.protocol,
            name=self.settings.model,
            response_time=(finished_at - sent_at) * 1000,
            response_length=0,
            exception=error,
        )

    def _watch(self) -> None:
        """Seals each second when it can no longer change, then writes the results and ends Locust."""
        settings, clock = self.settings, Clock()
        statistics = partial(server_statistics.fetch, settings.url, settings.protocol, settings.model)
        second = -int(settings.warmup_s)
        before = cpu = None
        while second <= settings.duration_s:
            clock.wait_until(self._window_at + second, time.perf_counter())
            if second == 0:
                cpu = _CpuClock()
                before = statistics()
            self._rows.extend(self.recorder.take(second - settings.timeout_s - 2))
            self._say(second)
            second += 1
        clock.wait_until(self._window_at + settings.duration_s, time.perf_counter())
        generator = {**(cpu.shares() if cpu else {}), "precedence": self._precedence}
        give_up_at = time.perf_counter() + settings.timeout_s + 1
        while self.recorder.in_flight and time.perf_counter() < give_up_at:
            gevent.sleep(0.01)
        server = server_statistics.difference(before, statistics())
        self._rows.extend(self.recorder.take())
        (self._folder / "seconds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in self._rows))
        measured = {"generator": generator, "server": server}
        (self._folder / "measured.json").write_text(json.dumps(measured))
        self._environment.process_exit_code = 0  # failed requests are a finding, not Locust's failure
        assert self._environment.runner is not None
        self._environment.runner.quit()

    def _say(self, second: int) -> None:
        """A line a second on standard output, for whoever shows the progress."""
        completed, failed = self.recorder.totals(second - 1)
        line = {"second": second, "completed": completed, "failed": failed, "in_flight": self.recorder.in_flight}
        print(json.dumps(line), flush=True)


class _CpuClock:
    """How busy the generator was: its Python thread (at 1 it cannot keep up), its process, the machine."""

    def __init__(self) -> None:
        psutil.cpu_percent()
        self._start = self._times()

    @staticmethod
    def _times() -> np.ndarray:
        return np.array([time.perf_counter(), time.thread_time(), time.process_time()])

    def shares(self) -> dict[str, float]:
        """Since it was made; 1 is one core for thread and process, all cores for the machine."""
        wall_s, thread_s, process_s = (self._times() - self._start).tolist()
        machine = psutil.cpu_percent() / 100
        return {"thread_cpu": thread_s / wall_s, "process_cpu": process_s / wall_s, "machine_cpu": machine}


def prepare_requests(client: InferenceClient, settings: Settings) -> list[PreparedRequest]:
    """Every input of the file, checked against the server's signature and encoded, once."""
    return [client.prepare(settings.model, inputs) for inputs in read_inputs(Path(settings.inputs))]


class TritonUser(User):
    """Sends until the run is over; `protocol` is the subclass's."""

    abstract = True
    protocol: ClassVar[Literal["grpc", "http"]]
    _started: ClassVar[int] = 0

    @task
    def send(self) -> None:
        """The whole run of this user: Locust's own waits and task switches stay out of the way."""
        load: Load = self.environment.load
        if load.settings.open_loop:
            load.run_schedule()
        else:
            TritonUser._started += 1
            load.run_back_to_back(first=TritonUser._started * 7919)  # users start far apart in the inputs
        raise StopUser


class TritonGrpcUser(TritonUser):
    """Over gRPC, all requests on one HTTP/2 connection."""

    protocol = "grpc"


class TritonHttpUser(TritonUser):
    """Over HTTP/1.1, one kept-alive connection for each request in flight."""

    protocol = "http"


@events.init_command_line_parser.add_listener
def _add_arguments(parser: LocustArgumentParser) -> None:
    parser.add_argument("--settings", required=True, help="JSON file of loadtests.results.Settings")


@events.init.add_listener
def _prepare(environment: Environment, **_: Any) -> None:
    path = Path(environment.parsed_options.settings)  # type: ignore[union-attr]
    settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    if settings.protocol == "grpc":
        import grpc.experimental.gevent

        grpc.experimental.gevent.init_gevent()  # after Locust's patching, before any channel
    load = Load(environment, settings, path.parent)
    environment.user_classes[:] = [
        kind for kind in (TritonGrpcUser, TritonHttpUser) if kind.protocol == settings.protocol
    ]
    environment.load = load  # type: ignore[attr-defined]
    environment.events.test_start.add_listener(lambda **_: load.start())


if __name__ == "__main__":
    sys.exit("run this file with locust, or as part of: python -m loadtests.run")

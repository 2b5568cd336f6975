"""The Locust file: users that send a model's real inputs to Triton over HTTP or gRPC.

Contract: everything is decided by a settings file (`results.Settings` as JSON). Open loop: one user a
worker sends each request at its planned time, from a bounded pool of greenlets; nothing is re-anchored
when the server stalls. Closed loop: each user sends its next request when the last was answered. Of the two
kinds of user, the one that speaks the settings' protocol runs. Locust's own statistics are fed for its page.

With Locust's master and workers each worker sends every n-th request of the one schedule, so that together they
are that schedule; they start in step, by the master's clock (workers on other machines need theirs in time), and
hand their counts and histograms to the master, which writes them beside the settings file.

`python -m loadtests.run` checks everything first and then starts this; alone it runs so:
    locust -f loadtests/locustfile.py --headless --users 1 --settings build/load/settings.json
    locust -f loadtests/locustfile.py --headless --users 4 --processes 4 --settings build/load/settings.json
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import gevent
import numpy as np
import psutil
from deepseek_client import InferenceClient, InferenceError, PreparedRequest
from gevent.event import Event
from gevent.pool import Pool
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.rpc import Message
from locust.runners import MasterRunner, WorkerRunner

from loadtests import server_statistics
from loadtests.clock import Clock, take_precedence
from loadtests.inputs import read_inputs
from loadtests.results import Recorder, Settings
from loadtests.schedule import Schedule, Segment

# From Locust's start signal to the first request: time for every user, and worker, to be there.
START_DELAY_S = 0.5
DISTRIBUTED_START_DELAY_S = 2.0


class Share:
    """What one worker sends of a run. Times without `_at` are seconds of the measured window."""

    def __init__(self, environment: Environment, settings: Settings) -> None:
        self.settings = settings
        self._environment = environment
        self._request_event = environment.events.request
        self._client = InferenceClient(
            settings.url, protocol=settings.protocol, timeout_s=settings.timeout_s, retries=0
        )
        self._requests = prepare_requests(self._client, settings)
        self._begun = Event()
        self._window_at = 0.0
        self._times_s = np.empty(0)
        self._precedence = False
        self.recorder = Recorder(open_loop=settings.open_loop)

    def begin(self, starts_at: float, worker: int, workers: int) -> None:
        """Fixes the start of the measured window, as the coordinator's `time.time()`, and this worker's part."""
        gc.collect()
        gc.freeze()  # later collections pass over all that is there now, and so are short
        # In a closed loop there is no time to keep, and it would only take from the server.
        self._precedence = self.settings.open_loop and take_precedence()
        self._times_s = planned_times_s(self.settings)[worker::workers]
        self.recorder = Recorder(open_loop=self.settings.open_loop)
        self._window_at = time.perf_counter() + starts_at - time.time()
        self._first = 7919 * worker  # workers start far apart in the inputs
        self._begun.set()
        gevent.spawn(self._watch)

    def run_schedule(self) -> None:
        """Open loop: takes up each request at its planned time, as long as that takes."""
        self._begun.wait()
        pool, clock, recorder = Pool(self.settings.max_in_flight), Clock(), self.recorder
        give_up_at = self._window_at + self.settings.duration_s + self.settings.timeout_s
        for index, planned_s in enumerate(self._times_s.tolist(), start=self._first):
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

    def run_back_to_back(self, user: int) -> None:
        """Closed loop: one request after the other until the window ends."""
        self._begun.wait()
        gevent.sleep(max(0.0, self._window_at - self.settings.warmup_s - time.perf_counter()))
        index = self._first + 997 * user
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
        """Hands each second on when it can no longer change, and the rest when all is answered or given up."""
        settings, clock = self.settings, Clock()
        cpu = None
        for second in range(-int(settings.warmup_s), int(settings.duration_s) + 1):
            clock.wait_until(self._window_at + second, time.perf_counter())
            if second == 0:
                cpu = _CpuClock()
            self._tell("second", second=second, rows=list(self.recorder.take(second - settings.timeout_s - 2)))
        generator = {**(cpu.shares() if cpu else {}), "precedence": self._precedence}
        give_up_at = time.perf_counter() + settings.timeout_s + 1
        while self.recorder.in_flight and time.perf_counter() < give_up_at:
            gevent.sleep(0.01)
        clock.close()
        self._tell("finished", rows=list(self.recorder.take()), generator=generator)

    def _tell(self, what: str, **facts: Any) -> None:
        completed, failed = self.recorder.totals(facts.get("second", 0) - 1)
        now = {"completed": completed, "failed": failed, "in_flight": self.recorder.in_flight}
        assert self._environment.runner is not None
        self._environment.runner.send_message(what, {**facts, "now": now})


class Coordinator:
    """Starts the workers in step, gathers what they counted, and writes it; in Locust's master or only process."""

    def __init__(self, environment: Environment, settings: Settings, folder: Path) -> None:
        self._environment, self._settings, self._folder = environment, settings, folder
        self._rows: list[dict[str, Any]] = []
        self._generators: list[dict[str, Any]] = []
        self._now: dict[int, Counter[str]] = defaultdict(Counter)
        self._workers = 1
        self._started = False

    def start(self) -> None:
        """Tells every worker when the measured window starts. A second start, from Locust's page, measures nothing."""
        runner = self._environment.runner
        assert runner is not None
        if self._started:
            return
        self._started = True
        self._workers = runner.worker_count if isinstance(runner, MasterRunner) else 1
        delay_s = DISTRIBUTED_START_DELAY_S if isinstance(runner, MasterRunner) else START_DELAY_S
        starts_at = time.time() + delay_s + self._settings.warmup_s
        runner.send_message("begin", {"starts_at": starts_at, "workers": self._workers})
        self._rows += Recorder(planned_s=planned_times_s(self._settings), open_loop=self._settings.open_loop).take()
        gevent.spawn(self._gather, starts_at)

    def take_second(self, second: int, rows: list[dict[str, Any]], now: dict[str, int]) -> None:
        """A worker's second has passed; the last one's makes a line on standard output, for whoever shows progress."""
        self._rows += rows
        counts = self._now[second]
        counts.update({**now, "workers": 1})
        if counts["workers"] == self._workers:
            line = {"second": second, **{name: counts[name] for name in ("completed", "failed", "in_flight")}}
            print(json.dumps(line), flush=True)

    def take_last(self, rows: list[dict[str, Any]], generator: dict[str, Any]) -> None:
        """A worker has finished."""
        self._rows += rows
        self._generators.append(generator)

    def _gather(self, starts_at: float) -> None:
        settings = self._settings
        statistics = partial(server_statistics.fetch, settings.url, settings.protocol, settings.model)
        gevent.sleep(max(0.0, starts_at - time.time()))
        before = statistics()
        gevent.sleep(max(0.0, starts_at + settings.duration_s - time.time()))
        give_up_at = time.time() + settings.timeout_s + 5
        while len(self._generators) < self._workers and time.time() < give_up_at:
            gevent.sleep(0.02)
        server = server_statistics.difference(before, statistics())
        (self._folder / "seconds.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in self._rows))
        # A worker that was lost has taken its answers with it: they stay planned, and count as never sent.
        measured = {"generator": _together(self._generators, self._workers), "server": server}
        draft = self._folder / "measured.json.part"
        draft.write_text(json.dumps(measured))
        draft.rename(self._folder / "measured.json")
        print(json.dumps({"finished": True}), flush=True)
        self._environment.process_exit_code = 0  # failed requests are a finding, not Locust's failure
        runner = self._environment.runner
        assert runner is not None
        if self._environment.web_ui is None:
            runner.quit()
        else:
            runner.stop()  # the page stays


def planned_times_s(settings: Settings) -> np.ndarray:
    """Of all workers together; empty in a closed loop."""
    if not settings.open_loop:
        return np.empty(0)
    warmup = Segment(duration_s=settings.warmup_s, rate_rps=settings.segments[0].rate_rps)
    schedule = Schedule((warmup, *settings.segments), settings.arrivals, settings.seed)
    return schedule.times_s() - settings.warmup_s


def _together(generators: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """The health of all workers: of each figure the worst."""
    worst = {
        name: max(each[name] for each in generators if name in each)
        for name in ("thread_cpu", "process_cpu", "machine_cpu")
        if any(name in each for each in generators)
    }
    precedence = bool(generators) and all(each["precedence"] for each in generators)
    return {**worst, "precedence": precedence, "workers": workers, "workers_lost": workers - len(generators)}


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
        share: Share = self.environment.share
        if share.settings.open_loop:
            share.run_schedule()
        else:
            TritonUser._started += 1
            share.run_back_to_back(user=TritonUser._started)
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
    environment.user_classes[:] = [
        kind for kind in (TritonGrpcUser, TritonHttpUser) if kind.protocol == settings.protocol
    ]
    runner = environment.runner
    assert runner is not None
    if not isinstance(runner, WorkerRunner):
        _coordinate(environment, Coordinator(environment, settings, path.parent))
    if not isinstance(runner, MasterRunner):
        if settings.protocol == "grpc":
            import grpc.experimental.gevent

            grpc.experimental.gevent.init_gevent()  # after Locust's patching, before any channel
        share = environment.share = Share(environment, settings)  # type: ignore[attr-defined]

        def begin(msg: Message, **_: Any) -> None:
            share.begin(msg.data["starts_at"], max(0, runner.worker_index), msg.data["workers"])  # type: ignore[attr-defined]

        runner.register_message("begin", begin)


def _coordinate(environment: Environment, coordinator: Coordinator) -> None:
    assert environment.runner is not None
    environment.events.test_start.add_listener(lambda **_: coordinator.start())

    def second(msg: Message, **_: Any) -> None:
        coordinator.take_second(msg.data["second"], msg.data["rows"], msg.data["now"])

    def finished(msg: Message, **_: Any) -> None:
        coordinator.take_last(msg.data["rows"], msg.data["generator"])

    environment.runner.register_message("second", second)
    environment.runner.register_message("finished", finished)


if __name__ == "__main__":
    sys.exit("run this file with locust, or as part of: python -m loadtests.run")

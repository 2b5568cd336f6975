"""Runs a load in a child process until it is stopped, and logs each of its requests.

Contract: streams are sent like those of a load test (`sender`); times are seconds since the load began. The child ends
when its standard input closes, so it never outlives its parent.

    with BackgroundLoad([Stream(name="shop", settings=settings)]) as load:
        log = load.stop()["shop"]
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from deepseek.spec import InvalidMeasurement
from deepseek.spec.processes.children import our_environment
from loadtests.load.request_log import RequestLog, RequestRecorder, SentRequest
from loadtests.results.settings import LoadSettings

MOST_IN_FLIGHT = 4096  # default for a stream; requests beyond it are dropped
STOP_S = 30.0  # for the end of a stopped load, beyond the time-out of its last requests
MOST_FILES = 10_000  # open files of the process, the same as Locust's limit; each connection is one
SO_FAR = "so far\n"
PROCESS = """
from gevent import monkey
monkey.patch_all()
from loadtests.load.background_load import run
run()
"""


@dataclass(frozen=True, kw_only=True)
class Stream:
    name: str
    settings: LoadSettings
    retries: int = 0
    retry_budget: float | None = 0.1
    idempotent: bool = False


class BackgroundLoad:
    """The parent's handle of the load: `wait` lets it finish its schedule, `stop` ends it now."""

    def __init__(self, streams: Sequence[Stream], environment: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="load-")
        self._log = Path(self._folder.name) / "log.json"
        plan = Path(self._folder.name) / "streams.json"
        plan.write_text(json.dumps([asdict(stream) for stream in streams]))
        self._stop_s = STOP_S + max((stream.settings.timeout_s for stream in streams), default=0)
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(plan), str(self._log)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=our_environment(**(environment or {})),
        )  # fmt: skip
        self._began_at = float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._end()
            raise InvalidMeasurement("the load ended early; the reason is above")
        return line

    @property
    def now_s(self) -> float:
        """Seconds since the load began."""
        return time.perf_counter() - self._began_at

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):  # it has not read all of its input
                pipe.close()
        self._folder.cleanup()

    def so_far(self) -> dict[str, RequestLog]:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the load has ended and will not answer
            self._process.stdin.write(SO_FAR)
            self._process.stdin.flush()
        self._answer()
        return self._read()

    def stop(self) -> dict[str, RequestLog]:
        """Stops sending, waits for the answers, returns all requests by stream."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            raise InvalidMeasurement(f"the load was stopped, but did not end within {self._stop_s:g} s") from None
        return self.wait()

    def wait(self) -> dict[str, RequestLog]:
        """Waits until the whole schedule is sent and answered; returns all requests by stream."""
        if self._process.wait() != 0:
            raise InvalidMeasurement("the load ended early; the reason is above")
        return self._read()

    def _read(self) -> dict[str, RequestLog]:
        found = json.loads(self._log.read_text())
        return {name: RequestLog([SentRequest(*row) for row in rows]) for name, rows in found.items()}


def run() -> None:
    """The child process: sends the load, obeys standard input, writes the log."""
    import gevent  # imported here, like the modules that need it, since the parent does not use them

    from loadtests.load.workers.clock import take_precedence
    from loadtests.load.workers.sender import ModelSender, start

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # unlimited is -1
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST_FILES if hard < 0 else min(MOST_FILES, hard), hard))
    plan, log = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    if any(each["settings"]["protocol"] == "grpc" for each in plan):
        import grpc.experimental.gevent

        grpc.experimental.gevent.init_gevent()
    recorders: dict[str, RequestRecorder] = {}
    senders = []
    for each in plan:
        name, settings = each.pop("name"), LoadSettings(**each.pop("settings"))
        recorders[name] = RequestRecorder()
        settings = replace(settings, max_in_flight=settings.max_in_flight or MOST_IN_FLIGHT)
        senders.append(ModelSender(settings, recorders[name], models=len(plan), **each))

    def save() -> None:
        log.write_text(json.dumps({name: each.requests for name, each in recorders.items()}))

    def listen() -> None:
        while gevent.get_hub().threadpool.apply(sys.stdin.readline) == SO_FAR:
            save()
            print("saved", flush=True)
        for sender in senders:
            sender.stopped = True

    gc.collect()
    gc.freeze()
    if all(sender.settings.open_loop and sender.settings.priority for sender in senders):
        take_precedence()  # a closed loop has no planned times
    began_at = time.perf_counter()
    sending = start(senders, began_at)
    print(began_at, flush=True)
    gevent.spawn(listen)
    gevent.joinall(sending)
    while any(each.in_flight for each in recorders.values()):
        gevent.sleep(0.01)
    save()
    os._exit(0)  # the thread that reads standard input may still wait

"""Starts the workers of a load test at the same time, then collects and writes their counts.

Contract: runs in Locust's master, or in its only process. It writes rows as they arrive, so memory does not grow with
the run. Beside the settings file it writes `<model>.seconds.jsonl` for each part (model), and at the end, atomically,
`measured.json`: the generator's health, and for each part the server's statistics and counts by length.

The wall clock decides nothing. The workers of this machine share its monotonic clock, `time.perf_counter()`. Workers on
other machines count the seconds to the start from the arrival of the message, so they start later by its travel time.
"""

import json
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gevent
import numpy as np
from locust.env import Environment
from locust.runners import MasterRunner

from deepseek.spec import ExitCode
from deepseek.spec.files.folders import write_whole
from loadtests.load import padding_counters, server_statistics
from loadtests.load.replay import open_plan
from loadtests.load.workers.recorder import Recorder, rows_file
from loadtests.load.workers.sender import planned_times_s
from loadtests.results.settings import LONGEST_PREPARATION_S, LoadSettings

# From Locust's start signal to the first request, so that every worker gets the message in time.
START_DELAY_S = 0.5
DISTRIBUTED_START_DELAY_S = 2.0
ALONE = "local"  # Locust's name for the only process
# The target only judges.
OF_THE_MACHINE = ("models", "inputs", "url", "route", "metrics", "ca_cert", "priority", "target")
Rows = list[list[dict[str, Any]]]  # one list for each part


class Master:
    def __init__(
        self, environment: Environment, parts: list[LoadSettings], folder: Path, *, remote: bool = False
    ) -> None:
        """`remote`: the workers run on other machines, whose clocks are not this one's."""
        self._environment, self._parts, self._folder, self._remote = environment, parts, folder, remote
        self._settings = parts[0]  # for the fields that all parts share
        self._lengths: Rows = [[] for _ in parts]
        self._generators: list[dict[str, Any]] = []
        self._now: dict[int, Counter[str]] = defaultdict(Counter)
        self._workers = 1
        self._prepared: set[str] = set()
        self._started = self._finished = False

    def start(self) -> None:
        """Tells every worker when the measured window starts. A second start, from Locust's page, does nothing."""
        runner = self._environment.runner
        assert runner is not None
        if self._started:
            return
        self._started = True
        for part in self._parts:
            rows_file(self._folder, part.model).write_text("")
        self._write([list(planned_rows(part, open_plan(self._folder, part))) for part in self._parts])
        workers = self._await_workers()
        self._workers = len(workers)
        delay_s = DISTRIBUTED_START_DELAY_S if isinstance(runner, MasterRunner) else START_DELAY_S
        starts_at = time.perf_counter() + delay_s + self._settings.warmup_s
        for rank, worker in enumerate(workers):  # Locust's own numbers have gaps if a worker was replaced
            begin = {"starts_in_s": starts_at - time.perf_counter(), "rank": rank, "workers": self._workers}
            if not self._remote:
                begin["starts_at"] = starts_at
            runner.send_message("begin", begin, worker)
        gevent.spawn(self._gather, starts_at)

    def take_prepared(self, worker: str, parts: list[dict[str, Any]]) -> None:
        """A worker is ready to send its own settings; Locust's own "ready" comes earlier."""
        ours = [shared(asdict(part)) for part in self._parts]
        theirs = [shared(part) for part in parts]
        if theirs != ours:
            pairs = [(one[name], other[name], name) for one, other in zip(ours, theirs, strict=False) for name in one]
            found = next((f"{name} {its}, the master {our}" for our, its, name in pairs if our != its), "other models")
            target = self._settings.target  # its SLO gives the default rate, time-out and requests in flight
            also = "" if parts[0]["target"] == target else f", and with --target {target}"
            self.take_unprepared(f"a worker has {found}; start each worker with all options of the master{also}")
        self._prepared.add(worker)

    def take_unprepared(self, why: str) -> None:
        """A worker cannot send: ends the test with the reason, since the load would be too low without it."""
        _say({"unprepared": why})
        sys.exit(ExitCode.INVALID)

    def _await_workers(self) -> list[str]:
        give_up_at = time.perf_counter() + LONGEST_PREPARATION_S
        while not self._prepared.issuperset(self._alive()) and time.perf_counter() < give_up_at:
            gevent.sleep(0.02)
        return self._alive()

    def _alive(self) -> list[str]:
        runner = self._environment.runner
        if not isinstance(runner, MasterRunner):
            return [ALONE]
        nodes = runner.clients
        return [node.id for node in (*nodes.ready, *nodes.spawning, *nodes.running)]

    def _write(self, rows: Rows) -> None:
        for part, found in zip(self._parts, rows, strict=True):
            if found:
                with _on_disk(), rows_file(self._folder, part.model).open("a", encoding="utf-8") as file:
                    file.writelines(f"{json.dumps(row)}\n" for row in found)

    def take_second(self, second: int, rows: Rows, now: dict[str, int]) -> None:
        """Takes a second from a worker; the last worker's completes the progress line."""
        self._write(rows)
        counts = self._now[second]
        counts.update({**now, "workers": 1})
        if counts["workers"] >= min(self._workers, len(self._alive())):
            line = {"second": second, **{name: counts[name] for name in ("completed", "failed", "in_flight")}}
            _say(line)
            del self._now[second]

    def take_last(self, rows: Rows, lengths: Rows, generator: dict[str, Any], **_: Any) -> None:
        self._write(rows)
        for known, found in zip(self._lengths, lengths, strict=True):
            known += found
        self._generators.append(generator)

    def _statistics(self) -> list[server_statistics.Statistics | None]:
        return [server_statistics.fetch(part.url, part.protocol, part.model) for part in self._parts]

    def _text_tokens(self) -> list[Counter[str]]:
        return [padding_counters.fetch(part.metrics, part.model) for part in self._parts]

    def _gather(self, starts_at: float) -> None:
        settings = self._settings
        gevent.sleep(max(0.0, starts_at - time.perf_counter()))
        before, tokens_before = self._statistics(), self._text_tokens()
        gevent.sleep(max(0.0, starts_at + settings.duration_s - time.perf_counter()))
        give_up_at = time.perf_counter() + settings.timeout_s + 5
        while len(self._generators) < self._workers and time.perf_counter() < give_up_at:
            gevent.sleep(0.02)
        # The answers of a lost worker are lost too: its requests stay planned and count as never sent.
        statistics = map(server_statistics.difference, before, self._statistics())
        tokens = map(padding_counters.difference, tokens_before, self._text_tokens())
        found = zip(self._lengths, statistics, tokens, strict=True)
        measured = {
            "generator": together(self._generators, self._workers),
            "parts": [{"lengths": lengths, "server": server and {**server, **more}} for lengths, server, more in found],
        }
        with _on_disk():
            write_whole(self._folder / "measured.json", json.dumps(measured))
        self._finished = True
        _say({"finished": True})
        self._end()

    def stop(self) -> None:
        """Locust stops the load, as by the button on its page: without the rest of the plan nothing is measured."""
        if not self._finished and self._environment.web_ui is not None:
            _say({"stopped": True})

    def quit(self) -> None:
        """Locust ends, perhaps before the load: by Ctrl-C, `--run-time` or a shape."""
        if self._started and not self._finished:
            print("error: stopped before the end of the load; nothing was saved", file=sys.stderr)
            self._environment.process_exit_code = ExitCode.INVALID

    def _end(self) -> None:
        self._environment.process_exit_code = 0  # failed requests are a result, not a failure of Locust
        runner = self._environment.runner
        assert runner is not None
        if self._environment.web_ui is None:
            runner.quit()
        else:
            runner.stop()  # keeps the page open


def shared(part: dict[str, Any]) -> dict[str, Any]:
    """The settings that a master and its workers share: all but those that may differ by machine, such as paths."""
    replay = part["replay"] and {name: value for name, value in part["replay"].items() if name != "file"}
    return {name: value for name, value in part.items() if name not in OF_THE_MACHINE} | {"replay": replay}


def _say(what: dict[str, Any]) -> None:
    """Tells `deepseek loadtest` something, in a line of JSON.

    If Locust runs alone, the line goes to standard error: standard output has the statistics of Locust's `--json`.
    """
    alone = "LOCUST_PARENT" not in os.environ
    with suppress(BrokenPipeError):  # the reader has left, as in `... | head`; the load continues
        print(json.dumps(what), file=sys.stderr if alone else sys.stdout, flush=True)


@contextmanager
def _on_disk() -> Iterator[None]:
    """Ends the test with the reason if the block cannot write."""
    try:
        yield
    except OSError as error:
        _say({"unwritten": [error.errno, error.strerror]})
        sys.exit(ExitCode.BAD_INPUT)


def planned_rows(settings: LoadSettings, plan: np.ndarray | None = None) -> list[dict[str, Any]]:
    """The planned requests of all workers together, as one row per second; a replay has its own `plan`."""
    recorder = Recorder(open_loop=settings.open_loop)
    recorder.plan(planned_times_s(settings, warmup_only=plan is not None))
    if plan is not None:
        recorder.plan(plan["time_s"])
    return list(recorder.take())


def together(generators: list[dict[str, Any]], workers: int) -> dict[str, Any]:
    """The health of all workers: the worst value of each figure."""
    worst = {
        name: max((each[name] for each in generators), default=0.0)
        for name in ("thread_cpu", "process_cpu", "machine_cpu")
    }
    precedence = bool(generators) and all(each["precedence"] for each in generators)
    return {**worst, "precedence": precedence, "workers": workers, "workers_lost": workers - len(generators)}

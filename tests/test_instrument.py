"""The accuracy of the load generator, measured against an endpoint with a known log."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from deepseek_client import Unreachable
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.processes.children import free_ports
from loadtests.load.measure import measure
from loadtests.load.preflight import check
from loadtests.load.wire.client import WireClient
from loadtests.load.workers.sender import described
from loadtests.results.histogram import VALUES_US, Latency
from loadtests.results.run import Run, latest_run
from loadtests.results.settings import LoadSettings
from loadtests.results.stretch import NO_FILE, NO_PORT
from tests.conftest import RunHere
from tests.failing_servers import url_of
from tests.fake_endpoint import FakeEndpoint, nearest_rank
from tests.test_locustfile import SPEC

ROOT = Path(__file__).parent.parent
PROTOCOLS = ["grpc", "http"]
SPREAD = 0.5  # of log-normal delays
Protocol = Literal["grpc", "http"]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, own_build: Path) -> Path:
    """A folder with the specs of `tiny` and `other`; their runs and inputs are below tmp_path."""
    for place, name in enumerate(("tiny", "other")):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "deploy.toml").write_text(SPEC.format(name=name))
        (own_build / name).mkdir(parents=True)
        # Three short rows, then a long one: an order that a run must shuffle.
        rows = {f"{row:05d}/x": np.full((1, 2 if row < 30 else 7), place, np.float32) for row in range(40)}
        np.savez(own_build / name / "evaluation.npz", **rows)  # type: ignore[arg-type]
    return tmp_path / "models"


def settings(endpoint: FakeEndpoint, protocol: Protocol = "grpc", **changes: Any) -> LoadSettings:
    build = Path(os.environ["DEEPSEEK_BUILD"])
    fixed: dict[str, Any] = {"model": "tiny", "models": str(build.parent / "models"), "target": "onnxruntime"}
    fixed |= {"protocol": protocol, "url": url_of(endpoint, protocol), "inputs": str(build / "tiny" / "evaluation.npz")}
    fixed |= {"warmup_s": 0.0, "duration_s": 3.0, "timeout_s": 20.0}
    return LoadSettings(**fixed | changes)


def measured(wanted: LoadSettings) -> Run:
    spec = DeploymentSpec.of_model(wanted.model, wanted.models)
    return measure(wanted, spec, check(wanted, spec), Console(quiet=True))


def most_in_flight(endpoint: FakeEndpoint) -> int:
    """The most requests in flight at the server, by its log."""
    received_s, answered_s = endpoint.log()[:, 1:]
    return max(int((answered_s[: place + 1] > at_s).sum()) for place, at_s in enumerate(received_s))


def test_no_reported_percentile_is_below_the_servers_own_and_no_request_waits_for_a_stream() -> None:
    """`make bench BENCH=accuracy` measures how far above they are."""
    with FakeEndpoint(delay_ms=700, spread=SPREAD, most_streams=100) as endpoint:
        run = measured(settings(endpoint, rate_rps=300.0, duration_s=2.0))
        ordered = endpoint.true_ms()
        assert most_in_flight(endpoint) > 110  # more than one connection can carry
    assert run.window.ok == len(ordered) == 600
    # About 240 are in flight at once; the fast ones are answered first.
    for percent in (50, 90, 99, 99.9):
        intended, service = (run.window.latency(kind).percentile_ms(percent) for kind in ("intended", "service"))
        assert nearest_rank(ordered, percent) <= service <= intended * 1.001, percent


def above(run: Run, kind: Latency, limit_ms: float) -> int:
    """The number of answers that took longer."""
    return int(run.window.latency(kind).counts[limit_ms * 1000 < VALUES_US].sum())


def test_an_open_loop_shows_a_whole_stall_and_a_closed_loop_hides_it() -> None:
    with FakeEndpoint(delay_ms=5, stall_at=25, stall_s=1) as endpoint:
        opened = measured(settings(endpoint, rate_rps=50.0, arrivals="constant", duration_s=2.0))
        longest_ms = endpoint.true_ms()[-1]
    with FakeEndpoint(delay_ms=5, stall_at=25, stall_s=1) as endpoint:
        closed = measured(settings(endpoint, users=2, duration_s=2.0))
        endpoint.stop()
        assert most_in_flight(endpoint) == 2  # one of each user
    assert opened.window.latency("intended").max_ms >= longest_ms >= 1000
    # Requests planned during the stall, 50 of 100, wait for the rest of it: from 1 s down to 0.
    assert above(opened, "intended", 475) >= 25
    assert 5 * above(closed, "service", 475) < above(opened, "intended", 475)
    assert (closed.window.ok > 4, closed.window.failed) == (True, 0)


@pytest.mark.parametrize(
    ("faults", "changes", "kinds"),
    [
        ({"refuse_every": 2, "die_at": 60}, {}, ("ServerBusy", "Unreachable")),
        ({"stall_at": 60, "stall_s": 2}, {"max_in_flight": 5}, ("DeadlineExceeded", "dropped")),
    ],
    ids=["refuses and dies", "answers late, with more in flight than allowed"],
)
def test_each_request_to_a_faulty_server_is_answered_or_an_error(
    faults: dict, changes: dict, kinds: tuple[str, ...]
) -> None:
    with FakeEndpoint(**faults) as endpoint:
        run = measured(settings(endpoint, rate_rps=60.0, timeout_s=0.5, duration_s=2.0, **changes))
    assert run.window.ok > 0
    assert all(run.window.errors[kind] > 0 for kind in kinds), run.window.errors
    assert run.window.planned == run.window.ok + run.window.failed == 120


@pytest.fixture
def load_test(run_here: RunHere) -> RunHere:
    """`deepseek loadtest` with the settings."""

    def run(wanted: LoadSettings, *more: str) -> subprocess.CompletedProcess[str]:
        arguments = ["--models", wanted.models, "--protocol", wanted.protocol, "--url", wanted.url]
        arguments += ["--warmup-s", f"{wanted.warmup_s:g}", "--duration-s", f"{wanted.duration_s:g}"]
        return run_here("loadtest", "--model", wanted.model, *arguments, *more)

    return run


def test_a_rate_that_no_machine_holds_is_an_invalid_measurement_and_ends_in_time(
    models: Path, load_test: RunHere
) -> None:
    # A larger limit would exceed the limit on requests in flight.
    fast = SPEC.format(name="tiny").replace("p99_ms = 200", "p99_ms = 2")
    (models / "tiny" / "deploy.toml").write_text(fast)
    with FakeEndpoint() as endpoint:
        run = load_test(settings(endpoint, duration_s=1.0), "--rate", "1000000", "--timeout-s", "1")
    assert run.returncode == 3
    assert "of 1000000 planned requests were never sent" in run.stderr
    assert Run.load(latest_run("tiny")).window.planned == 1_000_000


WALL_CLOCK = """
import os, time
starter, wall = os.getpid(), time.time
time.time = lambda: wall() + 300 * (os.getpid() != starter) * (time.perf_counter() // 2)
"""


def test_workers_send_one_schedule_in_the_proportions_of_the_file_even_if_the_wall_clock_jumps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(WALL_CLOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with FakeEndpoint(delay_ms=5) as endpoint:
        run = measured(settings(endpoint, rate_rps=120.0, warmup_s=1.0, duration_s=1.0, workers=2))
    assert run.window.ok == run.window.planned == 120
    assert run.seconds[0].second == -1  # the warm-up
    assert run.generator["workers_lost"] == 0
    assert 0 < run.server["statistics"]["inference_count"] <= 240  # read at the window's ends, with requests in flight
    assert {length: found.planned for length, found in run.lengths.items()} == {"length 2": 90, "length 7": 30}
    first = run.lengths["length 7"].latency("intended")
    assert first.total == 30
    assert 5 <= first.percentile_ms(50) <= first.percentile_ms(99)


def test_a_generator_that_cannot_prepare_gives_a_one_line_error(load_test: RunHere) -> None:
    with FakeEndpoint(refuse_metadata=10_000) as endpoint:
        run = load_test(settings(endpoint), "--rate", "40", "--workers", "2")
    assert (run.returncode, run.stderr.count("Traceback")) == (3, 0)
    last = run.stderr.splitlines()[-1]
    assert re.search(r"the load generator could not be prepared: .*Exceeds maximum queue size", last)
    assert not any("Exceeds" in line for line in run.stderr.splitlines()[:-1])


def test_a_load_runs_although_the_tuned_values_no_longer_fit_and_the_server_is_busy_during_the_preparation(
    models: Path,
) -> None:
    stale = '[targets.onnxruntime]\nmeasured = ""\n[targets.onnxruntime.batching]\nmax_batch = 99\n'
    (models / "tiny" / "tuned.toml").write_text(stale + "max_queue_delay_us = 0\ninstances = 1\n")
    deploy = models / "tiny" / "deploy.toml"
    deploy.write_text('tuned = "tuned.toml"\n' + deploy.read_text())
    with pytest.raises(InputError, match=r"tuned\.toml"):
        DeploymentSpec.of_model("tiny", models)
    spec = DeploymentSpec.of_model("tiny", models, tuned=os.devnull)  # the same spec as in make tune
    with FakeEndpoint(refuse_metadata=3) as endpoint:
        wanted = settings(endpoint, "http", rate_rps=40.0, duration_s=1.0)
        run = measure(wanted, spec, check(wanted, spec), Console(quiet=True))
    assert run.window.ok == 40


def test_a_mix_sends_each_model_its_share(load_test: RunHere) -> None:
    with FakeEndpoint(delay_ms=5) as endpoint:
        run = load_test(settings(endpoint, duration_s=1.0), "--mix", "tiny:3, other:1", "--rate", "200", "--json")
    assert run.returncode in (0, 3), run.stderr
    shares = {Path(each["run"]).parents[1].name: each["planned"] for each in json.loads(run.stdout)["runs"]}
    assert shares == {"tiny": 150, "other": 50}


SLOW = """
import gevent
from loadtests import locustfile
from loadtests.locustfile import *

class Slow(locustfile.Worker):
    def __init__(self, *args, **named):
        gevent.sleep(1)  # the time to read inputs on a busy machine; Locust's master does not wait for it
        super().__init__(*args, **named)

locustfile.Worker = Slow
"""


def test_locusts_command_sends_the_whole_schedule_with_slow_workers_and_any_number_of_users(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    port = str(free_ports(1)[0])
    locust = [sys.executable, "-m", "locust", "-f", str(tmp_path / "slow.py"), "--headless"]
    locust += ["--settings", str(tmp_path / "settings.json"), "--processes", "2"]
    locust += ["--master-bind-host", "127.0.0.1", "--master-bind-port", port, "--master-port", port]
    with FakeEndpoint() as endpoint:
        wanted = settings(endpoint, "http", rate_rps=80.0, duration_s=1.0)
        (tmp_path / "settings.json").write_text(json.dumps([wanted.__dict__]))
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(locust, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    rows = [json.loads(line) for line in (tmp_path / "tiny.seconds.jsonl").read_text().splitlines()]
    assert ended.returncode == 0, ended.stderr
    assert sum(row["ok"] for row in rows) == sum(row["planned"] for row in rows) == 80
    assert json.loads((tmp_path / "measured.json").read_text())["generator"]["workers_lost"] == 0
    assert "tiny" in ended.stderr  # Locust's summary


WORKER = """
from gevent import monkey
monkey.patch_all()
import json, resource, sys
from pathlib import Path
from loadtests.load.workers import worker
from loadtests.results.settings import LoadSettings
def listen(request_type, name, response_time, response_length, response, context, exception):
    pass  # exactly the arguments that Locust documents
{before}
for wanted in json.loads(sys.argv[1]):
    told = {{}}
    made = worker.Worker([LoadSettings(**wanted)], Path(), tell=told.__setitem__, fire=listen)
    made.begin(rank=0, workers=1, starts_in_s=0.2)
    made.finished.wait()
    print(json.dumps(told["finished"]))
"""


def last_told(before: str, *wanted: LoadSettings) -> list[dict[str, Any]]:
    """The report of a worker to its master at the end of each load. Its process runs `before` first."""
    command = [sys.executable, "-c", WORKER.format(before=before), json.dumps([each.__dict__ for each in wanted])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("loop", [{"rate_rps": 100.0}, {"users": 100}], ids=["open", "closed"])
def test_a_lack_of_open_files_is_not_a_failure_of_the_server(loop: dict[str, Any]) -> None:
    few = "resource.setrlimit(resource.RLIMIT_NOFILE, (130, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"
    with FakeEndpoint(delay_ms=5000) as endpoint:
        (told,) = last_told(few, settings(endpoint, "http", **loop, duration_s=1.0, arrivals="constant"))
    (rows,) = told["rows"]
    assert (told["now"]["in_flight"], sum(row["ok"] for row in rows)) == (0, 30)
    assert rows[0]["errors"] == {NO_FILE: 70}


def test_real_time_priority_is_taken_only_if_asked_for() -> None:
    with FakeEndpoint() as endpoint:
        wanted = settings(endpoint, "http", rate_rps=10.0, duration_s=1.0)
        told = last_told("worker.take_precedence = lambda: True", wanted, replace(wanted, priority=True))
    assert [each["generator"]["precedence"] for each in told] == [False, True]


KINDS = {errno.EMFILE: NO_FILE, errno.ENFILE: NO_FILE, errno.EADDRNOTAVAIL: NO_PORT, errno.ECONNREFUSED: "Unreachable"}


@pytest.mark.parametrize("number", KINDS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_lack_of_files_or_ports_differs_from_an_unreachable_server(
    protocol: Protocol, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("socket.socket.connect", connect)
    with WireClient("127.0.0.1:9", protocol, retries=0) as client, pytest.raises(Unreachable) as caught:
        client.ready()
    assert described(caught.value).partition(": ")[0] == KINDS[number]

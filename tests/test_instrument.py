"""The load generator against an endpoint of which everything is known: is what it reports what happened?"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from deepseek_client import InferenceClient, Unreachable
from deepseek_client.plain_wires import GreenWire
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, SloSpec
from loadtests.check import check
from loadtests.measure import measure
from loadtests.results import NO_FILE, NO_PORT, Latency, Run, Settings, latest_run
from loadtests.sender import kind_of
from loadtests.slo import generator_problems, judge
from tests.conftest import run_module
from tests.fake_endpoint import Endpoint, FakeEndpoint, Faults
from tests.test_locustfile import SPEC, free_port

ROOT = Path(__file__).parent.parent
PROTOCOLS = ["grpc", "http"]
SPREAD = 0.5  # of log-normal delays
Protocol = Literal["grpc", "http"]


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the specs of `tiny` and `other`, whose runs and inputs lie below tmp_path."""
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    for place, name in enumerate(("tiny", "other")):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "deploy.toml").write_text(SPEC.format(name=name))
        (tmp_path / "build" / name).mkdir(parents=True)
        # Three short rows, then one long: in an order that a run must not keep.
        rows = {f"{row:05d}/x": np.full((1, 2 if row < 30 else 7), place, np.float32) for row in range(40)}
        np.savez(tmp_path / "build" / name / "evaluation.npz", **rows)  # type: ignore[arg-type]
    return tmp_path / "models"


def settings(endpoint: FakeEndpoint, protocol: Protocol = "grpc", **changes: Any) -> Settings:
    build = Path(os.environ["BUILD"])
    fixed: dict[str, Any] = {"model": "tiny", "models": str(build.parent / "models"), "target": "onnxruntime"}
    url = endpoint.grpc_url if protocol == "grpc" else endpoint.http_url
    fixed |= {"protocol": protocol, "url": url, "inputs": str(build / "tiny" / "evaluation.npz")}
    fixed |= {"warmup_s": 0.0, "duration_s": 3.0}
    return Settings(**fixed | changes)


def measured(wanted: Settings) -> Run:
    spec = DeploymentSpec.of_model(wanted.model, wanted.models)
    return measure(wanted, spec, check(wanted, spec), Console(quiet=True))


def true_ms(endpoint: FakeEndpoint) -> np.ndarray:
    """What the server itself says that each request of a run took, ascending."""
    endpoint.stop()
    received_s, answered_s = endpoint.log()[:, 1:]  # the first is the check before the run
    return np.sort(answered_s - received_s) * 1000


def nearest_rank(ordered: np.ndarray, percent: float) -> float:
    return float(ordered[math.ceil(percent / 100 * len(ordered) - 1e-9) - 1])


@pytest.mark.alone
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_reported_percentiles_are_the_servers_own_within_two_percent(protocol: Protocol) -> None:
    with FakeEndpoint(delay_ms=200, spread=SPREAD) as endpoint:
        run = measured(settings(endpoint, protocol, rate_rps=75.0, duration_s=4.0))
        ordered = true_ms(endpoint)
    assert run.window.ok == len(ordered) == 300
    # Some 17 are in flight at once, the fast ones among them answered first.
    kinds: tuple[Latency, ...] = ("intended", "service")
    for kind, percent in itertools.product(kinds, (50, 90, 99, 99.9)):
        found = run.window.latency(kind).percentile_ms(percent)
        assert found == pytest.approx(nearest_rank(ordered, percent), rel=0.02), (kind, percent)


def test_delays_are_so_smooth_that_an_error_of_two_percent_shows() -> None:
    endpoint = Endpoint(Faults(delay_ms=200, spread=SPREAD))
    ordered = np.sort([endpoint.admit()[1] for _ in range(2000)])
    assert np.median(ordered) == pytest.approx(0.2, rel=0.05)
    for right, wrong in ((50, 48), (90, 88), (99, 98), (99.9, 99.5)):  # whoever reads one percentile for another
        assert nearest_rank(ordered, right) > 1.02 * nearest_rank(ordered, wrong)


@pytest.mark.alone
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_intended_latency_shows_a_planned_stall_in_full(protocol: Protocol) -> None:
    with FakeEndpoint(delay_ms=5, stall_at=50, stall_s=2) as endpoint:
        opened = measured(settings(endpoint, protocol, rate_rps=50.0, arrivals="constant", duration_s=4.0))
        longest_ms = true_ms(endpoint)[-1]
    intended = opened.window.latency("intended")
    assert 2000 <= longest_ms < 2100
    assert intended.percentile_ms(99.9) == pytest.approx(longest_ms, rel=0.02)
    # Requests planned during the stall, 100 of 200, wait for what is left of it: from 2 s down to nothing.
    assert intended.percentile_ms(75) == pytest.approx(1000, rel=0.05)
    assert intended.percentile_ms(95) > 1750
    assert judge(opened, SloSpec(p95_ms=200)).objectives[0].status == "violated"


@pytest.mark.alone
def test_a_closed_loop_hides_a_stall() -> None:
    with FakeEndpoint(delay_ms=5, stall_at=50, stall_s=2) as endpoint:
        closed = measured(settings(endpoint, users=1, duration_s=4.0))
    assert closed.window.latency("service").percentile_ms(95) < 500
    assert closed.window.latency("service").max_ms == pytest.approx(2000, rel=0.02)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_refuses_half_the_requests_fails_half_of_them(protocol: Protocol) -> None:
    with FakeEndpoint(refuse_every=2) as endpoint:
        run = measured(settings(endpoint, protocol, rate_rps=60.0, duration_s=2.0))
    assert run.window.errors == {"ServerBusy": 60}
    assert run.window.ok == 60
    judgement = judge(run, SloSpec(p50_ms=1000, max_error_rate=0.4, objectives=("p99_ms < 1000",)))
    assert judgement.verdict in ("violated", "invalid")  # invalid where this machine is too busy to measure on


def test_a_server_that_refuses_everything_is_measured_and_violates_its_slo() -> None:
    with FakeEndpoint(refuse_every=1) as endpoint:
        run = command(settings(endpoint, duration_s=1.0), "--rate", "50")
    measured_run, slo = Run.load(latest_run("tiny")), SloSpec(p50_ms=1000)
    judged = judge(measured_run, slo)
    assert run.returncode in (0, 3), run.stderr  # 3 where this machine is too busy to measure within deploy.toml's SLO
    assert math.isinf(judged.objectives[0].seen)
    assert judged.verdict == ("invalid" if generator_problems(measured_run, slo) else "violated")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_resets_connections_leaves_errors_of_that_kind(protocol: Protocol) -> None:
    with FakeEndpoint(delay_ms=20, reset_every=30) as endpoint:
        run = measured(settings(endpoint, protocol, rate_rps=60.0))
    assert run.window.errors["ConnectionLost"] + run.window.errors["Unreachable"] == run.window.failed >= 5
    assert run.window.ok > 90  # the connections come back
    assert run.window.planned == run.window.ok + run.window.failed == 180


@pytest.mark.alone
def test_an_answer_in_a_hundred_that_is_slow_shows_above_p99() -> None:
    with FakeEndpoint(delay_ms=10, slow_every=100, slow_ms=800) as endpoint:
        run = measured(settings(endpoint, rate_rps=150.0, duration_s=4.0))
    service = run.window.latency("service")
    assert service.percentile_ms(98) < 400
    assert service.percentile_ms(99.5) == pytest.approx(800, rel=0.05)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_dies_in_the_middle_ends_neither_the_run_nor_its_account(protocol: Protocol) -> None:
    with FakeEndpoint(delay_ms=5, die_at=60) as endpoint:
        run = measured(settings(endpoint, protocol, rate_rps=60.0, timeout_s=1.0))
    assert 40 <= run.window.ok <= 59
    assert run.window.errors["Unreachable"] + run.window.errors["ConnectionLost"] > 100
    assert run.window.planned == run.window.ok + run.window.failed == 180


def command(wanted: Settings, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = ["--models", wanted.models, "--protocol", wanted.protocol, "--url", wanted.url]
    arguments += ["--warmup-s", f"{wanted.warmup_s:g}", "--duration-s", f"{wanted.duration_s:g}"]
    return run_module("loadtests.run", "--model", wanted.model, *arguments, *more)


def test_a_rate_that_no_machine_holds_is_an_invalid_measurement_and_ends_in_time(models: Path) -> None:
    fast = SPEC.format(name="tiny").replace("p99_ms = 200", "p99_ms = 2")  # else its requests in flight are refused
    (models / "tiny" / "deploy.toml").write_text(fast)
    with FakeEndpoint() as endpoint:
        run = command(settings(endpoint, duration_s=2.0), "--rate", "1000000", "--timeout-s", "1")
    assert run.returncode == 3
    assert re.search(r"of 2000000 planned requests were never sent", run.stderr)
    assert Run.load(latest_run("tiny")).window.planned == 2_000_000


@pytest.mark.parametrize("zero", [("--duration-s", "0", "--rate", "9"), ("--shape", "50x0")], ids=["duration", "shape"])
def test_a_schedule_of_zero_seconds_is_refused_in_one_line(zero: tuple[str, ...]) -> None:
    with FakeEndpoint() as endpoint:
        run = command(settings(endpoint), *zero)
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)


def test_lengths_come_in_the_proportions_of_the_file_and_are_told_apart() -> None:
    with FakeEndpoint(delay_ms=5) as endpoint:
        run = measured(settings(endpoint, rate_rps=60.0, duration_s=2.0, workers=2))
    assert {length: found.planned for length, found in run.lengths.items()} == {"length 2": 90, "length 7": 30}
    first = run.lengths["length 7"].latency("intended")
    assert first.total == 30
    assert 5 <= first.percentile_ms(50) <= first.percentile_ms(99)


@pytest.mark.alone
def test_requests_wait_for_no_stream_of_the_server_unseen() -> None:
    with FakeEndpoint(delay_ms=1000, most_streams=100) as endpoint:
        run = measured(settings(endpoint, rate_rps=250.0, duration_s=4.0))  # 250 are in flight
    assert run.window.ok == 1000
    assert run.window.latency("service").percentile_ms(90) < 1500


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_server_that_is_busy_while_the_generator_prepares_is_asked_again(protocol: Protocol) -> None:
    with FakeEndpoint(refuse_metadata=3) as endpoint:
        run = measured(settings(endpoint, protocol, rate_rps=40.0, duration_s=1.0))
    assert run.window.ok == 40


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_generator_that_cannot_prepare_says_why_in_one_line(workers: str) -> None:
    with FakeEndpoint(refuse_metadata=10_000) as endpoint:
        run = command(settings(endpoint), "--rate", "40", "--workers", workers)
    assert (run.returncode, run.stderr.count("Traceback")) == (3, 0)
    last = run.stderr.splitlines()[-1]
    assert re.search(r"the load generator could not be prepared: .*Exceeds maximum queue size", last)
    assert not any("Exceeds" in line for line in run.stderr.splitlines()[:-1])


def test_tuned_values_that_no_longer_fit_the_model_stop_no_load(models: Path) -> None:
    stale = '[targets.onnxruntime]\nmeasured = ""\n[targets.onnxruntime.batching]\nmax_batch = 99\n'
    (models / "tiny" / "tuned.toml").write_text(stale + "max_queue_delay_us = 0\ninstances = 1\n")
    deploy = models / "tiny" / "deploy.toml"
    deploy.write_text('tuned = "tuned.toml"\n' + deploy.read_text())
    with pytest.raises(InputError, match=r"tuned\.toml"):
        DeploymentSpec.of_model("tiny", models)
    spec = DeploymentSpec.of_model("tiny", models, tuned=os.devnull)  # as make tune has it
    with FakeEndpoint() as endpoint:
        wanted = settings(endpoint, rate_rps=40.0, duration_s=1.0)
        run = measure(wanted, spec, check(wanted, spec), Console(quiet=True))
    assert run.window.ok == 40


def test_a_mix_sends_each_model_its_share_and_is_judged_by_each_models_own_slo(models: Path) -> None:
    strict = (models / "other" / "deploy.toml").read_text().replace("p99_ms = 200", "p50_ms = 1")
    (models / "other" / "deploy.toml").write_text(strict)
    with FakeEndpoint(delay_ms=5) as endpoint:
        run = command(settings(endpoint), "--mix", "tiny:3, other:1", "--rate", "200", "--json")
    assert run.returncode in (0, 3), run.stderr
    assert {each["planned"] for each in json.loads(run.stdout)["runs"]} == {450, 150}
    judged = run_module("loadtests.slo", "--models", str(models), "--mix", "tiny:3,other:1", "--json")
    found = json.loads(judged.stdout)
    if run.returncode == 0:  # else this machine was too busy to measure on
        assert (judged.returncode, found["verdict"]) == (1, "violated")
        assert found["models"]["other"]["objectives"][0]["status"] == "violated"
    assert [each["name"] for each in found["models"]["tiny"]["objectives"]][:1] == ["p99_ms"]


@pytest.mark.alone
def test_a_closed_loop_of_a_mix_shares_the_users_out() -> None:
    with FakeEndpoint(delay_ms=20) as endpoint:
        run = command(settings(endpoint, duration_s=2.0), "--mix", "tiny:3,other:1", "--users", "4", "--workers", "2")
    assert run.returncode == 0, run.stderr
    tiny, other = (Run.load(latest_run(name)) for name in ("tiny", "other"))
    assert (tiny.settings.users, other.settings.users) == (3, 1)
    assert tiny.window.ok == pytest.approx(3 * other.window.ok, rel=0.1)


SLOW = """
import gevent
from loadtests import locustfile
from loadtests.locustfile import *

class Slow(locustfile.Share):
    def __init__(self, *args, **named):
        gevent.sleep(3)  # as reading inputs takes on a busy machine; Locust's master does not wait for it
        super().__init__(*args, **named)

locustfile.Share = Slow
"""


def test_workers_that_prepare_for_long_are_waited_for(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    with FakeEndpoint() as endpoint:
        wanted = settings(endpoint, "http", rate_rps=80.0, duration_s=1.0)
        (tmp_path / "settings.json").write_text(json.dumps(wanted.__dict__))
        port = str(free_port())
        locust = [sys.executable, "-m", "locust", "-f", str(tmp_path / "slow.py"), "--headless", "--processes", "2"]
        locust += ["--settings", str(tmp_path / "settings.json"), "--master-bind-host", "127.0.0.1"]
        locust += ["--master-bind-port", port, "--master-port", port]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        ended = subprocess.run(locust, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    rows = [json.loads(line) for line in (tmp_path / "tiny.seconds.jsonl").read_text().splitlines()]
    assert sum(row["ok"] for row in rows) == sum(row["planned"] for row in rows) == 80, ended.stderr


@pytest.mark.parametrize("processes", [(), ("--processes", "2")], ids=["one process", "two processes"])
def test_locusts_own_command_sends_the_whole_schedule_whatever_its_users(
    tmp_path: Path, processes: tuple[str, ...]
) -> None:
    with FakeEndpoint() as endpoint:
        wanted = settings(endpoint, "http", rate_rps=80.0, duration_s=2.0)
        (tmp_path / "settings.json").write_text(json.dumps(wanted.__dict__))
        port = ("--master-bind-port", str(free_port()), "--master-bind-host", "127.0.0.1")
        arguments = ("-f", "loadtests/locustfile.py", "--headless", "--settings", str(tmp_path / "settings.json"))
        locust = [sys.executable, "-m", "locust", *arguments, *processes]
        if processes:
            locust += [*port, "--master-port", port[1]]
        ended = subprocess.run(locust, cwd=ROOT, capture_output=True, text=True, timeout=120)
    rows = [json.loads(line) for line in (tmp_path / "tiny.seconds.jsonl").read_text().splitlines()]
    assert ended.returncode == 0, ended.stderr
    assert sum(row["ok"] for row in rows) == sum(row["planned"] for row in rows) == 160
    assert json.loads((tmp_path / "measured.json").read_text())["generator"]["workers_lost"] == 0
    assert "tiny" in ended.stderr  # Locust's own summary


GREENLETS = """
from gevent import monkey
monkey.patch_all()
import json, sys, time
from loadtests.results import Settings
from loadtests.sender import Share

ended = {}
share = Share([Settings(**json.loads(sys.argv[1]))], tell=ended.__setitem__, fire=lambda **_: None)
share.begin(time.time() + 0.2, worker=0, workers=1)
share.finished.wait()
print(ended["finished"]["now"]["in_flight"], sum(row["ok"] for row in ended["finished"]["rows"][0]), end=" ")
print(len(share.parts[0]._free))
"""


FEW_FILES = """
import resource
limits = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (130, limits[1]))
"""
ERRORS = """
print(json.dumps(ended["finished"]["rows"][0][0]["errors"]))
"""


@pytest.mark.parametrize("loop", [{"rate_rps": 100.0}, {"users": 100}], ids=["open", "closed"])
def test_connections_that_this_machine_has_no_file_for_are_no_failures_of_the_server(loop: dict[str, Any]) -> None:
    script = GREENLETS.replace("share =", f"{FEW_FILES}share =") + ERRORS
    with FakeEndpoint(delay_ms=1500) as endpoint:
        wanted = settings(endpoint, "http", **loop, duration_s=1.0, arrivals="constant")
        command = [sys.executable, "-c", script, json.dumps(wanted.__dict__)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    in_flight, answered, *_ = run.stdout.split()
    assert (in_flight, answered) == ("0", "30"), run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {NO_FILE: 70}


KINDS = {errno.EMFILE: NO_FILE, errno.ENFILE: NO_FILE, errno.EADDRNOTAVAIL: NO_PORT, errno.ECONNREFUSED: "Unreachable"}


@pytest.mark.parametrize("number", KINDS, ids=lambda number: errno.errorcode[number])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_generators_machine_lacks_is_told_from_a_server_that_is_not_there(
    protocol: Protocol, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("deepseek_client.inference.blocking_wire", lambda url, _: GreenWire(url))
    monkeypatch.setattr("socket.socket.connect", connect)
    with InferenceClient("127.0.0.1:9", protocol, retries=0) as client, pytest.raises(Unreachable) as caught:
        client.ready()
    assert kind_of(caught.value) == KINDS[number]


def test_an_open_loop_sends_from_as_many_greenlets_as_were_in_flight_at_once() -> None:
    with FakeEndpoint(delay_ms=20, stall_at=150, stall_s=0.5) as endpoint:
        wanted = settings(endpoint, "http", rate_rps=200.0, duration_s=2.0, arrivals="constant")
        command = [sys.executable, "-c", GREENLETS, json.dumps(wanted.__dict__)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    in_flight, answered, greenlets = map(int, run.stdout.split())
    assert (in_flight, answered) == (0, 400), run.stderr
    assert 50 < greenlets < 400  # a stall of half a second has a hundred of them wait; a slow machine some more

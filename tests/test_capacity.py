"""What the search for the highest rate is asked, says and leaves; and on a real Triton of known capacity."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import ModelMetadata
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, SloSpec
from loadtests.capacity import Capacity, capacity_path, find, head_of
from loadtests.knee import table, trial_line
from loadtests.results import Settings
from loadtests.search import Plan
from loadtests.slo import judge
from loadtests.trial import (
    Phase,
    Trial,
    Trials,
    bound_rates,
    judged,
    required_rps,
    seconds_needed,
    slo_at,
)
from serving.embedded import EmbeddedServer
from tests.test_results import saved_run, steady
from tests.test_search import PLAN, server_of, trial

ROOT = Path(__file__).parent.parent


SLO = SloSpec(
    p99_ms=50,
    rate_rps=100,
    max_error_rate=0.001,
    objectives=("p50_ms < 10 @ 200 rps", "throughput >= 150", "ndcg@10 >= 0.99 * baseline"),
)


def test_objectives_are_asked_of_the_rates_that_they_are_about() -> None:
    below, above = (slo_at(SLO, rate, 10).all_objectives() for rate in (120, 240))
    assert [line.name for line in below] == ["p99_ms", "rate_rps", "max_error_rate", "p50_ms"]
    assert [line.name for line in above] == ["p99_ms", "rate_rps", "max_error_rate"]
    assert all(line.rate_rps is None for line in (*below, *above))
    # The trial's own rate, less the errors allowed and one limit's worth of requests that are under way at the end.
    assert above[1].limit == pytest.approx(240 * (1 - 0.001 - 0.05 / 10))
    assert (bound_rates(SLO), required_rps(SLO)) == ([200], 200)
    assert [seconds_needed(SLO, rate) for rate in (100, 10, 5)] == pytest.approx([2 * 459 / 100, 60, 459 / 5])


def test_above_the_rate_of_its_only_line_no_limit_on_errors_is_made_up() -> None:
    slo = SloSpec(p99_ms=50, objectives=("error_rate < 1% @ 200 rps",))
    below, above = ({line.name: line.limit for line in slo_at(slo, rate, 10).all_objectives()} for rate in (150, 300))
    assert (below["error_rate"], "max_error_rate" in below) == (0.01, False)
    assert above["max_error_rate"] == 1
    assert above["rate_rps"] / 300 == pytest.approx(below["rate_rps"] / 150)


def test_a_trial_is_judged_at_its_own_rate(tmp_path: Path) -> None:
    run = saved_run(tmp_path, steady(0.009, count=600, lag_s=0), rate_rps=60.0)
    assert judge(run, SLO).verdict == "inconclusive"  # 100/s were not offered
    assert judged(run, slo_at(SLO, 60, 10), "bracket").outcome == "holds"
    slow = judged(saved_run(tmp_path, steady(0.03, count=600, lag_s=0), rate_rps=60.0), slo_at(SLO, 60, 10), "bracket")
    assert (slow.outcome, slow.failed, slow.p50_ms) == ("fails", ("p50_ms",), pytest.approx(30, rel=2e-3))
    lost = [(p, s, f, "ServerBusy" if i % 2 else None) for i, (p, s, f, _) in enumerate(steady(0.01, count=600))]
    busy = judged(saved_run(tmp_path, lost, rate_rps=60.0), slo_at(SLO, 60, 10), "bracket")
    assert (busy.overloaded, busy.error_rate, busy.p99_ms) == (True, 0.5, None)
    assert "throughput" in busy.failed


HEAD: dict[str, Any] = {"model": "tiny", "target": "onnxruntime", "precision": "fp32", "url": "127.0.0.1:8001"}
HEAD |= {"protocol": "grpc", "objectives": ("p99_ms ≤ 50.0 ms",), "started": "2026-11-25T12:00:00+00:00"}


@pytest.mark.parametrize(
    ("facts", "code", "sentence"),
    [
        (
            {"capacity_rps": 95.0, "confirmed": True, "limited_by": "p99_ms", "first_failing_rps": 99.0},
            0,
            "capacity 95/s",
        ),
        (
            {
                "capacity_rps": 95.0,
                "confirmed": True,
                "limited_by": "p99_ms",
                "first_failing_rps": 99.0,
                "required_rps": 100.0,
            },
            1,
            "asks for 100/s",
        ),
        ({"limited_by": "p99_ms", "trials": (trial(2, "fails"),)}, 1, "no rate holds, down to 2/s"),
        (
            {"capacity_rps": 95.0, "confirmed": True, "limited_by": "generator"},
            3,
            "at least 95/s; the generator, not the server",
        ),
        ({"capacity_rps": 95.0, "limited_by": "time"}, 3, "at least 95/s, not confirmed: the limit on time"),
        (
            {"limited_by": "p99_ms", "trials": (trial(2, "holds"), trial(2, "fails", "confirm"))},
            3,
            "no longer run confirmed",
        ),
    ],
    ids=["found", "too little", "none", "generator", "time", "unconfirmed"],
)
def test_the_exit_code_and_the_sentence_say_what_is_known(facts: dict[str, Any], code: int, sentence: str) -> None:
    capacity = Capacity(**HEAD, **facts)
    assert capacity.exit_code == code
    assert sentence in capacity.sentence


def test_a_result_reads_back_and_a_broken_one_is_one_clear_line(tmp_path: Path) -> None:
    capacity = Capacity(**HEAD, trials=(trial(2, "fails", p99_ms=None),))
    capacity.save(tmp_path / "capacity.json")
    assert Capacity.load(tmp_path / "capacity.json") == capacity
    assert [path.name for path in tmp_path.iterdir()] == ["capacity.json"]
    (tmp_path / "capacity.json").write_text(capacity.model_dump_json().replace('"fails"', '"wins"'))
    with pytest.raises(InputError, match=r"trials\.0\.outcome: seen 'wins'.*make capacity"):
        Capacity.load(tmp_path / "capacity.json")
    with pytest.raises(InputError, match="no such file; make it with: make capacity"):
        Capacity.load(tmp_path / "absent.json")


def test_an_interrupted_search_leaves_its_trials_and_goes_on_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    made: list[float] = []

    def attempt(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        if len(made) == 3:
            made.append(0)
            raise KeyboardInterrupt
        made.append(rate_rps)
        return trial(rate_rps, "holds" if rate_rps < 95 else "fails", phase, duration_s=duration_s)

    with pytest.raises(KeyboardInterrupt):
        find(Capacity(**HEAD), PLAN, attempt, Console())
    assert "80/s" in capsys.readouterr().out
    assert not capacity_path("tiny").exists()
    capacity = find(Capacity(**HEAD), PLAN, attempt, Console())
    assert made.count(20) == made.count(40) == 1
    assert [each.rate_rps for each in capacity.trials][:3] == [20, 40, 80]
    assert sorted(path.name for path in (tmp_path / "tiny").iterdir()) == ["capacity.json"]
    other = find(Capacity(**HEAD | {"url": "127.0.0.1:9001"}), PLAN, attempt, Console())
    assert len(made) == 4 - 1 + len(capacity.trials) - 3 + len(other.trials) + 1


@pytest.mark.parametrize(
    ("start_rps", "longest_s", "sentence"),
    [
        (0.05, 1e9, "capacity 0.0917/s, limited by p99_ms"),
        (0.05, 1800, "capacity not to be said: the limit on time was reached"),
        (2e6, 1e9, "capacity at least 1"),
    ],
    ids=["slow", "too slow for the time", "fast"],
)
def test_a_search_may_start_outside_the_rates_that_it_looks_through(
    start_rps: float, longest_s: float, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    plan = Plan(start_rps=start_rps, duration_s=10, needed_s=lambda rate_rps: 459 / rate_rps, max_s=longest_s)
    limit = 1e9 if start_rps > 1 else 0.095
    attempt = server_of(lambda rate_rps, _: "holds" if rate_rps < limit else "fails")
    capacity = find(Capacity(**HEAD), plan, attempt, Console(quiet=True))
    assert sentence in capacity.sentence


def test_a_rate_with_more_in_flight_than_the_generator_can_have_is_its_limit_and_not_sent(tmp_path: Path) -> None:
    about: dict[str, Any] = {"model": "image", "models": "", "target": "onnxruntime", "protocol": "grpc"}
    spec = DeploymentSpec.load("tests/models/image")
    spec = spec.model_copy(update={"slo": SloSpec(p99_ms=2000)})
    served = ModelMetadata(name="image", versions=("1",), platform="", inputs=(), outputs=(), max_batch_size=8)
    settings = Settings(**about, url="nowhere:1", inputs="")
    trials = Trials(spec=spec, settings=settings, served=served, folder=tmp_path, console=Console(quiet=True))
    found = trials(5000, "bracket", 10, 0)
    assert (found.outcome, found.overloaded, found.run) == ("invalid", False, "")
    assert "10000 requests may be in flight and in time; a worker can have 8192" in found.problems[0]
    assert "not sent" in trial_line(found, again=False)
    assert list(table([found], None).columns[2].cells) == ["-"]


def test_a_search_does_not_go_on_over_another_version_of_the_model() -> None:
    spec = DeploymentSpec.load("tests/models/image")
    about: dict[str, Any] = {"model": "image", "models": "", "target": "onnxruntime", "protocol": "grpc"}
    settings = Settings(**about, url="nowhere:1", inputs="", rate_rps=1.0, tls=True)  # behind a gateway: not asked
    served = ModelMetadata(name="image", versions=("1",), platform="", inputs=(), outputs=(), max_batch_size=8)
    heads = [head_of(spec, settings, replace(served, versions=versions)) for versions in (("1",), ("1",), ("1", "2"))]
    first, same, other = (head.model_copy(update={"started": ""}) for head in heads)
    assert first == same != other


MODEL = '''
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """y = x after DELAY_S seconds, one request at a time."""

    def execute(self, requests):
        answers = []
        for request in requests:
            time.sleep(DELAY_S)
            x = np.from_dlpack(pb_utils.get_input_tensor_by_name(request, "x"))
            answers.append(pb_utils.InferenceResponse([pb_utils.Tensor.from_dlpack("y", x + 0)]))
        return answers
'''
CONFIG = """
name: "tiny" backend: "python" max_batch_size: 1 instance_group { kind: KIND_CPU }
input { name: "x" data_type: TYPE_FP32 dims: [2] } output { name: "y" data_type: TYPE_FP32 dims: [2] }
"""
SPEC = """
name = "tiny"
inputs.x = { dtype = "float32", shape = ["batch", 2] }
outputs.y = { dtype = "float32", shape = ["batch", 2] }
axes.batch = { min = 1, opt = 1, max = 1 }
slo = { p50_ms = 100, rate_rps = 10 }
"""


def write_sleeper(folder: Path, delay_s: float, name: str = "repository") -> Path:
    """A repository whose model answers 1 / delay_s requests/s at most; with its spec and inputs beside it."""
    version = folder / name / "tiny" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(MODEL.replace("DELAY_S", str(delay_s)))
    (version.parent / "config.pbtxt").write_text(CONFIG)
    (folder / "models" / "tiny").mkdir(parents=True, exist_ok=True)
    (folder / "models" / "tiny" / "deploy.toml").write_text(SPEC)
    rows = {f"{row:05d}/x": np.full((1, 2), row, np.float32) for row in range(20)}
    np.savez(folder / "inputs.npz", **rows)  # type: ignore[arg-type]
    return folder / name


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[EmbeddedServer, Path]]:
    """A Triton that answers just under 50 requests/s."""
    folder = tmp_path_factory.mktemp("sleeper")
    repository = write_sleeper(folder, 0.02)
    with EmbeddedServer(repository, http_port=0, grpc_port=0, metrics_port=0, log_path=folder / "triton.log") as server:
        yield server, folder


def command(sleeper: tuple[EmbeddedServer, Path], build: Path, *more: str) -> subprocess.Popen[str]:
    """`python -m loadtests.capacity` on it, with short trials of evenly spaced requests."""
    server, folder = sleeper
    arguments = [
        "--model",
        "tiny",
        "--models",
        str(folder / "models"),
        "--url",
        server.grpc_url,
        "--arrivals",
        "constant",
    ]
    arguments += ["--inputs", str(folder / "inputs.npz"), "--duration-s", "3", "--warmup-s", "0.5", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "loadtests.capacity", *arguments],
        cwd=ROOT,
        env={**os.environ, "BUILD": str(build)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_server_that_sleeps_20_ms_a_request_has_a_capacity_just_under_50(
    sleeper: tuple[EmbeddedServer, Path], tmp_path: Path
) -> None:
    with command(sleeper, tmp_path, "--start-rps", "30", "--max-s", "30", "--json") as process:
        output, errors = process.communicate(timeout=300)
    capacity = Capacity.model_validate_json(output)
    assert process.returncode in (0, 3), errors  # 3 where this machine is too busy to measure on
    assert capacity.capacity_rps is not None, errors
    assert 20 <= capacity.capacity_rps <= 50  # a busy machine sleeps longer
    assert (capacity.settings.max_batch, capacity.settings.instances) == (1, 1)
    assert capacity.machine["cores"]
    assert Capacity.load(tmp_path / "tiny" / "capacity.json") == capacity
    assert not (tmp_path / "tiny" / "loadtests").exists()  # of which the latest is judged


def test_ctrl_c_leaves_what_was_measured(sleeper: tuple[EmbeddedServer, Path], tmp_path: Path) -> None:
    part = tmp_path / "tiny" / "capacity.part.json"
    with command(sleeper, tmp_path, "--start-rps", "10") as process:
        deadline = time.monotonic() + 60
        while not part.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "goes on from there" in " ".join(errors.split())
    assert json.loads(part.read_text())["trials"][0]["rate_rps"] == 10
    assert Capacity.load(part).limited_by == "interrupted"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--url", "127.0.0.1:9"), "127.0.0.1:9"),
        (("--duration-s", "0"), "--duration-s 0: it must be more than 0"),
        (("--start-rps", "nan"), "--start-rps nan: it must be more than 0"),
        (("--model", "absent"), "no model 'absent'"),
    ],
    ids=["no server", "duration", "start", "model"],
)
def test_what_is_wrong_is_said_in_one_line(
    sleeper: tuple[EmbeddedServer, Path], tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    with command(sleeper, tmp_path, *flags) as process:
        _, errors = process.communicate(timeout=120)
    assert (process.returncode, len(errors.splitlines())) == (2, 1)
    assert message in errors

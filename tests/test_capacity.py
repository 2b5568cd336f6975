"""The capacity search's conclusion, output and files on computed servers, and the command on a real Triton."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cli.main import values_of
from deepseek.spec import InputError, SloSpec
from loadtests.search.capacity import find, first_rate, main, table, trial_line
from loadtests.search.capacity_result import Capacity
from loadtests.search.rate_trial import RateTrial
from serving.embedded.launcher import EmbeddedServer
from tests.computed_server import runner, server_of, trial
from tests.conftest import FREE
from tests.sleeper import write_sleeper

HEAD: dict[str, Any] = {"model": "tiny", "target": "onnxruntime", "precision": "fp32", "url": "127.0.0.1:8001"}
HEAD |= {"protocol": "grpc", "objectives": ("p99_ms ≤ 50.0 ms",), "started": "2026-11-25T12:00:00+00:00"}
FOUND: dict[str, Any] = {"capacity_rps": 95.0, "confirmed": True, "limited_by": "p99_ms", "first_failing_rps": 99.0}
REFUTED = (trial(2, "holds"), trial(2, "fails", "confirm"))
# A repetition counts in place of the first, and what the proof of 95/s refutes does not.
STALLED = (trial(100, "fails", violated=True), trial(100, "holds"), trial(94, "fails", violated=True))
NOW = "2026-11-25T00:00:00+00:00"


@pytest.mark.parametrize(
    ("facts", "code", "sentence"),
    [
        (FOUND, 0, "capacity 95/s, limited by p99_ms (fails at 99/s)"),
        (FOUND | {"required_rps": 95.0}, 0, "the SLO asks for 95/s"),
        (FOUND | {"required_rps": 100.0, "trials": (trial(98, "fails", violated=True),)}, 1, "the SLO asks for 100/s"),
        (
            FOUND | {"required_rps": 100.0, "trials": (trial(99, "fails"), trial(105, "fails", violated=True))},
            3,
            "100/s, which is neither proved nor violated; decide with: make loadtest verdict MODEL=tiny",
        ),
        (FOUND | {"required_rps": 100.0, "trials": STALLED}, 3, "neither proved nor violated"),
        ({"limited_by": "p99_ms", "trials": (trial(2, "fails"),)}, 1, "no rate holds, down to 2/s: p99_ms"),
        ({"limited_by": "generator"}, 3, "capacity inconclusive; the generator, not the server"),
        (FOUND | {"limited_by": "generator"}, 3, "at least 95/s; the generator, not the server"),
        (FOUND | {"limited_by": "time", "confirmed": False}, 3, "about 95/s, not confirmed: the limit on time"),
        (
            {"limited_by": "time", "trials": (trial(2, "fails"),)},
            3,
            "2/s fails (p99_ms), and no rate holds so far: the",
        ),
        (FOUND | {"limited_by": "samples", "confirmed": False}, 3, "not confirmed: too few samples"),
        (FOUND | {"limited_by": "trials", "confirmed": False}, 3, "limit on trials was reached; raise MAX_TRIALS="),
        (FOUND | {"limited_by": "walk", "confirmed": False}, 3, "it met the limit; start again from there (RATE=95)"),
        ({"limited_by": "p99_ms", "trials": REFUTED}, 3, "every longer run to confirm a rate failed"),
    ],
)
def test_exit_code_and_sentence(facts: dict[str, Any], code: int, sentence: str) -> None:
    capacity = Capacity(**HEAD, **facts)
    assert (capacity.exit_code, sentence in capacity.sentence) == (code, True), capacity.sentence


def test_a_result_reads_back_and_a_broken_one_gives_a_one_line_error(tmp_path: Path) -> None:
    capacity, path = Capacity(**HEAD, **FOUND, trials=(trial(2, "fails", p99_ms=None),)), tmp_path / "capacity.json"
    capacity.save(path)
    assert Capacity.load(path, "tiny") == capacity
    assert [each.name for each in tmp_path.iterdir()] == ["capacity.json"]
    path.write_text(capacity.model_dump_json().replace('"fails"', '"wins"'))
    with pytest.raises(InputError, match=r"trials\.0\.outcome: seen 'wins'.*make capacity"):
        Capacity.load(path, "tiny")
    path.write_text(capacity.model_dump_json().replace('"capacity_rps":95.0', '"capacity_rps":0'))
    with pytest.raises(InputError, match=r"capacity_rps: seen 0.*make capacity"):
        Capacity.load(path, "tiny")
    with pytest.raises(InputError, match="no such file; make it with: make capacity MODEL=tiny"):
        Capacity.load(tmp_path / "absent.json", "tiny")


def test_the_search_starts_at_the_lowest_rate_of_the_slo() -> None:
    slo = SloSpec(p99_ms=50, rate_rps=300)
    bound = SloSpec(p99_ms=50, rate_rps=300, objectives=("p50_ms < 10 @ 200 rps",))
    assert [first_rate(None, each) for each in (SloSpec(p99_ms=50), slo, bound)] == [50, 300, 200]
    assert first_rate(400, slo) == 400


def test_a_search_may_start_below_the_usual_rates(tmp_path: Path) -> None:
    on_server = runner(tmp_path, server_of(lambda rate_rps, _: "holds" if rate_rps < 0.095 else "fails"))
    capacity = find(on_server, on_server.plan(start_rps=0.05, duration_s=10, max_s=1e9), NOW)
    assert capacity.sentence.startswith("capacity 0.0917/s, limited by p99_ms")
    assert (capacity.model, capacity.settings.max_batch, capacity.served_versions) == ("image", 8, ("1",))


def test_the_table_of_a_fast_service_fits_100_columns() -> None:
    figures: dict[str, Any] = {"achieved_rps": 12345.6, "p50_ms": 1265.0, "p99_ms": 4321.0, "duration_s": 10}
    failed = ("throughput", "p50_ms", "error_rate")
    found = RateTrial(rate_rps=12400, phase="bracket", outcome="fails", run="run", failed=failed, **figures)
    out = io.StringIO()
    Console(width=100, file=out, markup=False).print(table([found], None))
    shown = out.getvalue()
    assert "answered" in shown
    assert "12345.6/s" in shown


def test_a_rate_with_too_many_requests_in_flight_is_the_generators_limit_and_not_sent(tmp_path: Path) -> None:
    found = runner(tmp_path, slo=SloSpec(p99_ms=2000))(5000, "bracket", 10, 0)
    assert (found.outcome, found.overloaded, found.sent) == ("invalid", False, False)
    assert "10000 requests may be in flight and in time; a worker can have 8192" in found.problems[0]
    assert "not sent" in trial_line(found)
    assert list(table([found], None).columns[2].cells) == ["-"]


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """The options of a search with short trials on a Triton that answers just under 50 requests/s."""
    folder = tmp_path_factory.mktemp("sleeper")
    repository = write_sleeper(folder, 0.02)
    model = ["--model", "tiny", "--models", str(folder / "models"), "--inputs", str(folder / "inputs.npz")]
    short = ["--arrivals", "constant", "--duration-s", "3", "--warmup-s", "0.5"]
    with EmbeddedServer(repository, **FREE, log_path=folder / "triton.log") as server:
        yield [*model, *short, "--url", server.grpc_url]


@pytest.mark.slow
def test_the_command_measures_a_real_server(
    sleeper: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    monkeypatch.setattr("loadtests.slo.judge.generator_problems", lambda *_: [])  # a busy machine must not fail this
    code = main(values_of("capacity", *sleeper, "--start-rps", "200", "--max-trials", "3", "--json"))
    capacity = Capacity.model_validate_json(capsys.readouterr().out)
    assert code == capacity.exit_code == 3
    overloaded = capacity.trials[0]
    assert (overloaded.rate_rps, overloaded.overloaded, overloaded.achieved_rps <= 50) == (200, True, True)
    assert capacity.trials[1].rate_rps <= 50
    assert (capacity.settings.max_batch, capacity.settings.instances) == (1, 1)
    assert capacity.machine["cores"]
    assert Capacity.load(tmp_path / "tiny" / "capacity.json", "tiny") == capacity
    assert "requests/s" in (tmp_path / "tiny" / "capacity.html").read_text()
    assert not (tmp_path / "tiny" / "loadtests").exists()  # `deepseek verdict` judges the latest there


def test_ctrl_c_ends_the_command_and_leaves_no_result(sleeper: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "capacity", *sleeper, "--start-rps", "10"]
    environment = {**os.environ, "DEEPSEEK_BUILD": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert next(line for line in process.stderr if line.startswith("bracket")).split()[1] == "10/s"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "10/s" in errors.partition("┏")[2]  # the trials so far
    assert not (tmp_path / "tiny" / "capacity.json").exists()


def test_too_little_time_for_one_trial_is_bad_input_and_keeps_the_last_result(
    sleeper: list[str], own_build: Path
) -> None:
    said = r"the first trial, at .*/s, takes (\d+) s; .*BUDGET_S="
    with pytest.raises(InputError, match=f"--max-s 0.5: {said}") as refused:
        main(values_of("capacity", *sleeper, "--max-s", "0.5"))
    least = re.search(said, str(refused.value))
    assert least is not None
    with pytest.raises(InputError, match=said):
        main(values_of("capacity", *sleeper, "--max-s", least[1]))
    assert not list(own_build.rglob("capacity.*"))

"""What a release keeps and says: its journal, the numbers it gives, the errors of its steps, the judgement of a shadow."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from deepseek_client import ServerBusy

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement, SloSpec
from loadtests import shadow, steady
from loadtests.shadow import Differences, Shadow, judged
from loadtests.steady import Sent, check_before, rate_of, result_of
from serving import release, rollback
from serving.candidate import Candidate
from serving.commands import Answer, ask, error_of
from serving.live import MOST_RPS, Live
from serving.release import Release
from serving.releases import Journal, LeftOut, Steps, alone, history, last_number, read, report
from serving.rollback import Rollback
from serving.versions import newest, stage


def test_what_was_not_made_here_is_not_released(tmp_path: Path) -> None:
    (tmp_path / "text" / "3").mkdir(parents=True)
    with pytest.raises(InputError, match=r"version 3 has no manifest.json"):
        stage(tmp_path / "text", number=4, folder=tmp_path / "new")
    with pytest.raises(InputError, match="no version"):
        stage(tmp_path / "other", number=4, folder=tmp_path / "new")


def test_over_what_was_not_made_here_nothing_is_released(tmp_path: Path) -> None:
    (tmp_path / "live" / "text" / "3").mkdir(parents=True)
    args = Namespace(model="text", models="tests/models", repository=tmp_path / "live", new=tmp_path, new_build=None)
    journal = Journal(tmp_path, "release", 4, before=3)
    candidate = Candidate(args, DeploymentSpec.load("tests/models/text"), journal, 4)
    with pytest.raises(InputError, match=r"live/text/3: no manifest\.json, so it was not made by make engine"):
        candidate.stage()


def test_a_journal_cut_off_in_a_line_tells_what_is_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "release", 4, before=3)
    steps = Steps(journal, as_json=True)
    steps.do("stage", lambda: "a copy")
    steps.do("shadow", lambda: LeftOut("nothing served"))
    journal.write(step="switch", state="started")
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"step": "switch", "sta')
    record = read(journal.folder)
    assert record is not None
    assert [step.state for step in record.steps] == ["holds", "left out", "started"]
    assert (record.outcome, record.stopped_in) == ("not finished", record.steps[-1])
    assert "Stopped in switch: started" in report(record, "text")


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (GateFailed, "failed"),
        (InvalidMeasurement, "inconclusive"),
        (InputError, "wrong input"),
        (KeyboardInterrupt, "interrupted"),
    ],
)
def test_how_a_step_ended_is_in_the_journal_before_the_error_goes_on(
    tmp_path: Path, error: type[BaseException], state: str
) -> None:
    journal = Journal(tmp_path, "release", 4)

    def step() -> str:
        raise error("why | not")

    with pytest.raises(error):
        Steps(journal, as_json=True).do("parity", step)
    record = read(journal.folder)
    assert record is not None
    assert (record.steps[0].state, record.steps[0].said) == (state, "why | not")
    assert r"why \| not" in report(record, "text")


def test_one_release_at_a_time_and_no_number_serves_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILD", str(tmp_path))
    with alone("text") as releases:
        with pytest.raises(InputError, match="another release or rollback of text is under way"), alone("text"):
            pass
        Journal(releases, "release", 4, before=3)
        assert last_number("text", tmp_path / "repository" / "text") == 0  # it never came into the repository
        assert history("text")[0].outcome == "under way"
        Journal(releases, "rollback", 3, before=5)
    assert last_number("text", tmp_path / "repository" / "text") == 5
    assert [record.outcome for record in history("text")] == ["not finished", "not finished"]


def test_the_exit_code_of_a_command_becomes_its_error() -> None:
    assert isinstance(error_of(1, "x", "why"), GateFailed)
    assert "ended with status 137" in str(error_of(137, "loadtests.run", ""))
    answer = ask("serving.releases", "--nonsense")
    assert (answer.code, answer.data) == (2, None)
    with pytest.raises(InputError, match="--nonsense"):
        answer.checked()
    with pytest.raises(InvalidMeasurement, match="x ended with status 0, but what it printed is no JSON"):
        Answer(name="x", code=0, data=None, reason="").checked()


def test_a_command_runs_in_the_build_folder_that_it_is_given(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUILD", str(tmp_path / "there"))
        with alone("text") as releases:
            Journal(releases, "rollback", 3, before=5)
    asked = ("serving.releases", "--model", "text", "--models", "tests/models", "--json")
    assert [each["before"] for each in ask(*asked, build=str(tmp_path / "there")).data["releases"]] == [5]
    assert ask(*asked, build=str(tmp_path / "here")).data["releases"] == []


@pytest.mark.parametrize(
    ("command", "flags", "said"),
    [
        ("release", "--requests 199", "--requests 199: 200 or more are needed"),
        ("release", "--load-rate 201", "--load-rate 201: more than 0 and at most 200 requests/s"),
        ("rollback", "--load-rate 0", "--load-rate 0: more than 0"),
        ("release", "--threshold 0", "--threshold 0: it must be more than 0"),
        ("release", "--rate inf", "--rate inf: it must be more than 0"),
        ("release", "--rate 19", "--rate 19: rate_rps = 20 of the SLO"),
        ("release", "--parity-rows 0", "--parity-rows 0: it must be more than 0"),
        ("rollback", "--switch-s -1", "--switch-s -1: it must be more than 0"),
        ("release", "--target plan", "invalid choice: 'plan'"),
        ("release", "--new-build b", "--new-build b: it is that of another repository"),
    ],
    ids=lambda text: str(text).split(":")[0],
)
def test_what_no_gate_could_do_is_refused_before_the_first(
    command: str, flags: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [command, "--model", "text", "--models", "tests/models", *flags.split()])
    with pytest.raises((InputError, SystemExit)) as refused:
        (release if command == "release" else rollback).main()
    assert said in str(refused.value) + capsys.readouterr().err


def test_the_limits_of_a_release_are_those_of_the_loads_that_it_runs() -> None:
    assert (release.LEAST_REQUESTS, MOST_RPS) == (shadow.LEAST_REQUESTS, steady.MOST_RPS)


def test_make_hands_on_what_was_given() -> None:
    command = [
        "make",
        "-n",
        "release",
        "rollback",
        f"VENV={sys.prefix}",
        "NEW=other",
        "NEW_BUILD=theirs",
        "RATE=5",
        "TARGET=onnxruntime",
    ]
    given = subprocess.run([*command, "URL=host:1"], capture_output=True, text=True).stdout
    assert "--url host:1" in given
    assert "--new='other'" in given
    assert "--new-build='theirs'" in given
    assert "--rate='5'" in given
    assert "--may-be-absent" not in given
    default = subprocess.run([*command, "GRPC_PORT=9001"], capture_output=True, text=True).stdout
    assert default.count("--url 127.0.0.1:9001 --protocol grpc  --may-be-absent") == 2


def test_make_without_a_repository_releases_the_build_once_it_is_up_to_date(tmp_path: Path) -> None:
    where = [f"VENV={sys.prefix}", "MODEL=text", "MODELS=tests/models", f"BUILD={tmp_path}", f"REPOSITORY={tmp_path}/r"]
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    told = subprocess.run(["make", "-n", "release", *where], capture_output=True, text=True, env=kept).stdout
    assert 0 < told.index("-m export.compare") < told.index("-m serving.release")
    assert "--new" not in told
    assert "-m export.to_triton" not in told  # into the repository it comes by the release alone


def told(*arguments: str) -> str:
    """What make would run."""
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", "-n", *arguments, f"VENV={sys.prefix}"], capture_output=True, text=True, env=kept
    ).stdout


def test_make_stack_is_what_make_engine_does_for_the_stack_and_publishes_nothing(tmp_path: Path) -> None:
    where = ("MODEL=text", "MODELS=tests/models", f"BUILD={tmp_path}", f"REPOSITORY={tmp_path}/r", "GATEWAY_HOSTS=a b")
    (stack,) = (line for line in told("stack", *where).splitlines() if "-m " in line)
    assert "-m serving.stack --model text" in stack
    assert " ".join(stack.split()) in " ".join(told("engine", *where).split())


def test_make_engine_publishes_what_was_refused_only_where_it_is_told_to(tmp_path: Path) -> None:
    where = ("engine", "MODEL=text", "MODELS=tests/models", f"BUILD={tmp_path}", f"REPOSITORY={tmp_path}/r")
    assert "--anyway" not in told(*where)
    assert f"--repository {tmp_path}/r --anyway" in told(*where, "ANYWAY=1")


@pytest.fixture
def hung() -> Iterator[str]:
    """The address of a server that takes connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def live_arguments(url: str, **more: Any) -> Namespace:
    """Of the server that callers have."""
    facts = {"model": "text", "models": "tests/models", "protocol": "http", "ca_cert": None, "may_be_absent": True}
    return Namespace(url=url, load_rate=None, switch_s=1, json=True, **facts, **more)


def test_only_where_nothing_listens_is_there_no_server(hung: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"did not answer .*; something may serve at 127"):
        Live.find(live_arguments(hung, repository=tmp_path), 1)
    absent = Live.find(live_arguments("127.0.0.1:9", repository=tmp_path), 1)
    assert (absent.version, absent.absent) == (None, "nothing listens at 127.0.0.1:9")


def test_a_server_that_came_up_during_the_gates_is_not_switched_unwatched(
    hung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Live, "look", lambda live: (None, "it did not answer"))
    args = live_arguments(hung, repository=tmp_path)
    (tmp_path / "text" / "1").mkdir(parents=True)
    candidate: Any = SimpleNamespace(args=args, journal=None, number=2, model=tmp_path / "text", before=1, folder=None)
    with pytest.raises(InputError, match="it did not answer; something may serve"):
        Release(candidate, Live(args=args, version=None, absent="nothing listens")).switch()


def test_the_bytes_of_a_version_are_in_the_repository_before_the_switch_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, staged = tmp_path / "repository" / "text", tmp_path / "build" / "text"
    (model / "1").mkdir(parents=True)
    for name in ("2/model.onnx", "warmup/2-x", "config.pbtxt"):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text(name)
    there: list[Path] = []

    def change() -> None:
        there.extend(model.glob(".scratch-*/text/2/model.onnx"))

    result = {"version": 2, **result_of([sent_at(1.5, 1)], 1, 2)}
    load = SimpleNamespace(change=change, result=lambda: result)
    monkeypatch.setattr(Release, "_steady", lambda release, stack: load)
    args = live_arguments("127.0.0.1:9", repository=tmp_path)
    journal = Journal(tmp_path / "releases", "release", 2, before=1)
    candidate: Any = SimpleNamespace(args=args, journal=journal, number=2, model=model, before=1, folder=staged)
    assert "none failed" in Release(candidate, Live(args=args, version=1)).switch()
    assert (len(there), newest(model), list(model.glob(".scratch-*"))) == (1, 2, [])


def test_a_server_that_hangs_is_rolled_back_and_waited_for(
    hung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Live, "look", lambda live: (None, "it did not answer"))
    monkeypatch.setattr("serving.rollback.expect_anew", lambda repository: LeftOut("no stack"))

    def out(model: Path, number: int, *, decided: Callable[[], object], **_: object) -> list[str]:
        (model / str(number)).rmdir()
        decided()
        return []

    monkeypatch.setattr("serving.releases.take_out", out)
    for version in ("1", "2"):
        (tmp_path / "text" / version).mkdir(parents=True)
    journal = Journal(tmp_path / "releases", "rollback", 1, before=2)
    with pytest.raises(GateFailed, match="the repository has version 1, the server gives none: restart it"):
        Rollback(live_arguments(hung, repository=tmp_path), journal, 2, 1).run()
    record = read(journal.folder)
    assert record is not None
    assert (newest(tmp_path / "text"), record.outcome) == (1, "rolled back")


def sent_at(planned_s: float, latency_ms: float, error: str | None = None) -> Sent:
    """A request of the steady load."""
    return Sent(planned_s=planned_s, lag_ms=0, latency_ms=latency_ms, error=error)


def test_requests_that_failed_before_the_change_are_not_held_against_the_switch() -> None:
    live = Live(args=live_arguments("127.0.0.1:9"), version=1)
    early = [sent_at(0, 1), sent_at(0.5, 1, "ServerError: x"), sent_at(2.5, 3), sent_at(4, 4)]
    assert "3 requests failed" not in live.judged({"version": 2, **result_of(early, 1, 2)}, 2)
    in_flight = [*early, sent_at(0.9, 200, "ConnectionLost: y")]
    with pytest.raises(GateFailed, match=r"1 of 5 requests failed since the change \(1 times: ConnectionLost: y\)"):
        live.judged({"version": 2, **result_of(in_flight, 1, 2)}, 2)


@pytest.mark.parametrize("late", [None, "ConnectionLost: y"], ids=["none after it", "after it, too"])
def test_the_failures_of_a_version_that_is_rolled_back_are_its_own(
    late: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = [sent_at(0.5, 1, "ServerError: x"), sent_at(1.5, 1, "ServerError: x"), sent_at(4, 1), sent_at(2.1, 1, late)]
    flags: list[str] = []

    class Steady:
        """In place of a load."""

        def __init__(self, *given: str) -> None:
            flags.extend(given)

        def __enter__(self) -> SimpleNamespace:
            result = {"version": 1, **result_of(sent, 1, 2)}
            return SimpleNamespace(begin=lambda: 2, change=lambda: None, result=lambda: result)

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("serving.rollback.SteadyLoad", Steady)
    monkeypatch.setattr(Rollback, "_take_out", lambda _: None)
    args = live_arguments("127.0.0.1:9", repository=tmp_path)
    rollback = Rollback(args, Journal(tmp_path, "rollback", 1, before=2), 2, 1)
    if late:
        with pytest.raises(GateFailed, match=r"1 of 4 requests failed after the switch \(1 times: ConnectionLost: y\)"):
            rollback.switch()
    else:
        assert "1 failed till the switch, none after it" in rollback.switch()
    assert "--may-fail" in flags


def test_a_request_that_the_change_lost_is_not_booked_to_the_version_before() -> None:
    in_flight = result_of([sent_at(0.5, 1), sent_at(0.9, 200, "ConnectionLost: y")], 1, 2)
    assert (in_flight["failed_before"], in_flight["failed"], in_flight["since_seen"]["failed"]) == (0, 1, 0)
    assert result_of([sent_at(0.5, 1, "ServerError: x")], 1, 2)["failed_before"] == 1


@pytest.mark.parametrize("slo", [{"objectives": ("throughput >= 10",)}, {"rate_rps": 10}], ids=["throughput", "rate"])
def test_a_load_test_lasts_as_long_as_its_percentiles_need_at_the_lowest_rate(
    slo: dict[str, Any], tmp_path: Path
) -> None:
    spec = DeploymentSpec.load("tests/models/text").model_copy(update={"slo": SloSpec(p99_ms=50, **slo)})
    args = Namespace(model="text", models="", repository=tmp_path, new_build=None, rate=None, duration_s=30)
    assert Candidate(args, spec, Journal(tmp_path, "release", 2), 2)._duration_s() == 55  # 1.2 x 459 at 10/s


def test_a_switch_is_not_begun_while_requests_fail() -> None:
    sent = [sent_at(0, 1), sent_at(1, 2, "ServerBusy: full")]
    with pytest.raises(
        InvalidMeasurement, match=r"1 of 2 requests failed before the change \(1 times: ServerBusy: full"
    ):
        check_before(sent, may_fail=False)
    check_before(sent, may_fail=True)


class Answers:
    """In place of a client: gives `outputs` after so many milliseconds by the clock that it moves."""

    def __init__(self, outputs: dict[str, np.ndarray]) -> None:
        self.outputs = outputs

    def prepare(self, model: str, row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Nothing to prepare."""
        return row

    def send(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same answer to all."""
        return self.outputs


@pytest.mark.parametrize(
    ("new", "failure"),
    [
        ({"y": np.array([1.0, np.nan])}, "has a NaN or Inf where base has a number"),
        ({"y": np.array([1, 2])}, "is int64 [2], base's float64 [2]"),
        ({"z": np.array([1.0, 2.0])}, "gives the outputs z, base gives y"),
    ],
    ids=["nan", "type", "name"],
)
def test_outputs_that_callers_cannot_take_fail(new: dict[str, np.ndarray], failure: str) -> None:
    clients: Any = {"base": Answers({"y": np.array([1.0, 2.0])}), "new": Answers(new)}
    shadow = Shadow("text", clients, [{}])
    shadow.run(20)
    assert failure in judged(shadow, 0.1)["failures"][0]


@pytest.mark.parametrize(("refusals", "verdict"), [(3, "holds"), (30, "inconclusive")], ids=["a while", "longer"])
def test_what_a_busy_machine_refuses_is_sent_again_and_never_held_against_a_version(
    refusals: int, verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Busy(Answers):
        def send(self, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal refusals
            refusals -= 1
            if refusals >= 0:
                raise ServerBusy("Request timeout expired")
            return self.outputs

    monkeypatch.setattr("loadtests.shadow.BUSY_PAUSE_S", 0)
    outputs = {"y": np.array([1.0])}
    clients: Any = {"base": Answers(outputs), "new": Busy(outputs)}
    shadow = Shadow("text", clients, [{}])
    shadow.run(220)
    found = judged(shadow, 1e9)
    assert (found["verdict"], found["failures"]) == (verdict, [])


@pytest.mark.parametrize(
    ("times", "count", "verdict"),
    [(1.0, 1000, "holds"), (1.4, 1000, "fails"), (1.1, 1000, "inconclusive"), (1.0, 100, "inconclusive")],
    ids=["the same", "slower", "at the threshold", "too few"],
)
def test_the_median_decides_where_its_whole_interval_does(times: float, count: int, verdict: str) -> None:
    generator = np.random.default_rng(0)
    shadow = Shadow("text", {}, [])
    shadow.latencies_ms = {
        side: list(generator.lognormal(0, 0.3, count) * factor) for side, factor in (("base", 1.0), ("new", times))
    }
    found = judged(shadow, 0.1)
    assert found["verdict"] == verdict
    json.dumps(found, allow_nan=False)


def test_differences_between_versions_are_told() -> None:
    found = Differences()
    found.add(np.array([[1.0, 2.0]]), np.array([[1.0, 2.5]]))
    found.add(np.array([[np.inf, 2.0]]), np.array([[np.inf, 2.0]]))
    figures = found.figures()
    assert (figures["worst_error"], figures["same"]) == (0.5, 0.75)
    assert figures["cosine"] == pytest.approx(0.998, abs=0.002)


def test_the_load_is_told_before_around_and_after_the_change() -> None:
    sent = [sent_at(0, 1), sent_at(1, 2), sent_at(2, 50), sent_at(2.5, 3, "ServerBusy: full"), sent_at(4, 4)]
    found = result_of(sent, changed_s=2, seen_s=2.7)
    assert (found["requests"], found["failed"], found["switched_s"]) == (5, 1, 0.7)
    assert found["before"] == {"requests": 2, "failed": 0, "p50_ms": 1, "p99_ms": 2, "max_ms": 2}
    assert (found["around"]["p99_ms"], found["around"]["failed"], found["after"]["requests"]) == (50, 1, 1)
    never = result_of(sent, changed_s=2, seen_s=None)
    assert (never["switched_s"], never["around"]["requests"], never["after"]["p50_ms"]) == (None, 3, None)
    spec = DeploymentSpec.load("tests/models/text")
    assert (rate_of(None, spec), rate_of(30, spec)) == (20, 30)
    for wrong in (900, 0):
        with pytest.raises(InputError, match=f"--rate {wrong}"):
            rate_of(wrong, spec)

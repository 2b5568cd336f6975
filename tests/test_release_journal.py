"""What a release records and reports: journal, version numbers, errors of its steps, the verdict of a shadow load."""

from __future__ import annotations

import os
import re
import signal
import socket
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import cli.release
from cli.commands.shared_options import SHADOW_REQUESTS, SWITCH_RATE
from cli.main import values_of
from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement, SloSpec
from deepseek.spec.command import end_at_sigterm
from deepseek.spec.files.released import last_number
from loadtests.load.request_log import RequestLog, SentRequest
from loadtests.release import shadow_load as shadow
from loadtests.release import switch_over_load as steady
from loadtests.release.switch_over_load import result_of
from serving.release import release
from serving.release.candidate import Candidate
from serving.release.gate_commands import CommandResult, error_of, run_json
from serving.release.history import history, read, report
from serving.release.journal import ReleaseJournal, exclusive
from serving.release.live_server import LiveServer, use_local_port
from serving.release.release import Release
from serving.release.rollback import Rollback
from serving.release.step_runner import Skipped, StepRunner
from serving.release.versions import newest
from tests.test_switch_over_load import sent_at


def test_a_served_version_without_a_manifest_stops_the_release(tmp_path: Path) -> None:
    (tmp_path / "live" / "text" / "3").mkdir(parents=True)
    args = Namespace(model="text", models="tests/models", repository=tmp_path / "live", new=tmp_path, new_build=None)
    journal = ReleaseJournal(tmp_path, "release", 4, before=3)
    candidate = Candidate(args, DeploymentSpec.load("tests/models/text"), journal, 4)
    with pytest.raises(InputError, match=r"live/text/3: no manifest\.json, so make engine did not publish it"):
        candidate.stage()


def test_a_record_sorts_after_earlier_ones_though_the_clock_was_set_back(tmp_path: Path) -> None:
    for second in (0, 1):
        (tmp_path / f"2999-01-01T00-00-0{second}.000Z-release-{4 - second}").mkdir()
    names = [ReleaseJournal(tmp_path, "rollback", 3, before=4).folder.name for _ in range(2)]
    assert names == ["2999-01-01T00-00-01.001Z-rollback-3", "2999-01-01T00-00-01.002Z-rollback-3"]


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "holds"),
        (GateFailed, "failed"),
        (InvalidMeasurement, "inconclusive"),
        (InputError, "wrong input"),
        (KeyboardInterrupt, "interrupted"),
    ],
)
def test_the_journal_says_how_each_step_ended_even_after_a_kill(
    tmp_path: Path, error: type[BaseException] | None, state: str
) -> None:
    journal = ReleaseJournal(tmp_path, "release", 4, before=3)
    steps = StepRunner(journal, as_json=True)

    def step() -> str:
        if error:
            raise error("why | not")
        return "why | not"

    with pytest.raises(error) if error else nullcontext():
        steps.do("parity", step)
    steps.do("shadow", lambda: Skipped("nothing served"))
    journal.write(step="switch", state="started")
    with (journal.folder / "journal.jsonl").open("a") as file:
        file.write('{"step": "switch", "sta')
    record = read(journal.folder)
    assert record is not None
    assert [step.state for step in record.steps] == [state, "left out", "started"]
    assert (record.outcome, record.stopped_in) == ("not finished", record.steps[0 if error else 2])
    assert r"why \| not" in report(record, "text")


def test_one_release_at_a_time_and_no_number_serves_twice(own_build: Path) -> None:
    with exclusive("text") as releases:
        with pytest.raises(InputError, match="another release or rollback of text is under way"), exclusive("text"):
            pass
        ReleaseJournal(releases, "release", 4, before=3)
        assert last_number(own_build / "repository" / "text") == 0  # it never came into the repository
        ReleaseJournal(releases, "rollback", 3, before=5)
    assert last_number(own_build / "repository" / "text") == 5
    assert [record.outcome for record in history("text")] == ["not finished", "not finished"]


def test_the_exit_code_of_a_command_becomes_its_error() -> None:
    assert isinstance(error_of(1, "x", "why"), GateFailed)
    assert "ended with status 137" in str(error_of(137, "loadtest", ""))
    answer = run_json("releases", "--nonsense")
    assert (answer.code, answer.data) == (2, None)
    with pytest.raises(InputError, match="--nonsense"):
        answer.checked()
    with pytest.raises(InvalidMeasurement, match="x ended with status 0, but its output is not JSON"):
        CommandResult(name="x", code=0, data=None, reason="").checked()


def test_a_command_runs_in_the_build_folder_that_it_is_given(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(tmp_path / "there"))
        with exclusive("text") as releases:
            ReleaseJournal(releases, "rollback", 3, before=5)
    asked = ("releases", "--model", "text", "--models", "tests/models", "--json")
    assert [each["before"] for each in run_json(*asked, build=str(tmp_path / "there")).data["releases"]] == [5]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--rate 19", "--rate 19: it must be at least the SLO's rate_rps, 20"),
        ("--new-build b", "--new-build b: name its repository too"),
    ],
)
def test_bad_options_are_refused_before_the_first_gate(flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cli.release.build", lambda *_, **__: Namespace(target="onnxruntime"))
    with pytest.raises(InputError, match=re.escape(said)):
        cli.release.main(values_of("release", "--model", "text", "--models", "tests/models", *flags.split()))


@pytest.mark.parametrize(
    ("rate", "lines", "said"),
    [
        (100, ("p99_ms < 20 @ 500 rps",), "--rate 100: the SLO asks for p99_ms at 500 requests/s"),
        (500, ("p99_ms < 20 @ 500 rps", "p50_ms < 5 @ 100 rps"), "--rate 500: the SLO asks for p50_ms at 100 requests"),
        (100, ("throughput >= 150",), "--rate 100: it must be at least the SLO's throughput, 150"),
        (500, ("p99_ms < 20 @ 500 rps", "throughput >= 150", "error_rate < 1%"), ""),
    ],
    ids=["another rate", "two rates", "below a throughput", "the same rate"],
)
def test_a_rate_that_cannot_prove_an_objective_is_refused(rate: float, lines: tuple[str, ...], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)) if said else nullcontext():
        release.check_rate(rate, SloSpec(objectives=lines).all_objectives())


def test_the_limits_of_a_release_are_those_of_the_loads_that_it_runs() -> None:
    assert (SHADOW_REQUESTS.least, SWITCH_RATE.most) == (shadow.LEAST_REQUESTS, steady.MOST_RPS)


@pytest.fixture
def hung() -> Iterator[str]:
    """The address of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def live_options(url: str, **more: Any) -> Namespace:
    options = values_of("rollback", "--model", "text", "--models", "tests/models", "--protocol", "http", "--json")
    return Namespace(**{**vars(options), "url": url, "switch_s": 1, **more})


def test_only_a_refused_connection_means_that_no_server_runs(
    hung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.release.live_server.LONGEST_S", 0.5)
    with pytest.raises(
        InputError, match=r"did not answer .*; a server may run at 127.*: restart it with make serve POLL_S=2"
    ):
        LiveServer.find(live_options(hung, repository=tmp_path), 1)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(LiveServer, "look", lambda live: (None, "no answer"))
    with pytest.raises(InputError, match="no answer; leave the address out"):
        LiveServer.find(live_options("127.0.0.1:9", repository=tmp_path, given={"url"}), 1)
    options = live_options("127.0.0.1:9", repository=tmp_path)
    port = hung.partition(":")[2]
    Path(".env").write_text(f"STACK_REPOSITORY='{tmp_path}'\nGATEWAY_PORT={port}\n")
    with pytest.raises(InputError, match=f"runs behind localhost:{port} and would load the version without"):
        LiveServer.find(options, 1)
    Path(".env").unlink()
    absent = LiveServer.find(options, 1)
    assert (absent.version, absent.absent) == (None, "nothing listens at 127.0.0.1:9")


def test_a_server_that_came_up_during_the_gates_is_not_switched_unwatched(
    hung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LiveServer, "look", lambda live: (None, "it did not answer"))
    args = live_options(hung, repository=tmp_path)
    (tmp_path / "text" / "1").mkdir(parents=True)
    found = {"options": args, "journal": None, "number": 2, "model": tmp_path / "text", "before": 1}
    candidate: Any = SimpleNamespace(**found)
    with pytest.raises(InputError, match="it did not answer; a server may run"):
        Release(candidate, LiveServer(options=args, version=None, absent="nothing listens")).switch()


def test_a_second_sigterm_does_not_stop_the_taking_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """make and timeout send it twice. A server that needs a restart to serve the old version is named."""

    def back(live: LiveServer, version: int) -> tuple[bool, str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return False, "none: restart it"

    model = tmp_path / "text"
    for version in ("1", "2"):
        (model / version).mkdir(parents=True)
        (model / version / "config.pbtxt").touch()
    (model / "2" / "manifest.json").touch()
    journal = ReleaseJournal(tmp_path / "releases", "release", 2, before=1)
    journal.keep("manifest.json", "")
    args = live_options("127.0.0.1:9", repository=tmp_path)
    found = {"options": args, "journal": journal, "number": 2, "model": model, "before": 1, "folder": model}
    release_ = Release(SimpleNamespace(**found), LiveServer(options=args, version=1))  # type: ignore[arg-type]
    load = SimpleNamespace(change=lambda: None, result=lambda: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(release_, "_steady", lambda stack: load)
    monkeypatch.setattr(release, "beside_repository", lambda *_: nullcontext())
    monkeypatch.setattr(release, "move_in", lambda *_, before: None)
    monkeypatch.setattr(LiveServer, "back", back)
    before = signal.getsignal(signal.SIGTERM)
    end_at_sigterm()
    try:
        with pytest.raises(KeyboardInterrupt):
            release_.switch()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert newest(model) == 1
    assert [line.get("step") for line in journal.lines[-1:]] == ["taken back"]
    assert capsys.readouterr().err == "note: none: restart it\n"


def test_a_rollback_waits_for_a_server_that_hangs(hung: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LiveServer, "look", lambda live: (None, "it did not answer"))
    for version in ("1", "2"):
        (tmp_path / "text" / version).mkdir(parents=True)
    (tmp_path / "text" / "1" / "config.pbtxt").touch()
    journal = ReleaseJournal(tmp_path / "releases", "rollback", 1, before=2)
    with pytest.raises(GateFailed, match="the repository has version 1, the server has none: restart it"):
        Rollback(live_options(hung, repository=tmp_path), journal, 2, 1).run()
    record = read(journal.folder)
    assert record is not None
    assert (newest(tmp_path / "text"), record.outcome) == (1, "rolled back")


BUSY = [sent_at(0.5, 1, "ServerError: x"), sent_at(2.5, 3), sent_at(4, 4)]
LOST = sent_at(0.9, 200, "ConnectionLost: y")


@pytest.mark.parametrize(
    ("sent", "failing", "said"),
    [
        (BUSY, False, "3 requests, none failed"),
        ([*BUSY, LOST], False, "1 of 4 requests failed since the change (1 times: ConnectionLost: y)"),
        ([*BUSY, LOST], True, "4 requests, 1 failed before the switch, none after it"),
        ([*BUSY, sent_at(2.1, 1, "ServerBusy: z")], True, "1 of 4 requests failed after the switch (1 times: ServerBu"),
    ],
)
def test_failures_of_the_old_version_do_not_count_against_the_new_one(
    sent: list[SentRequest], failing: bool, said: str
) -> None:
    live = LiveServer(options=live_options("127.0.0.1:9"), version=1)
    found = {"version": 2, **result_of(RequestLog(sent), 1, 2)}
    if "requests failed" in said:
        with pytest.raises(GateFailed, match=re.escape(said)):
            live.judged(found, 2, failing=failing)
    else:
        assert said in live.judged(found, 2, failing=failing)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "the server at 127.0.0.1:9 does not answer any more"),
        (1, "the server at 127.0.0.1:9 still had version 1 after 60 s: it refused version 2"),
    ],
)
def test_a_server_that_died_at_the_switch_is_told_from_one_that_refuses(version: int | None, said: str) -> None:
    live = LiveServer(options=live_options("127.0.0.1:9", switch_s=60), version=1)
    found = {"version": version, **result_of(RequestLog([*BUSY, LOST]), 1, None)}
    failures = "; 1 of 4 requests failed since the change (1 times: ConnectionLost: y)"
    with pytest.raises(GateFailed, match=f"^{re.escape(said)}.*{re.escape(failures)}$"):
        live.judged(found, 2)


def test_a_rollback_starts_even_while_requests_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*flags: str) -> None:
        raise GateFailed(" ".join(flags))

    monkeypatch.setattr("serving.release.rollback.SteadyLoad", stopped)
    journal = ReleaseJournal(tmp_path, "rollback", 1, before=2)
    with pytest.raises(GateFailed, match="--may-fail"):
        Rollback(live_options("127.0.0.1:9", repository=tmp_path), journal, 2, 1).switch()


def test_a_rollback_whose_load_is_lost_still_waits_for_the_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost() -> None:
        raise InvalidMeasurement("the load was stopped, but did not end within 33 s")

    load = SimpleNamespace(begin=lambda: 2, change=lambda: None, result=lost)
    monkeypatch.setattr("serving.release.rollback.SteadyLoad", lambda *_: nullcontext(load))
    monkeypatch.setattr(Rollback, "_take_out", lambda _: None)
    monkeypatch.setattr(LiveServer, "look", lambda _: (1, ""))
    rollback = Rollback(live_options("127.0.0.1:9", repository=tmp_path), ReleaseJournal(tmp_path, "rollback", 1), 2, 1)
    assert re.fullmatch(
        r"version 1 serves after .* s; not watched under load: .* did not end within 33 s", rollback.switch()
    )


@pytest.mark.parametrize(
    ("slo", "seconds"),
    [
        ({"p99_ms": 50, "objectives": ("throughput >= 10",)}, 90),  # 1.5 x 299 bursts of 0.2 s
        ({"p99_ms": 50, "rate_rps": 10}, 90),
        ({"p99_ms": 50, "objectives": ("p50_ms < 5 @ 10 rps",)}, 90),
        ({"p95_ms": 50, "rate_rps": 5, "max_error_rate": 0}, 86),  # 1.5 x 285 requests
        ({"objectives": ("throughput >= 5", "error_rate <= 0")}, 86),
    ],
    ids=["throughput", "rate", "a line's rate", "a low rate", "throughput alone"],
)
def test_a_load_test_lasts_as_long_as_the_objectives_need_at_the_lowest_rate(
    slo: dict[str, Any], seconds: int, tmp_path: Path
) -> None:
    spec = DeploymentSpec.load("tests/models/text").model_copy(update={"slo": SloSpec(**slo)})
    args = Namespace(model="text", models="", repository=tmp_path, new_build=None, rate=None, duration_s=30)
    assert Candidate(args, spec, ReleaseJournal(tmp_path, "release", 2), 2)._duration_s() == seconds


def test_the_local_port_of_a_running_stack_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--model", "text", "--repository", str(tmp_path))

    def url(*more: str) -> str:
        options = values_of("rollback", *arguments, *more)
        use_local_port(options)
        return str(options.url)

    with socket.create_server(("127.0.0.1", 0)) as gateway:
        stack = f"STACK_REPOSITORY='{tmp_path}'\nGATEWAY_PORT={gateway.getsockname()[1]}\n"
        Path(".env").write_text(f"{stack}LOCAL_HTTP_PORT=8100\nLOCAL_GRPC_PORT=8101\n")
        assert [url(), url("--protocol", "http")] == ["127.0.0.1:8101", "127.0.0.1:8100"]
        assert [url("--url", "a:1"), url("--grpc-port", "2")] == ["a:1", "127.0.0.1:2"]
        Path("other.env").write_text(f"{stack}LOCAL_GRPC_PORT=8201\n")
        assert url("--env-file", "other.env") == "127.0.0.1:8201"
        Path(".env").write_text(stack)  # LOCAL_PORTS=0
        assert url() == "127.0.0.1:8001"
    Path(".env").write_text(f"{stack}LOCAL_GRPC_PORT=8101\n")
    assert url() == "127.0.0.1:8001"  # the stack does not run


def test_a_rollback_says_that_a_stack_without_local_ports_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.release.rollback.refresh_stack", lambda repository: Skipped("no stack"))
    monkeypatch.setattr("serving.release.rollback.running_gateway", lambda *_: "localhost:8443")
    monkeypatch.setattr(Rollback, "_take_out", lambda _: None)
    monkeypatch.setattr(LiveServer, "look", lambda live: (None, "nothing listens"))
    journal = ReleaseJournal(tmp_path / "releases", "rollback", 1, before=2)
    Rollback(live_options("127.0.0.1:9", repository=tmp_path), journal, 2, 1).run()
    record = read(journal.folder)
    assert record is not None
    assert "which the stack behind localhost:8443 follows within seconds" in record.steps[0].said


def test_nvidias_triton_of_the_stack_needs_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("serving.release.rollback.refresh_stack", lambda repository: Skipped("no stack"))
    monkeypatch.setattr(LiveServer, "look", lambda live: (2, ""))  # what it serves until then
    monkeypatch.setattr(LiveServer, "refuses", lambda live: False)
    options = live_options("127.0.0.1:9", repository=tmp_path)
    taken: list[str] = []
    monkeypatch.setattr(Rollback, "_take_out", lambda _: taken.append("out"))
    with socket.create_server(("127.0.0.1", 0)) as gateway:
        stack = f"STACK_REPOSITORY='{tmp_path}'\nGATEWAY_PORT={gateway.getsockname()[1]}\n"
        Path(".env").write_text(f"COMPOSE_FILE=compose.yaml:docker/compose.gpu.yaml\n{stack}")
        live = LiveServer.find(options, 2)
        told = "does not follow it (docker compose restart triton)"
        assert (live.version, told in live.absent) == (None, True)
        journal = ReleaseJournal(tmp_path / "releases", "rollback", 1, before=2)
        Rollback(options, journal, 2, 1).run()
        record = read(journal.folder)
        assert record is not None
        assert (taken, record.steps[0].name, told in record.steps[0].said) == (["out"], "repository", True)
        Path(".env").write_text(f"COMPOSE_FILE=compose.yaml\n{stack}")
        assert LiveServer.find(options, 2).version == 2

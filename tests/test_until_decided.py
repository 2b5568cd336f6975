"""Load tests that go on until every objective is decided."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepseek_client import ModelMetadata
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, SloSpec
from loadtests.load import until_decided
from loadtests.load.measure import ModelLoad
from loadtests.load.until_decided import measure_until_decided, planned_looks
from loadtests.results.run import Run, latest_run
from loadtests.results.settings import LoadSettings
from loadtests.slo.judge import judge
from tests.conftest import Refused, RunHere
from tests.fake_endpoint import FakeEndpoint
from tests.saved_runs import load_settings, saved_run, steady
from tests.test_locustfile import SPEC

LOOK_S = 90
STATISTICS = {"inference_count": 5, "versions": ["1"], "batches": {"1": 5}, "success": {"count": 5, "ns": 10}}


@pytest.fixture
def load(tmp_path: Path, own_build: Path) -> ModelLoad:
    """A load of 20 requests/s; its p99 must be below 200 ms."""
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    (tmp_path / "models" / "tiny" / "deploy.toml").write_text(SPEC.format(name="tiny"))
    spec = DeploymentSpec.of_model("tiny", tmp_path / "models")
    settings = load_settings(rate_rps=20.0, duration_s=float(LOOK_S), warmup_s=5.0)
    slo = spec.slo.model_copy(update={"rate_rps": 20.0})
    served = ModelMetadata(name="tiny", versions=("1",), platform="", inputs=(), outputs=(), max_batch_size=1)
    return ModelLoad(settings=settings, spec=spec.model_copy(update={"slo": slo}), served=served)


def service(monkeypatch: pytest.MonkeyPatch, slow_share: float) -> None:
    """Each part of the run is measured at once, on a service with this share of slow answers, one at a time."""
    made: list[int] = []

    def measure(settings: LoadSettings, spec: Any, served: Any, console: Any, folder: Path) -> Run:
        length_s, every = settings.duration_s, round(1 / slow_share) if slow_share else 10**9
        requests = steady(0.01, round(20 * length_s), 0, length_s)
        requests = [(p, s, f + 0.5 * (i % every == every - 1), None) for i, (p, s, f, _) in enumerate(requests)]
        warm_up, late = (-1.0, -1.0, -0.9, None), (length_s - 0.01, length_s - 0.01, length_s + 1, None)
        made.append(len(made))
        changes = {"rate_rps": 20.0, "duration_s": length_s, "warmup_s": 5.0, "seed": settings.seed}
        server = {"version": "1", "statistics": STATISTICS}
        return saved_run(folder / f"{len(made)}", [warm_up, *requests[:-1], late], server=server, **changes)

    monkeypatch.setattr(until_decided, "measure", measure)


def test_a_run_is_looked_at_each_time_it_has_doubled_while_there_is_time(load: ModelLoad) -> None:
    assert planned_looks(load.settings, 1200) == [1, 2, 4, 8]
    assert planned_looks(load.settings, 197) == [1, 2]
    assert planned_looks(load.settings, 196) == [1]
    with pytest.raises(InputError, match=r"--max-s 98: a run of 90 s takes 98.5 s with its start and warm-up"):
        planned_looks(load.settings, 98)


def test_a_good_service_is_decided_at_the_first_look(load: ModelLoad, monkeypatch: pytest.MonkeyPatch) -> None:
    service(monkeypatch, 0)
    run = measure_until_decided(load, Console(quiet=True), budget_s=1200)
    assert (run.settings.duration_s, run.settings.looks) == (LOOK_S, 4)
    judgement = judge(run, load.spec.slo)
    assert judgement.verdict == "holds"
    assert "4 looks were planned, so each is judged at 98.75% confidence" in judgement.notes[0]


def test_a_service_near_its_limit_is_measured_until_it_is_decided(
    load: ModelLoad, monkeypatch: pytest.MonkeyPatch
) -> None:
    service(monkeypatch, 0.004)
    run = measure_until_decided(load, Console(quiet=True), budget_s=3000)
    assert run.settings.duration_s > LOOK_S
    assert judge(run, load.spec.slo).verdict == "holds"
    assert latest_run("tiny") == run.folder
    assert [path.name for path in run.folder.parent.iterdir()] == [run.folder.name]  # no parts are left


def test_the_parts_become_one_run(load: ModelLoad, monkeypatch: pytest.MonkeyPatch) -> None:
    service(monkeypatch, 0.01)
    run = measure_until_decided(load, Console(quiet=True), budget_s=200)
    assert (run.settings.duration_s, run.settings.looks) == (2 * LOOK_S, 2)
    assert (run.window.planned, run.window.ok, len(run.window.seconds)) == (3600, 3600, 2 * LOOK_S)
    assert [second.planned for second in run.seconds if second.second < 0] == [1]  # one warm-up
    assert run.window.latency("intended").counts.sum() == 3600
    assert run.seconds[-1].second == 2 * LOOK_S + 1  # only the last part's late answer
    assert run.server["statistics"]["success"] == {"count": 10, "ns": 20}
    assert run.server["statistics"]["versions"] == ["1"]
    assert judge(run, load.spec.slo).verdict == "inconclusive"


def test_a_shape_is_repeated_as_a_whole(load: ModelLoad) -> None:
    steps = replace(load.settings, rate_rps=None, shape="10x30, 20x60")
    assert until_decided.longer(steps, 2).shape == "10x30, 20x60, 10x30, 20x60"
    assert until_decided.longer(steps, 2).duration_s == 180


@pytest.mark.server
def test_the_command_measures_an_endpoint_in_parts_and_saves_one_run(
    load: ModelLoad, tmp_path: Path, run_here: RunHere
) -> None:
    np.savez(tmp_path / "inputs.npz", **{f"{row:05d}/x": np.zeros((1, 2), np.float32) for row in range(4)})  # type: ignore[arg-type]
    with FakeEndpoint() as endpoint:
        where = ("--models", str(tmp_path / "models"), "--model", "tiny", "--inputs", str(tmp_path / "inputs.npz"))
        length = ("--rate", "40", "--duration-s", "1", "--warmup-s", "0", "--until-decided", "--max-s", "9")
        made = run_here("loadtest", *where, *length, "--url", endpoint.grpc_url, "--json")
    assert made.returncode in (0, 3), made.stderr  # 3 if this machine is too busy
    run = Run.load(json.loads(made.stdout)["run"])
    assert "looks after 1, 2 s" in made.stderr
    assert run.settings.looks == 2
    assert run.window.planned == 40 * round(run.settings.duration_s)


def test_a_restart_of_the_server_in_a_part_keeps_what_was_counted() -> None:
    counted = [STATISTICS, {**STATISTICS, "versions": [], "batches": {}}]
    for parts in (counted, counted[::-1]):
        found = until_decided._summed(parts)
        assert (found["versions"], found["batches"], found["inference_count"]) == (["1"], {"1": 5}, 10)


def test_parts_measured_before_an_interruption_are_saved(load: ModelLoad, monkeypatch: pytest.MonkeyPatch) -> None:
    service(monkeypatch, 0.01)
    measure, done = until_decided.measure, list[float]()

    def interrupted(settings: LoadSettings, *others: Any) -> Run:
        if done:
            raise KeyboardInterrupt
        done.append(settings.duration_s)
        return measure(settings, *others)

    monkeypatch.setattr(until_decided, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_until_decided(load, Console(quiet=True), budget_s=1200)
    saved = Run.load(latest_run("tiny"))
    assert (saved.settings.duration_s, saved.settings.looks) == (LOOK_S, 4)


@pytest.mark.parametrize(("seen_rps", "offered_rps", "open_"), [(98.5, 100, True), (49.5, 50, False)])
def test_a_throughput_near_its_limit_is_undecided_only_if_the_load_can_reach_it(
    seen_rps: float, offered_rps: int, open_: bool, tmp_path: Path
) -> None:
    dropped = round(1 / (1 - seen_rps / offered_rps))
    requests = steady(0.01, offered_rps * 4, 0, 4)
    requests = [(p, s, f, "ServerBusy" if i % dropped == 0 else e) for i, (p, s, f, e) in enumerate(requests)]
    run = saved_run(tmp_path / "run", requests, rate_rps=float(offered_rps), duration_s=4.0)
    (found,) = (
        each for each in judge(run, SloSpec(rate_rps=100, max_error_rate=1)).objectives if each.name == "rate_rps"
    )
    assert found.status == "inconclusive"
    assert until_decided.undecided(found) == open_


def test_only_what_a_longer_run_can_decide_is_undecided(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", [(0.1, 0.1, 0.2, None)], rate_rps=0.5, duration_s=4.0)
    slo = SloSpec(objectives=("mean_ms < 500", "p50_ms < 10 @ 7 rps", "ndcg@10 > 0.1"))
    found = {each.name: each for each in judge(run, slo).objectives}
    assert {each.status for each in found.values()} == {"inconclusive"}
    assert [name for name, each in found.items() if until_decided.undecided(each)] == ["max_error_rate", "mean_ms"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        *(
            (("--until-decided", *words), f"--until-decided: not with {words[0]}; leave one of them out")
            for words in (("--mix", "a,b"), ("--web",), ("--remote-workers", "2"), ("--replay", "t.csv"))
        ),
        *(
            (
                ("--mix", "a,b", *words),
                f"{words[0]}: not with --mix, whose models each use build/<model>/evaluation.npz; leave it out",
            )
            for words in (("--inputs", "a.txt"), ("--route", "/rerank"))
        ),
        (("--max-s", "60"), "--max-s 60: only for --until-decided; add it, or leave --max-s out (BUDGET_S=)"),
        *(
            (
                ("--users", "2", *words),
                f"{words[0]}: not with --users, who send again after each answer; leave one of them out",
            )
            for words in (("--arrivals", "constant"), ("--priority",))
        ),
        (
            ("--shape", "50x30", "--duration-s", "90"),
            "--duration-s: not with --shape, which has its own seconds; leave one of them out",
        ),
        (
            ("--remote-workers", "2", "--workers", "2"),
            "--workers: not with --remote-workers, which are one process each; leave one of them out",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_in_one_line(
    words: tuple[str, ...], line: str, refused: Refused
) -> None:
    assert refused("loadtest", *words) == f"error: {line}\n"

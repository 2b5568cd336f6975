"""The versions of a comparison, how they are laid out, and the shape and number of their runs."""

from __future__ import annotations

import json
import time
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.files.repository import config_path
from loadtests.regression.compared_version import ComparedVersion, Role
from loadtests.regression.comparison import LEAST_PAIRS
from loadtests.regression.interleaved_runs import (
    SEARCH_SHARE,
    InterleavedPlan,
    ServedVersion,
    capacity_of,
    measure_pairs,
)
from loadtests.results.run import Run
from loadtests.slo.paired_intervals import least_pairs
from tests.computed_server import runner, server_of
from tests.saved_runs import load_settings, saved_run, steady
from tests.sleeper import SPEC, write_sleeper


def plan(*objectives: str, **changes: Any) -> InterleavedPlan:
    """The plan for a service with an SLO at 100/s."""
    toml = tomllib.loads(SPEC) | {"slo": {"p99_ms": 50, "rate_rps": 100, "objectives": objectives}}
    spec = DeploymentSpec.model_validate_json(json.dumps(toml))
    fixed: dict[str, Any] = {"server": "", "rate_rps": None, "duration_s": 30.0, "pairs": 8, "max_s": 1200.0}
    return InterleavedPlan(spec=spec, settings=load_settings(warmup_s=2.0), **{**fixed, **changes})


@pytest.mark.parametrize(
    ("changes", "capacity_rps", "shape"),
    [
        ({}, 200.0, "100x9, 182x21"),
        ({}, 118.0, "100x9, 107x21"),  # just enough room above the SLO's rate
        ({}, 117.0, "81.9x9, 106x21"),  # too little
        ({"rate_rps": 20.0, "slack": 0.25}, 110.0, "20x9, 88x21"),
        ({"rate_rps": 100.0}, 110.0, "100x30"),
        ({}, None, "100x30"),
        ({"rate_rps": 1e6}, None, "1000000x30"),
    ],
)
def test_a_run_holds_one_rate_and_then_one_near_the_capacity(
    changes: dict[str, Any], capacity_rps: float | None, shape: str
) -> None:
    assert plan(**changes).shape(capacity_rps) == shape


@pytest.mark.parametrize(
    ("bound_rps", "capacity_rps", "rates"),
    [
        (200, 400.0, "200x10, 364x10"),
        (200, 220.0, "200x21"),
        (200, 195.0, "177x21"),
        (100, 220.0, "200x21"),
        (50, 220.0, "50x10, 200x10"),
    ],
)
def test_a_rate_that_an_objective_is_bound_to_is_measured_too(bound_rps: int, capacity_rps: float, rates: str) -> None:
    assert plan(f"p50_ms < 10 @ {bound_rps} rps").shape(capacity_rps) == f"100x9, {rates}"


def test_the_number_of_pairs_fits_into_the_time() -> None:
    assert [plan(pairs=10).pairs_in(left_s) for left_s in (1000, 710, 709, 568)] == [10, 10, 9, 8]
    assert least_pairs(1 - 0.05 / 4) == LEAST_PAIRS  # four rows, if failures are judged
    asked = values_of("regression", "--base", "a", "--new", "b")
    assert LEAST_PAIRS < plan(pairs=10).pairs_in(asked.max_s * (1 - SEARCH_SHARE)) == asked.pairs
    with pytest.raises(InputError, match=r"8 pairs need about 1468 s; raise it \(BUDGET_S=\)"):
        plan().pairs_in(300)


def served(folder: Path, role: Role, made: list[tuple[str, int]], *, busy: tuple[int, ...] = ()) -> ServedVersion:
    """A version with made-up runs; in the runs numbered `busy` the generator was the limit."""

    class Made(ServedVersion):
        def run(self, shape: str, seed: int) -> Run:
            made.append((role, seed))
            cpu = 0.99 if len(made) in busy else 0.2
            settings = {"rate_rps": None, "shape": shape, "thread_cpu": cpu}
            return saved_run(folder / f"{len(made)}", steady(count=1000, lag_s=0), **settings)

    version = ComparedVersion(role=role, given=role)
    return Made(version=version, server=cast(Any, None), runner=runner(folder))


@pytest.mark.parametrize(
    ("busy", "runs"),
    [((), "bc cb bc"), ((2,), "bc bc cb bc"), ((2, 4), "bc bc cb bc")],  # a spoiled pair is not repeated twice
)
def test_pairs_alternate_with_the_same_arrivals_and_a_spoiled_one_is_repeated_once(
    tmp_path: Path, busy: tuple[int, ...], runs: str
) -> None:
    made: list[tuple[str, int]] = []
    versions = (served(tmp_path, "baseline", made, busy=busy), served(tmp_path, "candidate", made, busy=busy))
    assert len(list(measure_pairs(versions, "100x10", 3, time.monotonic() + 1000, Console(quiet=True)))) == 3
    pairs = [made[at : at + 2] for at in range(0, len(made), 2)]
    assert " ".join(first[0][0] + second[0][0] for first, second in pairs) == runs
    assert all(first[1] == second[1] for first, second in pairs)
    if not busy:  # the time limit never leaves fewer than the minimum of pairs
        assert len(list(measure_pairs(versions, "100x10", 20, 0.0, Console(quiet=True)))) == LEAST_PAIRS


def test_spoiled_pairs_are_repeated_only_while_the_minimum_of_pairs_fits_into_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, int]] = []
    clock = SimpleNamespace(monotonic=lambda: 30.0 * len(made))  # a run takes 30 s
    monkeypatch.setattr("loadtests.regression.interleaved_runs.time", clock)
    always = tuple(range(1, 99))
    versions = (served(tmp_path, "baseline", made, busy=always), served(tmp_path, "candidate", made, busy=always))
    assert len(list(measure_pairs(versions, "100x10", 10, 600.0, Console(quiet=True)))) == LEAST_PAIRS
    assert clock.monotonic() == 600


def test_the_capacity_of_the_baseline_is_found_without_a_confirmation(tmp_path: Path) -> None:
    def found(limit_rps: float) -> float | None:
        on_server = runner(
            tmp_path, server_of(lambda rate, phase: "holds" if rate < limit_rps and phase != "confirm" else "fails")
        )
        version = ComparedVersion(role="baseline", given="x")
        baseline = ServedVersion(version=version, server=cast(Any, None), runner=on_server)
        return capacity_of(baseline, plan(), 1200.0, Console(quiet=True))

    assert 95 / 1.1 <= (found(95) or 0) < 95
    assert found(0) is None


def write_versions(folder: Path) -> Path:
    """A repository of `tiny` with versions 1 and 2; version 1 has a configuration of its own."""
    repository = write_sleeper(folder, 0.002)
    (repository / "tiny" / "2").mkdir()
    (repository / "tiny" / "2" / "model.py").write_text("")
    (repository / "tiny" / "1" / "config.pbtxt").write_text("of version 1")
    return repository


def laid_out(given: str, repository: Path, folder: Path) -> Path:
    return ComparedVersion.of("candidate", given, "tiny", repository).lay_out(folder) / "tiny"


def test_a_version_is_laid_out_alone_with_its_own_configuration(tmp_path: Path) -> None:
    repository = write_versions(tmp_path)
    old = laid_out("tiny/1", repository, tmp_path / "old")
    assert sorted(path.name for path in old.iterdir()) == ["1", "config.pbtxt"]
    assert (old / "config.pbtxt").read_text() == "of version 1"
    new = laid_out(str(repository / "tiny" / "2"), tmp_path, tmp_path / "new")
    assert sorted(path.name for path in new.iterdir()) == ["2", "config.pbtxt"]
    assert (new / "config.pbtxt").read_text() == (repository / "tiny" / "config.pbtxt").read_text()
    whole = laid_out(str(repository), tmp_path, tmp_path / "whole")
    assert sorted(path.name for path in whole.iterdir()) == ["1", "2", "config.pbtxt"]


def test_a_model_and_a_version_may_be_links(tmp_path: Path) -> None:
    repository = write_versions(tmp_path)
    stored = (repository / "tiny").rename(tmp_path / "stored-v7")
    (repository / "tiny").symlink_to(stored)
    (stored / "3").symlink_to((stored / "2").rename(tmp_path / "weights"))
    for version in ("1", "3"):
        found = laid_out(f"tiny/{version}", repository, tmp_path / version)
        assert sorted(path.name for path in found.iterdir()) == [version, "config.pbtxt"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "NEW= is missing; give a model repository"),
        ("tiny/7", r"nor a version in .*repository \(tiny/1, tiny/2\)"),
        ("nowhere", "neither a repository with tiny/config.pbtxt"),
        ("other/1", "a version of other, not of tiny"),
    ],
)
def test_a_name_of_no_known_kind_gives_a_one_line_error(tmp_path: Path, given: str, message: str) -> None:
    repository = write_versions(tmp_path)
    (repository / "other" / "1").mkdir(parents=True)
    (repository / "other" / "config.pbtxt").touch()
    with pytest.raises(InputError, match=message):
        ComparedVersion.of("candidate", given, "tiny", repository)


@pytest.mark.parametrize(
    ("common", "version", "is_own"),
    [
        ("versions: 2", 2, False),
        ("versions: 2", 1, True),
        ("versions: 1", 2, True),  # publishing was killed before it wrote the configuration of 2
        ("versions: 3", 2, True),  # 3 was removed by hand
        ("versions: [ 1, 2 ]", 2, False),
        ("mine", 2, False),
    ],
)
def test_a_version_is_served_with_its_own_configuration(
    tmp_path: Path, common: str, version: int, is_own: bool
) -> None:
    for number in ("1", "2"):
        (tmp_path / number).mkdir()
        (tmp_path / number / "config.pbtxt").write_text(f"versions: {number}")
    (tmp_path / "config.pbtxt").write_text(common)
    assert config_path(tmp_path, version).parent == (tmp_path / str(version) if is_own else tmp_path)

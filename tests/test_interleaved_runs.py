"""The shape and number of the runs of a comparison, and the handling of a version that dies."""

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
from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement
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
from loadtests.results.settings import LoadSettings
from loadtests.slo.confidence import least_pairs
from tests.computed_server import runner, server_of
from tests.saved_runs import saved_run, steady
from tests.sleeper import SPEC


def plan(*objectives: str, **changes: Any) -> InterleavedPlan:
    """The plan for a service with an SLO at 100/s."""
    toml = tomllib.loads(SPEC) | {"slo": {"p99_ms": 50, "rate_rps": 100, "objectives": objectives}}
    spec = DeploymentSpec.model_validate_json(json.dumps(toml))
    run = {"model": "tiny", "models": "", "target": "onnxruntime", "protocol": "grpc", "url": "", "inputs": ""}
    fixed = {"server": "", "rate_rps": None, "duration_s": 30.0, "pairs": 8, "max_s": 1200.0}
    return InterleavedPlan(spec=spec, settings=LoadSettings(**run, warmup_s=2.0), **fixed | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "capacity_rps", "shape"),
    [
        ({}, 200.0, "100x9, 182x21"),
        ({}, 118.0, "100x9, 107x21"),
        ({}, 117.0, "81.9x9, 106x21"),
        ({"rate_rps": 20.0, "slack": 0.25}, 110.0, "20x9, 88x21"),
        ({"rate_rps": 100.0}, 110.0, "100x30"),
        ({}, None, "100x30"),
    ],
    ids=["the SLO's rate", "just enough room", "too little room", "as asked", "the same rate", "no capacity"],
)
def test_a_run_holds_one_rate_and_then_one_near_the_capacity(
    changes: dict[str, Any], capacity_rps: float | None, shape: str
) -> None:
    assert plan(**changes).shape(capacity_rps) == shape


@pytest.mark.parametrize(
    ("bound_rps", "capacity_rps", "rates"),
    [
        ((200,), 400.0, "200x10, 364x10"),
        ((200,), 220.0, "200x21"),
        ((200,), 195.0, "177x21"),
        ((100,), 220.0, "200x21"),
        ((50,), 220.0, "50x10, 200x10"),
    ],
    ids=["below", "at", "above", "the rate of the latencies", "below the rate of the latencies"],
)
def test_a_rate_that_an_objective_is_bound_to_is_measured_too(
    bound_rps: tuple[int, ...], capacity_rps: float, rates: str
) -> None:
    asked = plan(*(f"p50_ms < 10 @ {rate} rps" for rate in bound_rps))
    assert asked.shape(capacity_rps) == f"100x9, {rates}"


def test_the_number_of_pairs_fits_into_the_time() -> None:
    assert [plan(pairs=10).pairs_in(left_s) for left_s in (1000, 710, 709, 568)] == [10, 10, 9, 8]
    assert least_pairs(1 - 0.05 / 4) == LEAST_PAIRS  # four rows, if failures are judged
    asked = values_of("regression", "--base", "a", "--new", "b")
    assert LEAST_PAIRS < plan(pairs=10).pairs_in(asked.max_s * (1 - SEARCH_SHARE)) == asked.pairs
    with pytest.raises(InputError, match="8 pairs need about 1468 s; raise it"):
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
    [((), "bc cb bc"), ((2,), "bc bc cb bc"), ((2, 4), "bc bc cb bc")],
    ids=["quiet", "repeated once", "and not twice"],
)
def test_pairs_alternate_with_the_same_arrivals_and_a_spoiled_one_is_repeated_once(
    tmp_path: Path, busy: tuple[int, ...], runs: str
) -> None:
    made: list[tuple[str, int]] = []
    versions = (served(tmp_path, "baseline", made, busy=busy), served(tmp_path, "candidate", made, busy=busy))
    pairs = list(measure_pairs(versions, "100x10", 3, time.monotonic() + 1000, Console(quiet=True)))
    assert len(pairs) == 3
    order = "".join(role[0] for role, _ in made)
    assert [order[at : at + 2] for at in range(0, len(order), 2)] == runs.split()
    assert all(made[at][1] == made[at + 1][1] for at in range(0, len(made), 2))


def test_the_time_limit_never_leaves_fewer_than_the_minimum_of_pairs(tmp_path: Path) -> None:
    made: list[tuple[str, int]] = []
    versions = (served(tmp_path, "baseline", made), served(tmp_path, "candidate", made))
    assert len(list(measure_pairs(versions, "100x10", 20, 0.0, Console(quiet=True)))) == LEAST_PAIRS


@pytest.mark.parametrize(("role", "error"), [("candidate", GateFailed), ("baseline", InvalidMeasurement)])
def test_a_dead_candidate_is_worse_and_a_dead_baseline_is_an_invalid_measurement(
    tmp_path: Path, role: Role, error: type[Exception]
) -> None:
    process = SimpleNamespace(poll=lambda: 1, wait=lambda timeout_s: 1)
    server: Any = SimpleNamespace(process=process, last_words="out of memory", log=tmp_path / "server.log")

    class Lost(type(runner(tmp_path))):  # type: ignore[misc]
        def run(self, **changes: Any) -> Run:
            raise InvalidMeasurement("no longer answers")

    about = vars(runner(tmp_path))
    dead = ServedVersion(version=ComparedVersion(role=role, given="x"), server=server, runner=Lost(**about))
    with pytest.raises(error, match=r"x died under load: out of memory \(log: .*server.log\)"):
        dead.run("100x10", 0)


def test_the_capacity_of_the_baseline_is_found_without_a_confirmation(tmp_path: Path) -> None:
    on_server = runner(
        tmp_path, server_of(lambda rate, phase: "holds" if rate < 95 and phase != "confirm" else "fails")
    )
    baseline = ServedVersion(
        version=ComparedVersion(role="baseline", given="x"), server=cast(Any, None), runner=on_server
    )
    found = capacity_of(baseline, plan(), Console(quiet=True))
    assert found is not None
    assert 95 / 1.1 <= found < 95
    none = ServedVersion(
        version=baseline.version, server=baseline.server, runner=runner(tmp_path, server_of(lambda *_: "fails"))
    )
    assert capacity_of(none, plan(), Console(quiet=True)) is None

"""Is the new one worse? Judged on made-up runs whose answer is known, and on real servers."""

from __future__ import annotations

import json
import math
import subprocess
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, SloSpec
from loadtests.bootstrap import (
    Draws,
    Interval,
    Stretches,
    expanded_tail,
    least_pairs,
    means_ms,
    percentiles,
    ratio_interval,
)
from loadtests.compare_runs import PAIRS, as_json, markdown
from loadtests.interleaved import SEARCH_SHARE, How, pairs_in_time, shape_of
from loadtests.regression import LEAST_PAIRS, Thresholds, _Judge, compare, method
from loadtests.results import Run, Settings
from loadtests.sides import Side
from tests.conftest import run_module
from tests.test_capacity import SPEC, write_sleeper
from tests.test_results import Request, saved_run, steady

SLO = SloSpec(p99_ms=50)


def noisy(median_ms: float, seed: int, count: int = 200) -> list[Request]:
    """Requests whose run, as a whole, is a little faster or slower than the next, as on a shared machine."""
    generator = np.random.default_rng(seed)
    latencies = generator.lognormal(math.log(median_ms / 1000), 0.3, count) * generator.lognormal(0, 0.02)
    return [
        (time, time, time + each, None) for time, each in zip(np.arange(count) / count * 10, latencies, strict=True)
    ]


def runs(folder: Path, median_ms: float, first: int, count: int = 8, **changes: Any) -> list[Run]:
    """So many runs at 20/s."""
    made = (noisy(median_ms, seed) for seed in range(first, first + count))
    return [saved_run(folder / f"{place:02d}", each, rate_rps=20.0, **changes) for place, each in enumerate(made)]


@pytest.mark.parametrize(
    ("new_ms", "verdict"),
    [(10.0, "no worse"), (8.0, "no worse"), (10.8, "inconclusive"), (13.0, "worse")],
    ids=["the same", "faster", "at the threshold", "slower"],
)
def test_a_side_is_worse_where_its_whole_interval_is_beyond_the_threshold(
    tmp_path: Path, new_ms: float, verdict: str
) -> None:
    found = compare(runs(tmp_path / "a", 10, 0), runs(tmp_path / "b", new_ms, 100), SLO, Thresholds(p50=0.08, p99=0.3))
    assert found.rows[0].verdict == verdict
    assert found.rows[0].change.ratio == pytest.approx(new_ms / 10, rel=0.04)
    assert found.rows[0].better == (new_ms == 8)


def test_of_many_comparisons_of_the_same_with_itself_hardly_one_is_called_worse(tmp_path: Path) -> None:
    verdicts = []
    for first in range(0, 160, 16):
        sides = runs(tmp_path / "a", 10, first), runs(tmp_path / "b", 10, first + 8)
        verdicts.append(compare(*sides, SLO, Thresholds(p50=0.0001, p99=0.0001)).verdict)
    assert verdicts.count("worse") <= 1  # of 10, at 95 %, though nothing is allowed


def test_the_interval_holds_the_true_ratio_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    draws = Draws.of(6, 6)
    held = 0
    for _ in range(300):
        values = generator.lognormal(0, 0.1, (2, 6))
        base, new = draws.base @ values[0], draws.new @ values[1]
        interval = ratio_interval(new, base, pairs=6, confidence=0.95)
        held += interval.low <= 1 <= interval.high
    assert held / 300 == pytest.approx(0.95, abs=0.035)
    assert expanded_tail(6, 0.95) < 0.025 < expanded_tail(6, 0.80)


@pytest.mark.parametrize(("rows", "needed"), [(1, 6), (2, 7), (3, 7), (4, 8)])
def test_no_interval_is_surer_than_its_pairs_can_be(rows: int, needed: int) -> None:
    each = 1 - 0.05 / rows
    assert least_pairs(each) == needed
    found = {}
    for pairs in (needed - 1, needed):
        draws, values = Draws.of(pairs, pairs), np.random.default_rng(0).lognormal(0, 0.1, (2, pairs))
        found[pairs] = ratio_interval(draws.new @ values[0], draws.base @ values[1], pairs=pairs, confidence=each)
    assert math.isnan(found[needed - 1].low)
    assert found[needed].low < found[needed].ratio < found[needed].high


def test_percentiles_of_draws_are_those_of_the_added_up_runs(tmp_path: Path) -> None:
    fast, slow = saved_run(tmp_path / "a", steady(0.01, lag_s=0)), saved_run(tmp_path / "b", steady(0.1, lag_s=0))
    side = Stretches.of([fast.window, slow.window])
    draws = np.array([[1, 1], [2, 0], [0, 2]])
    assert percentiles(side, draws, 50) == pytest.approx([10, 10, 100], rel=2e-3)
    assert percentiles(side, draws, 51) == pytest.approx([100, 10, 100], rel=2e-3)
    assert means_ms(side, draws) == pytest.approx([55, 10, 100], rel=2e-3)
    lost = Stretches.of([saved_run(tmp_path / "c", [*steady(count=90), *[(9.5, 9.5, 0.0, "dropped")] * 10]).window])
    assert percentiles(lost, np.array([[1]]), 90)[0] == pytest.approx(10.1, rel=2e-3)
    assert math.isinf(percentiles(lost, np.array([[1]]), 91)[0])
    assert means_ms(lost, np.array([[1]]))[0] == pytest.approx(10.1, rel=2e-2)  # of what was answered


def climbing(folder: Path, knee_rps: float, first: int, count: int = 7, lag_s: float = 0.0) -> list[Run]:
    """Runs at 20/s and up a ladder; past the knee latency leaps over the limit. From 60/s on it is sent late."""
    found = []
    for place in range(count):
        generator = np.random.default_rng(first + place)
        requests: list[Request] = []
        for start, rate in ((0, 20), (10, 40), (14, 50), (18, 60), (22, 70)):
            length = 10 if rate == 20 else 4
            latency_s = 0.05 * (rate / knee_rps) ** 4  # is 50 ms at the knee
            times = start + np.arange(rate * length) / rate
            lag = lag_s if rate >= 60 else 0.0
            takes_s = latency_s * generator.uniform(0.9, 1.0, len(times))
            requests += [(time, time + lag, time + each, None) for time, each in zip(times, takes_s, strict=True)]
        shape = "20x10, 40x4, 50x4, 60x4, 70x4"
        found.append(saved_run(folder / f"{place}", requests, rate_rps=None, shape=shape, duration_s=26.0))
    return found


@pytest.mark.parametrize(("knee_rps", "verdict"), [(56, "no worse"), (47, "worse"), (66, "no worse"), (30, "worse")])
def test_capacity_is_read_between_the_rungs_of_the_ladder(tmp_path: Path, knee_rps: float, verdict: str) -> None:
    found = compare(climbing(tmp_path / "a", 56, 0), climbing(tmp_path / "b", knee_rps, 50), SLO, Thresholds())
    row = found.rows[2]
    assert (row.name, row.verdict) == ("capacity", verdict)
    assert row.base == pytest.approx(56, rel=0.02)
    assert row.new == pytest.approx(max(knee_rps, 40), rel=0.02)
    assert ("below the ladder" in row.note) == (knee_rps == 30)


def test_where_the_base_is_beyond_the_ladder_only_what_is_worse_all_the_same_is_said(tmp_path: Path) -> None:
    found = compare(climbing(tmp_path / "a", 90, 0), climbing(tmp_path / "b", 90, 50), SLO, Thresholds())
    assert (found.rows[2].verdict, found.verdict) == ("inconclusive", "inconclusive")
    assert "base's lies above the ladder, 40 to 70/s" in found.rows[2].note
    assert (
        compare(climbing(tmp_path / "a", 90, 0), climbing(tmp_path / "c", 50, 50), SLO, Thresholds()).verdict == "worse"
    )
    below = compare(climbing(tmp_path / "d", 30, 0), climbing(tmp_path / "e", 30, 50), SLO, Thresholds())
    assert (below.rows[2].verdict, below.rows[2].note) == ("inconclusive", "base's lies below the ladder, 40 to 70/s")


def test_a_capacity_that_was_to_be_measured_and_was_not_is_in_doubt(tmp_path: Path) -> None:
    base = runs(tmp_path / "a", 10, 0)
    assert compare(base, base, SLO, Thresholds()).verdict == "no worse"
    found = compare(base, base, SLO, Thresholds(), capacity=True)
    assert [(row.name, row.verdict) for row in found.rows][2] == ("capacity", "inconclusive")
    side = Side(name="new", given="b")
    assert "| capacity | - | - | - | - |" in markdown(found, (side, side), "tiny", {})


def test_a_knee_of_the_generator_is_no_capacity(tmp_path: Path) -> None:
    late = climbing(tmp_path, 56, 0, lag_s=0.004)
    found = compare(late, late, SLO, Thresholds())
    assert (found.rows[2].verdict, found.rows[2].note) == ("inconclusive", "the generator is the limit at 60/s")


def test_failures_make_the_new_side_worse_however_fast_the_rest_is(tmp_path: Path) -> None:
    base = runs(tmp_path / "a", 10, 0)
    lossy = [
        [(p, s, f, "ServerBusy" if i % 30 == 0 else None) for i, (p, s, f, _) in enumerate(noisy(5, n))]
        for n in range(8)
    ]
    new = [saved_run(tmp_path / "b" / f"{place}", each, rate_rps=20.0) for place, each in enumerate(lossy)]
    found = compare(base, new, SLO, Thresholds())
    assert [row.verdict for row in found.rows] == ["no worse", "worse", "worse"]
    assert math.isinf(found.rows[1].change.ratio)
    side = Side(name="new", given="b")
    assert as_json(found, (side, side), {})["rows"][1]["new"] is None
    assert "| never | ∞ |" in markdown(found, (side, side), "tiny", {})


def test_too_few_pairs_or_samples_prove_nothing_and_the_number_needed_is_said(tmp_path: Path) -> None:
    few = compare(runs(tmp_path / "a", 10, 0, 4), runs(tmp_path / "b", 30, 9, 4), SLO, Thresholds())
    assert (few.verdict, few.rows[0].note) == ("inconclusive", "4 pairs, 7 needed")
    short = [saved_run(tmp_path / "c" / f"{n}", noisy(10, n, 40), rate_rps=4.0) for n in range(7)]
    assert compare(short, short, SLO, Thresholds()).rows[1].note == "280 requests, 459 needed"


def test_runs_that_differ_among_themselves_are_not_called_close_to_the_threshold(tmp_path: Path) -> None:
    base = [saved_run(tmp_path / "a" / f"{n}", noisy(10 * 4 ** (n % 2), n), rate_rps=20.0) for n in range(8)]
    new = [saved_run(tmp_path / "b" / f"{n}", noisy(10 * 4 ** (n // 4), n), rate_rps=20.0) for n in range(8)]
    assert compare(base, new, SLO, Thresholds()).rows[0].note.startswith("more than 200 pairs would tell; runs of")


def test_more_pairs_are_advised_than_were_made() -> None:
    skewed = _Judge(pairs=8, confidence=0.95)
    assert skewed._advice(Interval(ratio=1.02, low=0.98, high=1.12), 1.10) == "about 13 pairs would tell"
    assert skewed._advice(Interval(ratio=1.0, low=0.99, high=1.20), 1.15) == "about 14 pairs would tell"
    assert skewed._advice(Interval(ratio=1.0, low=0.94, high=1.01), 0.95) == "about 12 pairs would tell"


def test_what_is_left_of_unequally_many_runs_is_not_paired(tmp_path: Path) -> None:
    base, new = runs(tmp_path / "a", 10, 0), runs(tmp_path / "b", 10, 50)
    busy = saved_run(tmp_path / "busy", noisy(90, 1), rate_rps=20.0, thread_cpu=0.99)
    found = compare(base, [busy, *new], SLO, Thresholds())
    assert (found.runs, found.paired) == ((8, 8), False)
    assert method(found).startswith("8 and 8 runs, not paired")


def test_a_pair_in_which_the_generator_was_the_limit_is_left_out(tmp_path: Path) -> None:
    base, new = runs(tmp_path / "a", 10, 0), runs(tmp_path / "b", 10, 50)
    busy = saved_run(tmp_path / "busy", noisy(90, 1), rate_rps=20.0, thread_cpu=0.99)
    found = compare(base, [busy, *new[1:]], SLO, Thresholds())
    assert found.runs == (7, 7)
    assert "99% busy" in found.dropped[0]
    with pytest.raises(InvalidMeasurement, match="no run is valid"):
        compare([busy], [busy], SLO, Thresholds())


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rate_rps": 25.0}, "measured at 25/s"), ({"rate_rps": None, "users": 2}, "no open loop")],
    ids=["another rate", "closed loop"],
)
def test_runs_of_different_kinds_are_not_compared(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    other = saved_run(tmp_path / "b", steady(), **changes)
    with pytest.raises(InputError, match=message):
        compare(runs(tmp_path / "a", 10, 0, 1), [other], SLO, Thresholds())


def recorded(folder: Path, base: Sequence[Run], new: Sequence[Run], *more: str) -> subprocess.CompletedProcess[str]:
    """`python -m loadtests.compare_runs` over two folders of runs, with a spec of theirs."""
    if not (folder / "spec").exists():
        write_sleeper(folder / "spec", 0.002)
    sides = ("--base", str(base[0].folder.parent), "--new", str(new[0].folder.parent))
    model = ("--model", "tiny", "--models", str(folder / "spec" / "models"))
    return run_module("loadtests.compare_runs", *model, *sides, *more, BUILD=str(folder / "build"))


def test_recorded_runs_are_judged_again_and_the_table_is_fit_for_a_pull_request(tmp_path: Path) -> None:
    base, new = runs(tmp_path / "a", 10, 0), runs(tmp_path / "b", 14, 50)
    run = recorded(tmp_path, base, new)
    assert run.returncode == 1, run.stderr
    text = (tmp_path / "build" / "tiny" / "compare-runs.md").read_text()
    assert text in run.stdout
    assert f"`{new[0].folder.parent}` is worse than `{base[0].folder.parent}`" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {8}
    assert "**worse**" in table[2]
    data = json.loads((tmp_path / "build" / "tiny" / "compare-runs.json").read_text())
    assert (data["verdict"], data["rows"][0]["name"]) == ("worse", "p50 at 20/s")
    assert recorded(tmp_path, base, base, "--threshold-p99", "50").returncode == 0


def left(build: Path) -> tuple[str, dict[str, Any]]:
    """The table and the figures in their place."""
    place = build / "tiny" / "compare-runs.md"
    return place.read_text(), json.loads(place.with_suffix(".json").read_text())


def test_where_nothing_can_be_said_that_takes_the_place_of_an_earlier_table(tmp_path: Path) -> None:
    base = runs(tmp_path / "a", 10, 0, 7)
    busy = runs(tmp_path / "b", 10, 50, 7, thread_cpu=0.99)
    assert recorded(tmp_path, base, base, "--threshold", "50", "--threshold-p99", "90").returncode == 0
    assert recorded(tmp_path, base, busy).returncode == 3
    text, data = left(tmp_path / "build")
    assert (data["verdict"], data["rows"], data["new"]) == ("inconclusive", [], str(busy[0].folder.parent))
    assert "no run is valid" in data["reason"] in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--pairs", "7"), "--pairs 7: 8 or more are needed"),
        (("--threshold", "0"), "--threshold 0: it must be more than 0"),
        (("--warmup-s", "nan"), "--warmup-s nan: it must be 0 or more"),
        (("--output", "x.json"), "--output x.json: the Markdown file"),
        (("--new", "tests/models"), "NEW=tests/models: neither a repository"),
    ],
    ids=["pairs", "threshold", "warmup", "output", "side"],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, flags: tuple[str, ...], message: str) -> None:
    base = runs(tmp_path / "a", 10, 0, 1)
    run = recorded(tmp_path, base, base, *flags)
    assert (run.returncode, len(run.stderr.splitlines())) == (2, 1)
    assert message in run.stderr


def how(*objectives: str, **changes: Any) -> How:
    """Of a service that is to hold 100/s."""
    toml = tomllib.loads(SPEC) | {"slo": {"p99_ms": 50, "rate_rps": 100, "objectives": objectives}}
    spec = DeploymentSpec.model_validate_json(json.dumps(toml))
    run = {"model": "tiny", "models": "", "target": "onnxruntime", "protocol": "grpc", "url": "", "inputs": ""}
    fixed = {"server": "", "rate_rps": None, "duration_s": 30.0, "pairs": 8, "max_s": 1200.0}
    return How(spec=spec, settings=Settings(**run, users=1, warmup_s=2.0), **fixed | changes)  # type: ignore[arg-type]


def test_latencies_are_compared_at_the_slos_rate_where_the_base_can_hold_it() -> None:
    assert shape_of(how(), 200.0) == "100x9, 150x4, 168x4, 188x4, 210x4, 234x4, 260x4"
    assert shape_of(how(), 110.0).startswith("77x9")
    assert shape_of(how(rate_rps=20.0), 110.0).startswith("20x9")
    assert shape_of(how(), None) == "100x30"


@pytest.mark.parametrize(
    ("bound_rps", "capacity_rps", "ladder"),
    [
        ((200,), 195.0, "146x4, 164x4, 183x4, 200x4, 228x4, 254x4"),
        ((200,), 400.0, "200x4, 336x4, 376x4, 420x4, 468x4, 520x4"),
        ((200, 201), 195.0, "146x4, 164x4, 183x4, 200x4, 201x4, 254x4"),
        ((300,), 195.0, "146x4, 164x4, 183x4, 205x4, 228x4, 254x4"),
        ((100,), 200.0, "150x4, 168x4, 188x4, 210x4, 234x4, 260x4"),
    ],
    ids=["within", "below", "two", "above", "the rate of the latencies"],
)
def test_a_rate_that_an_objective_is_bound_to_takes_the_place_of_the_first_rung_beyond_it(
    bound_rps: tuple[int, ...], capacity_rps: float, ladder: str
) -> None:
    asked = how(*(f"p50_ms < 10 @ {rate} rps" for rate in bound_rps))
    assert shape_of(asked, capacity_rps) == f"100x9, {ladder}"


@pytest.mark.parametrize(("bound_rps", "knee_rps"), [(50, 45), (20, 18)], ids=["a rung", "the rate of the latencies"])
def test_capacity_is_what_also_holds_an_objective_that_is_bound_to_a_rate(
    tmp_path: Path, bound_rps: int, knee_rps: float
) -> None:
    limit_ms = 0.95 * 50 * (knee_rps / 56) ** 4
    slo = SloSpec(p99_ms=50, objectives=(f"p50_ms < {limit_ms} @ {bound_rps} rps",))
    found = compare(climbing(tmp_path / "a", 90, 0), climbing(tmp_path / "b", 56, 50), slo, Thresholds())
    assert found.rows[2].new == pytest.approx(max(knee_rps, 20), rel=0.02)


def test_as_many_pairs_are_made_as_fit_into_the_time() -> None:
    assert [pairs_in_time(how(pairs=10), left_s) for left_s in (1000, 600)] == [10, 8]
    least = least_pairs(1 - 0.05 / 4)  # where failures are judged, too
    assert least == LEAST_PAIRS < pairs_in_time(how(pairs=PAIRS), 1200 * (1 - SEARCH_SHARE)) == PAIRS
    with pytest.raises(InputError, match="8 pairs need about 1468 s in all"):
        pairs_in_time(how(), 300)


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repositories `fast` (5 ms a request), `slow` (15 ms), `broken` and `deadly`."""
    folder = tmp_path_factory.mktemp("repositories")
    for name, delay_s in (("fast", 0.005), ("slow", 0.015), ("broken", 0.005), ("deadly", 0.005)):
        write_sleeper(folder, delay_s, name)
    late = SPEC.replace("p50_ms = 100", "p50_ms = 1000")  # a busy machine may send that much later
    (folder / "models" / "tiny" / "deploy.toml").write_text(late)
    (folder / "broken" / "tiny" / "1" / "model.py").write_text("raise RuntimeError('no weights here')")
    deadly = folder / "deadly" / "tiny" / "1" / "model.py"
    kill = "os.kill(int(next(line for line in open('/proc/self/status') if line.startswith('PPid')).split()[1]), 9)"
    dies = f"self.count = getattr(self, 'count', 0) + 1\n        if self.count > 30:\n            import os; {kill}\n        answers = []"
    deadly.write_text(deadly.read_text().replace("answers = []", dies))
    return folder


def served(repositories: Path, build: Path, new: str, *more: str) -> subprocess.CompletedProcess[str]:
    """`fast` against another, in the shortest runs that prove anything."""
    model = ("--model", "tiny", "--models", str(repositories / "models"), "--inputs", str(repositories / "inputs.npz"))
    sides = ("--base", str(repositories / "fast"), "--new", str(repositories / new))
    short = ("--pairs", "8", "--duration-s", "1", "--warmup-s", "0", "--rate", "40")
    return run_module("loadtests.compare_runs", *model, *sides, *short, *more, BUILD=str(build))


@pytest.mark.slow
def test_an_added_delay_is_found_worse_and_the_same_is_not_worse_than_itself(
    repositories: Path, tmp_path: Path
) -> None:
    run = served(repositories, tmp_path, "slow", "--no-capacity")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "p50 at 40/s" in run.stdout
    (kept,) = (tmp_path / "tiny" / "compare-runs").iterdir()
    base, new = ([Run.load(each) for each in (kept / side / "runs").iterdir()] for side in ("base", "new"))
    assert len(base) == len(new) >= 7
    assert not (kept / "base" / "repository").exists()
    # On a shared machine nothing may be told; but worse it is not.
    same = recorded(tmp_path, base, base, "--threshold", "60", "--threshold-p99", "200")
    assert same.returncode in (0, 3), same.stdout + same.stderr


def test_a_new_side_that_does_not_load_fails_the_gate_in_one_line(repositories: Path, tmp_path: Path) -> None:
    run = served(repositories, tmp_path, "broken", "--no-capacity")
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: NEW=")
    assert "is not served" in run.stderr
    assert "no weights here" in run.stderr
    text, data = left(tmp_path)
    assert data["verdict"] == "worse"
    assert "no weights here" in data["reason"] in text


def test_a_new_side_that_dies_under_load_fails_the_gate_in_one_line(repositories: Path, tmp_path: Path) -> None:
    run = served(repositories, tmp_path, "deadly", "--no-capacity", "--timeout-s", "2")
    assert run.returncode == 1, run.stderr
    assert "died under load" in run.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("base_fails", "limit", "verdict"),
    [(False, 0.001, "worse"), (False, 0.01, "no worse"), (True, 0.001, "no worse")],
    ids=["more than the SLO allows", "as the SLO allows", "as of base"],
)
def test_a_side_that_fails_more_requests_is_worse(tmp_path: Path, base_fails: bool, limit: float, verdict: str) -> None:
    def side(name: str, first: int, fails: bool) -> list[Run]:
        made = [noisy(10, seed) for seed in range(first, first + 8)]
        if fails:
            made = [[*each[:-1], (*each[-1][:3], "ServerBusy")] for each in made]  # one in 200
        return [saved_run(tmp_path / name / f"{place}", each, rate_rps=20.0) for place, each in enumerate(made)]

    slo = SloSpec(p99_ms=50, max_error_rate=limit)
    found = compare(side("a", 0, base_fails), side("b", 100, True), slo, Thresholds(p50=0.5, p99=5.0))
    row = found.rows[-1]
    assert (row.name, row.verdict, row.new, row.better) == ("failed at 20/s (new / allowed)", verdict, 0.005, False)
    assert found.verdict == verdict
    assert "| failed at 20/s (new / allowed) |" in markdown(
        found, (Side(name="base", given="a"), Side(name="new", given="b")), "m", {}
    )

"""Whether a candidate is worse: made-up runs with a known answer, and the command on real servers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cli.main import values_of
from deepseek.spec import InputError, InvalidMeasurement, SloSpec
from loadtests.regression.compared_version import ComparedVersion
from loadtests.regression.comparison import CAPACITY, Comparison, RowJudge, Thresholds, compare
from loadtests.regression.held_rates import HeldRates
from loadtests.regression.regression import as_json, main, markdown
from loadtests.results.run import Run
from tests.add_one import replace_in
from tests.conftest import RunHere
from tests.saved_runs import Request, saved_run, steady
from tests.sleeper import SPEC, write_sleeper

SLO = SloSpec(p99_ms=50)
VERSIONS = (ComparedVersion(role="baseline", given="a"), ComparedVersion(role="candidate", given="b"))


def noisy(median_ms: float, seed: int, count: int = 200) -> list[Request]:
    """The requests of a run; each run is a little faster or slower than the next, as on a shared machine."""
    generator = np.random.default_rng(seed)
    latencies = generator.lognormal(math.log(median_ms / 1000), 0.3, count) * generator.lognormal(0, 0.02)
    times = np.arange(count) / count * 10
    return [(time, time, time + each, None) for time, each in zip(times, latencies, strict=True)]


def losing(requests: list[Request], *lost: int) -> list[Request]:
    """The same requests, some of them refused."""
    return [(*each[:3], "ServerBusy") if place in lost else each for place, each in enumerate(requests)]


def saved(folder: Path, made: Sequence[list[Request]], **changes: Any) -> list[Run]:
    fixed = {"rate_rps": 20.0, **changes}
    return [saved_run(folder / f"{place:02d}", each, **fixed) for place, each in enumerate(made)]


def runs(folder: Path, median_ms: float, first: int, count: int = 8, **changes: Any) -> list[Run]:
    return saved(folder, [noisy(median_ms, seed) for seed in range(first, first + count)], **changes)


@pytest.mark.parametrize(
    ("candidate_ms", "verdict"),
    [(10.0, "no worse"), (8.0, "no worse"), (10.8, "inconclusive"), (13.0, "worse")],
)
def test_a_candidate_is_worse_if_its_whole_interval_is_beyond_the_threshold(
    tmp_path: Path, candidate_ms: float, verdict: str
) -> None:
    thresholds = Thresholds(p50=0.08, p99=0.3)
    found = compare(runs(tmp_path / "a", 10, 0), runs(tmp_path / "b", candidate_ms, 100), SLO, thresholds)
    assert found.rows[0].verdict == verdict
    assert found.rows[0].change.ratio == pytest.approx(candidate_ms / 10, rel=0.04)
    assert found.rows[0].better == (candidate_ms == 8)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(1.02, 1.05, "no worse"), (1.05, 1.2, "inconclusive"), (1.0501, 1.2, "worse")],
)
def test_an_interval_that_touches_the_threshold(low: float, high: float, verdict: str) -> None:
    values = np.concatenate([[math.sqrt(low * high)], np.linspace(low, high, 1001)])
    judge = RowJudge(pairs=50, confidence=1 - 1e-12)  # so high that no draw is excluded
    found = judge.row("x", "ms", np.ones(1002), values, 0.05)
    assert (found.change.low, found.change.high) == (low, high)
    assert found.verdict == verdict


AtRates = Callable[..., list[Run]]


@pytest.fixture(scope="module")
def at_rates(tmp_path_factory: pytest.TempPathFactory) -> AtRates:
    """`runs_at_rates`, made once for the tests that ask for the same runs."""
    made: dict[str, list[Run]] = {}

    def runs_of(over: dict[int, float], lag_s: float = 0.0) -> list[Run]:
        name = f"{over} {lag_s}"
        if name not in made:
            made[name] = runs_at_rates(tmp_path_factory.mktemp("at_rates"), over, lag_s)
        return made[name]

    return runs_of


def runs_at_rates(folder: Path, over: dict[int, float], lag_s: float) -> list[Run]:
    """Eight runs at 20/s and then 15 s at each of the rates, where this share of requests takes 80 ms, not 10."""
    found = []
    for place in range(8):
        requests, start = noisy(10, place), 10
        for rate, share in over.items():
            times = start + np.arange(15 * rate) / rate
            per_mille = round(1000 * share)
            slow = np.arange(len(times)) * per_mille % 1000 < per_mille
            requests += [
                (time, time + lag_s, time + (0.08 if late else 0.01), None)
                for time, late in zip(times, np.roll(slow, 10 * place), strict=True)
            ]
            start += 15
        shape = ", ".join(["20x10", *(f"{rate}x15" for rate in over)])
        found.append(saved_run(folder / f"{place}", requests, rate_rps=None, shape=shape, duration_s=float(start)))
    return found


@pytest.mark.parametrize(
    ("baseline", "candidate", "verdict", "figures", "note"),
    [
        ({50: 0}, {50: 0}, "no worse", (50, 50), ""),
        ({50: 0}, {50: 0.04}, "worse", (50, None), "at 50/s p99_ms violated: at least "),
        ({50: 0}, {50: 0.01}, "inconclusive", (50, None), "at 50/s p99_ms inconclusive: "),
        ({50: 0.04}, {50: 0}, "inconclusive", (None, 50), "the baseline is not proved: at 50/s p99_ms violated: "),
        ({50: 0.04}, {50: 0.04}, "inconclusive", (None, None), "the baseline is not proved: at 50/s p99_ms violated: "),
        ({40: 0, 50: 0}, {40: 0, 50: 0.04}, "worse", (50, 40), "at 50/s p99_ms violated: at least "),
        ({40: 0, 50: 0}, {40: 0.01, 50: 0.04}, "worse", (50, None), "at 40/s p99_ms inconclusive: "),
        ({40: 0, 50: 0}, {40: 0.01, 50: 0}, "inconclusive", (50, None), "at 40/s p99_ms inconclusive: "),
        ({40: 0, 50: 0.04}, {40: 0, 50: 0.04}, "no worse", (40, 40), ""),
        ({40: 0, 50: 0.01}, {40: 0.04, 50: 0.04}, "worse", (40, None), "at 40/s p99_ms violated: at least "),
        ({40: 0.04, 50: 0}, {40: 0, 50: 0}, "inconclusive", (None, 50), "the baseline is not proved: at 40/s p99_ms "),
    ],
)
def test_the_candidate_must_hold_every_rate_that_the_baseline_holds_with_confidence(
    at_rates: AtRates,
    baseline: dict[int, float],
    candidate: dict[int, float],
    verdict: str,
    figures: tuple[float | None, float | None],
    note: str,
) -> None:
    found = compare(at_rates(baseline), at_rates(candidate), SLO, Thresholds())
    row = found.rows[2]
    assert (row.name, row.verdict, row.note[: len(note) or None]) == (CAPACITY, verdict, note)
    data = as_json(found, VERSIONS, {})["rows"][2]
    assert (data["baseline"], data["candidate"]) == figures


def test_the_rates_share_the_error_that_is_allowed(at_rates: AtRates) -> None:
    fast = at_rates({50: 0})
    one, three = (HeldRates.of(fast, (50,), SLO, looks).at[50].objectives[0] for looks in (1, 3))
    assert one.high < three.high


@pytest.mark.parametrize(
    ("by_side", "side"), [((0, 6), "candidate"), ((6, 0), "baseline"), ((0, 5), None), ((1, 9), None)]
)
def test_a_side_that_alone_makes_the_generator_late_is_a_finding(by_side: tuple[int, int], side: str | None) -> None:
    found = Comparison(
        over="grpc", rate_rps=20, rates_rps=(), pairs=8, dropped=("a: late",), dropped_by_side=by_side, rows=()
    )
    assert (found.starves, found.verdict) == (side, "inconclusive" if side else "no worse")


def test_one_slow_answer_over_a_maximum_does_not_make_a_candidate_worse(at_rates: AtRates) -> None:
    both = at_rates({50: 0}), at_rates({50: 0.001})
    with_maximum = SLO.model_copy(update={"objectives": ("max_ms < 50",)})
    found, without = (compare(*both, slo, Thresholds()).rows[2] for slo in (with_maximum, SLO))
    assert str(found) == str(without)  # nan in both


def test_the_generators_limit_is_no_verdict_on_a_version(at_rates: AtRates) -> None:
    late = at_rates({50: 0}, lag_s=0.03)
    row = compare(late, late, SLO, Thresholds()).rows[2]
    assert row.verdict == "inconclusive"
    assert row.note.startswith("the baseline is not proved: at 50/s the generator sent late")


@pytest.mark.parametrize(("bound_rps", "verdict"), [(50, "worse"), (40, "worse"), (20, "no worse")])
def test_an_objective_that_is_bound_to_a_rate_is_judged_there(at_rates: AtRates, bound_rps: int, verdict: str) -> None:
    slo = SloSpec(p99_ms=100, objectives=(f"p95_ms < 50 @ {bound_rps} rps",))
    row = compare(at_rates({40: 0, 50: 0}), at_rates({40: 0.1, 50: 0.1}), slo, Thresholds()).rows[2]
    assert (row.verdict, row.baseline) == (verdict, 50)


def test_runs_of_one_rate_are_judged_there_if_capacity_is_asked_for(tmp_path: Path) -> None:
    base = runs(tmp_path / "a", 10, 0)
    assert len(compare(base, base, SLO, Thresholds()).rows) == 2
    found = compare(base, base, SLO, Thresholds(), capacity=True)
    assert (found.rows[2].name, found.rows[2].verdict, found.verdict) == (CAPACITY, "inconclusive", "inconclusive")
    line = f"| {CAPACITY} | - | - | - | - | ≥ 1.00 | inconclusive (the baseline "
    assert line in markdown(found, VERSIONS, "tiny", {})


def test_the_rows_share_the_error_that_is_allowed(tmp_path: Path) -> None:
    quiet = runs(tmp_path / "quiet", 10, 0, 7)
    lossy = saved(tmp_path / "lossy", [losing(noisy(10, seed), 7) for seed in range(7)])
    for made, capacity, rows in ((quiet, False, 2), (quiet, True, 3), (lossy, True, 4)):
        found = compare(made, made, SLO, Thresholds(), capacity=capacity)
        assert len(found.rows) == rows
        assert f"{1 - 0.05 / rows:.1%} each, so that all {rows} hold together at 95%" in found.method
        # Seven pairs are enough for the intervals of three rows, but not of four.
        assert ("7 pairs, 8 needed" in {row.note for row in found.rows}) == (rows == 4)


@pytest.mark.parametrize(
    ("baseline_fails", "objectives", "verdict"),
    [
        (False, {"max_error_rate": 0.001}, "worse"),
        (False, {"max_error_rate": 0.01}, "no worse"),
        (True, {"max_error_rate": 0.001}, "no worse"),
        (False, {"objectives": ("error_rate < 0.1% @ 20 rps",)}, "worse"),
        (False, {"objectives": ("error_rate < 0.1% @ 19 rps",)}, None),
        (False, {"objectives": ("error_rate < 0.1% @ 19 rps", "error_rate < 1%")}, "no worse"),
    ],
)
def test_a_candidate_that_fails_more_requests_than_allowed_is_worse(
    tmp_path: Path, baseline_fails: bool, objectives: dict[str, Any], verdict: str | None
) -> None:
    lossy = [losing(noisy(10, seed), 199) for seed in range(100, 108)]  # one in 200
    other = [losing(noisy(10, seed), 199) if baseline_fails else noisy(10, seed) for seed in range(8)]
    slo = SloSpec(p99_ms=50, **objectives)
    both = saved(tmp_path / "a", other), saved(tmp_path / "b", lossy)
    found = compare(*both, slo, Thresholds(p50=0.5, p99=5.0))
    rows = [row for row in found.rows if row.unit == "share"]
    assert [row.verdict for row in rows] == ([verdict] if verdict else [])
    assert found.verdict == (verdict or "no worse")
    for row in rows:
        assert (row.name, row.better) == ("failed at 20/s (candidate / allowed)", False)
        assert (row.baseline, row.candidate) == (0.005 if baseline_fails else 0, 0.005)


def test_failures_make_a_fast_candidate_worse(tmp_path: Path) -> None:
    lossy = [losing(noisy(5, seed), *range(0, 200, 30)) for seed in range(8)]
    found = compare(runs(tmp_path / "a", 10, 0), saved(tmp_path / "b", lossy), SLO, Thresholds())
    assert [row.verdict for row in found.rows] == ["no worse", "worse", "worse"]
    assert math.isinf(found.rows[1].change.ratio)
    assert as_json(found, VERSIONS, {})["rows"][1]["candidate"] is None
    assert "| never | ∞ |" in markdown(found, VERSIONS, "tiny", {})


def test_too_few_pairs_or_samples_are_inconclusive_and_the_note_says_how_many_are_needed(tmp_path: Path) -> None:
    few = compare(runs(tmp_path / "a", 10, 0, 4), runs(tmp_path / "b", 30, 9, 4), SLO, Thresholds())
    assert (few.verdict, few.rows[0].note) == ("inconclusive", "4 pairs, 7 needed")
    short = saved(tmp_path / "c", [noisy(10, seed, 40) for seed in range(7)], rate_rps=4.0)
    assert compare(short, short, SLO, Thresholds()).rows[1].note == "280 requests, 299 needed"


def test_a_pair_in_which_the_generator_was_the_limit_is_dropped(tmp_path: Path) -> None:
    busy = saved_run(tmp_path / "busy", noisy(90, 1), rate_rps=20.0, thread_cpu=0.99)
    found = compare(runs(tmp_path / "a", 10, 0), [busy, *runs(tmp_path / "b", 10, 50)[1:]], SLO, Thresholds())
    assert found.pairs == 7
    assert "99% busy" in found.dropped[0]
    assert "1 runs dropped (0 of the baseline, 1 of the candidate)" in markdown(found, VERSIONS, "tiny", {})
    with pytest.raises(InvalidMeasurement, match="no run is valid"):
        compare([busy], [busy], SLO, Thresholds())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_rps": 25.0}, "measured at 25/s over grpc"),
        (
            {"rate_rps": 20.0, "protocol": "http"},
            r"measured at 20/s over http, .* at 20/s over grpc; use one rate and one protocol",
        ),
        ({"rate_rps": None, "users": 2}, "not an open loop"),
        ({"rate_rps": None, "shape": "20-30x10"}, "not an open loop that starts at a steady rate"),
        ({}, "1 runs of the baseline, 0 of the candidate; runs are compared in pairs"),
    ],
)
def test_runs_of_different_kinds_are_not_compared(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    others = [saved_run(tmp_path / "b", steady(), **changes)] if changes else []
    with pytest.raises(InputError, match=message):
        compare(runs(tmp_path / "a", 10, 0, 1), others, SLO, Thresholds())


Recorded = Callable[..., int]


@pytest.fixture
def recorded(tmp_path: Path, own_build: Path) -> Recorded:
    """Runs the command over two folders of runs with a matching spec; returns its exit code."""
    write_sleeper(tmp_path / "spec", 0.002)

    def run(base: Sequence[Run], new: Sequence[Run], *more: str) -> int:
        both = ("--base", str(base[0].folder.parent), "--new", str(new[0].folder.parent))
        model = ("--model", "tiny", "--models", str(tmp_path / "spec" / "models"))
        return main(values_of("regression", *model, *both, *more))

    return run


def left(build: Path) -> tuple[str, dict[str, Any]]:
    """The written table and figures."""
    place = build / "tiny" / "regression.md"
    return place.read_text(), json.loads(place.with_suffix(".json").read_text())


def test_recorded_runs_are_judged_and_the_table_suits_a_pull_request(
    tmp_path: Path, recorded: Recorded, capsys: pytest.CaptureFixture[str]
) -> None:
    base, new = runs(tmp_path / "a", 10, 0), runs(tmp_path / "b", 14, 50)
    assert recorded(base, new) == 1
    text, data = left(tmp_path / "build")
    assert text in capsys.readouterr().out
    assert f"`{new[0].folder.parent}` is worse than `{base[0].folder.parent}`" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {8}
    assert "**worse**" in table[2]
    assert (data["verdict"], data["rows"][0]["name"]) == ("worse", "p50 at 20/s")


def test_a_measurement_without_a_result_replaces_an_earlier_table(tmp_path: Path, recorded: Recorded) -> None:
    base, busy = runs(tmp_path / "a", 10, 0, 7), runs(tmp_path / "b", 10, 50, 7, thread_cpu=0.99)
    assert recorded(base, base, "--threshold", "50", "--threshold-p99", "90") == 0
    with pytest.raises(InvalidMeasurement, match="no run is valid"):
        recorded(base, busy)
    text, data = left(tmp_path / "build")
    assert (data["verdict"], data["rows"], data["candidate"]) == ("inconclusive", [], str(busy[0].folder.parent))
    assert "no run is valid" in data["reason"] in text


def test_an_output_that_is_not_markdown_is_bad_input(tmp_path: Path, recorded: Recorded) -> None:
    base = runs(tmp_path / "a", 10, 0, 1)
    with pytest.raises(InputError, match=r"--output x\.json: name the Markdown file"):
        recorded(base, base, "--output", "x.json")


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repositories `fast` (5 ms a request), `broken` and `deadly`."""
    folder = tmp_path_factory.mktemp("repositories")
    for name in ("fast", "broken", "deadly"):
        write_sleeper(folder, 0.005, name)
    late = SPEC.replace("p50_ms = 100", "p50_ms = 1000")  # a busy machine may answer late
    (folder / "models" / "tiny" / "deploy.toml").write_text(late)
    (folder / "broken" / "tiny" / "1" / "model.py").write_text("raise RuntimeError('no weights here')")
    kill = "os.kill(int(next(line for line in open('/proc/self/status') if line.startswith('PPid')).split()[1]), 9)"
    count = "self.count = getattr(self, 'count', 0) + 1"
    dies = f"{count}\n        if self.count > 30:\n            import os; {kill}\n        import time"
    replace_in(folder / "deadly" / "tiny" / "1" / "model.py", "import time", dies)
    return folder


def options(repositories: Path, base: str, new: str, *more: str) -> list[str]:
    """The options that compare two of these repositories, in short runs."""
    model = ["--model", "tiny", "--models", str(repositories / "models"), "--inputs", str(repositories / "inputs.npz")]
    both = ["--base", str(repositories / base), "--new", str(repositories / new)]
    return [*model, *both, "--duration-s", "1", "--warmup-s", "0", "--rate", "40", "--no-capacity", *more]


@pytest.mark.slow
def test_two_repositories_are_measured_in_turn(
    repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    monkeypatch.setattr("loadtests.regression.interleaved_runs.LEAST_PAIRS", 2)
    for module in ("interleaved_runs", "comparison"):  # a busy machine must not fail this
        monkeypatch.setattr(f"loadtests.regression.{module}.problems_at", lambda *_: [])
    asked = values_of("regression", *options(repositories, "fast", "fast"))
    asked.pairs = 2  # too few to conclude anything
    assert main(asked) == 3
    assert "2 pairs, 7 needed" in left(tmp_path)[0]
    (kept,) = (tmp_path / "tiny" / "regression").iterdir()
    for role in ("baseline", "candidate"):
        made = [Run.load(each) for each in (kept / role / "runs").iterdir()]
        assert [run.settings.shape for run in made] == ["40x1", "40x1"]
        assert not (kept / role / "repository").exists()


@pytest.mark.server
@pytest.mark.parametrize(
    ("base", "new", "code", "said"),
    [
        ("fast", "deadly", 1, ("NEW=", "worse", "died under load")),
        ("broken", "fast", 3, ("BASE=", "inconclusive", "no weights here")),
    ],
)
def test_a_candidate_that_dies_is_worse_and_without_a_baseline_nothing_is_measured(
    repositories: Path, tmp_path: Path, run_here: RunHere, base: str, new: str, code: int, said: tuple[str, str, str]
) -> None:
    words = options(repositories, base, new, "--timeout-s", "2")
    run = run_here("regression", *words, DEEPSEEK_BUILD=str(tmp_path))
    side, verdict, reason = said
    assert run.returncode == code, run.stderr
    assert run.stderr.splitlines()[-1].startswith(f"error: {side}")
    text, data = left(tmp_path)
    assert data["verdict"] == verdict
    assert reason in data["reason"] in text

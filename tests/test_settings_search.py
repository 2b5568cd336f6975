"""The search for better serving settings, over computed servers: contenders, comparisons, conclusion."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, TunedBatching
from deepseek.spec.cpu import Cpu
from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.measured_batches import BatchTime, MeasuredBatches, batches_path
from loadtests.search.local_server import NotServed
from loadtests.search.rate_trial import Phase, RateTrial
from loadtests.tune.candidate_server import CandidateServer, NotValid, TuneConditions
from loadtests.tune.predicted_latency import Curves
from loadtests.tune.search_space import SearchSpace, ServingSettings
from loadtests.tune.settings_search import SettingsSearch
from tests.computed_server import runner, trial

PUBLISHED: Any = SimpleNamespace(precision="fp32", versions={"onnx": "1"})
SLOW, FAST = (ServingSettings(max_batch=size, max_queue_delay_us=0, instances=2, threads=1) for size in (8, 4))
ROW_MS = {1: 15.0, 2: 29.0, 4: 54.0, 8: 108.0}  # of a text encoder: 4 keeps the throughput


def curve(times_ms: dict[int, float]) -> MeasuredBatches:
    """A curve of two instances with a thread each."""
    times = tuple(BatchTime(rows=rows, ms=ms) for rows, ms in times_ms.items())
    cpu = Cpu(model="EPYC", cores=2)
    return MeasuredBatches(precision="fp32", instances=2, threads=1, at_once=2, cpu=cpu, times=times)


CURVES = Curves({(2, 1): curve(ROW_MS)}, 2)


def a_search(folder: Path, *, max_s: float = 10_000, rate_rps: float | None = None, **changes: Any) -> SettingsSearch:
    """A search over SLOW, the default, and FAST; it cannot start a server."""
    spec = DeploymentSpec.load("tests/models/image")
    spec = spec.model_copy(update={"slo": spec.slo.model_copy(update={"p99_ms": 1000.0, "rate_rps": rate_rps})})
    conditions = TuneConditions(
        spec=spec,
        settings=runner(folder).settings,
        precision=None,
        server="false",
        folder=folder,
        least_s=1,
        max_s=max_s,
        ends_at=time.monotonic() + max_s,
        console=Console(stderr=True),
    )
    space = SearchSpace.of(spec, "onnxruntime", 2, max_batch=(4, 8), delays_us=(0,), instances=(2,), threads=(1,))
    return SettingsSearch(conditions=conditions, default=SLOW, space=space, cores=2, sizes=(4, 8), **changes)


@dataclass(frozen=True, kw_only=True)
class ComputedServer(CandidateServer):
    """A candidate with a p99 of `ms` at every rate, give or take a tenth, which holds up to `limit_rps`."""

    ms: float
    answers_rps: float
    valid: bool
    asked: list[tuple[float, int]]

    def throughput_rps(self) -> float:
        return self.answers_rps

    def p99_ms(self, rate_rps: float, seed: int) -> float:
        self.asked.append((rate_rps, seed))
        if not self.valid:
            raise NotValid("the load generator was the limit: it was late")
        return self.ms * float(np.exp(0.1 * np.random.default_rng(seed + self.settings.max_batch).standard_normal()))


def serving(
    search: SettingsSearch, patch: pytest.MonkeyPatch, curves: Curves | None = CURVES, **of: dict[str, Any]
) -> dict[str, list[Any]]:
    """Puts the search over computed servers; returns the rate and seed of each block by server."""
    asked: dict[str, list[Any]] = {"slow": [], "fast": []}
    names = {SLOW: "slow", FAST: "fast"}

    @contextlib.contextmanager
    def candidate_server(settings: ServingSettings, conditions: TuneConditions, name: str) -> Iterator[ComputedServer]:
        about = {"ms": 100.0, "answers_rps": 150.0, "valid": True, "limit_rps": 90.0, "proves": True}
        about |= of.get(names[settings], {})
        if "refuses" in about:
            raise about["refuses"]  # type: ignore[misc]
        limit_rps, proves = about.pop("limit_rps"), about.pop("proves")

        def try_rate(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
            if phase == "prove" and not proves:
                return trial(rate_rps, "inconclusive")
            return trial(rate_rps, "holds" if rate_rps < limit_rps else "fails")

        on_server = runner(conditions.folder, try_rate, conditions.spec.slo)
        fixed: dict[str, Any] = {"conditions": conditions, "published": PUBLISHED, "runner": on_server, **about}
        yield ComputedServer(settings=settings, asked=asked[names[settings]], **fixed)

    patch.setattr("loadtests.tune.settings_search.candidate_server", candidate_server)
    patch.setattr(Curves, "measured", lambda *_: curves)
    return asked


def test_a_lower_p99_at_the_usual_rate_is_proved_with_the_same_arrivals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path)
    asked = serving(search, monkeypatch, fast={"ms": 50.0, "limit_rps": 130.0})
    facts = search.run()
    (compared,) = search.comparisons
    assert (facts["best"], compared.outcome, compared.rate_rps) == (FAST, "better", 105)
    assert asked["slow"] == asked["fast"] == [(105, seed) for seed in range(len(compared.pairs))]
    assert (compared.low or 0) >= 1.05
    assert len(compared.pairs) >= 4
    assert 90 < facts["proved_rps"] < 130
    assert f"{facts['proved_rps']:g}/s hold with 95% confidence" in facts["conclusion"]


def test_the_usual_rate_is_the_slos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path, rate_rps=60.0)
    serving(search, monkeypatch, fast={"ms": 50.0})
    search.run()
    assert search.usual_rps == 60


def test_a_setting_may_win_only_at_the_highest_rate_of_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path, rate_rps=1.0)  # no batch forms at this rate: no setting could be better
    serving(search, monkeypatch, fast={"ms": 50.0, "limit_rps": 130.0})
    assert search.run()["best"] == FAST
    assert [each.rate_rps for each in search.comparisons] == [search.high_rps]
    assert search.high_rps == pytest.approx(0.9 * 150, rel=0.01)


@pytest.mark.parametrize(
    ("fast", "outcomes", "told"),
    [
        ({"ms": 100.0}, {"no difference", "undecided"}, "nothing is proved better than the default; nearest: "),
        ({"ms": 200.0}, {"worse"}, "nothing is proved better than the default; nearest: "),
        ({"refuses": NotServed("no backend")}, set(), "not compared (0 pairs): no backend"),
        ({"refuses": InvalidMeasurement("died")}, set(), "not compared (0 pairs): died"),
        ({"valid": False}, set(), "not compared (0 pairs): the load generator was the limit: it was late"),
    ],
    ids=["the same", "worse", "not served", "dies", "generator"],
)
def test_what_is_not_better_is_not_the_best(
    fast: dict[str, Any], outcomes: set[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path)
    serving(search, monkeypatch, fast=fast)
    if outcomes:
        facts = search.run()
        assert "best" not in facts
        assert told in facts["conclusion"]
        assert {each.outcome for each in search.comparisons} <= outcomes
    else:
        with pytest.raises(InvalidMeasurement) as error:
            search.run()
        assert told in str(error.value)


def test_pairs_in_which_neither_answers_in_time_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path)
    serving(search, monkeypatch, slow={"ms": 9000.0}, fast={"ms": 9000.0})
    with pytest.raises(InvalidMeasurement, match=r"not compared \(0 pairs\): neither answers 99 % of "):
        search.run()


def test_nothing_is_served_if_the_curves_promise_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path)
    grows = Curves({(2, 1): curve({1: 15.0, 2: 28.0, 4: 54.0, 8: 60.0})}, 2)  # batches of 8 pay
    asked = serving(search, monkeypatch, curves=grows, fast={"refuses": AssertionError()})
    assert search.run() == {
        "conclusion": "the default stays: by measured batches, none of 0 other settings could be better by 10%"
    }
    assert asked["slow"] == []


def test_without_a_curve_each_setting_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path)
    asked = serving(search, monkeypatch, curves=None, fast={"ms": 50.0, "limit_rps": 130.0})
    assert search.run()["best"] == FAST
    assert [each.settings for each in search.expected] == [SLOW, FAST]
    assert asked["fast"][:2] == [(105, 1000), (search.high_rps, 1000)]


@pytest.mark.parametrize(
    ("slow", "error", "message"),
    [
        ({"refuses": NotServed("no backend")}, InputError, "not served: no backend"),
        ({"refuses": InvalidMeasurement("died")}, InvalidMeasurement, "died"),
        ({"answers_rps": 0.0}, InvalidMeasurement, "no answer to 32 users within 1 s: try a longer --least-s"),
    ],
    ids=["not served", "dies", "answers nothing"],
)
def test_a_default_that_cannot_be_measured_ends_the_search(
    slow: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path)
    serving(search, monkeypatch, slow=slow)
    with pytest.raises(error, match=f"the default settings: {message}"):
        search.run()


def test_a_comparison_ends_with_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path, max_s=5)  # a pair takes more
    serving(search, monkeypatch, fast={"ms": 50.0})
    with pytest.raises(InvalidMeasurement, match=r"not compared \(0 pairs\): out of time: raise --max-s"):
        search.run()


def test_a_gain_counts_without_a_proved_rate_and_the_conclusion_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path)
    serving(search, monkeypatch, fast={"ms": 50.0, "proves": False})
    facts = search.run()
    assert (facts["best"], facts["proved_rps"]) == (FAST, None)
    assert facts["conclusion"].endswith("no rate was proved to hold with 95% confidence (too close to the limit)")


def test_layouts_share_the_cores_or_take_turns() -> None:
    spec = DeploymentSpec.load("tests/models/image")
    layouts = {cores: SearchSpace.of(spec, "onnxruntime", cores).layouts for cores in (1, 2, 8)}
    assert layouts == {
        1: ((2, 1),),
        2: ((2, 1), (2, 2), (4, 1)),
        8: ((2, 4), (4, 2), (8, 1), (2, 8), (4, 4), (8, 2), (16, 1)),
    }
    assert SearchSpace.of(spec, "onnxruntime", 8, instances=(4,)).layouts == ((4, 2),)
    assert SearchSpace.of(spec, "onnxruntime", 8, instances=(4,), threads=(1, 3)).layouts == ((4, 1), (4, 3))
    tensorrt = SearchSpace.of(spec, "tensorrt", 8)
    assert tensorrt.layouts == ((1, None), (2, None), (3, None), (4, None))
    assert tensorrt.cuda_graphs == (False, True)


def test_the_default_has_the_measured_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    spec = DeploymentSpec.load("tests/models/image")
    assert ServingSettings.of(spec, "onnxruntime", 2).max_batch == 8
    times = (BatchTime(rows=1, ms=10.0), BatchTime(rows=2, ms=14.0), BatchTime(rows=4, ms=28.0))
    cpu = Cpu(model="EPYC", cores=2)
    measured = MeasuredBatches(precision="fp32", instances=2, threads=1, at_once=2, cpu=cpu, times=times)
    write_whole(batches_path("image", "onnxruntime"), measured.model_dump_json())
    assert ServingSettings.of(spec, "onnxruntime", 2).max_batch == 2


def test_a_tuned_batch_limits_requests_only_with_a_queue_delay() -> None:
    assert FAST.tuned().batching == TunedBatching(preferred_batch=4, max_queue_delay_us=0, instances=2, threads=1)
    delayed = FAST.model_copy(update={"max_queue_delay_us": 200})
    assert (delayed.tuned().batching.max_batch, delayed.tuned().batching.preferred_batch) == (4, 4)


def test_no_batch_above_max_batch_is_tried() -> None:
    image = DeploymentSpec.load("tests/models/image")
    spec = image.model_copy(update={"batching": image.batching.model_copy(update={"max_batch": 6})})
    assert SearchSpace.of(spec, "onnxruntime", 2).max_batch == (1, 4, 6)
    with pytest.raises(InputError, match="--max-batch: seen 8; allowed: 1 to 6"):
        SearchSpace.of(spec, "onnxruntime", 2, max_batch=(8,))


def test_the_predicted_p99_of_a_lone_request_is_its_batch() -> None:
    assert CURVES.p99_ms(FAST, rate_rps=0.1) == pytest.approx(15.3, rel=0.01)


def test_large_batches_raise_the_predicted_p99_near_the_throughput() -> None:
    found = [CURVES.p99_ms(FAST.model_copy(update={"max_batch": size}), rate_rps=110) for size in (4, 8, 32)]
    assert found == sorted(found)
    assert found[2] > 2 * found[0]
    assert CURVES.throughput_rps(FAST) == pytest.approx(2 * 4 / 0.0543)
    assert CURVES.p99_ms(FAST, CURVES.highest_rps(FAST, 120)) == pytest.approx(120, rel=0.05)


def test_a_queue_delay_is_waited_for_unless_the_batch_is_full() -> None:
    delayed = FAST.model_copy(update={"max_queue_delay_us": 20_000})
    assert CURVES.p99_ms(delayed, rate_rps=0.1) == pytest.approx(35.3, rel=0.01)
    alone = delayed.model_copy(update={"max_batch": 1})
    assert CURVES.p99_ms(alone, rate_rps=0.1) == pytest.approx(15.3, rel=0.01)


def test_instances_that_take_turns_share_a_curve_and_its_cores() -> None:
    turns = FAST.model_copy(update={"instances": 4})
    assert CURVES.throughput_rps(turns) == CURVES.throughput_rps(FAST)
    assert CURVES.p99_ms(turns, rate_rps=10) == pytest.approx(CURVES.p99_ms(FAST, rate_rps=10), rel=0.1)


def test_a_machine_that_serves_slower_is_predicted_so() -> None:
    slowed = CURVES.as_fast_as(FAST, CURVES.throughput_rps(FAST) / 3)
    assert slowed.throughput_rps(FAST) == pytest.approx(CURVES.throughput_rps(FAST) / 3)
    assert slowed.p99_ms(FAST, rate_rps=30) == pytest.approx(3 * CURVES.p99_ms(FAST, rate_rps=90))


def test_settings_that_lose_throughput_are_left_out() -> None:
    sizes = {size: FAST.model_copy(update={"max_batch": size}) for size in (1, 2, 4, 8)}
    assert CURVES.keeping_throughput(sizes.values()) == [sizes[4], sizes[8]]


def test_every_layout_and_batch_size_is_predicted_and_without_a_curve_one_value_varies() -> None:
    space = SearchSpace.of(DeploymentSpec.load("tests/models/image"), "onnxruntime", 2, delays_us=(0,))
    assert len(space.combined(SLOW, sizes=(1, 2, 4, 8))) == 3 * 4 - 1
    assert len(space.varied(SLOW)) == 2 + 2  # two layouts, batches of 1 and 4
    assert space.laid_out(SLOW)[0] == SLOW

"""The search for better serving settings, over computed servers: contenders, comparisons, conclusion."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, TunedBatching
from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.measured_batches import BatchTime, MeasuredBatches, batches_path
from deepseek.spec.machine.cpu import Cpu
from loadtests.search.rate_trial import Phase, RateTrial
from loadtests.tune.candidate_server import NotValid, TuneConditions
from loadtests.tune.predicted_latency import Curves
from loadtests.tune.search_space import SearchSpace, ServingSettings
from loadtests.tune.sequential_test import LEAST_PAIRS
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
    fixed: dict[str, Any] = {"precision": None, "server": "false", "least_s": 1, "console": Console(stderr=True)}
    fixed["ends_at"] = time.monotonic() + max_s
    conditions = TuneConditions(spec=spec, settings=runner(folder).settings, folder=folder, **fixed)
    space = SearchSpace.of(spec, "onnxruntime", 2, max_batch=(4, 8), delays_us=(0,), instances=(2,), threads=(1,))
    return SettingsSearch(conditions=conditions, default=SLOW, space=space, cores=2, sizes=(4, 8), **changes)


def serving(
    search: SettingsSearch, patch: pytest.MonkeyPatch, curves: Curves | None = CURVES, **of: dict[str, Any]
) -> dict[str, list[Any]]:
    """Puts the search over computed servers; returns the rate and seed of each block by server.

    A server has a p99 of `ms` at every rate, give or take a tenth, and holds up to `limit_rps`.
    """
    asked: dict[str, list[Any]] = {"slow": [], "fast": []}
    names = {SLOW: "slow", FAST: "fast"}

    @contextlib.contextmanager
    def candidate_server(settings: ServingSettings, conditions: TuneConditions, name: str) -> Iterator[Any]:
        about: dict[str, Any] = {"ms": 100.0, "answers_rps": 150.0, "valid": True, "limit_rps": 90.0, "proves": True}
        about |= of.get(names[settings], {})
        if "refuses" in about:
            raise about["refuses"]

        def p99_ms(rate_rps: float, seed: int) -> float:
            asked[names[settings]].append((rate_rps, seed))
            if not about["valid"]:
                raise NotValid("the load generator was the limit: it was late")
            return about["ms"] * math.exp(0.1 * np.random.default_rng(seed + settings.max_batch).standard_normal())

        def try_rate(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
            if phase == "prove" and not about["proves"]:
                return trial(rate_rps, "inconclusive")
            return trial(rate_rps, "holds" if rate_rps < about["limit_rps"] else "fails")

        yield SimpleNamespace(
            settings=settings,
            published=PUBLISHED,
            runner=runner(conditions.folder, try_rate, conditions.spec.slo),
            throughput_rps=lambda: about["answers_rps"],
            p99_ms=p99_ms,
        )

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
    assert len(compared.pairs) >= LEAST_PAIRS
    assert 90 < facts["proved_rps"] < 130
    assert f"{facts['proved_rps']:g}/s hold with 95% confidence" in facts["conclusion"]


def test_a_setting_may_win_only_at_the_highest_rate_of_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path, rate_rps=1.0)  # no batch forms at this rate: no setting could be better
    serving(search, monkeypatch, fast={"ms": 50.0, "limit_rps": 130.0})
    assert search.run()["best"] == FAST
    assert search.usual_rps == 1
    assert [each.rate_rps for each in search.comparisons] == [search.high_rps]
    assert search.high_rps == pytest.approx(0.9 * 150, rel=0.01)


@pytest.mark.parametrize(("ms", "outcomes"), [(100.0, {"no difference", "undecided"}), (200.0, {"worse"})])
def test_what_is_not_better_is_not_the_best(
    ms: float, outcomes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path)
    serving(search, monkeypatch, fast={"ms": ms})
    facts = search.run()
    assert "best" not in facts
    assert facts["conclusion"].startswith("nothing is proved better than the default; nearest: ")
    assert {each.outcome for each in search.comparisons} <= outcomes


@pytest.mark.parametrize(
    ("of", "max_s", "message"),
    [
        ({"fast": {"refuses": InputError("no backend")}}, 1e4, "not compared (0 pairs): no backend"),
        ({"fast": {"refuses": InvalidMeasurement("died")}}, 1e4, "not compared (0 pairs): died"),
        ({"fast": {"valid": False}}, 1e4, "not compared (0 pairs): the load generator was the limit: it was late"),
        ({"fast": {"ms": 9e3}, "slow": {"ms": 9e3}}, 1e4, "not compared (0 pairs): neither answers 99 % of "),
        ({"fast": {"ms": 50.0}}, 5, "not compared (0 pairs): out of time: raise --max-s"),  # a pair takes more
        ({"slow": {"refuses": InputError("no backend")}}, 1e4, "the default settings: no backend"),
        ({"slow": {"refuses": InvalidMeasurement("died")}}, 1e4, "the default settings: died"),
        ({"slow": {"answers_rps": 0.0}}, 1e4, "the default settings: no answer to 32 users within 1 s: try a longer "),
    ],
)
def test_a_search_without_a_single_comparison_ends_in_one_line(
    of: dict[str, Any], max_s: float, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path, max_s=max_s)
    serving(search, monkeypatch, **of)
    refused = isinstance(of.get("slow", {}).get("refuses"), InputError)
    with pytest.raises(InputError if refused else InvalidMeasurement) as error:
        search.run()
    assert message in str(error.value)


def test_nothing_is_served_if_the_curves_promise_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path)
    grows = Curves({(2, 1): curve({1: 15.0, 2: 28.0, 4: 54.0, 8: 60.0})}, 2)  # batches of 8 pay
    asked = serving(search, monkeypatch, curves=grows, fast={"refuses": AssertionError()})
    conclusion = "the default stays: by measured batches, none of 0 other settings could be better by 10%"
    assert search.run()["conclusion"] == conclusion
    assert asked["slow"] == []


def test_without_a_curve_each_setting_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = a_search(tmp_path)
    asked = serving(search, monkeypatch, curves=None, fast={"ms": 50.0, "limit_rps": 130.0})
    assert search.run()["best"] == FAST
    assert [each.settings for each in search.expected] == [SLOW, FAST]
    assert asked["fast"][:2] == [(105, 1000), (search.high_rps, 1000)]


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
    assert (tensorrt.layouts, tensorrt.cuda_graphs) == (((1, None), (2, None), (3, None), (4, None)), (False, True))
    space = SearchSpace.of(spec, "onnxruntime", 2, delays_us=(0,))
    assert len(space.combined(SLOW, sizes=(1, 2, 4, 8))) == 3 * 4
    assert len(space.varied(SLOW)) == 2 + 2  # two layouts, batches of 1 and 4


def test_the_default_has_the_measured_batch(own_build: Path) -> None:
    spec = DeploymentSpec.load("tests/models/image")
    found = ServingSettings.of(spec, "onnxruntime", 2)
    assert str(found) == "2 instances x 1 thread, batches of 8, delay 0 us"
    write_whole(batches_path("image", "onnxruntime"), curve({1: 10.0, 2: 14.0, 4: 28.0}).model_dump_json())
    assert ServingSettings.of(spec, "onnxruntime", 2) == found.model_copy(update={"max_batch": 2})


def test_a_tuned_batch_limits_requests_only_with_a_queue_delay() -> None:
    assert FAST.tuned().batching == TunedBatching(preferred_batch=4, max_queue_delay_us=0, instances=2, threads=1)
    delayed = FAST.model_copy(update={"max_queue_delay_us": 200}).tuned().batching
    assert (delayed.max_batch, delayed.preferred_batch) == (4, 4)


def test_no_batch_above_max_batch_is_tried() -> None:
    image = DeploymentSpec.load("tests/models/image")
    spec = image.model_copy(update={"batching": image.batching.model_copy(update={"max_batch": 6})})
    assert SearchSpace.of(spec, "onnxruntime", 2).max_batch == (1, 4, 6)
    with pytest.raises(InputError, match="--max-batch: seen 8; allowed: 1 to 6"):
        SearchSpace.of(spec, "onnxruntime", 2, max_batch=(8,))


@pytest.mark.parametrize(
    ("changes", "p99_ms"),
    [
        ({}, 15.3),  # its batch
        ({"max_queue_delay_us": 20_000}, 35.3),  # the delay, and its batch
        ({"max_queue_delay_us": 20_000, "max_batch": 1}, 15.3),  # full at once
        ({"instances": 4}, 15.3),  # four that take turns on two cores
    ],
)
def test_the_predicted_p99_of_a_lone_request(changes: dict[str, int], p99_ms: float) -> None:
    settings = FAST.model_copy(update=changes)
    assert CURVES.p99_ms(settings, rate_rps=0.1) == pytest.approx(p99_ms, rel=0.01)


def test_predictions_count_requests_which_may_have_several_rows() -> None:
    tiny = Curves({(2, 1): curve({8: 0.02, 512: 0.02})}, cores=2)
    settings = FAST.model_copy(update={"max_batch": 512})
    assert tiny.throughput_rps(settings) == pytest.approx(2 * 512 / 0.02592)  # 0.05 ms each
    assert tiny.throughput_rps(settings, users=32) == pytest.approx(2 * 16 / 0.00112)  # 16 in each of two batches
    fixed, of_8 = replace(tiny, rows_each=8), FAST.model_copy(update={"max_batch": 8})
    assert fixed.throughput_rps(of_8) == pytest.approx(2 / 0.00037)
    assert fixed.p99_ms(of_8, rate_rps=0.1) == pytest.approx(0.37, rel=0.01)


def test_large_batches_raise_the_predicted_p99_near_the_throughput() -> None:
    sizes = {size: FAST.model_copy(update={"max_batch": size}) for size in (1, 2, 4, 8, 32)}
    found = [CURVES.p99_ms(sizes[size], rate_rps=110) for size in (4, 8, 32)]
    assert found == sorted(found)
    assert found[2] > 2 * found[0]
    assert CURVES.throughput_rps(FAST) == pytest.approx(2 * 4 / 0.0545)
    assert CURVES.p99_ms(FAST, CURVES.highest_rps(FAST, 120)) == pytest.approx(120, rel=0.05)
    assert CURVES.keeping_throughput(sizes[size] for size in (1, 2, 4, 8)) == [sizes[4], sizes[8]]
    in_parts = replace(CURVES, run_rows=4)  # as a model that takes texts
    assert found[0] < in_parts.p99_ms(sizes[32], rate_rps=110) < 0.8 * found[2]
    assert in_parts.throughput_rps(sizes[32]) == CURVES.throughput_rps(FAST)
    slowed = CURVES.as_fast_as(FAST, CURVES.throughput_rps(FAST) / 3, users=32)
    assert slowed.throughput_rps(FAST) == pytest.approx(CURVES.throughput_rps(FAST) / 3)
    assert slowed.p99_ms(FAST, rate_rps=30) == pytest.approx(3 * CURVES.p99_ms(FAST, rate_rps=90))

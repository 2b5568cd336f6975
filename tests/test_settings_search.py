"""The search for better serving settings, over computed servers: candidates, confirmation, conclusion."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, TunedBatching
from deepseek.spec.cpu import Cpu
from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.measured_batches import BatchTime, MeasuredBatches, batches_path
from loadtests.search.local_server import NotServed
from loadtests.search.rate_trial import Phase, RateTrial
from loadtests.search.slo_at_rate import slo_at
from loadtests.tune.candidate_server import CandidateServer, TuneConditions
from loadtests.tune.confirmation import concluded, gain_of, rate_and_p99
from loadtests.tune.search_space import SearchSpace, ServingSettings
from loadtests.tune.settings_search import SettingsSearch
from loadtests.tune.tune_result import DefaultAndBest, MeasuredSettings
from tests.computed_server import runner, trial

PUBLISHED: Any = SimpleNamespace(precision="fp32", versions={"onnx": "1"})
SLOW, FAST = (ServingSettings(max_batch=size, max_queue_delay_us=0, instances=2, threads=1) for size in (1, 8))


def measured(settings: ServingSettings, capacity: float | None, p99_ms: float = 10, **more: Any) -> MeasuredSettings:
    figures = {"capacity_rps": capacity, "throughput_rps": capacity or 1, "p99_ms": p99_ms}
    return MeasuredSettings.model_validate({"settings": settings, **figures, **more})


def a_search(folder: Path, *known: MeasuredSettings, objectives: tuple[str, ...] = ()) -> SettingsSearch:
    """A search over SLOW, the default, and FAST, with these measurements; it cannot start a server."""
    spec = DeploymentSpec.load("tests/models/image")
    spec = spec.model_copy(update={"slo": spec.slo.model_copy(update={"objectives": objectives})})
    conditions = TuneConditions(
        spec=spec,
        settings=runner(folder).settings,
        precision=None,
        server="false",
        folder=folder,
        least_s=1,
        ends_at=time.monotonic() + 10_000,
        console=Console(stderr=True),
    )
    space = SearchSpace.of(spec, "onnxruntime", 2, max_batch=(1, 8), delays_us=(0,), instances=(2,), threads=(1,))
    return SettingsSearch(
        conditions=conditions,
        default=SLOW,
        space=space,
        users=1,
        confirm_s=0,
        measured={each.settings: each for each in known},
        reference_rps=80,
    )


@dataclass(frozen=True, kw_only=True)
class ComputedServer(CandidateServer):
    """A candidate that holds up to `limit_rps`; an objective on p50 up to `p50_limit_rps`."""

    answers_rps: float

    def throughput_rps(self, users: int, duration_s: float) -> float:
        return self.answers_rps


def computed(
    search: SettingsSearch,
    settings: ServingSettings,
    *,
    limit_rps: float = 0,
    p50_limit_rps: float = math.inf,
    answers_rps: float = 1000,
    trial_takes_s: float = 1,
    valid: Callable[[int], bool] = lambda count: True,
    proves: bool = True,
    tried: list[float] | None = None,
) -> ComputedServer:
    """A server for `settings`; `valid`: whether the n-th trial, from 1, is valid; `proves`: whether proofs may hold."""
    slo, made = search.conditions.spec.slo, [] if tried is None else tried

    def try_rate(rate_rps: float, phase: Phase, duration_s: float, seed: int) -> RateTrial:
        made.append(rate_rps)
        bound = "p50_ms" in [line.name for line in slo_at(slo, rate_rps, 10).all_objectives()]
        if phase == "prove" and not proves:
            return trial(rate_rps, "inconclusive")
        if not valid(len(made)):
            return trial(rate_rps, "invalid", problems=("the generator was late",))
        return trial(rate_rps, "holds" if rate_rps < (p50_limit_rps if bound else limit_rps) else "fails")

    conditions = replace(search.conditions, least_s=trial_takes_s)
    on_server = runner(search.conditions.folder, try_rate, slo)
    return ComputedServer(
        settings=settings, conditions=conditions, published=PUBLISHED, runner=on_server, answers_rps=answers_rps
    )


def serving(search: SettingsSearch, patch: pytest.MonkeyPatch, **of: dict[str, Any]) -> SettingsSearch:
    """The same search, over computed servers."""
    about = {SLOW: of.get("slow", {}), FAST: of.get("fast", {})}

    @contextlib.contextmanager
    def candidate_server(settings: ServingSettings, conditions: TuneConditions, name: str) -> Iterator[ComputedServer]:
        if "refuses" in about[settings]:
            raise about[settings]["refuses"]
        yield computed(search, settings, **about[settings])

    for module in ("settings_search", "confirmation"):
        patch.setattr(f"loadtests.tune.{module}.candidate_server", candidate_server)
    return search


def test_a_candidate_is_measured_upwards_from_the_best_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = list[float](), list[float]()
    about = {"slow": {"limit_rps": 500, "tried": slow}, "fast": {"limit_rps": 700, "tried": fast}}
    search = serving(a_search(tmp_path), monkeypatch, **about)
    best = search.run()
    assert (best.settings, best.capacity_rps) == (FAST, pytest.approx(700, rel=0.05))
    held_rps = search.measured[SLOW].capacity_rps or 0
    assert held_rps == pytest.approx(500, rel=0.05)
    assert (slow[0], slow[-1]) == (600, search.reference_rps)  # 0.6 of the throughput; latency last
    assert fast[0] == search.reference_rps == pytest.approx(0.8 * held_rps, rel=0.01)
    assert fast[1] == pytest.approx(held_rps / 1.05, rel=0.01)
    assert min(fast[1:]) == fast[1]


@pytest.mark.parametrize(
    ("fast", "reason", "rates"),
    [
        ({"limit_rps": 400}, "at 4", 3),
        ({"limit_rps": 900, "answers_rps": 400}, "answers 400.0/s at most, the best so far holds 4", 1),
        ({"limit_rps": 900, "answers_rps": 0}, "answers nothing", 0),
        ({"refuses": NotServed("no backend")}, "not served: no backend", 0),
        ({"refuses": InputError("bad inputs")}, "bad inputs", 0),
    ],
    ids=["holds less", "answers less", "answers nothing", "not served", "refuses inputs"],
)
def test_a_candidate_that_falls_behind_is_stopped(
    fast: dict[str, Any], reason: str, rates: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    search = serving(a_search(tmp_path), monkeypatch, slow={"limit_rps": 500}, fast={**fast, "tried": made})
    assert search.run().settings == SLOW
    stopped = search.measured[FAST]
    assert stopped.capacity_rps is None
    assert stopped.reason.startswith(reason)
    assert len(made) == rates


@pytest.mark.parametrize(
    ("slow", "error", "message"),
    [
        ({"refuses": NotServed("no backend")}, InputError, "not served: no backend"),
        ({"refuses": InvalidMeasurement("died")}, InvalidMeasurement, "died"),
        ({"answers_rps": 0}, InvalidMeasurement, "no answer to 1 users within 1 s: try fewer --users"),
        ({"limit_rps": 500, "valid": lambda count: False}, InvalidMeasurement, "the load generator is the limit at"),
    ],
    ids=["not served", "dies", "answers nothing", "generator"],
)
def test_a_default_that_cannot_be_measured_ends_the_search(
    slow: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=f"the default settings: {message}"):
        serving(a_search(tmp_path), monkeypatch, slow=slow).run()


def test_settings_that_violate_a_bound_objective_are_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound, breaks = ("p50_ms < 3 @ 200 rps",), {"limit_rps": 900, "p50_limit_rps": 190}
    search = serving(a_search(tmp_path, objectives=bound), monkeypatch, slow={"limit_rps": 600}, fast=breaks)
    assert search.run().settings == SLOW
    assert search.measured[FAST].reason == "at 200/s fails: p99_ms"
    turned = a_search(tmp_path / "turned", objectives=bound)
    assert serving(turned, monkeypatch, slow=breaks, fast={"limit_rps": 600}).run().settings == FAST
    assert turned.measured[SLOW].capacity_rps == pytest.approx(190, rel=0.05)


def test_if_the_default_holds_no_rate_the_gain_is_a_lower_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = serving(a_search(tmp_path), monkeypatch, slow={"limit_rps": 1}, fast={"limit_rps": 500})
    facts = concluded(search, search.run(), 3)
    assert facts["best"] == FAST
    assert ", or more: no rate holds with the default; " in facts["conclusion"]


def test_no_trial_begins_that_would_end_too_late_and_a_cut_off_candidate_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = {"limit_rps": 900, "trial_takes_s": 36_000}
    search = serving(a_search(tmp_path / "default"), monkeypatch, slow=late)
    with pytest.raises(InvalidMeasurement, match=r"too little time for the default: .*; raise --max-s"):
        search.run()
    assert not search.measured
    search = serving(a_search(tmp_path / "other"), monkeypatch, slow={"limit_rps": 500}, fast=late)
    assert (search.run().settings, search.cut_short) == (SLOW, True)
    assert list(search.measured) == [SLOW]
    with pytest.raises(InvalidMeasurement, match="out of time before any candidate but the default was tried"):
        concluded(search, search.best(), 3)


def test_if_the_generator_was_the_limit_nothing_is_concluded(tmp_path: Path) -> None:
    at_least = a_search(tmp_path, measured(SLOW, 100, at_least=True), measured(FAST, 100, at_least=True))
    with pytest.raises(InvalidMeasurement, match="the load generator was the limit: the default holds 100/s or more"):
        concluded(at_least, at_least.best(), 3)
    decided = a_search(tmp_path, measured(SLOW, 100, at_least=True), measured(FAST, 90))
    assert "nothing better than the default" in concluded(decided, decided.best(), 3)["conclusion"]


@pytest.mark.parametrize(
    "other",
    [measured(FAST, 90), measured(FAST, None), measured(FAST, 102, 9.8), measured(FAST, 102, 11)],
    ids=["slower", "stopped", "no better p99", "within noise and a worse p99"],
)
def test_if_nothing_is_better_the_default_stays(tmp_path: Path, other: MeasuredSettings) -> None:
    search = a_search(tmp_path, measured(SLOW, 100), other)
    told = "nothing better than the default was found (1 other settings tried)"
    assert concluded(search, search.best(), 3) == {"conclusion": told}


@pytest.mark.parametrize("other", [measured(FAST, 106), measured(FAST, 102, 9)], ids=["faster", "a lower p99"])
def test_a_clearly_better_candidate_is_the_best(tmp_path: Path, other: MeasuredSettings) -> None:
    assert a_search(tmp_path, measured(SLOW, 100), other).best().settings == FAST


def pairs(*ratios: float, p99: float = 1.0) -> list[DefaultAndBest]:
    return [
        DefaultAndBest(default_rps=100, best_rps=100 * ratio, default_p99_ms=10 * p99, best_p99_ms=10)
        for ratio in ratios
    ]


@pytest.mark.parametrize(
    ("found", "of", "better"),
    [
        (pairs(1.2, 1.25, 1.22), "capacity_rps", True),
        (pairs(0.9, 1.4, 1.1), "capacity_rps", False),
        (pairs(1.105, 1.15, 1.197), "capacity_rps", False),
        (pairs(1.0, 1.01, 0.99), "capacity_rps", False),
        (pairs(1.0, 1.01, 0.99, p99=1.5), "p99_ms", True),
        (pairs(1.0, 1.01, 0.99, p99=1.04), "capacity_rps", False),
        (pairs(0.8, 0.81, 0.79, p99=1.5), "capacity_rps", False),
    ],
    ids=[
        "more rate",
        "noise",
        "enough for one measure but not for two",
        "the same",
        "a lower p99",
        "hardly lower",
        "a lower p99 for less rate",
    ],
)
def test_a_gain_counts_if_its_interval_lies_above_1(found: list[DefaultAndBest], of: str, better: bool) -> None:
    gain, counts = gain_of(found)
    assert (gain.of, counts, gain.pairs) == (of, better, 3)
    assert gain.low <= gain.ratio <= gain.high


@pytest.mark.parametrize("limit_rps", [20, 50, 100, 150, 160, 250, 400])
@pytest.mark.parametrize("objectives", [(), ("p50_ms < 3 @ 200 rps",)], ids=["limit", "bound"])
def test_a_pair_finds_the_rate_far_from_the_known_one(
    limit_rps: float, objectives: tuple[str, ...], tmp_path: Path
) -> None:
    search = a_search(tmp_path, measured(SLOW, limit_rps), objectives=objectives)
    limits = {"limit_rps": 900, "p50_limit_rps": 160} if objectives else {"limit_rps": 160}
    rate, p99_ms = rate_and_p99(search, computed(search, SLOW, **limits), 0)  # type: ignore[arg-type]
    assert (rate, p99_ms) == (pytest.approx(160, rel=0.05), 20)


def test_an_invalid_run_is_repeated_once_and_then_its_pair_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path, measured(SLOW, 100), measured(FAST, 150))
    first_late = computed(search, FAST, limit_rps=120, valid=lambda count: count != 1)
    assert rate_and_p99(search, first_late, 0)[0] == pytest.approx(120, rel=0.05)
    blind = {"limit_rps": 100, "valid": lambda count: False}
    serving(search, monkeypatch, slow=blind, fast=blind)
    with pytest.raises(InvalidMeasurement, match=r"\(0 of 3 pairs\): last dropped pair: .*was late"):
        concluded(search, search.best(), 3)


def test_pairs_confirm_the_best_but_not_a_lucky_candidate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit_rps, better in ((150, True), (100, False)):
        search = a_search(tmp_path / str(limit_rps), measured(SLOW, 100), measured(FAST, 150))
        serving(search, monkeypatch, slow={"limit_rps": 100}, fast={"limit_rps": limit_rps})
        facts = concluded(search, search.best(), 3)
        assert (facts["best"], facts["candidate"], len(facts["pairs"])) == (FAST if better else None, FAST, 3)
        assert facts["conclusion"].startswith("nothing is proved better") is not better
        if not better:
            assert facts["proved_rps"] is None
            continue
        assert 0.8 * limit_rps < facts["proved_rps"] < limit_rps
        assert f"{facts['proved_rps']:g}/s hold with 95% confidence" in facts["conclusion"]
        assert facts["gain"].ratio == pytest.approx(limit_rps / 100, rel=0.05)


def test_a_gain_counts_without_a_proved_rate_and_the_conclusion_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = a_search(tmp_path, measured(SLOW, 100), measured(FAST, 150))
    serving(search, monkeypatch, slow={"limit_rps": 100}, fast={"limit_rps": 150, "proves": False})
    facts = concluded(search, search.best(), 3)
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


def test_the_search_starts_from_the_measured_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path))
    spec = DeploymentSpec.load("tests/models/image")
    assert ServingSettings.of(spec, "onnxruntime", 2).max_batch == 8
    times = (BatchTime(rows=1, ms=10.0), BatchTime(rows=2, ms=14.0), BatchTime(rows=4, ms=28.0))
    cpu = Cpu(model="EPYC", cores=2)
    measured = MeasuredBatches(precision="fp32", instances=2, threads=1, at_once=2, cpu=cpu, times=times)
    write_whole(batches_path("image", "onnxruntime"), measured.model_dump_json())
    assert ServingSettings.of(spec, "onnxruntime", 2).max_batch == 2


def test_a_tuned_batch_limits_requests_only_with_a_queue_delay() -> None:
    assert FAST.tuned().batching == TunedBatching(preferred_batch=8, max_queue_delay_us=0, instances=2, threads=1)
    delayed = FAST.model_copy(update={"max_queue_delay_us": 200})
    assert (delayed.tuned().batching.max_batch, delayed.tuned().batching.preferred_batch) == (8, 8)


def test_no_batch_above_max_batch_is_tried() -> None:
    image = DeploymentSpec.load("tests/models/image")
    spec = image.model_copy(update={"batching": image.batching.model_copy(update={"max_batch": 6})})
    assert SearchSpace.of(spec, "onnxruntime", 2).max_batch == (1, 4, 6)
    with pytest.raises(InputError, match="--max-batch: seen 8; allowed: 1 to 6"):
        SearchSpace.of(spec, "onnxruntime", 2, max_batch=(8,))


def test_batch_sizes_near_the_best_are_tried_too_within_the_profile() -> None:
    space = SearchSpace.of(DeploymentSpec.load("tests/models/image"), "onnxruntime", 2)
    assert [settings.max_batch for settings in space.varied(FAST, "max_batch")] == [1, 4, 8]
    half = FAST.model_copy(update={"max_batch": 4})
    assert [settings.max_batch for settings in space.varied(half, "max_batch")] == [1, 2, 4, 8]

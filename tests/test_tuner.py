"""The search for better settings, over servers that are computed: what it tries, keeps, concludes and says."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, TunedFile
from loadtests.contender import Place
from loadtests.journal import Journal
from loadtests.results import Settings
from loadtests.space import space_of
from loadtests.trial import Trial, slo_at
from loadtests.tune import apply, concluded, parse, tune
from loadtests.tuner import Tuner, verdict
from loadtests.tuning import Pair, Setting, TriedSetting, Tuning, interval, tuning_path, with_front
from tests.test_search import trial

SLOW, FAST = (Setting(max_batch=size, max_queue_delay_us=0, instances=2, threads=1) for size in (1, 8))


def known(folder: Path, *tried: TriedSetting) -> Tuner:
    """A search that has measured these settings already, SLOW as the default; it cannot start a server."""
    spec = DeploymentSpec.load("tests/models/image")
    journal = Journal(folder / "journal.jsonl", {})
    journal.set_reference(80, {"cpu": "x", "cores": 2, "versions": {}})
    for each in tried:
        journal.add(each)
    settings = Settings(model="image", models=str(folder), target="onnxruntime", protocol="grpc", url="", inputs="")
    place = Place(spec=spec, settings=settings, precision=None, server="false", folder=folder, least_s=1, console=Console(stderr=True))  # fmt: skip
    space = space_of(spec, "onnxruntime", 2, (1, 8), (0,), (2,), (1,))
    return Tuner(place=place, default=SLOW, space=space, journal=journal, users=1, pairs=3, ends_at=time.monotonic() + 60, confirm_s=0)  # fmt: skip


def tried(setting: Setting, capacity: float | None, p99_ms: float = 10, **more: Any) -> TriedSetting:
    return TriedSetting(settings=setting, capacity_rps=capacity, throughput_rps=capacity or 1, p99_ms=p99_ms, **more)


HEAD = {"model": "image", "target": "onnxruntime", "precision": "fp32", "objectives": (), "default": SLOW, "users": 1, "versions": {}}  # fmt: skip


@pytest.mark.parametrize(
    "other",
    [tried(FAST, 90), tried(FAST, None, stopped_early=True), tried(FAST, 102, 9.8), tried(FAST, 102, 11)],
    ids=["slower", "stopped", "no better p99", "within noise and a worse p99"],
)
def test_where_nothing_is_better_nothing_changes(tmp_path: Path, other: TriedSetting) -> None:
    search = known(tmp_path, tried(SLOW, 100), other)
    result = apply(concluded(search, HEAD, search.search()), search.place, tmp_path / "deploy.toml", dry_run=False)
    assert (result.best, result.gain, result.applied) == (None, None, False)
    assert result.conclusion == "nothing better than the default was found (1 others were tried)"
    assert not list(tmp_path.glob("*.toml"))


def test_a_search_that_the_time_cut_short_says_so_or_that_nothing_can_be_said(tmp_path: Path) -> None:
    search = known(tmp_path / "one", tried(SLOW, 100))
    search.ends_at = 0
    with pytest.raises(InvalidMeasurement, match="the time was up before anything but the default was tried"):
        concluded(search, HEAD, search.search())
    search = known(tmp_path / "two", tried(SLOW, 100), tried(FAST.model_copy(update={"max_batch": 4}), 50))
    search.ends_at = 0
    assert "the same command goes on from there" in concluded(search, HEAD, search.search()).conclusion


def pairs(*ratios: float, p99: float = 1.0) -> list[Pair]:
    return [Pair(default_rps=100, best_rps=100 * ratio, default_p99_ms=10 * p99, best_p99_ms=10) for ratio in ratios]


@pytest.mark.parametrize(
    ("measured", "of", "better"),
    [
        (pairs(1.2, 1.25, 1.22), "capacity_rps", True),
        (pairs(0.9, 1.4, 1.1), "capacity_rps", False),
        (pairs(1.0, 1.01, 0.99), "capacity_rps", False),
        (pairs(1.0, 1.01, 0.99, p99=1.5), "p99_ms", True),
        (pairs(0.8, 0.81, 0.79, p99=1.5), "capacity_rps", False),
    ],
    ids=["more rate", "noise", "the same", "a lower p99", "a lower p99 for less rate"],
)
def test_a_gain_counts_where_its_interval_lies_above_1(measured: list[Pair], of: str, better: bool) -> None:
    gain, counts = verdict(measured)
    assert (gain.of, counts, gain.pairs) == (of, better, 3)
    assert gain.low <= gain.ratio <= gain.high


def test_a_candidate_that_the_pairs_do_not_bear_out_changes_nothing(tmp_path: Path) -> None:
    search = known(tmp_path, tried(SLOW, 100), tried(FAST, 120))
    for pair in pairs(0.9, 1.3, 1.1):
        search.journal.add_pair(FAST, pair)
    result = apply(concluded(search, HEAD, search.search()), search.place, tmp_path / "deploy.toml", dry_run=False)
    assert (result.best, result.candidate, result.applied, len(result.pairs)) == (None, FAST, False, 3)
    assert result.conclusion.startswith(
        "nothing is proved better than the default; the nearest, 2 instances x 1 thread"
    )


@dataclass(frozen=True)
class Fake:
    """A setting that is served: its trials hold up to `knee_rps`, and an objective on p50 up to `p50_knee_rps`."""

    setting: Setting
    place: Place
    knee_rps: float
    p50_knee_rps: float = math.inf
    answers_rps: float = 1000
    trial_takes_s: float = 0
    valid: Callable[[int], bool] = lambda count: True
    """Whether the trial of this number, from 1, says anything of the server."""
    machine: dict[str, Any] = field(default_factory=dict)
    asked: list[float] = field(default_factory=list)

    def throughput_rps(self, users: int, duration_s: float) -> float:
        return self.answers_rps

    def trial_s(self, rate_rps: float) -> float:
        return self.trial_takes_s

    def try_rate(self, rate_rps: float, seed: int) -> Trial:
        self.asked.append(rate_rps)
        bound = "p50_ms" in [line.name for line in slo_at(self.place.spec.slo, rate_rps, 10).all_objectives()]
        if not self.valid(len(self.asked)):
            return trial(rate_rps, "invalid")
        return trial(rate_rps, "holds" if rate_rps < (self.p50_knee_rps if bound else self.knee_rps) else "fails")


def faked(folder: Path, patch: pytest.MonkeyPatch, *objectives: str, **of: dict[str, Any]) -> Tuner:
    """A search over SLOW and FAST, which nothing is known of, on servers that are computed."""
    tuner = known(folder)
    (folder / "journal.jsonl").unlink()
    tuner.journal = Journal(folder / "journal.jsonl", {})
    slo = tuner.place.spec.slo.model_copy(update={"objectives": objectives})
    tuner.place = replace(tuner.place, spec=tuner.place.spec.model_copy(update={"slo": slo}))
    sides = {SLOW: of["slow"], FAST: of["fast"]}

    @contextlib.contextmanager
    def contender(setting: Setting, place: Place, name: str) -> Iterator[Fake]:
        yield Fake(setting, place, **sides[setting])

    patch.setattr("loadtests.tuner.contender", contender)
    return tuner


def test_a_run_that_says_nothing_of_the_server_is_repeated_once_and_then_its_pair_is_left_out(tmp_path: Path) -> None:
    tuner = known(tmp_path, tried(SLOW, 100), tried(FAST, 120))
    every_second = Fake(FAST, tuner.place, 120, valid=lambda count: count % 2 == 0)
    every_third = Fake(FAST, tuner.place, 120, valid=lambda count: count % 3 == 0)
    rate, p99_ms = tuner._rate_and_p99(every_second, 100, 0)  # type: ignore[arg-type]
    assert (rate > 100, p99_ms) == (True, 20)
    with pytest.raises(InvalidMeasurement, match="/s: invalid"):
        tuner._rate_and_p99(every_third, 100, 0)  # type: ignore[arg-type]


def test_where_pairs_were_left_out_that_is_said_and_not_that_the_time_was_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blind = {"knee_rps": 100, "valid": lambda count: False}
    tuner = faked(tmp_path, monkeypatch, slow=blind, fast=blind)
    tuner.journal.set_reference(80, {})
    for each in (tried(SLOW, 100), tried(FAST, 150)):
        tuner.journal.add(each)
    with pytest.raises(InvalidMeasurement, match=r"\(0 of 3 pairs\): the last pair that was left out: .*/s: invalid"):
        concluded(tuner, HEAD, tuner.search())


@pytest.mark.parametrize("recorded_rps", [20, 50, 100, 150, 160, 250, 400])
@pytest.mark.parametrize("objectives", [(), ("p50_ms < 3 @ 200 rps",)], ids=["knee", "bound"])
def test_a_pair_finds_the_rate_wherever_it_lies(
    recorded_rps: float, objectives: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knees = {"knee_rps": 900, "p50_knee_rps": 160} if objectives else {"knee_rps": 160}
    tuner = faked(tmp_path, monkeypatch, *objectives, slow={}, fast={})
    tuner.journal.set_reference(80, {})
    tuner.journal.add(tried(SLOW, recorded_rps))
    rate, _ = tuner._rate_and_p99(Fake(SLOW, tuner.place, **knees), recorded_rps, 0)  # type: ignore[arg-type]
    assert rate == pytest.approx(160, rel=0.05)


def test_a_setting_that_breaks_an_objective_at_the_rate_that_it_is_bound_to_is_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = {"knee_rps": 900, "p50_knee_rps": 190}
    tuner = faked(tmp_path, monkeypatch, "p50_ms < 3 @ 200 rps", slow={"knee_rps": 600}, fast=fast)
    assert tuner.search().settings == SLOW
    assert "at 200/s fails" in tuner.journal.tried[FAST].reason
    tuner = faked(tmp_path / "turned", monkeypatch, "p50_ms < 3 @ 200 rps", slow=fast, fast={"knee_rps": 600})
    assert tuner.search().settings == FAST
    assert tuner.journal.tried[SLOW].capacity_rps == pytest.approx(190, rel=0.05)


def test_a_default_that_answers_nothing_is_left_behind_by_a_setting_that_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = {"answers_rps": 0, "knee_rps": 0}
    tuner = faked(tmp_path / "one", monkeypatch, slow=none, fast={"knee_rps": 500})
    found = concluded(tuner, HEAD, tuner.search())
    assert (found.best, found.trials[0].reason) == (FAST, "answers nothing")
    assert ", or more: the search found no rate that the default holds" in found.conclusion
    late = {"knee_rps": 500, "trial_takes_s": 3600}
    tuner = faked(tmp_path / "late", monkeypatch, slow=none, fast=late)
    with pytest.raises(InvalidMeasurement, match=r"before a setting that answers was measured .* takes 3600 s"):
        tuner.search()
    tuner = faked(tmp_path / "none", monkeypatch, slow=none, fast=none)
    with pytest.raises(InvalidMeasurement, match=r"settings tried \(2\) answers anything to 1 users .* fewer --users"):
        tuner.search()


def test_no_trial_begins_that_ends_after_the_time_and_what_it_cuts_off_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow: dict[str, Any] = {"knee_rps": 500}
    tuner = faked(tmp_path / "default", monkeypatch, slow=slow | {"trial_takes_s": 3600}, fast={})
    with pytest.raises(InvalidMeasurement, match=r"default: a trial at 600/s takes 3600 s, .* --max-s gives it longer"):
        tuner.search()
    assert not tuner.journal.tried
    tuner = faked(tmp_path / "other", monkeypatch, slow=slow, fast={"knee_rps": 900, "trial_takes_s": 3600})
    assert (tuner.search().settings, tuner.cut_short, list(tuner.journal.tried)) == (SLOW, True, [SLOW])


def test_without_a_place_for_tuned_values_the_find_is_said_and_not_written(tmp_path: Path) -> None:
    search = known(tmp_path, tried(SLOW, 100), tried(FAST, 120))
    for pair in pairs(1.2, 1.25, 1.22):
        search.journal.add_pair(FAST, pair)
    result = apply(concluded(search, HEAD, search.search()), search.place, tmp_path / "deploy.toml", dry_run=False)
    assert (result.best, result.applied) == (FAST, False)
    assert result.conclusion.endswith('names no file for it; add tuned = "tuned.toml" at its top')


@pytest.mark.parametrize("count", [3, 6])
def test_the_interval_of_few_pairs_holds_the_true_ratio_about_as_often_as_it_says(count: int) -> None:
    generator = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        _, low, high = interval(list(1.1 * np.exp(0.05 * generator.standard_normal(count))))
        inside += low <= 1.1 <= high
    assert inside >= 0.9 * 200  # a plain bootstrap of 3 pairs: 0.77


def test_the_front_has_what_nothing_else_beats_in_both() -> None:
    cases = [(100, 10), (120, 20), (90, 9), (90, 15), (120, 25)]
    marked = with_front(tried(FAST, rate, p99) for rate, p99 in cases)
    assert [each.pareto for each in marked] == [True, True, True, False, False]


def test_a_line_that_a_kill_cut_off_is_left_out_of_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {"machine": "a"})
    journal.add(tried(SLOW, 100))
    path.write_text(path.read_text() + '{"tried": {"sett')
    again = Journal(path, {"machine": "a"})
    again.add(tried(FAST, 120))
    assert list(Journal(path, {"machine": "a"}).tried) == [SLOW, FAST]
    path.write_text(before := path.read_text() + '{"tried": {"settings": {"of_a_later_version": 1}}}\n')
    later = Journal(path, {"machine": "a"})
    assert (later.changed, later.tried, later.resumed) == (["version of make tune"], {}, 0)
    path.write_text(before)
    other = Journal(path, {"machine": "b"})
    assert (other.changed, other.tried) == (["machine"], {})


def arguments_for(folder: Path, patch: pytest.MonkeyPatch) -> list[str]:
    """Of a search over a copy of the model image, whose deploy.toml names a file of tuned values."""
    patch.setenv("BUILD", str(folder / "build"))
    (folder / "models" / "image").mkdir(parents=True)
    deploy = Path("tests/models/image/deploy.toml").read_text()
    (folder / "models" / "image" / "deploy.toml").write_text(f'tuned = "tuned.toml"\n{deploy}')
    return ["--models", str(folder / "models"), "--model", "image"]


def test_what_was_found_is_kept_whatever_becomes_of_the_tuned_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(arguments_for(tmp_path, monkeypatch))
    search = known(tmp_path / "known", tried(SLOW, 100), tried(FAST, 120))
    for pair in pairs(1.2, 1.21, 1.19):
        search.journal.add_pair(FAST, pair)
    found = concluded(search, HEAD, search.search())
    published = SimpleNamespace(precision="fp32", versions={}, files={})
    monkeypatch.setattr("loadtests.tune.publish", lambda *_: published)
    monkeypatch.setattr("loadtests.tune.Tuner.search", lambda _: search.best())
    monkeypatch.setattr("loadtests.tune.concluded", lambda *_: found)
    monkeypatch.setattr(TunedFile, "write", Mock(side_effect=InputError("tuned.toml: cannot be written")))
    with pytest.raises(InputError, match="cannot be written"):
        tune(args, Console(quiet=True))
    kept = Tuning.load(tuning_path("image"))
    assert (kept.best, kept.applied) == (FAST, False)


def test_a_place_that_takes_no_tuned_values_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = parse(arguments_for(tmp_path, monkeypatch))
    (tmp_path / "models" / "image" / "tuned.toml").mkdir()
    monkeypatch.setattr("loadtests.tune.publish", Mock(side_effect=AssertionError))
    with pytest.raises(InputError, match=r"tuned\.toml: cannot be written: it is a folder; .* --dry-run$"):
        tune(args, Console(quiet=True))


def test_a_broken_file_of_tuned_values_is_made_anew(tmp_path: Path) -> None:
    search = known(tmp_path, tried(SLOW, 100), tried(FAST, 120))
    for pair in pairs(1.2, 1.21, 1.19):
        search.journal.add_pair(FAST, pair)
    spec = search.place.spec.model_copy(update={"tuned": "tuned.toml"})
    (tmp_path / "tuned.toml").write_text("[targets")
    found = concluded(search, HEAD, search.search())
    result = apply(found, replace(search.place, spec=spec), tmp_path / "deploy.toml", dry_run=False)
    assert result.applied
    assert TunedFile.read(tmp_path / "tuned.toml").targets["onnxruntime"].batching.max_batch == 8


def test_layouts_share_the_cores_out_or_take_turns_and_one_instance_alone_is_left_out() -> None:
    spec = DeploymentSpec.load("tests/models/image")
    assert space_of(spec, "onnxruntime", 2).layouts == ((2, 1), (2, 2), (4, 1))
    assert space_of(spec, "onnxruntime", 8).layouts == ((2, 4), (4, 2), (8, 1), (2, 8), (4, 4), (8, 2), (16, 1))
    assert space_of(spec, "onnxruntime", 1).layouts == ((2, 1),)
    tensorrt = space_of(spec, "tensorrt", 8)
    assert tensorrt.layouts == ((1, None), (2, None), (3, None), (4, None))
    assert tensorrt.cuda_graphs == (False, True)


def test_batch_sizes_near_the_best_are_tried_too_within_the_profile() -> None:
    space = space_of(DeploymentSpec.load("tests/models/image"), "onnxruntime", 2)
    assert [setting.max_batch for setting in space.varied(FAST, "max_batch")] == [1, 4, 8]
    half = FAST.model_copy(update={"max_batch": 4})
    assert [setting.max_batch for setting in space.varied(half, "max_batch")] == [1, 2, 4, 8]


def test_tuning_json_of_another_schema_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tuning.json").write_text('{"schema_version": 2}')
    with pytest.raises(InputError, match=r"tuning.json: schema_version: .*; make it anew with: make tune"):
        Tuning.load(tmp_path / "tuning.json")


def test_where_the_generator_was_the_limit_nothing_is_concluded(tmp_path: Path) -> None:
    limited = known(tmp_path / "a", tried(SLOW, 100, at_least=True), tried(FAST, 100, at_least=True))
    with pytest.raises(InvalidMeasurement, match="the load generator was the limit: the default holds 100/s or more"):
        concluded(limited, HEAD, limited.best())
    decided = known(tmp_path / "b", tried(SLOW, 100, at_least=True), tried(FAST, 90))
    assert "nothing better than the default" in concluded(decided, HEAD, decided.best()).conclusion

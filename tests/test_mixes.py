"""Mixed traffic: each model's share, and the lengths of the inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deepseek.spec import DeploymentSpec, InputError
from loadtests.load import inputs
from loadtests.load.inputs import length_classes, read_rows, shuffled
from loadtests.results.mixes import Mix, runs_of
from loadtests.results.settings import LoadSettings
from tests.saved_runs import load_settings, saved_run, steady

SLO_RATES = {"a": 100.0, "b": 40.0}


def parts(mix: str, **load: Any) -> list[LoadSettings]:
    found = Mix.parse(mix, SLO_RATES).parts(load_settings(**load), {"a": "a.npz", "b": "b.npz"})
    assert [each.inputs for each in found] == [f"{each.model}.npz" for each in found]
    assert {each.mix for each in found} == {"".join(mix.split())}
    return found


def test_weights_are_shares_of_the_rate_and_each_model_has_its_own_arrivals() -> None:
    a, b = parts("a:3, b:1", rate_rps=120.0)
    assert (a.rate_rps, b.rate_rps) == (90, 30)
    assert a.seed != b.seed


@pytest.mark.parametrize(("mix", "least"), [("a:3,b:1", 160), ("a,b", 140), ("a:1,b:9", 1000)])
def test_without_a_rate_every_model_gets_at_least_its_slos_rate(mix: str, least: float) -> None:
    found = Mix.parse(mix, SLO_RATES)
    assert found.least_rate_rps == pytest.approx(least)
    asked = {model: share * found.least_rate_rps for model, share in found.shares.items()}
    assert all(asked[model] >= SLO_RATES[model] - 1e-9 for model in asked)


def test_without_weights_each_model_gets_exactly_its_slos_rate() -> None:
    rates: dict[str, float | None] = {"a": 15.0, "b": 40.0}
    mix = Mix.parse("a,b", rates)
    found = mix.parts(load_settings(rate_rps=mix.least_rate_rps), {"a": "", "b": ""})
    assert {each.model: each.rate_rps for each in found} == rates


def test_every_rate_of_a_shape_is_divided() -> None:
    a, b = parts("a:3,b:1", shape="50x30, 10-200x5")
    assert (a.shape, b.shape) == ("37.5x30, 7.5-150x5", "12.5x30, 2.5-50x5")


@pytest.mark.parametrize(("users", "expected"), [(2, (1, 1)), (4, (3, 1)), (5, (4, 1)), (40, (30, 10))])
def test_users_are_divided_into_whole_numbers(users: int, expected: tuple[int, int]) -> None:
    a, b = parts("a:3,b:1", users=users)
    assert (a.users, b.users) == expected


@pytest.mark.parametrize(
    ("mix", "rates", "message"),
    [
        ("a", SLO_RATES, "two or more"),
        ("a,a", SLO_RATES, "each once"),
        ("a:0,b:1", SLO_RATES, "weights above 0"),
        ("a:x,b:1", SLO_RATES, "weights above 0"),
        ("a:1,b", SLO_RATES, "every model a weight, or none"),
        ("a,b", {"a": 1.0, "b": None}, "b has no slo.rate_rps"),
    ],
)
def test_a_wrong_mix_gives_a_one_line_error(mix: str, rates: dict[str, float | None], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mix.parse(mix, rates)


def test_a_mix_without_any_rate_asks_for_one() -> None:
    with pytest.raises(InputError, match="give --rate"):
        _ = Mix.parse("a:1,b:1", {"a": None, "b": None}).least_rate_rps
    with pytest.raises(InputError, match="each needs at least one"):
        parts("a:3,b:1", users=1)


def test_the_latest_run_of_the_same_mix_is_found(own_build: Path) -> None:
    for name, mix in (("1", "a:3,b:1"), ("2", "a:3,b:1"), ("3", "a:1,b:1"), ("4", None)):
        for model in "ab"[: 2 if mix else 1]:
            saved_run(own_build / model / "loadtests" / name, steady(), model=model, mix=mix)
    assert [run.folder for run in runs_of("a:3, b:1")] == [own_build / model / "loadtests" / "2" for model in "ab"]
    assert runs_of("a:3,b:1", str(own_build / "b" / "loadtests" / "1"))[0].folder.name == "1"
    with pytest.raises(InputError, match=r"no load test of the mix a:9,b:1 .* make loadtest MIX=a:9,b:1"):
        runs_of("a:9,b:1")
    with pytest.raises(InputError, match="no load test of the mix a:3,b:1 in /x;"):
        runs_of("a:3,b:1", "/x")


def rows(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    return [{"input_ids": np.zeros((1, length), np.int64)} for length in lengths]


def test_different_lengths_make_classes_and_many_are_grouped_by_powers_of_two() -> None:
    spec = DeploymentSpec.load("tests/models/text")

    def titles(lengths: list[int]) -> list[str]:
        return [length.title for length in length_classes(rows(lengths), spec)]

    assert titles([16, 128, 16]) == ["length 16", "length 128", "length 16"]
    assert titles([50, 50]) == ["", ""]
    many = titles([*range(1, 20), 128])
    wanted = ["length 1 to 1", "length 2 to 2", "length 3 to 4", "length 17 to 32", "length 65 to 128"]
    assert [many[place] for place in (0, 1, 2, 18, 19)] == wanted


def test_rows_of_every_kind_are_drawn_from_a_large_file_and_sent_shuffled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {f"{row:05d}/ids": np.full((1, 4), row) for row in range(300)}  # as if two or three kinds alternate
    np.savez(tmp_path / "rows.npz", **arrays)  # type: ignore[arg-type]
    monkeypatch.setattr(inputs, "MOST_ROWS", 100)
    assert read_rows(tmp_path / "rows.npz", least=4)[0]["ids"].shape == (4, 4)  # if the profile has no batch of 1
    read = list(read_rows(tmp_path / "rows.npz").values())
    taken = [int(row["ids"][0, 0]) for row in read]
    assert (len(taken), taken) == (100, sorted(set(taken)))
    for kinds in (2, 3):
        counts = np.bincount([row % kinds for row in taken], minlength=kinds)
        assert counts.min() > 0.6 * 100 / kinds
    sent = [int(row["ids"][0, 0]) for row in shuffled(read, seed=1)]
    assert sorted(sent) == taken != sent
    assert sent == [int(row["ids"][0, 0]) for row in shuffled(read, seed=1)]


def test_rows_have_the_numbers_of_their_keys(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **{f"{row}/ids": np.full((1, 4), row) for row in range(12)})  # type: ignore[arg-type]
    assert [int(row["ids"][0, 0]) for row in read_rows(tmp_path / "rows.npz").values()] == list(range(12))


def test_the_limit_on_bytes_uses_all_rows_and_not_only_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = {f"{row:05d}/ids": np.zeros((1, 1 if row == 0 else 1000)) for row in range(100)}
    np.savez_compressed(tmp_path / "rows.npz", **arrays)  # type: ignore[arg-type]
    monkeypatch.setattr(inputs, "MOST_BYTES", 25 * 8000)
    assert 20 <= len(read_rows(tmp_path / "rows.npz")) <= 25
    assert len(read_rows(tmp_path / "rows.npz", least=4)) <= 6  # each row is then four times as large

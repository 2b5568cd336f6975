"""The recommender: how it splits a log, the contract of its graph, and errors for wrong logs."""

import gzip
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek.pruning import PruneConfig, prune_model
from deepseek.sizing.model.live_memory import LiveBytes
from deepseek.spec import InputError
from deepseek.vocabulary import Vocabulary
from models.recommender import data, model, recipe
from models.recommender.data import HISTORY, TOP, Interactions
from models.recommender.model import NextItem, Recommender
from models.recommender.recipe import transformer_config

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.server]

ITEMS = 90


def log_lines(users: int = 40, length: int = 14) -> list[str]:
    """A log in which every user moves through the catalogue in steps of 3, which is easy to learn."""
    rng = np.random.default_rng(0)
    starts = rng.integers(0, ITEMS, users)
    rows = [f"user {u},sku-{(s + 3 * t) % ITEMS},{t},web" for u, s in enumerate(starts) for t in range(length)]
    return ["user,item,timestamp,page", *rows, *(f"last,sku-{item},{item},web" for item in range(ITEMS))]


Patch = pytest.MonkeyPatch
Shop = Callable[[list[str]], Path]


@pytest.fixture
def shop(tmp_path: Path, own_build: Path, monkeypatch: Patch) -> Shop:
    """A function that writes lines into a log, sets DATA to it, and uses a new build folder."""

    def write(lines: list[str]) -> Path:
        path = tmp_path / "log.csv"
        path.write_text("\n".join(lines) + "\n")
        monkeypatch.setenv("DEEPSEEK_DATA", str(path))
        return path

    write(log_lines())
    return write


@pytest.fixture
def recommender() -> Recommender:
    torch.manual_seed(0)
    made = Recommender(transformer_config(ITEMS)).eval()
    made.log_popularity.copy_(torch.linspace(-1, 1, ITEMS + 1))  # the last item is the most popular
    return made


@pytest.fixture
def row() -> Tensor:
    """Ten items, oldest first, padded on the left."""
    return torch.cat([torch.zeros(HISTORY - 10, dtype=torch.long), torch.arange(31, 41)])[None]


def test_equal_timestamps_keep_the_files_order_and_a_repeated_item_counts_once(shop: Shop) -> None:
    shop([*log_lines(), "x,sku-5,7,", "x,sku-3,9,", "x,sku-1,9,", "x,sku-5,9,", "x,sku-2,8.5,"])
    log = data.load()
    assert [log.item_ids[item] for item in log.histories[-1]] == ["sku-5", "sku-2", "sku-3", "sku-1"]


def test_iso_times_are_seconds_in_utc_unless_they_have_a_zone(shop: Shop) -> None:
    times = ("1970-01-01T00:00:02Z", "1970-01-01T01:00:01+01:00", "1970-01-01 00:00:00.5", "3")
    shop([*log_lines(), *(f"x,sku-{place},{time}," for place, time in enumerate(times))])
    log = data.load()
    assert [log.item_ids[item] for item in log.histories[-1]] == ["sku-2", "sku-1", "sku-0", "sku-3"]
    assert log.times[-1].tolist() == [0.5, 1, 2, 3]


def test_a_log_may_be_a_folder_of_files_with_titles(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("DEEPSEEK_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"no file \*.csv or \*.csv.gz; DATA names a csv file, or a folder of them"):
        data.load()
    (tmp_path / "1.csv").write_text("\n".join(log_lines()) + "\n")
    before = data.fingerprint()
    (tmp_path / "2.csv").write_text("item,title,user,time\nsku-1,Tea,x,1\nsku-2,,x,2\n")
    log = data.load()
    assert data.fingerprint() != before
    assert {name: title for name, title in zip(log.item_ids, log.titles, strict=True) if name != title} == {
        "sku-1": "Tea"
    }
    assert [log.item_ids[item] for item in log.histories[-1]] == ["sku-1", "sku-2"]
    (tmp_path / "0.csv.gz").write_bytes(gzip.compress(b"user,item,time\ny,sku-3,1\n"))  # as logrotate leaves them
    (tmp_path / "3.CSV").write_text("user,item,time\nz,sku-4,1\n")
    (tmp_path / ".2.csv").write_bytes(b"\0\5\x16\7")  # as macOS and rsync write them
    log = data.load()
    names = [[log.item_ids[item] for item in history] for history in log.histories]
    assert (names[0], names[-1]) == (["sku-3"], ["sku-4"])


def test_empty_lines_are_skipped_as_a_spreadsheet_writes_them(shop: Shop) -> None:
    shop(log_lines())
    log = data.load()
    shop(["", ",,,", *log_lines(), "  ", ",,,"])
    assert data.load().item_ids == log.item_ids


@pytest.mark.parametrize("end", [-20, -2, 4], ids=["middle", "checksum", "header"])
def test_a_gzip_file_that_is_cut_off_is_a_one_line_error(shop: Shop, monkeypatch: Patch, end: int) -> None:
    path = shop([]).with_name("log.csv.gz")
    path.write_bytes(gzip.compress("\n".join(log_lines()).encode())[:end])
    monkeypatch.setenv("DEEPSEEK_DATA", str(path))
    with pytest.raises(InputError, match="not a complete gzip file: "):
        data.load()


def test_the_last_item_is_the_test_and_the_one_before_the_validation(shop: Shop) -> None:
    shop([*log_lines(), "short,sku-1,1,", "short,sku-2,2,"])
    log = data.load()
    (inputs, targets), (earlier, before) = log.held_out("test"), log.held_out("validation")
    np.testing.assert_array_equal(inputs[:, -1], before)
    np.testing.assert_array_equal(targets, [history[-1] for history in log.histories[:-1]])
    np.testing.assert_array_equal(earlier[0, -12:], log.training[0])
    assert inputs.shape == (41, HISTORY)
    assert len(log.training[-1]) == 2  # too few items to hold out two: only trained on


def interactions(*histories: Sequence[int], times: Sequence[float] | None = None) -> Interactions:
    """A log in which all items are training data: two items to hold out are appended to each history."""
    longer = tuple(np.array([*history, 1, 2]) for history in histories)
    moments = tuple(np.array([*(times or range(len(history))), 998.0, 999.0]) for history in histories)
    return Interactions(histories=longer, times=moments, item_ids=(), titles=(), fingerprint="")


def test_windows_of_a_long_history_differ_by_epoch_and_the_targets_are_the_next_items() -> None:
    windows = recipe.Windows(interactions(range(1, 201), [5], [7, 8]), seed=0, at_least=1)
    assert len(windows) == 4 + 1
    seen = set()
    for epoch in range(5):
        windows.set_epoch(epoch)
        inputs, targets = windows[0]
        assert torch.equal(inputs + 1, targets)
        seen.add(int(targets[-1]))
    assert len(seen) > 1
    assert [part[-2:].tolist() for part in windows[4]] == [[0, 7], [7, 8]]


def test_only_items_seen_at_the_same_moment_are_shuffled() -> None:
    windows = recipe.Windows(interactions([5, 6, 7, 8], times=[1.0, 2.0, 2.0, 3.0]), seed=0, at_least=1)
    seen = set()
    for epoch in range(20):
        windows.set_epoch(epoch)
        seen.add(tuple(windows[0][1][-4:].tolist()))
    assert seen == {(5, 6, 7, 8), (5, 7, 6, 8)}


@pytest.mark.parametrize("limit", [200_000_000, 36_000_000], ids=["whole", "divided"])
def test_a_step_of_a_large_catalogue_stays_within_half_of_the_memory(limit: int, monkeypatch: Patch) -> None:
    monkeypatch.setattr(recipe, "limit_bytes", lambda _: float(limit))
    items = 3000
    config = recipe.training_config(0, items)
    size = int(config.batch_size)
    assert size * config.accumulation_steps == 64
    network = NextItem(Recommender(transformer_config(items)))
    ids = torch.randint(1, items + 1, (size, HISTORY + 1))
    with LiveBytes() as live:
        live.watch(network.parameters())
        torch.nn.functional.cross_entropy(*network(ids[:, :-1], ids[:, 1:])).backward()
    assert live.most < limit / 2


def test_a_catalogue_too_large_for_the_memory_is_a_one_line_error(monkeypatch: Patch) -> None:
    monkeypatch.setattr(recipe, "limit_bytes", lambda _: 8e9)
    says = r"20,000,000 items: training takes 73.44 GB at one history per batch, but half of the memory is 4.00 GB"
    with pytest.raises(InputError, match=says):
        recipe.training_config(0, 20_000_000)


def test_recommendations_are_new_items_best_first(recommender: Recommender) -> None:
    ids = torch.randint(0, ITEMS + 1, (64, HISTORY), generator=torch.Generator().manual_seed(0))
    items, scores = recommender(ids)
    assert (items.dtype, scores.dtype) == (torch.int64, torch.float32)
    for given, found in zip(ids.tolist(), items.tolist(), strict=True):
        assert len({*found} - {0, *given}) == TOP
    assert bool((scores.diff(dim=1) <= 0).all())


def test_excluded_items_are_replaced_by_the_next_best(recommender: Recommender, row: Tensor) -> None:
    items, scores = recommender(row)
    first = torch.tensor([[0, *items[0, :3].tolist(), -1, 2**40]])  # padding and unknown ids exclude nothing
    others, rest = recommender(row, first)
    assert others[0, :-3].tolist() == items[0, 3:].tolist()
    torch.testing.assert_close(rest[0, :-3], scores[0, 3:])


@pytest.mark.parametrize("unknown", [0, -1, ITEMS + 1, 2**40, -(2**63)], ids=str)
def test_padding_and_unknown_ids_are_ignored_anywhere(unknown: int, recommender: Recommender, row: Tensor) -> None:
    holes = torch.full((1, HISTORY), unknown)
    holes[0, [3, 4, 5, 6, 7, 8, 12, 13, 20, HISTORY - 2]] = torch.arange(31, 41)
    torch.testing.assert_close(recommender(holes), recommender(row))
    items, scores = recommender(torch.full((1, HISTORY), unknown))
    assert bool(scores.isfinite().all())
    assert items[0].tolist() == list(range(ITEMS, ITEMS - TOP, -1))  # the popular ones
    items, _ = recommender(torch.full((1, HISTORY), unknown), torch.arange(4, ITEMS + 1)[None])
    assert items[0].tolist() == [3, 2, 1, *[0] * (TOP - 3)]  # no other item remains


def test_every_position_with_a_target_is_predicted_in_one_pass(recommender: Recommender, row: Tensor) -> None:
    targets = row.roll(-1, dims=1)
    targets[0, -1] = 41
    logits, asked = NextItem(recommender)(row, targets)
    assert asked.tolist() == list(range(32, 42))
    serving = recommender.logits(recommender.transformer(row)[:, -1])
    torch.testing.assert_close(logits[-1:], serving)


def test_metrics_of_known_ranks() -> None:
    def predict(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"items": np.tile(np.arange(1, TOP + 1), (len(inputs["item_ids"]), 1))}

    rows = model.ranking_metrics(predict, np.zeros((200, HISTORY), np.int64), np.repeat([1, 3, 10, 11], 50))
    assert rows["hr@10"].tolist() == [*[True] * 150, *[False] * 50]
    metrics = model.means(rows)
    assert metrics["hr@10"] == 0.75
    assert metrics["ndcg@10"] == pytest.approx((1 + 1 / 2 + 1 / np.log2(11)) / 4)


def test_a_shops_log_is_trained_evaluated_and_labelled_and_beats_popularity(
    shop: Shop, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(model, "MIN_WINDOWS", 128)
    monkeypatch.setattr(recipe, "SETTINGS", replace(recipe.SETTINGS, max_epochs=10))
    facts = model.train()
    assert facts["test"]["ndcg@10"] > 3 * facts["popularity"]["ndcg@10"]
    folder = tmp_path / "build" / "recommender"
    names = (folder / "labels" / "items.txt").read_text().split("\n")
    for name in ("item_ids", "exclude_ids"):
        assert (folder / "labels" / f"{name}.txt").read_text().split("\n") == names
    assert (names[0], names[1], len(names)) == ("", data.load().item_ids[1], ITEMS + 2)
    assert json.loads((folder / "training.json").read_text())["seed"] == 0
    loaded = model.load()
    assert model.means(model.evaluate(model.predictor(loaded))) == facts["test"]
    evaluation, calibration = (
        {sample["item_ids"].tobytes() for sample in model.samples(split)} for split in ("evaluation", "calibration")
    )
    assert evaluation.isdisjoint(calibration)
    shop([*log_lines(), "x,sku-1,1,"])
    with pytest.raises(
        InputError, match=r"trained on another log than .*log.csv \(DATA\), or before it changed; train it"
    ):
        model.load()


def test_the_catalogue_has_any_name_of_the_log(shop: Shop) -> None:
    odd = ["a,b", '"', "a\rb", "a\nb", "列車", "x" * 100_000]
    shop([*log_lines(), *('x,"' + name.replace('"', '""') + '",1,' for name in odd)])
    log = data.load()
    model._write(Recommender(transformer_config(log.num_items)), log, {})
    assert Vocabulary(model.weights_path().parent / "catalogue.csv").names.tolist() == [
        n.encode() for n in log.item_ids
    ]
    assert set(odd) < set(log.item_ids)


@pytest.mark.slow
def test_finetune_restores_a_pruned_model(shop: Shop, monkeypatch: Patch) -> None:
    monkeypatch.setattr(model, "MIN_WINDOWS", 256)
    monkeypatch.setattr(model, "finetuning_config", lambda _: replace(recipe.SETTINGS, max_epochs=4))
    trained = model.train()["validation"]["ndcg@10"]
    pruned, rows = model.load(), torch.from_numpy(data.load().held_out("validation")[0])
    report = prune_model(pruned, (rows,), PruneConfig(ratio=0.4))
    assert report.count("heads")[1] < 4
    assert report.count("channels")[1] < 0.65 * 384

    def ndcg() -> float:
        found = model.ranking_metrics(model.predictor(pruned), *data.load().held_out("validation"))
        return float(found["ndcg@10"].mean())

    before = ndcg()
    model.finetune(pruned)
    assert before < ndcg()
    assert ndcg() > 0.97 * trained


def test_loading_an_untrained_model_is_an_error_that_says_what_to_run(shop: Shop) -> None:
    with pytest.raises(InputError, match=r"no such file; train it: deepseek train --model recommender"):
        model.load()
    model.weights_path().parent.mkdir(parents=True)
    model.weights_path().write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"cannot be read .*; train it"):
        model.load()


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "columns user,item,timestamp are needed, with commas between them; seen: an empty file"),
        (["user;item;timestamp"], "line 1: .* seen: user;item;timestamp"),
        (["user,item,timestamp", "a,b,1", "a,c,noon"], "line 3: timestamp: seen 'noon'; allowed: a number, "),
        (["user,item,timestamp", "a,b,nan"], "line 2: timestamp: seen 'nan'"),
        (["user,item,timestamp", "a,b"], "line 2: 2 fields; the header has 3"),
        (["user,title,item,timestamp", "a,Tea, black,b,1"], "line 2: 5 fields; the header has 4"),
        (
            ["user,item,timestamp", "a,b,1732700000000", "a,c,2026-11-28"],
            r"in several units: seen '2026-11-28' \(.*: line 3\) and '1732700000000' \(.*: line 2\); allowed: one unit",
        ),
        (["user,item,timestamp", "a,,1"], "line 2: item is empty"),
        (["user,item,timestamp", 'a,"b,1'], "not valid csv: unexpected end of data"),
        (["user,item,timestamp", "a,b,1"], "1 different items; at least 70 are needed: 20 .* besides an input of 50"),
        (log_lines(users=3), "4 users with 4 or more different items; at least 10"),
    ],
    ids=["empty", "semicolons", "timestamp", "nan", "short", "long", "units", "blank", "quote", "items", "users"],
)
def test_a_broken_log_is_a_one_line_error_that_says_where(lines: list[str], says: str, shop: Shop) -> None:
    path = shop(lines)
    with pytest.raises(InputError, match=says) as error:
        data.load()
    assert str(error.value).startswith(str(path))


def test_a_log_that_is_no_text_missing_or_not_fetched_is_a_one_line_error(shop: Shop, monkeypatch: Patch) -> None:
    path = shop([])
    path.write_bytes(b"user,item,timestamp\n\xff\xfe,b,1\n")
    with pytest.raises(InputError, match=r"not UTF-8 text .*; save it as UTF-8"):
        data.load()
    monkeypatch.setenv("DEEPSEEK_DATA", str(path.parent / "none.csv"))
    with pytest.raises(InputError, match="No such file"):
        data.load()
    monkeypatch.delenv("DEEPSEEK_DATA")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(InputError, match=r"could not be fetched .* put the file at .* or use your own log: DATA="):
        data.load()

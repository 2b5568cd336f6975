"""`POST /rerank` and `POST /similarity` beside a real Triton."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from deepseek_client import InferenceClient

from serving.openai.embeddings import similarities
from serving.openai.metrics import Metrics
from serving.openai.requests import SimilarityRequest
from serving.openai.routes import HELD_BYTES
from serving.openai.text_models import TextModel
from tests.test_openai import Serving, call, scrape, serve
from tests.test_openai_routes import SMALL, in_front_of
from tests.test_pairs import LONGEST, scores_of_transformers

QUERY = "how long do eggs keep?"
NO_DEFAULT, DEFAULT = r"\"default_prompt\": null", r"\"default_prompt\": \"query\""  # in config.pbtxt
TEXTS = [f"{'eggs ' * (k % 7)}number {k}{', then' * (k % 20)}" for k in range(70)]  # more than two batches
SENTENCES = ["ab " * (1 + 7 * k % 30) for k in range(20)]


@pytest.fixture(scope="module")
def expected(built_reranker: Path) -> np.ndarray:
    """The scores of TEXTS by transformers."""
    return scores_of_transformers(built_reranker / "reranker", [(QUERY, text) for text in TEXTS])[:, 0]


@pytest.fixture(scope="module")
def serving(built_sentence: Path, built_reranker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of the encoder `sentence`, its copy `another` with a default prompt, and the cross-encoder `reranker`."""
    repository = tmp_path_factory.mktemp("texts") / "repository"
    shutil.copytree(built_sentence / "repository", repository)
    shutil.copytree(built_reranker / "repository" / "reranker", repository / "reranker")
    shutil.copytree(repository / "sentence", repository / "another")
    for file in ("config.pbtxt", "1/manifest.json"):
        path = repository / "another" / file
        path.write_text(path.read_text().replace('"sentence"', '"another"').replace(NO_DEFAULT, DEFAULT))
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


def test_cutting_the_right_side_may_be_asked_for_but_not_the_left(url: str) -> None:
    fields = {"query": "q", "texts": ["a", "b " * 70]}
    expected = rerank(url, **fields)
    assert expected[0] == 200
    assert rerank(url, **fields, truncation_direction="Right") == expected  # LiteLLM always sends it
    status, answer = rerank(url, **fields, truncation_direction="left")
    assert status == 400
    assert answer["error"]["message"] == 'truncation_direction: seen "left"; allowed: right'


def test_pairs_and_their_tokens_are_counted(serving: Serving, url: str) -> None:
    before = scrape(serving)
    rerank(url, query="ab", texts=["abc", "a " * 100])
    after = scrape(serving)
    texts, tokens = (f'openai_{name}_total{{model="reranker"}}' for name in ("texts", "tokens"))
    added = after[texts] - before.get(texts, 0), after[tokens] - before.get(tokens, 0)
    assert added == (2, 2 + 3 + 3 + LONGEST)


@pytest.mark.parametrize(
    ("max_bytes", "status", "message"),
    [(2**24, 429, "requests in flight have"), (2**17, 400, "query: 3145728 bytes; allowed: up to 131072 (max_bytes)")],
)
async def test_the_copies_of_a_query_that_is_not_too_large_count_as_memory(
    max_bytes: int, status: int, message: str
) -> None:
    body = json.dumps({"query": "q" * (HELD_BYTES // 64), "texts": ["a"] * 100}).encode()
    model = replace(SMALL, pairs=True, max_batch=32, parts_at_once=2, max_bytes=max_bytes)
    async with in_front_of(None, model) as address:
        seen, _, answer = await asyncio.to_thread(call, address, "POST", "/rerank", body)
    assert seen == status
    assert message in answer["error"]["message"]


def test_each_route_names_the_models_that_it_takes(url: str) -> None:
    status, answer = rerank(url, query=QUERY, texts=TEXTS, model="sentence")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "model 'sentence': takes single texts, not pairs" in answer["error"]["message"]
    status, _, answer = call(url, "POST", "/v1/embeddings", b'{"model": "reranker", "input": "a"}')
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "takes pairs of texts; send them to POST /rerank" in answer["error"]["message"]
    models = call(url, "GET", "/v1/models")[2]["data"]
    found = {model["id"]: model["capabilities"] for model in models}
    assert found == {"another": ["embed"], "reranker": ["rerank"], "sentence": ["embed"]}


# ---- POST /similarity ------------------------------------------------------------------------------


def compare(serving: Serving, **fields: Any) -> tuple[int, Any]:
    """Status and JSON of a comparison."""
    body = {"inputs": {"source_sentence": "ab cd", "sentences": SENTENCES}, "model": "sentence", **fields}
    body = {name: value for name, value in body.items() if value != "left out"}
    status, _, answer = call(serving.places["OpenAI"], "POST", "/similarity", json.dumps(body).encode())
    return status, answer


def test_the_answer_is_the_cosine_of_each_sentence_in_order(serving: Serving) -> None:
    with InferenceClient(serving.places["gRPC"], timeout_s=60) as client:
        source, *vectors = (
            client.infer("sentence", {"text": [text]})["embedding"][0] for text in ["ab cd", *SENTENCES]
        )
    cosines = [source @ each / np.linalg.norm(source) / np.linalg.norm(each) for each in vectors]
    status, answer = compare(serving)
    assert status == 200
    np.testing.assert_allclose(answer, cosines, atol=1e-5)


class Fixed:
    """A client with vectors that are not of length 1."""

    async def infer(self, *_: Any, **__: Any) -> tuple[str, dict[str, np.ndarray]]:
        vectors = np.array([[3, 4], [6, 8], [-8, 6], [-3, -4], [0, 0]], np.float32)
        return "1", {"v": vectors, "tokens": np.ones((5, 1), np.int32)}


def test_a_cosine_does_not_depend_on_the_lengths_of_the_vectors() -> None:
    fixed: Any = Fixed()
    request = SimilarityRequest.read(b'{"inputs": {"source_sentence": "a", "sentences": ["b", "c", "d", "e"]}}')
    model = TextModel(name="m", output="v", size=2, max_batch=8, parts_at_once=1, max_tokens=8, max_bytes=8)
    found = asyncio.run(similarities(fixed, Metrics(), model, request))
    np.testing.assert_allclose(found, [1, 0, -1, 0], atol=1e-6)


def test_a_prompt_begins_all_texts(serving: Serving) -> None:
    prompted = {"source_sentence": "ab ab: ab cd", "sentences": [f"ab ab: {text}" for text in SENTENCES]}
    _, expected = compare(serving, inputs=prompted)
    assert compare(serving, parameters={"prompt_name": "query"})[1] == pytest.approx(expected, abs=1e-5)
    assert compare(serving)[1] != pytest.approx(expected, abs=1e-5)


def test_the_prompt_of_embeddings_is_the_named_one_or_the_default(serving: Serving) -> None:
    with openai.OpenAI(base_url=serving.places["OpenAI"], api_key="unused") as client:

        def embed(model: str, text: str, prompt: str | None = None) -> tuple[np.ndarray, int]:
            answer = client.embeddings.create(model=model, input=text, extra_body={"prompt_name": prompt})
            return np.array(answer.data[0].embedding), answer.usage.prompt_tokens

        plain, prompted = embed("sentence", "cd"), embed("sentence", "ab ab: cd")
        assert prompted[1] > plain[1]
        for model, prompt, (vector, tokens) in (
            ("sentence", "none", plain),
            ("another", "none", plain),
            ("sentence", "query", prompted),
            ("another", None, prompted),
            ("another", "query", prompted),
        ):
            found = embed(model, "cd", prompt)
            np.testing.assert_allclose(found[0], vector, atol=1e-5)
            assert found[1] == tokens


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"model": "left out"}, "model", "model: missing; allowed: another, sentence"),
        ({"inputs": {"source_sentence": "b" * 110_001, "sentences": ["b"]}}, "inputs.source_sentence", "inputs.source_sentence: 110001 bytes"),
        ({"inputs": {"source_sentence": "a", "sentences": ["b", "b" * 109_994]}, "parameters": {"prompt_name": "query"}}, "inputs.sentences", "inputs.sentences[1]: 110001 bytes with the prompt; allowed: up to 110000"),
        ({"parameters": {"prompt_name": "x"}}, "parameters.prompt_name", 'parameters.prompt_name: seen "x"; prompts of sentence: none, query'),
    ],
)  # fmt: skip
def test_what_the_model_cannot_take_is_a_400(
    serving: Serving, fields: dict[str, Any], param: str | None, message: str
) -> None:
    status, answer = compare(serving, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("source", "sentences", "param", "place"),
    [
        ("a " * 90, ["b"], "inputs.source_sentence", "inputs.source_sentence: 92 tokens"),
        ("a", ["b", "b " * 90], "inputs.sentences", "inputs.sentences[1]: 92 tokens"),
    ],
)
def test_a_long_sentence_is_truncated_unless_the_caller_refuses_that(
    serving: Serving, source: str, sentences: list[str], param: str, place: str
) -> None:
    inputs = {"source_sentence": source, "sentences": sentences}
    expected = compare(serving, inputs=inputs)
    assert expected[0] == 200
    assert compare(serving, inputs=inputs, parameters={"truncate": True, "truncation_direction": "Right"}) == expected
    status, answer = compare(serving, inputs=inputs, parameters={"truncate": False})
    assert (status, answer["error"]["param"]) == (400, param)
    assert answer["error"]["message"].startswith(f"{place}; allowed: up to ")
    short = {"source_sentence": "a", "sentences": ["b"]}
    assert compare(serving, inputs=short, parameters={"truncate": False})[0] == 200

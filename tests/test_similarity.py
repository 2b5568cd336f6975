"""`POST /similarity` beside a real Triton."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from deepseek_client import InferenceClient

from serving.openai.embeddings import similarities
from serving.openai.metrics import Metrics
from serving.openai.requests import SimilarityRequest
from serving.openai.text_models import TextModel
from tests.test_openai import Serving, call, serve

NO_DEFAULT, DEFAULT = r"\"default_prompt\": null", r"\"default_prompt\": \"query\""  # in config.pbtxt
TEXTS = ["ab " * (1 + 7 * k % 30) for k in range(20)]  # more than two batches


@pytest.fixture(scope="module")
def serving(built_sentence: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """`deepseek serve` with the model `sentence`, and `another`, a copy of it with a default prompt."""
    repository = tmp_path_factory.mktemp("several") / "repository"
    shutil.copytree(built_sentence / "repository", repository)
    shutil.copytree(repository / "sentence", repository / "another")
    for file in ("config.pbtxt", "1/manifest.json"):
        path = repository / "another" / file
        path.write_text(path.read_text().replace('"sentence"', '"another"').replace(NO_DEFAULT, DEFAULT))
    with serve(repository) as running:
        yield running


def compare(serving: Serving, **fields: Any) -> tuple[int, Any]:
    """Status and JSON of a comparison."""
    body = {"inputs": {"source_sentence": "ab cd", "sentences": TEXTS}, "model": "sentence", **fields}
    body = {name: value for name, value in body.items() if value != "left out"}
    status, _, answer = call(serving.places["OpenAI"], "POST", "/similarity", json.dumps(body).encode())
    return status, answer


def test_the_answer_is_the_cosine_of_each_sentence_in_order(serving: Serving) -> None:
    with InferenceClient(serving.places["gRPC"], timeout_s=60) as client:
        source, *vectors = (client.infer("sentence", {"text": [text]})["embedding"][0] for text in ["ab cd", *TEXTS])
    cosines = [source @ each / np.linalg.norm(source) / np.linalg.norm(each) for each in vectors]
    status, answer = compare(serving)
    assert status == 200
    np.testing.assert_allclose(answer, cosines, atol=1e-5)


class Fixed:
    """A client with vectors that are not of length 1."""

    async def infer(self, *_: Any, **__: Any) -> dict[str, np.ndarray]:
        vectors = np.array([[3, 4], [6, 8], [-8, 6], [-3, -4], [0, 0]], np.float32)
        return {"v": vectors, "tokens": np.ones((5, 1), np.int32)}


def test_a_cosine_does_not_depend_on_the_lengths_of_the_vectors() -> None:
    fixed: Any = Fixed()
    request = SimilarityRequest.read(b'{"inputs": {"source_sentence": "a", "sentences": ["b", "c", "d", "e"]}}')
    model = TextModel(name="m", output="v", size=2, max_batch=8, parts_at_once=1, max_tokens=8, max_bytes=8)
    found = asyncio.run(similarities(fixed, Metrics(), model, request))
    np.testing.assert_allclose(found, [1, 0, -1, 0], atol=1e-6)


def test_a_prompt_begins_all_texts(serving: Serving) -> None:
    prompted = {"source_sentence": "ab ab: ab cd", "sentences": [f"ab ab: {text}" for text in TEXTS]}
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

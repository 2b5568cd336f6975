"""OpenAI's routes beside a real Triton, called by the package `openai`, unchanged."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from deepseek_client import InferenceClient
from huggingface_hub import InferenceClient as HuggingFaceClient
from jsonschema import Draft202012Validator

from serving.openai.metrics import Metrics
from serving.openai.routes import BODY_BYTES
from tests.add_one import write_add_one
from tests.gateway import series_of
from tests.test_embedded import Serving, start
from tests.test_openapi import DOCUMENT
from tests.test_text import MOST_TOKENS, ids_of

TEXTS = ["ab " * (1 + 7 * k % 30) + "cd" * (k % 3) for k in range(50)]  # of unequal length, more than six batches


@contextmanager
def serve(repository: Path, *flags: str) -> Iterator[Serving]:
    """`deepseek serve` on free ports."""
    process = start(repository, "--openai-port", "0", *flags)
    try:
        yield Serving.of(process)
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def serving(built_sentence: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of the model `sentence`, and of `add_one`, which takes no texts."""
    repository = tmp_path_factory.mktemp("openai") / "repository"
    shutil.copytree(built_sentence / "repository", repository)
    write_add_one(repository)
    with serve(repository) as running:
        yield running


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=serving.places["OpenAI"], api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(serving: Serving) -> np.ndarray:
    """The vectors of TEXTS over gRPC, text by text."""
    with InferenceClient(serving.places["gRPC"], timeout_s=60) as direct:
        return np.concatenate([direct.infer("sentence", {"text": [text]})["embedding"] for text in TEXTS])


def call(
    url: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """A bare request: status, headers, JSON."""
    place = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(place, timeout=60)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), json.loads(answer.read())
    finally:
        connection.close()


def scrape(serving: Serving) -> dict[str, float]:
    """The value of each series."""
    return series_of(serving.places["OpenAI"].removesuffix("/v1") + "/metrics")


def test_a_long_list_is_answered_in_order(client: openai.OpenAI, expected: np.ndarray) -> None:
    answer = client.embeddings.create(model="sentence", input=TEXTS)
    assert [each.index for each in answer.data] == list(range(len(TEXTS)))
    np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-5)
    assert answer.model == "sentence"


async def test_the_asynchronous_client_works_unchanged(serving: Serving, expected: np.ndarray) -> None:
    async with openai.AsyncOpenAI(base_url=serving.places["OpenAI"], api_key="unused") as client:
        answers = await asyncio.gather(*(client.embeddings.create(model="sentence", input=text) for text in TEXTS))
    np.testing.assert_allclose([each.data[0].embedding for each in answers], expected, atol=1e-5)


def test_base64_holds_the_same_numbers_as_float(serving: Serving, client: openai.OpenAI) -> None:
    floats, default = (
        client.embeddings.create(model="sentence", input="ab cd", encoding_format=how, dimensions=32, user="me")
        for how in ("float", openai.omit)
    )
    as_float, as_base64 = (np.array(each.data[0].embedding, np.float32) for each in (floats, default))
    assert as_float.tolist() == as_base64.tolist()  # the client asks for base64 by default
    body = json.dumps({"model": "sentence", "input": "ab cd", "encoding_format": "base64"}).encode()
    _, _, answer = call(serving.places["OpenAI"], "POST", "/v1/embeddings", body)
    assert isinstance(answer["data"][0]["embedding"], str)


def test_hugging_faces_client_works_unchanged(serving: Serving) -> None:
    url = serving.places["OpenAI"].removesuffix("/v1")
    found = HuggingFaceClient(model=f"{url}/similarity").sentence_similarity("ab cd", ["ab cd", "ef"])
    assert found[0] == pytest.approx(1, abs=1e-5)  # it names no model: the only one answers
    assert found[1] < 0.999


def test_a_shorter_vector_is_the_first_numbers_scaled_to_length_1(client: openai.OpenAI, expected: np.ndarray) -> None:
    units = {size: expected[:, :size] / np.linalg.norm(expected[:, :size], axis=1, keepdims=True) for size in (8, 16)}
    for size, wanted in {**units, 32: expected}.items():
        answer = client.embeddings.create(model="sentence", input=TEXTS, dimensions=size)
        np.testing.assert_allclose([each.embedding for each in answer.data], wanted, atol=1e-5)


def test_a_whole_number_may_be_written_with_a_fraction(serving: Serving) -> None:
    body = b'{"model": "sentence", "input": "ab cd", "dimensions": %b}'
    answers = [
        call(serving.places["OpenAI"], "POST", "/v1/embeddings", body % size) for size in (b"8", b"8.0", b"0.8e1")
    ]
    assert [(status, answer["data"]) for status, _, answer in answers] == [(200, answers[0][2]["data"])] * 3


def test_usage_counts_the_tokens_that_ran(client: openai.OpenAI) -> None:
    usage = client.embeddings.create(model="sentence", input=TEXTS).usage
    counts = [ids_of(text)[1] for text in TEXTS]
    assert max(counts) > MOST_TOKENS
    assert usage.prompt_tokens == usage.total_tokens == sum(min(count, MOST_TOKENS) for count in counts)
    assert usage.model_extra == {"truncated_texts": sum(count > MOST_TOKENS for count in counts)}


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sentence"]
    assert client.models.retrieve("sentence").object == "model"
    for name, why in (("another", "not served here"), ("add_one", "takes no texts")):
        with pytest.raises(openai.NotFoundError, match=f"model '{name}': {why}"):
            client.models.retrieve(name)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ["a", "b" * 110_001]}, "input", "input[1]: 110001 bytes; allowed: up to 110000"),
        ({"dimensions": 31}, "dimensions", "seen 31; allowed for sentence: 8, 16, 32"),
        ({"dimensions": 8.5}, "dimensions", "seen 8.5; allowed: a whole number from 1 on"),
        ({"prompt_name": "x"}, "prompt_name", 'seen "x"; prompts of sentence: none, query'),
        ({"inputs": "a"}, None, '"inputs": no such field; allowed: input, model'),
    ],
)
def test_a_bad_request_is_a_400(serving: Serving, fields: dict[str, Any], param: str | None, message: str) -> None:
    body = json.dumps({"model": "sentence", "input": "a", **fields}).encode()
    status, _, answer = call(serving.places["OpenAI"], "POST", "/v1/embeddings", body)
    assert (status, answer["error"].keys()) == (400, {"message", "type", "param", "code"})
    assert [answer["error"][key] for key in ("type", "param", "code")] == ["invalid_request_error", param, None]
    assert message in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/embeddings", b'{"model": "another", "input": "a"}', 404, "model_not_found"),
        ("POST", "/v1/embeddings", b'{"model": "add_one", "input": "a"}', 404, "model_not_found"),  # it takes ids only
        ("POST", "/v1/embeddings", b'{"model": "../sentence", "input": "a"}', 404, "model_not_found"),
        ("GET", "/v2/models/another/stats", None, 404, "model_not_found"),
        ("POST", "/rerank", b'{"query": "a", "texts": ["b"]}', 404, "model_not_found"),  # no model takes pairs
        ("GET", "/v1/completions", None, 404, "unknown_url"),
        ("GET", "/v1/embeddings", None, 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", b'"' + b"a" * BODY_BYTES, 413, None),
    ],
)
def test_other_refusals_have_their_status(
    serving: Serving, method: str, path: str, body: bytes | None, status: int, code: str | None
) -> None:
    found, headers, answer = call(serving.places["OpenAI"], method, path, body)
    assert (found, answer["error"]["code"]) == (status, code)
    assert headers.get("Allow") == ("POST" if status == 405 else None)


def test_a_compressed_body_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError, match="send the body uncompressed") as error:
        client.embeddings.create(model="sentence", input="a", extra_headers={"Content-Encoding": "gzip"})
    assert error.value.status_code == 415


def test_answers_are_those_of_the_document(serving: Serving) -> None:
    url = serving.places["OpenAI"]
    assert call(url, "GET", "/openapi.json")[2] == DOCUMENT
    for path, body in (
        ("/v1/embeddings", {"model": "sentence", "input": ["ab", "cd"]}),
        ("/v1/embeddings", {"model": "sentence", "input": "ab", "encoding_format": "base64"}),
        ("/v1/embeddings", {"model": "nosuch", "input": "ab"}),
        ("/similarity", {"inputs": {"source_sentence": "ab", "sentences": ["cd"]}}),
        ("/v1/models", None),
        ("/v1/models/sentence", None),
    ):
        method = "POST" if body else "GET"
        status, _, answer = call(url, method, path, json.dumps(body).encode() if body else None)
        operation = DOCUMENT["paths"][path.replace("/sentence", "/{model}")][method.lower()]
        told = operation["responses"].get(str(status), operation["responses"]["default"])
        schema = told["content"]["application/json"]["schema"]
        Draft202012Validator({**DOCUMENT, **schema}).validate(answer)


SHORT, LONG, REFUSED = (
    f'route="/v1/embeddings",model="{model}",split="{split}"'
    for model, split in (("sentence", "no"), ("sentence", "yes"), ("", "no"))
)


def test_requests_texts_and_tokens_are_counted(serving: Serving) -> None:
    texts, url, before = ["ab", "ab " * 100], serving.places["OpenAI"], scrape(serving)
    call(url, "POST", "/v1/embeddings", json.dumps({"model": "sentence", "input": texts}).encode())
    call(url, "POST", "/v1/embeddings", json.dumps({"model": "sentence", "input": ["ab"] * 40}).encode())
    call(url, "POST", "/v1/embeddings", b"{}")
    call(url, "GET", "/v1/models/sentence")
    call(url, "GET", "/v1/nosuch")
    after = scrape(serving)
    added = {name: value - before.get(name, 0) for name, value in after.items()}
    tokens = sum(min(ids_of(text)[1], MOST_TOKENS) for text in texts + ["ab"] * 40)
    expected = {
        'openai_requests_total{route="/v1/embeddings",status="200"}': 2,
        'openai_requests_total{route="/v1/embeddings",status="400"}': 1,
        'openai_requests_total{route="/v1/models/{model}",status="200"}': 1,
        'openai_requests_total{route="other",status="404"}': 1,
        'openai_texts_total{model="sentence"}': 42,
        'openai_tokens_total{model="sentence"}': tokens,
        f"openai_request_duration_seconds_count{{{SHORT}}}": 1,
        f"openai_request_duration_seconds_count{{{LONG}}}": 1,
        f"openai_request_duration_seconds_count{{{REFUSED}}}": 1,
        f'openai_request_duration_seconds_bucket{{{SHORT},le="+Inf"}}': 1,
    }
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert {name: added[name] for name in expected} == expected
    assert added[f"openai_request_duration_seconds_sum{{{SHORT}}}"] > 0


def test_each_bucket_counts_the_requests_up_to_its_end() -> None:
    metrics = Metrics()
    for seconds in (0.003, 0.005, 0.2, 100):
        metrics.count_request("/a", 200, seconds)
    lines = [line for line in metrics.text().splitlines() if line.startswith("openai_request_duration_seconds")]
    name = 'openai_request_duration_seconds_bucket{route="/a",model="",split="no",le='
    counts = {line.removeprefix(name).split('"')[1]: int(line.split()[-1]) for line in lines if line.startswith(name)}
    assert [counts[end] for end in ("0.005", "0.1", "0.2", "60.0", "+Inf")] == [2, 2, 3, 3, 4]
    assert float(lines[-2].split()[-1]) == pytest.approx(100.208)
    assert lines[-1] == 'openai_request_duration_seconds_count{route="/a",model="",split="no"} 4'


def test_a_label_is_escaped() -> None:
    metrics = Metrics()
    metrics.count_texts('a"b\\c\nd', 1, 2)
    assert 'openai_texts_total{model="a\\"b\\\\c\\nd"} 1\n' in metrics.text()

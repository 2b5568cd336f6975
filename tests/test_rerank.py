"""`POST /rerank` beside a real Triton: the scores of a cross-encoder, the best first."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving.openai.routes import HELD_BYTES
from serving.repository.served_models import served_models
from tests.conftest import run_module
from tests.gateway import skip_without_nginx, wait_for
from tests.test_embedded import start
from tests.test_gateway_openai import in_front
from tests.test_openai import Serving, call
from tests.test_openai_routes import SMALL, in_front_of
from tests.test_pairs import LONGEST, place, scores_of_transformers
from tests.test_text import folder

__all__ = ["folder", "place"]  # fixtures
QUERY = "how long do eggs keep?"
TEXTS = [f"{'eggs ' * (k % 7)}number {k}{', then' * (k % 20)}" for k in range(70)]  # more than two batches


@pytest.fixture(scope="module")
def expected(place: Path) -> np.ndarray:
    """The scores of TEXTS by transformers."""
    return scores_of_transformers(place / "reranker", [(QUERY, text) for text in TEXTS])[:, 0]


@pytest.fixture(scope="module")
def serving(place: Path) -> Iterator[Serving]:
    """A server with one cross-encoder."""
    process = start(place / "repository", "--openai-port", "0")
    try:
        yield Serving.of(process)
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture(scope="module")
def url(serving: Serving) -> str:
    """Its routes."""
    return serving.places["OpenAI"]


@pytest.fixture(scope="module")
def two_urls(place: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The routes of a server with two cross-encoders, and the encoder `sentence`."""
    repository = tmp_path_factory.mktemp("two") / "repository"
    shutil.copytree(folder / "repository", repository)
    for name in ("first", "second"):
        model = Path(shutil.copytree(place / "repository" / "reranker", repository / name))
        for file in (*model.rglob("config.pbtxt"), *model.rglob("manifest.json")):
            file.write_text(file.read_text().replace('"reranker"', f'"{name}"'))
    process = start(repository, "--openai-port", "0")
    try:
        yield Serving.of(process).places["OpenAI"]
    finally:
        process.terminate()
        process.communicate()


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


def test_the_gateway_has_the_route_with_a_key(
    serving: Serving, place: Path, tmp_path: Path, expected: np.ndarray
) -> None:
    skip_without_nginx()
    models = served_models(place / "repository", place / "models")
    gateway = in_front(serving, tmp_path, models)
    try:
        body = json.dumps({"query": QUERY, "texts": TEXTS, "raw_scores": True}).encode()
        status, answer = gateway.http("POST", "/rerank", body=body)
        rows = json.loads(answer.partition(b"\r\n\r\n")[2])
        assert status == 200
        np.testing.assert_allclose([row["score"] for row in rows], np.sort(expected)[::-1], atol=1e-4)
        assert gateway.http("POST", "/rerank", body=body, key="")[0] == 401
        largest = {"query": "q" * 131_072, "texts": ["t" * 131_072] * 32}  # one batch of max_bytes each
        assert gateway.http("POST", "/rerank", body=json.dumps(largest).encode())[0] == 200
        assert gateway.http("POST", "/rerank", body=b'"' + b"q" * models[0].body_bytes + b'"')[0] == 413
        counted = 'gateway_requests_total{protocol="http",api="openai",model="",status="200"}'
        wait_for(lambda: gateway.metrics().get(counted) == 2)
        (tmp_path / "pairs.tsv").write_text("eggs\tmilk\n")
        where = ("--model", "reranker", "--models", str(place / "models"), "--inputs", str(tmp_path / "pairs.tsv"))
        access = ("--url", f"localhost:{gateway.port}", "--ca-cert", str(gateway.folder / "ca.crt"))
        load = ("--route", "/rerank", "--rate", "20", "--duration-s", "1", "--warmup-s", "0", "--json")
        key = {"DEEPSEEK_API_KEY": gateway.key, "DEEPSEEK_BUILD": str(place / "build")}
        done = run_module("cli", "loadtest", *where, *access, *load, **key)
        assert done.returncode in (0, 3), done.stderr  # 3: the machine was too busy to send in time
        answered = json.loads(done.stdout)["answered"]
        assert answered > 0
        wait_for(lambda: gateway.metrics().get(counted) == 3 + answered)  # and the check before the load
    finally:
        gateway.stop()


@pytest.mark.parametrize("route", ["", "/rerank"])
def test_a_load_test_sends_pairs_over_kserve_and_to_the_route(
    serving: Serving, url: str, place: Path, tmp_path: Path, route: str
) -> None:
    (tmp_path / "pairs.tsv").write_text("eggs\tmilk\nhow long?\tabout a week\n\n")
    where = ("--model", "reranker", "--models", str(place / "models"), "--url", serving.places["gRPC"])
    to = ("--route", url.removeprefix("http://").removesuffix("/v1") + route) if route else ()
    load = ("--rate", "20", "--duration-s", "1", "--warmup-s", "0", "--inputs", str(tmp_path / "pairs.tsv"), "--json")
    done = run_module("cli", "loadtest", *where, *to, *load, DEEPSEEK_BUILD=str(place / "build"))
    assert done.returncode in (0, 3), done.stderr  # 3: the machine was too busy to send in time
    found = json.loads(done.stdout)
    assert (found["answered"], found["errors"]) == (found["planned"], {})
    assert list(found["lengths"]) == ["tokens 11", "tokens 21"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pairs.tsv", "a\tb\nc", "pairs.tsv, line 2: 0 tabs; write two texts with a tab between them"),
        ("texts.txt", "a", "has texts, but deploy.toml of reranker has pairs = true: give a .tsv file"),
    ],
)
def test_a_load_of_pairs_that_cannot_be_sent_is_one_line(
    place: Path, tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    which = ("--model", "reranker", "--models", str(place / "models"), "--inputs", str(tmp_path / name))
    done = run_module("cli", "loadtest", *which, "--rate", "20", DEEPSEEK_BUILD=str(place / "build"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert message in done.stderr


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


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"texts": ["a"]}, "query", "query: missing; allowed: a string"),
        ({"query": ["a"], "texts": ["a"]}, "query", "query: seen an array; allowed: a string"),
        ({"query": "", "texts": ["a"]}, "query", "query: an empty string"),
        ({"query": "a"}, "texts", "texts: missing; allowed: a list of strings"),
        ({"query": "a", "texts": []}, "texts", "texts: a list of 0; allowed: 1 to 2048 texts"),
        ({"query": "a", "texts": ["a", 1.5]}, "texts", "texts[1]: seen 1.5; allowed: a string"),
        ({"query": "a", "texts": ["a"] * 2049}, "texts", "texts: a list of 2049; allowed: 1 to 2048 texts"),
        ({"query": "a" * 131_073, "texts": ["a"]}, "query", "query: 131073 bytes; allowed: up to 131072"),
        ({"query": "a", "texts": ["a", "b" * 131_073]}, "texts", "texts[1]: 131073 bytes; allowed: up to 131072"),
        ({"query": "a", "texts": ["a"], "raw_scores": 1}, "raw_scores", "raw_scores: seen 1; allowed: true or false"),
        ({"query": "a", "texts": "a"}, "texts", 'texts: seen "a"; allowed: a list of strings'),
        ({"query": "a", "texts": ["a"], "model": 1}, "model", "model: seen 1"),
        ({"query": "a", "documents": ["a"]}, None, '"documents": no such field; allowed: query, texts, model'),
    ],
)
def test_a_bad_request_is_one_400(url: str, fields: dict[str, Any], param: str | None, message: str) -> None:
    status, answer = rerank(url, **fields)
    assert (status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


def test_pairs_and_their_tokens_are_counted(url: str) -> None:
    def counted(name: str) -> int:
        with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return sum(int(line.split()[-1]) for line in lines if line.startswith(f'openai_{name}_total{{model="reranker"'))

    before = counted("texts"), counted("tokens")
    rerank(url, query="ab", texts=["abc", "a " * 100])
    assert (counted("texts") - before[0], counted("tokens") - before[1]) == (2, 2 + 3 + 3 + LONGEST)


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


def test_the_model_is_named_if_there_are_several(two_urls: str) -> None:
    fields = {"query": QUERY, "texts": TEXTS[:3]}
    assert rerank(two_urls, **fields, model="first") == rerank(two_urls, **fields, model="second")
    status, answer = rerank(two_urls, **fields)
    assert (status, answer["error"]["message"]) == (400, "model: missing; allowed: first, second")
    status, answer = rerank(two_urls, **fields, model="sentence")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "model 'sentence': takes single texts, not pairs" in answer["error"]["message"]


def test_a_model_of_pairs_has_no_embeddings(url: str) -> None:
    status, _, answer = call(url, "POST", "/v1/embeddings", b'{"model": "reranker", "input": "a"}')
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert "takes pairs of texts; send them to POST /rerank" in answer["error"]["message"]
    assert [model["id"] for model in call(url, "GET", "/v1/models")[2]["data"]] == ["reranker"]

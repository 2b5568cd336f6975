"""What the routes count, and how they write it."""

from __future__ import annotations

import http.client
import json
import subprocess
import urllib.parse
from pathlib import Path

import pytest

from serving.openai.metrics import Metrics
from tests.conftest import run_module
from tests.test_openai import Serving, call, serving
from tests.test_text import MODELS, MOST_TOKENS, folder, ids_of

__all__ = ["folder", "serving"]  # fixtures
SHORT, LONG, REFUSED = (
    f'route="/v1/embeddings",model="{model}",split="{split}"'
    for model, split in (("sentence", "no"), ("sentence", "yes"), ("", "no"))
)


def scrape(serving: Serving) -> dict[str, float]:
    """The value of each series."""
    connection = http.client.HTTPConnection(serving.places["OpenAI"].removeprefix("http://").removesuffix("/v1"))
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = [line for line in answer.read().decode().splitlines() if not line.startswith("#")]
    connection.close()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}


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
    assert {name: added[name] for name in expected} == expected
    assert added[f"openai_request_duration_seconds_sum{{{SHORT}}}"] > 0


def load_test(serving: Serving, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """`deepseek loadtest` with 40 texts in 2 s on the route."""
    (folder / "texts.txt").write_text("a\na text\n" + "a long text " * 100)
    which = ("--model", "sentence", "--models", str(MODELS), "--url", serving.places["gRPC"])
    load = ("--rate", "20", "--duration-s", "2", "--warmup-s", "0", "--arrivals", "constant", "--json")
    return run_module("cli", "loadtest", *which, *load, *flags, DEEPSEEK_BUILD=str(folder / "build"))


def test_a_load_test_calls_the_route(serving: Serving, tmp_path: Path) -> None:
    before = scrape(serving)
    place = urllib.parse.urlsplit(serving.places["OpenAI"]).netloc
    texts = ("--inputs", str(tmp_path / "texts.txt"))
    done = load_test(serving, tmp_path, *texts, "--route", f"{place}/v1/embeddings")
    assert done.returncode in (0, 3), done.stderr  # 3: the machine was too busy to send in time
    assert f"sentence over /v1/embeddings at {place}" in done.stderr
    found = json.loads(done.stdout)
    assert found["answered"] == 40
    assert list(found["lengths"]) == ["tokens 3", "tokens 7", f"tokens {MOST_TOKENS}"]
    answered = 'openai_requests_total{route="/v1/embeddings",status="200"}'
    assert scrape(serving)[answered] - before.get(answered, 0) == 41  # and that of the check before the load
    run = Path(found["run"]) / "run.json"
    assert json.loads(run.read_text())["settings"]["route"] == f"{place}/v1/embeddings"
    verdict = run_module("cli", "verdict", "--model", "sentence", "--models", str(MODELS), "--run", found["run"])
    assert verdict.returncode in (0, 1, 3), verdict.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--route", "/similarity"), "--route /similarity: allowed: /v1/embeddings, /rerank"),
        (("--route", "HERE/rerank"), "give --inputs with pairs of texts, such as pairs.tsv"),
        (("--route", "HERE/v1/embeddings", "--model", "another"), "another"),
        (("--route", "127.0.0.1:9/v1/embeddings"), "127.0.0.1:9"),
    ],
)
def test_a_route_that_cannot_be_called_is_one_line(
    serving: Serving, tmp_path: Path, flags: tuple[str, ...], message: str
) -> None:
    place = urllib.parse.urlsplit(serving.places["OpenAI"]).netloc
    texts = ("--inputs", str(tmp_path / "texts.txt"))
    done = load_test(serving, tmp_path, *texts, *(flag.replace("HERE", place) for flag in flags))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr


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

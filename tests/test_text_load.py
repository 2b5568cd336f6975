"""Load tests with texts and pairs of texts, over KServe v2 and to the OpenAI routes."""

from __future__ import annotations

import json
import subprocess
import urllib.parse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError
from loadtests.load.inputs import count_rows, length_classes, lengths_of
from loadtests.load.replay import sizes_bytes
from loadtests.search.local_server import EMBEDDED, local_server, settings_of_local
from loadtests.search.trial_runner import TrialRunner
from serving.repository.served_models import served_models
from tests.conftest import RunHere
from tests.gateway import skip_without_nginx
from tests.saved_runs import load_settings
from tests.test_gateway_openai import in_front
from tests.test_openai import Serving, scrape
from tests.test_rerank import serving
from tests.test_text import MODELS, MOST_TOKENS
from tests.waiting import wait_for

__all__ = ["serving"]  # a fixture
TEXTS = "\ufeffa\n\na\u2028b\n\n" + "a long text " * 100 + "\r\n"  # a mark of Windows; 3, 4 and, truncated, 48 tokens
PAIRS = "eggs\tmilk\nhow long?\tabout a week\n\n"


@pytest.fixture
def models(built_reranker: Path) -> dict[str, Path]:
    """The folder of each model's folder."""
    return {"sentence": MODELS, "text": MODELS, "reranker": built_reranker / "models"}


@pytest.fixture
def load_test(tmp_path: Path, models: dict[str, Path], run_here: RunHere) -> RunHere:
    """`deepseek loadtest` with 40 requests/s for 1 s; `inputs` is the name of the file with `content`."""

    def run(model: str, inputs: str, content: str, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / inputs).write_bytes(content.encode())
        what = ("--model", model, "--models", str(models[model]), "--inputs", str(tmp_path / inputs))
        load = ("--rate", "40", "--duration-s", "1", "--warmup-s", "0", "--arrivals", "constant", "--json")
        return run_here("loadtest", *what, *load, *flags, DEEPSEEK_BUILD=str(tmp_path / "build"), **environment)

    return run


def check_tokens(found: dict[str, Any], *tokens: int) -> None:
    """Checks that all was answered, and that texts of these numbers of tokens took turns."""
    assert (found["answered"], found["errors"]) == (40, {})
    planned = {length: figures["planned"] for length, figures in found["lengths"].items()}
    assert list(planned) == [f"tokens {count}" for count in tokens]
    assert max(planned.values()) - min(planned.values()) <= 1
    assert found["tokens_per_s"] == sum(count * planned[f"tokens {count}"] for count in tokens)


@pytest.mark.parametrize(
    ("what", "route", "tokens"),
    [
        (("sentence", "texts.txt", TEXTS), "", (3, 4, MOST_TOKENS)),
        (("sentence", "texts.txt", TEXTS), "/v1/embeddings", (3, 4, MOST_TOKENS)),
        (("reranker", "pairs.tsv", PAIRS), "", (11, 21)),
    ],
    ids=["texts", "texts to the route", "pairs"],
)
def test_the_texts_take_turns_and_their_tokens_are_counted(
    serving: Serving,
    models: dict[str, Path],
    load_test: RunHere,
    run_here: RunHere,
    what: tuple[str, str, str],
    route: str,
    tokens: tuple[int, ...],
) -> None:
    before = scrape(serving)
    host = urllib.parse.urlsplit(serving.places["OpenAI"]).netloc
    metrics = ("--metrics-port", str(urllib.parse.urlsplit(serving.places["metrics"]).port))
    done = load_test(*what, "--url", serving.places["gRPC"], *metrics, *(("--route", host + route) if route else ()))
    assert done.returncode in (0, 3), done.stderr  # 3: the machine was too busy to send in time
    found = json.loads(done.stdout)
    check_tokens(found, *tokens)
    ran = found["server"]["statistics"]
    assert ran["text_padded_tokens"] >= ran["text_tokens"] == pytest.approx(found["tokens_per_s"], rel=0.1)
    answered = f'openai_requests_total{{route="{route}",status="200"}}'
    sent = scrape(serving).get(answered, 0) - before.get(answered, 0)
    assert sent == (41 if route else 0)  # and the check before the load
    verdict = run_here("verdict", "--model", what[0], "--models", str(models[what[0]]), "--run", found["run"])
    assert verdict.returncode in (0, 1, 3), verdict.stderr


def test_the_default_prompt_of_a_route_counts_as_tokens() -> None:
    """Also where a replay looks for the nearest length; the nearest size is that of the route's body."""
    spec = DeploymentSpec.of_model("sentence", MODELS)
    assert spec.text is not None
    spec = spec.model_copy(update={"text": spec.text.model_copy(update={"default_prompt": "query"})})
    rows = [{"text": np.array([[text]], object)} for text in ("a", "ab ab: a")]
    assert [length.tokens for length in length_classes(rows, spec)] == [3, 8]
    assert length_classes(rows, spec, on_route=True)[0].tokens == lengths_of(rows, spec, on_route=True)[0] == 8
    settings = load_settings(model="sentence", route="127.0.0.1:9/v1/embeddings")
    assert sizes_bytes(rows[:1], settings) == [len(b'{"model": "sentence", "input": ["a"]}')]


def test_a_capacity_search_calls_the_route_and_the_report_names_it(
    serving: Serving, tmp_path: Path, run_here: RunHere
) -> None:
    (tmp_path / "texts.txt").write_text("ab cd")
    host = urllib.parse.urlsplit(serving.places["OpenAI"]).netloc
    what = ("--model", "sentence", "--models", str(MODELS), "--inputs", str(tmp_path / "texts.txt"))
    where = ("--url", serving.places["gRPC"], "--route", f"{host}/v1/embeddings")
    short = ("--start-rps", "100", "--duration-s", "1", "--warmup-s", "0", "--max-trials", "1")
    environment = {"DEEPSEEK_BUILD": str(tmp_path)}
    before = scrape(serving)
    done = run_here("capacity", *what, *where, *short, "--json", **environment)
    assert done.returncode in (1, 3), done.stderr  # one trial proves no rate
    found = json.loads(done.stdout)
    assert (found["url"], found["protocol"]) == (host, "/v1/embeddings")
    answered = 'openai_requests_total{route="/v1/embeddings",status="200"}'
    assert scrape(serving)[answered] > before.get(answered, 0) + 10
    drawn = run_here("report", *what[:4], "--run", found["trials"][0]["run"], **environment)
    assert drawn.returncode == 0, drawn.stderr
    assert f"/v1/embeddings at {host}" in Path(drawn.stdout.split()[-1]).read_text()


def test_a_server_of_a_search_opens_the_route_and_is_loaded_there(built_sentence: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("ab cd")
    what = ("--model", "sentence", "--models", str(MODELS), "--inputs", str(tmp_path / "texts.txt"), "--warmup-s", "0")
    options = values_of("tune", *what, "--route", "/v1/embeddings")
    spec = DeploymentSpec.of_model("sentence", MODELS)
    with pytest.raises(InputError, match=r"the server's command has no {openai_port}; give one: --server"):
        settings_of_local(options, spec, "serve {repository}")
    settings = settings_of_local(options, spec, EMBEDDED)
    with local_server(EMBEDDED, built_sentence / "repository", tmp_path / "served", settings) as server:
        run = TrialRunner.at(spec, server.settings, tmp_path / "runs", Console(quiet=True)).run(users=1, duration_s=1.0)
    assert (run.settings.over, run.window.failed, run.window.ok > 0) == ("/v1/embeddings", 0, True)


SENTENCE = ("sentence", "texts.txt", "a")


@pytest.mark.parametrize(
    ("what", "route", "message"),
    [
        (("sentence", "texts.txt", "\n \n"), "", "contains no text"),
        (("text", "texts.txt", "a"), "", "has texts, but deploy.toml of text has no [text]"),
        (("reranker", "texts.txt", "a"), "", "but deploy.toml of reranker has pairs = true: give a .tsv file"),
        (
            ("reranker", "pairs.tsv", "a\tb\nc"),
            "",
            "pairs.tsv, line 2: 0 tabs; write two texts with a tab between them",
        ),
        (SENTENCE, "/similarity", "--route /similarity: allowed: /v1/embeddings, /rerank"),
        (SENTENCE, "HOST/rerank", "give --inputs with pairs of texts, such as pairs.tsv"),
        (
            ("reranker", "pairs.tsv", "a\tb\n\tc"),
            "HOST/rerank",
            "has an empty text, which /rerank refuses; remove the pair",
        ),
        (SENTENCE, "127.0.0.1:9/v1/embeddings", "127.0.0.1:9"),
        (SENTENCE, "/v1/embeddings", "does not speak HTTP"),  # at --url: the gRPC port
    ],
)
def test_what_cannot_be_sent_is_one_line(
    serving: Serving, load_test: RunHere, what: tuple[str, str, str], route: str, message: str
) -> None:
    host = urllib.parse.urlsplit(serving.places["OpenAI"]).netloc
    flags = ("--url", serving.places["gRPC"], *(("--route", route.replace("HOST", host)) if route else ()))
    done = load_test(*what, *flags)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert message in done.stderr


def test_a_file_of_texts_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    with pytest.raises(InputError, match="No such file or directory; a file with one text on each line is needed"):
        count_rows(path)
    path.write_bytes(b"a\xff")
    with pytest.raises(InputError, match=r"not UTF-8 \(invalid start byte at byte 1\); save it as UTF-8"):
        count_rows(path)


@pytest.mark.parametrize(("name", "content"), [("texts.jsonl", '{"text": "a"}'), ("texts.TXT", "a\nb"), ("a.npz", "")])
def test_a_file_of_another_kind_is_told_what_texts_go_into(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(
        InputError, match=r"not an \.npz file of inputs \(texts go into a \.txt file, one on each line;"
    ):
        count_rows(path)


def test_the_gateway_takes_the_largest_pairs_and_a_load_test(
    serving: Serving, built_reranker: Path, tmp_path: Path, load_test: RunHere
) -> None:
    skip_without_nginx()
    gateway = in_front(serving, tmp_path, served_models(built_reranker / "repository", built_reranker / "models"))
    try:
        largest = {"query": "q" * 131_072, "texts": ["t" * 131_072] * 32}  # one batch of max_bytes each
        assert gateway.http("POST", "/rerank", body=json.dumps(largest).encode())[0] == 200
        counted = 'gateway_requests_total{protocol="http",api="openai",model="",status="200"}'
        wait_for(lambda: gateway.metrics().get(counted) == 1)
        access = ("--url", f"localhost:{gateway.port}", "--ca-cert", str(gateway.folder / "ca.crt"))
        what = ("reranker", "pairs.tsv", PAIRS, *access, "--route", "/rerank")
        done = load_test(*what, DEEPSEEK_API_KEY=gateway.key)
        assert done.returncode in (0, 3), done.stderr  # 3: the machine was too busy to send in time
        found = json.loads(done.stdout)
        check_tokens(found, 11, 21)
        wait_for(lambda: gateway.metrics().get(counted) == 2 + found["answered"])  # and the check before the load
    finally:
        gateway.stop()

"""OpenAI's routes beside a real Triton, called by the package `openai` as it is."""

from __future__ import annotations

import asyncio
import http.client
import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from deepseek_client import InferenceClient

from serving.openai.routes import BODY_BYTES
from tests.conftest import write_add_one
from tests.gateway import wait_for
from tests.test_embedded import start
from tests.test_text import MOST_TOKENS, folder, ids_of

__all__ = ["folder"]  # a fixture
TEXTS = ["ab " * (1 + 7 * k % 30) + "cd" * (k % 3) for k in range(50)]  # of unequal length, more than six batches


@dataclass
class Serving:
    """A running `deepseek serve`, and the places that it printed."""

    process: subprocess.Popen[str]
    places: dict[str, str]

    @classmethod
    def of(cls, process: subprocess.Popen[str]) -> Serving:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        places: dict[str, str] = {}
        for line in lines:
            if line.startswith("Ctrl-C"):
                return cls(process, places)
            name, _, rest = line.strip().partition(" ")
            places[name] = rest.strip()
        raise AssertionError(process.stderr.read() if process.stderr else "")

    @property
    def routes(self) -> psutil.Process:
        """The process of the routes."""
        below = psutil.Process(self.process.pid).children()
        return next(each for each in below if "serving.openai" in each.cmdline())


@pytest.fixture(scope="module")
def serving(folder: Path) -> Iterator[Serving]:
    """`deepseek serve` with the model `sentence`, on free ports."""
    process = start(folder / "repository", "--openai-port", "0")
    try:
        yield Serving.of(process)
    finally:
        process.terminate()
        process.communicate()


@pytest.fixture
def client(serving: Serving) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=serving.places["OpenAI"], api_key="unused", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected(serving: Serving) -> np.ndarray:
    """The vectors of TEXTS over gRPC, text by text."""
    with InferenceClient(serving.places["gRPC"], timeout_s=60) as direct:
        return np.concatenate([direct.infer("sentence", {"text": [text]})["embedding"] for text in TEXTS])


def call(url: str, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], Any]:
    """A bare request: status, headers, JSON."""
    place = url.removeprefix("http://").removesuffix("/v1")
    connection = http.client.HTTPConnection(place, timeout=60)
    try:
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, dict(answer.headers), json.loads(answer.read())
    finally:
        connection.close()


def test_a_long_list_is_answered_in_order(client: openai.OpenAI, expected: np.ndarray) -> None:
    answer = client.embeddings.create(model="sentence", input=TEXTS)
    assert [each.index for each in answer.data] == list(range(len(TEXTS)))
    np.testing.assert_allclose([each.embedding for each in answer.data], expected, atol=1e-5)
    assert answer.model == "sentence"


def test_the_asynchronous_client_works_unchanged(serving: Serving, expected: np.ndarray) -> None:
    async def embed() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=serving.places["OpenAI"], api_key="unused") as client:
            return await asyncio.gather(*(client.embeddings.create(model="sentence", input=text) for text in TEXTS))

    answers = asyncio.run(embed())
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


def test_a_shorter_vector_is_the_first_numbers_scaled_to_length_1(client: openai.OpenAI, expected: np.ndarray) -> None:
    units = {size: expected[:, :size] / np.linalg.norm(expected[:, :size], axis=1, keepdims=True) for size in (8, 16)}
    for size, wanted in {**units, 32: expected}.items():
        answer = client.embeddings.create(model="sentence", input=TEXTS, dimensions=size)
        np.testing.assert_allclose([each.embedding for each in answer.data], wanted, atol=1e-5)


def test_usage_counts_the_tokens_that_ran(client: openai.OpenAI) -> None:
    usage = client.embeddings.create(model="sentence", input=TEXTS).usage
    counts = [ids_of(text)[1] for text in TEXTS]
    assert max(counts) > MOST_TOKENS
    assert usage.prompt_tokens == usage.total_tokens == sum(min(count, MOST_TOKENS) for count in counts)
    assert usage.model_extra == {"truncated_texts": sum(count > MOST_TOKENS for count in counts)}


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["sentence"]
    assert client.models.retrieve("sentence").object == "model"
    with pytest.raises(openai.NotFoundError, match="model 'another': not served here"):
        client.models.retrieve("another")


NESTED = b'{"model": "sentence", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "the body is not JSON"),
        (b"{", None, "the body is not JSON"),
        (b'"a"', None, 'the body is "a"; allowed: a JSON object'),
        (b'{"model": "sentence", "input": "\xff"}', None, "the body is not UTF-8: invalid start byte at byte 32"),
        (NESTED, None, "the body is not JSON"),
        ({"input": "a"}, "model", "model: missing"),
        ({"model": 1, "input": "a"}, "model", "model: seen 1"),
        ({"model": "a" * 256, "input": "a"}, "model", "model: seen \"aaa"),
        ({"model": "\ud800", "input": "a"}, "model", "model: seen"),
        ({"model": "sentence"}, "input", "input: missing; allowed: a string or a list of strings"),
        ({"model": "sentence", "input": None}, "input", "input: seen null"),
        ({"model": "sentence", "input": []}, "input", "input: a list of 0; allowed: 1 to 2048 texts"),
        ({"model": "sentence", "input": ["a"] * 2049}, "input", "input: a list of 2049; allowed: 1 to 2048 texts"),
        ({"model": "sentence", "input": ""}, "input", "input: an empty string; leave it out"),
        ({"model": "sentence", "input": ["a", ""]}, "input", "input[1]: an empty string"),
        ({"model": "sentence", "input": ["a", None]}, "input", "input[1]: seen null; allowed: a string"),
        ({"model": "sentence", "input": [["a"]]}, "input", "input[0]: seen an array; allowed: a string"),
        ({"model": "sentence", "input": [1, 2]}, "input", "input[0]: token ids; send strings"),
        ({"model": "sentence", "input": [[1, 2]]}, "input", "(LangChain: check_embedding_ctx_length=False)"),
        ({"model": "sentence", "input": "\ud800"}, "input", "input: half of a surrogate pair"),
        ({"model": "sentence", "input": ["a", "b" * 110_001]}, "input", "input[1]: 110001 bytes; allowed: up to 110000"),
        ({"model": "sentence", "input": "a", "encoding_format": "int8"}, "encoding_format", 'seen "int8"; allowed: float or base64'),
        ({"model": "sentence", "input": "a", "encoding_format": []}, "encoding_format", "seen an array"),
        ({"model": "sentence", "input": "a", "dimensions": 31}, "dimensions", "seen 31; allowed for sentence: 8, 16, 32"),
        ({"model": "sentence", "input": "a", "dimensions": True}, "dimensions", "seen true; allowed: a whole number"),
        ({"model": "sentence", "input": "a", "prompt_name": "x"}, "prompt_name", 'seen "x"; prompts of sentence: none, query'),
        ({"model": "sentence", "input": "a", "prompt_name": 1}, "prompt_name", "seen 1; allowed: the name of a prompt"),
        ({"model": "sentence", "input": "a", "user": 1}, "user", "seen 1; allowed: a string"),
        ({"model": "sentence", "inputs": "a", "input": "a"}, None, '"inputs": no such field; allowed: input, model'),
    ],
)  # fmt: skip
def test_a_bad_request_is_one_400(serving: Serving, body: Any, param: str | None, message: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    status, _, answer = call(serving.places["OpenAI"], "POST", "/v1/embeddings", data)
    assert (status, answer["error"].keys()) == (400, {"message", "type", "param", "code"})
    assert [answer["error"][key] for key in ("type", "param", "code")] == ["invalid_request_error", param, None]
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("POST", "/v1/embeddings", b'{"model": "another", "input": "a"}', 404, "model_not_found"),
        ("POST", "/v1/embeddings", b'{"model": "../sentence", "input": "a"}', 404, "model_not_found"),
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


BLOCKED = """
import json, os, time
import numpy as np
import triton_python_backend_utils as pb_utils
from numpy1_stub import fix_strings


class TritonPythonModel:
    def initialize(self, args):
        fix_strings(pb_utils)
        self.go = json.loads(args["model_config"])["parameters"]["go"]["string_value"]

    def execute(self, requests):
        open(self.go + ".asked", "w").close()
        while not os.path.exists(self.go):
            time.sleep(0.01)
        time.sleep(0.5 * os.path.exists(self.go + ".slow"))
        arrays = {"vector": np.ones((1, 3), np.float32), "tokens": np.ones((1, 1), np.int32)}
        answer = [pb_utils.Tensor.from_dlpack(name, array) for name, array in arrays.items()]
        return [pb_utils.InferenceResponse(answer) for _ in requests]
"""
BLOCKED_CONFIG = """
name: "blocked"
backend: "python"
max_batch_size: 1
input { name: "text" data_type: TYPE_STRING dims: [1] }
output { name: "vector" data_type: TYPE_FP32 dims: [3] }
output { name: "tokens" data_type: TYPE_INT32 dims: [1] }
instance_group { kind: KIND_CPU count: 1 }
dynamic_batching { default_queue_policy { max_queue_size: 1 } }
parameters { key: "text" value { string_value: '{"max_tokens": 8, "max_bytes": 100}' } }
parameters { key: "go" value { string_value: "GO" } }
"""


@pytest.fixture
def blocked(tmp_path: Path) -> Iterator[tuple[Serving, Path]]:
    """A server whose model `blocked` answers when a file exists, with a queue of one; and the file."""
    repository, go = tmp_path / "repository", tmp_path / "go"
    (repository / "blocked" / "1").mkdir(parents=True)
    (repository / "blocked" / "1" / "model.py").write_text(BLOCKED)
    shutil.copy("serving/backend/numpy1_stub.py", repository / "blocked" / "1")
    (repository / "blocked" / "config.pbtxt").write_text(BLOCKED_CONFIG.replace("GO", str(go)))
    write_add_one(repository)
    process = start(repository, "--openai-port", "0")
    try:
        yield Serving.of(process), go
    finally:
        go.touch()
        process.terminate()
        process.communicate()


ASK = ("POST", "/v1/embeddings", b'{"model": "blocked", "input": "a"}')


def test_a_full_queue_is_429_with_retry_after(blocked: tuple[Serving, Path]) -> None:
    serving, go = blocked
    url = serving.places["OpenAI"]
    with ThreadPoolExecutor(8) as pool:
        calls = [pool.submit(call, url, *ASK) for _ in range(8)]
        wait_for(lambda: sum(each.done() for each in calls) >= 5)  # refused, while one runs and one or two wait
        refused = [each.result() for each in calls if each.done()]
        go.touch()
        statuses = sorted(each.result()[0] for each in calls)
    assert {(status, headers["Retry-After"]) for status, headers, _ in refused} == {(429, "1")}
    assert refused[0][2]["error"]["code"] == "rate_limit_exceeded"
    assert statuses.count(200) >= 1  # the one that ran; on a busy machine all others may come before it starts
    assert set(statuses) == {200, 429}


def test_a_model_that_takes_ids_only_is_not_listed(blocked: tuple[Serving, Path]) -> None:
    url = blocked[0].places["OpenAI"]
    assert [model["id"] for model in call(url, "GET", "/v1/models")[2]["data"]] == ["blocked"]
    status, _, answer = call(url, "POST", "/v1/embeddings", b'{"model": "add_one", "input": "a"}')
    assert (status, answer["error"]["code"]) == (404, "model_not_found")

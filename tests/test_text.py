"""A model that takes texts, on a real Triton: a text gives what its ids give, and a bad request is one 400."""

from __future__ import annotations

import json
import re
import shutil
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from deepseek_client import InferenceClient, InferenceError, InvalidInput
from tokenizers import Tokenizer
from tritonclient.grpc import service_pb2, service_pb2_grpc

from deepseek.spec import DeploymentSpec, InputError
from deepseek.spec.text import TextSpec
from export.checks.parity import compare_served, endpoints_of
from export.checks.parity_cases import EndpointComparison
from export.checks.parity_strings import AT, compare_texts, texts_for
from export.model_folder import ModelFolder
from export.stages.publish import publish_version
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.launcher import EmbeddedServer
from serving.repository.served_models import served_models
from serving.stack.gateway_limits import limits
from tests.conftest import Refused, RunHere, serves
from tests.test_onnxruntime_backend import counter, statistics
from tests.waiting import wait_for

MODELS = Path("tests/models")
MOST_TOKENS = 48
TEXTS = {
    "short": "Hello, World",
    "empty": "",
    "blanks": " \t\n ",
    "other scripts": "Der Zug fährt. 列车驶过大桥 القطار",
    "emoji": "good \U0001f600 and \U0001f469\u200d\U0001f680",
    "control characters": "a\x00b\x07\x1b c",
    "combining": "e\u0301 and \u00e9",
    "100 kB": "a long text " * 8500,
    "one long word": "x" * 100_000,
}
server = serves("built_sentence")


def ids_of(text: str) -> tuple[dict[str, np.ndarray], int]:
    """The inputs that the tokenizer itself gives for a text, and the number of tokens before truncation."""
    tokenizer = Tokenizer.from_file(str(MODELS / "sentence" / "tokenizer.json"))
    tokenizer.no_padding()
    whole = len(tokenizer.encode(text))
    tokenizer.enable_truncation(MOST_TOKENS)
    row = np.array([tokenizer.encode(text).ids])
    return {"ids": row, "attention_mask": np.ones_like(row), "token_type_ids": np.zeros_like(row)}, whole


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float((first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_gives_what_its_ids_give(client: InferenceClient, text: str) -> None:
    ids, whole = ids_of(text)
    expected, found = client.infer("sentence", ids), client.infer("sentence", {"text": [text]})
    assert cosine(found["embedding"], expected["embedding"]) >= 0.9999
    np.testing.assert_allclose(found["score"], expected["score"], rtol=1e-4, atol=1e-4)
    assert found["tokens"].tolist() == [[whole]]
    assert expected["tokens"].tolist() == [[min(whole, MOST_TOKENS)]]


@pytest.mark.parametrize(
    "texts",
    [["a", "b"], ("a", "b"), [b"a", b"b"], np.array(["a", "b"]), np.array([["a"], ["b"]], object), [["a"], ["b"]]],
    ids=["list", "tuple", "bytes", "array", "column", "lists"],
)
def test_texts_may_be_a_list_an_array_or_a_column(client: InferenceClient, texts: Any) -> None:
    found = client.infer("sentence", {"text": texts})
    np.testing.assert_array_equal(found["embedding"], client.infer("sentence", {"text": ["a", "b"]})["embedding"])


def test_texts_of_any_length_run_as_one_batch(server: EmbeddedServer) -> None:
    before = statistics(server, "sentence")
    with InferenceClient(server.grpc_url, timeout_s=60) as client, ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda k: client.infer("sentence", {"text": ["ab " * (k % 16)]}), range(160)))
    wait_for(lambda: statistics(server, "sentence")["inference_count"] >= before["inference_count"] + 160)
    assert statistics(server, "sentence")["execution_count"] - before["execution_count"] < 160
    assert [answer["tokens"][0, 0] for answer in answers] == [2 + 2 * (place % 16) for place in range(160)]


def test_a_prompt_begins_the_texts_of_a_request(client: InferenceClient) -> None:
    texts, named = {"text": ["cd", "a text"]}, {"prompt_name": "query"}
    found = client.infer("sentence", texts, parameters=named)
    expected = client.infer("sentence", {"text": ["ab ab: cd", "ab ab: a text"]})
    np.testing.assert_allclose(found["embedding"], expected["embedding"], atol=1e-5)
    assert found["tokens"].tolist() == expected["tokens"].tolist() != client.infer("sentence", texts)["tokens"].tolist()
    for parameters, message in (
        ({"prompt_name": "passage"}, "prompt_name: seen 'passage'; prompts are none, query"),
        ({"prompt_name": 1}, "prompt_name: seen 1; prompts are none, query"),
    ):
        with pytest.raises(InvalidInput, match=message):
            client.infer("sentence", texts, parameters=parameters)
    with pytest.raises(InvalidInput, match="text has 110007 bytes with the prompt; allowed: up to 110000"):
        client.infer("sentence", {"text": ["b" * 110_000]}, parameters=named)


IDS = np.ones((1, 3), np.int64)
ALL_IDS = {"ids": IDS, "attention_mask": IDS, "token_type_ids": IDS}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": [b"ab\xff"]}, "text is not UTF-8: invalid start byte at byte 2"),
        ({"text": ["a", "b" * 110_001]}, "text 1 has 110001 bytes; allowed: up to 110000"),
        ({"text": "a"}, "a str; pass a list of texts, or a numpy array"),
        ({"text": ["a"], **ALL_IDS}, "seen text with ids with attention_mask with token_type_ids; allowed: text alone"),
        ({"ids": IDS}, "input attention_mask is missing; allowed: text alone, or ids with attention_mask"),
        ({}, "no input; it takes ids"),
    ],
    ids=["not UTF-8", "too long", "not a list", "both", "no mask", "nothing"],
)
def test_a_bad_request_is_one_line(client: InferenceClient, inputs: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(message)):
        client.infer("sentence", inputs)


@pytest.mark.parametrize(
    ("shape", "data", "reason"),
    [
        ([9, 1], ["a"] * 9, "batch-size must be <= 8"),
        ([0, 1], [], "expected 1 string elements"),
        ([1, 2], ["a", "b"], "unexpected shape for input 'text'"),
    ],
)
def test_a_bad_request_of_any_client_is_a_400(server: EmbeddedServer, shape: Any, data: Any, reason: str) -> None:
    body = {"inputs": [{"name": "text", "datatype": "BYTES", "shape": shape, "data": data}]}
    status, error = ask(server, json.dumps(body).encode())
    assert (status, reason in error) == (400, True)


def ask(server: EmbeddedServer, body: bytes) -> tuple[int, str]:
    """Status and error of a request in JSON."""
    url = f"http://{server.http_url}/v2/models/sentence/infer"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=body)) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())["error"]


def test_a_bad_text_fails_alone(server: EmbeddedServer) -> None:
    with InferenceClient(server.grpc_url, timeout_s=60) as client, ThreadPoolExecutor(16) as pool:

        def call(text: str | bytes) -> str:
            try:
                return str(client.infer("sentence", {"text": [text]})["embedding"].shape)
            except InferenceError as error:
                return type(error).__name__

        answers = list(pool.map(call, ["a text", b"\xff"] * 40))
    assert answers == ["(1, 32)", "InvalidInput"] * 40
    labels = '{model="sentence",reason="INTERNAL",version="1"}'  # callers' mistakes are not counted
    assert counter(server, f"onnxruntime_inference_request_failure{labels}") == 0


def test_a_request_that_triton_should_refuse_fails_alone(server: EmbeddedServer) -> None:
    """Triton does not check the bytes of a parameter. Over gRPC, it lets a batch of 0 pass that has the data of 1.

    Its Python backend drops an input without rows and columns, which would get no answer.
    """
    good = b'{"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1, 1], "data": ["ab"]}]'

    bodies = [good + b', "parameters": {"prompt_name": "\xff"}}', good + b"}", good + b"}"] * 40
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(partial(ask, server), bodies))
    refused = (400, "the parameters of the request are not UTF-8: invalid start byte")
    assert answers == [refused, (200, ""), (200, "")] * 40
    for inputs in ({"text": b"\1\0\0\0a"}, *({name: bytes(size) for name in ALL_IDS} for size in (24, 0))):
        assert without_rows(server, "sentence", inputs) == "the batch has no rows; send one at least"


def without_rows(server: EmbeddedServer, model: str, inputs: dict[str, bytes]) -> str:
    """Why a batch of 0 rows with the data of one is refused."""
    request = service_pb2.ModelInferRequest(model_name=model, raw_input_contents=inputs.values())
    for name, data in inputs.items():
        kind, width = ("INT64", len(data) // 8) if len(data) % 8 == 0 else ("BYTES", 1)
        request.inputs.add(name=name, datatype=kind, shape=[0, width])
    with grpc.insecure_channel(server.grpc_url) as channel, pytest.raises(grpc.RpcError) as refused:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=60)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return str(refused.value.details())


def test_tokens_are_counted_with_and_without_padding(server: EmbeddedServer) -> None:
    names = [f'onnxruntime_text_{name}{{model="sentence",version="1"}}' for name in ("tokens", "padded_tokens")]
    before = [counter(server, name) for name in names]
    with InferenceClient(server.grpc_url) as client:
        client.infer("sentence", {"text": ["abc", "a", "a " * 100]})  # 5, 3 and 102 tokens: 48 run, and 2 rows of 5
    wait_for(lambda: [counter(server, name) - old for name, old in zip(names, before, strict=True)] == [56, 58])


def test_the_command_sends_a_text(server: EmbeddedServer, run_here: RunHere, refused: Refused) -> None:
    place = ("infer", "--model", "sentence", "--models", str(MODELS), "--url", server.grpc_url)
    for words, tokens in (
        (("--text", "-- a text"), 9),
        (("--text", "a text", "--prompt-name", "query"), 12),  # five from "ab ab: "
        (("--text", ""), 2),
    ):
        run = run_here(*place, *words, "--json")
        assert (run.returncode, json.loads(run.stdout)["outputs"]["tokens"]) == (0, [[tokens]]), run.stderr
    assert "A text, as typed" in run_here(*place, "--text", "A text, as typed").stdout
    for words, said in (
        (("--prompt-name", "query"), "--prompt-name: seen without --text"),
        (("--text", "a", "--pair", "b"), "--text: sentence takes single texts: leave --pair out"),
        (("--text", "a", "--inputs", "x.json"), "--text and --inputs: seen both; give one of them"),
        (("--text", "a", "--row", "3"), "--row: seen with --text; it picks a sample of the inputs"),
    ):
        assert refused(*place, *words).startswith(f"error: {said}")


def test_parity_compares_texts_with_their_ids(
    server: EmbeddedServer, built_sentence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(built_sentence / "build"))
    source = ModelFolder("sentence", MODELS)
    result = compare_served(source, server.grpc_url, server.http_url, most_rows=2)
    assert result["failures"] == []
    assert len([check for check in result["checks"] if check["at"] == AT]) == 4  # two outputs over two protocols


@pytest.mark.parametrize("pairs", [False, True])
def test_parity_sends_no_text_above_max_bytes(pairs: bool) -> None:
    sent = texts_for(TextSpec(max_bytes=17, pairs=pairs))
    sizes = [len(text.encode()) for each in sent for text in ((each,) if isinstance(each, str) else each)]
    assert (len(sent), max(sizes)) == (8, 17)


def test_parity_finds_a_server_with_another_tokenizer(server: EmbeddedServer, tmp_path: Path) -> None:
    shutil.copytree(MODELS / "sentence", tmp_path / "sentence")
    file = tmp_path / "sentence" / "tokenizer.json"
    file.write_text(file.read_text().replace('"a": 5', '"a": 6').replace('"b": 6', '"b": 5'))
    spec = DeploymentSpec.of_model("sentence", tmp_path)
    with endpoints_of(spec, server.http_url, server.grpc_url, 60) as endpoints:
        judge = EndpointComparison(spec, "http", endpoints[0])
        compare_texts(spec, [judge])
    assert not judge.checks[0].holds


HERE = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",), tokenizers=True)


def test_the_doctor_finds_what_texts_need(built_sentence: Path, tmp_path: Path) -> None:
    assert [str(each) for each in examine(built_sentence / "repository", HERE)[1] if each.level == "mismatch"] == []
    (finding,) = examine(built_sentence / "repository", replace(HERE, tokenizers=False))[1]
    assert "takes texts, but the package tokenizers is not installed here" in str(finding)
    copied = Path(shutil.copytree(built_sentence / "repository", tmp_path / "repository"))
    (copied / "sentence" / "1" / "tokenizer.json").write_text("{}")
    (finding, *_) = examine(copied, HERE)[1]
    assert "tokenizer.json" in str(finding)


def test_the_gateway_lets_the_largest_texts_pass(built_sentence: Path) -> None:
    (model,) = served_models(built_sentence / "repository", MODELS)
    assert model.text_bytes == 8 * (110_000 + 4)
    assert f"# sentence: {model.text_bytes} bytes of texts + 65536 bytes\nclient_max_body_size 945568;" in limits(
        [model]
    )


def test_a_tokenizer_that_cannot_be_read_is_one_line_before_anything_is_published(
    built_sentence: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPSEEK_BUILD", str(built_sentence / "build"))
    shutil.copytree(MODELS / "sentence", tmp_path / "sentence")
    file = tmp_path / "sentence" / "tokenizer.json"
    known = json.loads(file.read_text())
    known["model"]["unk_token"] = "[NONE]"
    for content, said in (
        ("{}", f"text.tokenizer: {file}: not a tokenizer that fits [text]: "),
        (json.dumps(known), "Missing [UNK] token"),
        (None, f"text.tokenizer: no file {file}"),
    ):
        file.unlink() if content is None else file.write_text(content)
        with pytest.raises(InputError, match=re.escape(said)):
            publish_version(
                DeploymentSpec.of_model("sentence", tmp_path), "fp32", "onnxruntime", tmp_path / "repository"
            )
    assert not (tmp_path / "repository" / "sentence").exists()

"""The OpenAPI document agrees with what the routes take and answer."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from serving.openai.errors import ApiError
from serving.openai.openapi import document
from serving.openai.request_body import RequestBody
from serving.openai.requests import EmbeddingRequest, RerankRequest, SimilarityRequest
from serving.openai.routes import Routes

DOCUMENT = document(Routes(None, None, None)._routes)  # type: ignore[arg-type]


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({**DOCUMENT, "$ref": f"#/components/schemas/{name}"})


def test_every_schema_is_valid_and_every_reference_resolves() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    named = {place.split('"')[0] for place in json.dumps(DOCUMENT).split('"#/components/schemas/')[1:]}
    assert named <= schemas.keys()
    assert {"EmbeddingRequest", "SimilarityRequest", "ErrorAnswer"} <= named


NESTED = b'{"model": "m", "input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
PAIR = {"source_sentence": "a", "sentences": ["b"]}
E, S, R = EmbeddingRequest, SimilarityRequest, RerankRequest


@pytest.mark.parametrize(
    ("kind", "body", "param", "message"),
    [
        (E, b"{", None, "the body is not JSON"),
        (E, NESTED, None, "the body has too many nested arrays or objects"),
        (E, b'{"dimensions": ' + b"9" * 5000 + b"}", None, "the body has a number with too many digits"),
        (E, b'{"model": "m", "input": "\xff"}', None, "the body is not UTF-8: invalid start byte at byte 25"),
        (E, b'"a"', None, 'the body is "a"; allowed: a JSON object'),
        (E, b'{"model": "\\ud800", "input": "a"}', "model", "model: seen"),
        (E, b'{"model": "m", "input": "a", "\\ud800": 1}', None, '"\\ud800": no such field; allowed: input'),
        (S, b'{"inputs": {"\\ud800": 1}}', None, '"\\ud800": no such field; allowed: source_sentence, sentences'),
        (E, b'{"model": "m", "input": "\\ud800"}', "input", "input: half of a surrogate pair"),
        (E, {"input": "a"}, "model", "model: missing"),
        (E, {"model": 1, "input": "a"}, "model", "model: seen 1; allowed: the name of a model"),
        (E, {"model": "", "input": "a"}, "model", 'model: seen ""'),
        (E, {"model": "m" * 256, "input": "a"}, "model", 'model: seen "mmm'),
        (E, {"model": "m"}, "input", "input: missing; allowed: a string or a list of strings"),
        (E, {"model": "m", "input": None}, "input", "input: seen null"),
        (E, {"model": "m", "input": []}, "input", "input: a list of 0; allowed: 1 to 2048 texts"),
        (E, {"model": "m", "input": ["a"] * 2049}, "input", "input: a list of 2049; allowed: 1 to 2048 texts"),
        (E, {"model": "m", "input": ""}, "input", "input: an empty string; allowed: at least one character"),
        (E, {"model": "m", "input": ["a", ""]}, "input", "input[1]: an empty string"),
        (E, {"model": "m", "input": ["a", None]}, "input", "input[1]: seen null; allowed: a string"),
        (E, {"model": "m", "input": [1, 2]}, "input", "input[0]: token ids; send strings"),
        (E, {"model": "m", "input": [[1, 2]]}, "input", "(LangChain: check_embedding_ctx_length=False)"),
        (E, {"model": "m", "input": "a", "encoding_format": "int8"}, "encoding_format", 'seen "int8"; allowed: float or base64'),
        (E, {"model": "m", "input": "a", "encoding_format": []}, "encoding_format", "seen an array"),
        (E, {"model": "m", "input": "a", "dimensions": 0}, "dimensions", "seen 0; allowed: a whole number"),
        (E, {"model": "m", "input": "a", "dimensions": True}, "dimensions", "seen true"),
        (E, {"model": "m", "input": "a", "prompt_name": 1}, "prompt_name", "seen 1; allowed: the name of a prompt"),
        (E, {"model": "m", "input": "a", "user": 1}, "user", "seen 1; allowed: a string"),
        (E, {"model": "m", "input": "a", "inputs": "a"}, None, '"inputs": no such field; allowed: input, model'),
        (S, {}, "inputs", "inputs: missing; allowed: an object with source_sentence and sentences"),
        (S, {"inputs": {"sentences": ["a"]}}, "inputs.source_sentence", "inputs.source_sentence: missing; allowed: a string"),
        (S, {"inputs": {**PAIR, "sentences": "b"}}, "inputs.sentences", 'inputs.sentences: seen "b"; allowed: a list'),
        (S, {"inputs": {**PAIR, "sentences": ["b", ""]}}, "inputs.sentences", "inputs.sentences[1]: an empty string"),
        (S, {"inputs": {**PAIR, "x": 1}}, None, '"x": no such field; allowed: source_sentence, sentences'),
        (S, {"inputs": PAIR, "parameters": {"prompt_name": 1}}, "parameters.prompt_name", "parameters.prompt_name: seen 1"),
        (S, {"inputs": PAIR, "parameters": {"truncate": 1}}, "parameters.truncate", "parameters.truncate: seen 1; allowed: true or false"),
        (S, {"inputs": PAIR, "parameters": {"truncation_direction": "left"}}, "parameters.truncation_direction", "allowed: right"),
        (S, {"inputs": PAIR, "parameters": {"x": 1}}, None, '"x": no such field; allowed: prompt_name, truncate'),
        (S, {"inputs": PAIR, "parameters": 1}, "parameters", "parameters: seen 1; allowed: an object"),
        (R, {"texts": ["a"]}, "query", "query: missing; allowed: a string"),
        (R, {"query": ["a"], "texts": ["a"]}, "query", "query: seen an array; allowed: a string"),
        (R, {"query": "a", "texts": [1]}, "texts", "texts[0]: seen 1; allowed: a string"),
        (R, {"query": "a", "texts": "a"}, "texts", 'texts: seen "a"; allowed: a list of strings'),
        (R, {"query": "a", "texts": ["a", 1.5]}, "texts", "texts[1]: seen 1.5; allowed: a string"),
        (R, {"query": "a", "texts": ["a"], "raw_scores": 1}, "raw_scores", "raw_scores: seen 1; allowed: true or false"),
        (R, {"query": "a", "texts": ["a"], "truncation_direction": "left"}, "truncation_direction", 'seen "left"'),
        (R, {"query": "a", "texts": ["a"], "model": 1}, "model", "model: seen 1"),
        (R, {"query": "a", "documents": ["a"]}, None, '"documents": no such field; allowed: query, texts, model'),
    ],
)  # fmt: skip
def test_a_body_that_is_refused_is_invalid_in_the_document_too(
    kind: type[RequestBody], body: Any, param: str | None, message: str
) -> None:
    with pytest.raises(ApiError) as error:
        kind.read(body if isinstance(body, bytes) else json.dumps(body).encode())
    answer = error.value.body()
    validator("ErrorAnswer").validate(answer)
    assert (error.value.status, answer["error"]["param"]) == (400, param)
    assert message in answer["error"]["message"]
    assert "\n" not in answer["error"]["message"]
    assert isinstance(body, bytes) or not validator(kind.__name__).is_valid(body)


def test_of_many_unknown_fields_only_the_first_is_reported() -> None:
    """To name all fields of a body of 8 MiB would take seconds and most of a GB."""
    for fields in ({"a": 1, "b": 2}, {"inputs": PAIR, "parameters": {"a": 1, "b": 2}}):
        with pytest.raises(ValidationError) as error:
            SimilarityRequest.model_validate(fields)
        assert error.value.error_count() == 1


@pytest.mark.parametrize("value", ["[]", "{}", '""', '"a"', "1", '{"a":1}', '"\\\\"', '"\\""'])
def test_a_body_of_very_many_values_is_refused_before_the_parser_needs_many_times_its_size(value: str) -> None:
    body = f'{{"model": "m", "input": [{",".join([value] * 600_000)}]}}'.encode()
    tracemalloc.start()
    try:
        with pytest.raises(ApiError, match="too many JSON values; allowed: up to 2048 texts"):
            E.read(body)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(body) + 10**6
    finally:
        tracemalloc.stop()


def test_punctuation_inside_texts_is_no_value() -> None:
    text = '[,{ "\\' * 100_000
    assert E.read(json.dumps({"model": "m", "input": [text, text]}).encode()).input == [text, text]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (E, {"model": "m", "input": "a"}),
        (E, {"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8, "user": "u", "prompt_name": "p"}),
        (E, {"model": "m", "input": "a", "encoding_format": None, "dimensions": None, "user": None, "prompt_name": None}),
        (S, {"inputs": PAIR}),
        (S, {"inputs": PAIR, "model": "m", "parameters": {"prompt_name": "p", "truncate": False, "truncation_direction": "right"}}),
        (R, {"query": "a", "texts": ["b"]}),
        (R, {"query": "a", "texts": ["b"], "model": None, "raw_scores": True, "return_text": False, "truncate": None}),
    ],
)  # fmt: skip
def test_a_body_that_is_taken_is_valid_in_the_document_too(kind: type[RequestBody], body: dict[str, Any]) -> None:
    kind.read(json.dumps(body).encode())
    validator(kind.__name__).validate(body)


def test_names_of_choices_differ_by_more_than_case() -> None:
    """Generators of clients make one constant of `right` and `Right`, and fail."""
    choices = [each["enum"] for each in _objects(DOCUMENT) if "enum" in each]
    assert choices
    assert all(len({each.lower() for each in names}) == len(names) for names in choices)
    assert R.read(b'{"query": "a", "texts": ["b"], "truncation_direction": "Right"}').truncation_direction == "right"


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(each)


def test_a_byte_order_mark_is_ignored() -> None:
    assert E.read(b'\xef\xbb\xbf{"model": "m", "input": "a"}').input == "a"

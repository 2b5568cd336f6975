"""The OpenAPI document agrees with what the routes take and answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from serving.openai.errors import ApiError
from serving.openai.openapi import document
from serving.openai.request_body import RequestBody
from serving.openai.requests import EmbeddingRequest, RerankRequest, SimilarityRequest
from serving.openai.routes import Routes
from tests.test_openai import Serving, call, serving
from tests.test_text import folder

__all__ = ["folder", "serving"]  # fixtures
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


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ({"model": "m", "input": "a"}, True),
        ({"model": "m", "input": ["a", "b"], "encoding_format": "base64", "dimensions": 8, "user": "u", "prompt_name": "p"}, True),
        ({"model": "m", "input": "a", "encoding_format": None, "dimensions": None, "user": None, "prompt_name": None}, True),
        ({"model": "m"}, False),
        ({"input": "a"}, False),
        ({"model": "", "input": "a"}, False),
        ({"model": "m" * 256, "input": "a"}, False),
        ({"model": "m", "input": ""}, False),
        ({"model": "m", "input": []}, False),
        ({"model": "m", "input": ["a", ""]}, False),
        ({"model": "m", "input": ["a"] * 2049}, False),
        ({"model": "m", "input": [1]}, False),
        ({"model": "m", "input": "a", "encoding_format": "int8"}, False),
        ({"model": "m", "input": "a", "dimensions": 0}, False),
        ({"model": "m", "input": "a", "user": 1}, False),
        ({"model": "m", "input": "a", "inputs": "a"}, False),
        ({"query": "a", "texts": ["b"]}, True),
        ({"query": "a", "texts": ["b"], "model": None, "raw_scores": True, "return_text": False, "truncate": None}, True),
        ({"query": "a", "texts": "b"}, False),
        ({"query": "a", "texts": ["b"], "raw_scores": 1}, False),
        ({"inputs": {"source_sentence": "a", "sentences": ["b"]}}, True),
        ({"inputs": {"source_sentence": "a", "sentences": ["b"]}, "model": "m", "parameters": {"prompt_name": "p"}}, True),
        ({"inputs": {"source_sentence": "a", "sentences": []}}, False),
        ({"inputs": {"source_sentence": "a"}}, False),
        ({"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"x": 1}}, False),
    ],
)  # fmt: skip
def test_a_body_is_valid_if_and_only_if_it_is_taken(body: dict[str, Any], allowed: bool) -> None:
    kinds: dict[str, type[RequestBody]] = {"query": RerankRequest, "source_sentence": SimilarityRequest}
    kind = next((kind for name, kind in kinds.items() if f'"{name}"' in json.dumps(body)), EmbeddingRequest)
    assert validator(kind.__name__).is_valid(body) == allowed
    try:
        kind.read(json.dumps(body).encode())
    except ApiError as error:
        assert not allowed
        validator("ErrorAnswer").validate(error.body())
    else:
        assert allowed


def test_what_is_answered_is_valid(serving: Serving) -> None:
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

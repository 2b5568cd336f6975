"""Reads and checks the body of `POST /v1/embeddings`.

Contract: `read_request` raises `ApiError` 400 with one line that names the field, the value seen and what is allowed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from serving.openai.errors import ApiError

MOST_TEXTS = 2048  # as OpenAI
FIELDS = ("input", "model", "encoding_format", "dimensions", "user")
FORMATS = ("float", "base64")
LONGEST_NAME = 255  # of a model's folder
SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, kw_only=True)
class EmbeddingRequest:
    """What the caller wants."""

    model: str
    texts: list[str]
    as_base64: bool
    dimensions: int | None
    """Numbers in a vector; None: the model's."""


def read_request(body: bytes) -> EmbeddingRequest:
    """The request in a body."""
    fields = _fields(body)
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ApiError(400, f"{_shown(unknown[0])}: no such field; allowed: {', '.join(FIELDS)}")
    model = fields.get("model")
    if not isinstance(model, str) or not 1 <= len(model) <= LONGEST_NAME or not _is_unicode(model):
        raise _wrong("model", fields, "the name of a model; GET /v1/models lists them")
    encoding = fields.get("encoding_format")
    if encoding not in (None, *FORMATS):
        raise _wrong("encoding_format", fields, " or ".join(FORMATS))
    dimensions = fields.get("dimensions")
    if dimensions is not None and (type(dimensions) is not int or dimensions < 1):
        raise _wrong("dimensions", fields, "a whole number from 1 on")
    if not isinstance(fields.get("user"), str | None):
        raise _wrong("user", fields, "a string")
    return EmbeddingRequest(model=model, texts=_texts(fields), as_base64=encoding == "base64", dimensions=dimensions)


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body.decode())
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, f"the body is {_shown(fields)}; allowed: a JSON object with {', '.join(FIELDS)}")
    return fields


def _texts(fields: dict[str, Any]) -> list[str]:
    given = fields.get("input")
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list):
        raise _wrong("input", fields, "a string or a list of strings")
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise ApiError(400, f"input: a list of {len(texts)}; allowed: 1 to {MOST_TEXTS} texts", param="input")
    for place, text in enumerate(texts):
        where = "input" if given is text else f"input[{place}]"
        if type(text) is int or (isinstance(text, list) and text and type(text[0]) is int):
            advice = "this server takes strings (LangChain: check_embedding_ctx_length=False)"
            raise ApiError(400, f"{where}: token ids; {advice}", param="input")
        if not isinstance(text, str):
            raise ApiError(400, f"{where}: seen {_shown(text)}; allowed: a string", param="input")
        if not text:
            raise ApiError(400, f"{where}: an empty string; leave it out", param="input")
        if not _is_unicode(text):
            reason = "half of a surrogate pair (\\ud800 to \\udfff); send valid Unicode"
            raise ApiError(400, f"{where}: {reason}", param="input")
    return texts


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong(name: str, fields: dict[str, Any], allowed: str) -> ApiError:
    seen = f"seen {_shown(fields[name])}" if name in fields else "missing"
    return ApiError(400, f"{name}: {seen}; allowed: {allowed}", param=name)


def _shown(value: Any) -> str:
    """A value of a request, short."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

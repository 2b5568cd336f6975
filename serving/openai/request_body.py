"""Reads the JSON body of a request. A class declares its fields once, for the check and for the OpenAPI document.

Contract: `read` raises `ApiError` 400 with one line that names the field, the value seen and what is allowed.

Example:
    class Ask(RequestBody):
        model: ModelName
        input: Texts
        user: Annotated[str | None, Allowed("a string")] = None
"""

import json
import re
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from serving.openai.errors import ApiError

MOST_TEXTS = 2048  # as OpenAI
LONGEST_NAME = 255  # of a model's folder
MOST_VALUES = 200_000  # strings, arrays, objects and commas outside strings: some 20 MB of memory
_VALUE = re.compile(rb'"[^"]*"?|[,\[{]')
SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Allowed:
    """What a field takes, in words; each field has it."""

    words: str


class Fields(BaseModel):
    """An object with the declared fields; others are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_others(cls, given: Any) -> Any:
        """Names the first. Pydantic would name all: of a body full of them, that takes seconds and most of a GB."""
        for name in given if isinstance(given, dict) else ():
            if name not in cls.model_fields:
                allowed = ", ".join(cls.model_fields)
                raise PydanticCustomError("unknown", "no such field", {"name": shown(name), "allowed": allowed})
        return given


class RequestBody(Fields):
    """The fields of a body."""

    @classmethod
    def read(cls, body: bytes) -> Self:
        """The fields in a body."""
        if _has_too_many_values(body):
            allowed = f"up to {MOST_TEXTS} texts, as strings and not as token ids"
            raise ApiError(400, f"the body has too many JSON values; allowed: {allowed}")
        try:
            fields = json.loads(body.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
        except json.JSONDecodeError as error:
            raise ApiError(400, f"the body is not JSON: {error}") from None
        except RecursionError:
            raise ApiError(400, "the body has too many nested arrays or objects") from None
        except ValueError:
            raise ApiError(400, "the body has a number with too many digits") from None
        if not isinstance(fields, dict):
            allowed = f"a JSON object with {', '.join(cls.model_fields)}"
            raise ApiError(400, f"the body is {shown(fields)}; allowed: {allowed}")
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise _refusal(cls, error) from None


def _has_too_many_values(body: bytes) -> bool:
    """Whether the parser would need far more memory than the body: 40 times its size for nested lists."""
    if len(body) <= MOST_VALUES or sum(map(body.count, (b",", b"[", b"{"))) <= MOST_VALUES:
        return False
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")  # a quote now starts or ends a string
    return next(islice(_VALUE.finditer(unescaped), MOST_VALUES, None), None) is not None


def _refusal(fields: type[BaseModel], error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    if first["type"] == "unknown":
        return ApiError(400, f"{first['ctx']['name']}: no such field; allowed: {first['ctx']['allowed']}")
    *outer, name = map(str, first["loc"])
    for each in outer:
        annotation: Any = fields.model_fields[each].annotation
        fields = next(iter(get_args(annotation)), annotation)  # of an optional one
    place = ".".join([*outer, name])
    if first["type"] == "refused":
        return ApiError(400, f"{place}{first['ctx']['at']}: {first['ctx']['why']}", param=place)
    seen = "missing" if first["type"] == "missing" else f"seen {shown(first['input'])}"
    words = next(each.words for each in fields.model_fields[name].metadata if isinstance(each, Allowed))
    return ApiError(400, f"{place}: {seen}; allowed: {words}", param=place)


def _refused(why: str, at: str = "") -> PydanticCustomError:
    return PydanticCustomError("refused", "{why}", {"why": why, "at": at})


def _check_text(text: Any, at: str = "") -> Any:
    if not isinstance(text, str):
        raise _refused(f"seen {shown(text)}; allowed: a string", at)
    if not text:
        raise _refused("an empty string; allowed: at least one character", at)
    if not _is_unicode(text):
        raise _refused("half of a surrogate pair (\\ud800 to \\udfff); send valid Unicode", at)
    return text


def _check_texts(texts: Any, allowed: str = "a list of strings") -> Any:
    if not isinstance(texts, list):
        raise _refused(f"seen {shown(texts)}; allowed: {allowed}")
    if not 1 <= len(texts) <= MOST_TEXTS:
        raise _refused(f"a list of {len(texts)}; allowed: 1 to {MOST_TEXTS} texts")
    for place, text in enumerate(texts):
        _check_text(text, f"[{place}]")
    return texts


def _check_text_or_texts(given: Any) -> Any:
    first = given[0] if isinstance(given, list) and given else None
    if type(first) is int or (isinstance(first, list) and first and type(first[0]) is int):
        advice = "send strings: ids of another tokenizer have another meaning here"
        raise _refused(f"token ids; {advice} (LangChain: check_embedding_ctx_length=False)", "[0]")
    return _check_text(given) if isinstance(given, str) else _check_texts(given, "a string or a list of strings")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value of a request, short."""
    if isinstance(value, list | dict):
        return "an array" if isinstance(value, list) else "an object"
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


_NonEmpty = Annotated[str, Field(min_length=1)]
_Listed = Annotated[list[_NonEmpty], Field(min_length=1, max_length=MOST_TEXTS)]
_NAME = Allowed("the name of a model; GET /v1/models lists them")
_Name = Annotated[str, Field(min_length=1, max_length=LONGEST_NAME)]
Text = Annotated[_NonEmpty, BeforeValidator(_check_text), Allowed("a string")]
Texts = Annotated[_Listed, BeforeValidator(_check_texts), Allowed("a list of strings")]
TextOrTexts = Annotated[
    _NonEmpty | _Listed, BeforeValidator(_check_text_or_texts), Allowed("a string or a list of strings")
]
ModelName = Annotated[_Name, _NAME]
PromptName = Annotated[str | None, Allowed("the name of a prompt of the model")]
OptionalModelName = Annotated[_Name | None, _NAME]

"""How a mistake in a file of ours becomes one line: the key, the value seen, what is allowed."""

from __future__ import annotations

import difflib
import re
from typing import Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

# pydantic's words where they name its own types; all others begin with "Input should be".
_WORDS = {
    "tuple_type": "a list is needed, in [ ]",
    "dict_type": "a table is needed",
    "model_type": "a table is needed",
    "too_short": "at least one is needed",
}


class Table(BaseModel):
    """A table of a file: its keys are all known, its types are exact, it does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def listed(names: Any) -> str:
    """Names in order, for a message."""
    return ", ".join(map(str, sorted(names))) or "none"


def at(key: str, message: str) -> PydanticCustomError:
    """For a validator to raise: a mistake of another key than the one that is validated."""
    return PydanticCustomError("at", "{message}", {"key": key, "message": message})


def matching(pattern: str, allowed: str) -> AfterValidator:
    """Of a text: it matches all of `pattern`, which the message says in words."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"seen {value!r}; allowed: {allowed}")
        return value

    return AfterValidator(check)


def identifier(allowed: str) -> AfterValidator:
    """Of a text: it is a name as Python has them."""

    def check(value: str) -> str:
        if not value.isidentifier():
            raise ValueError(f"seen {value!r}; allowed: {allowed}")
        return value

    return AfterValidator(check)


def _allowed_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys that the table at `loc` may have."""
    node: Any = model
    for part in loc:
        if isinstance(node, type) and issubclass(node, BaseModel):
            node = node.model_fields[str(part)].annotation if part in node.model_fields else None
        else:  # dict[str, Table]
            node = get_args(node)[-1] if get_args(node) else None
    return sorted(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def first_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> tuple[str, str]:
    """Key and one-line message of the first error that pydantic found."""
    found = error.errors(include_url=False)  # a misspelt key is also a missing one: say the former
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    loc = tuple(part for part in first["loc"] if part != "[key]")
    key = prefix + ".".join(str(part) if str(part).isprintable() else repr(part) for part in loc)
    if first["type"] == "at":
        return first["ctx"]["key"], first["ctx"]["message"]
    if first["type"] == "missing":
        return key, "missing; it has to be given"
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(model, loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return key, f"unknown key (seen {first['input']!r}); allowed: {', '.join(allowed)}{hint}"
    if first["type"] == "value_error":
        return key, first["msg"].removeprefix("Value error, ")
    message = _WORDS.get(first["type"]) or first["msg"].replace("Input should be", "it has to be").replace("\n", " ")
    return key, f"seen {first['input']!r}; {message[0].lower()}{message[1:]}"

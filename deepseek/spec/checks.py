"""Turns a mistake in a configuration file into one line: the key, the value seen, what is allowed."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from deepseek.spec.command import InputError

Made = TypeVar("Made", bound=BaseModel)

# Replacements for messages in which pydantic names its own types; all other messages begin with "Input should be".
_WORDS = {
    "tuple_type": "a list is needed, in [ ]",
    "dict_type": "a table is needed",
    "model_type": "a table is needed",
    "too_short": "at least one is needed",
    "int_type": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "string_type": "a string is needed, in quotes",
    "bool_type": "true or false is needed",
}


class Table(BaseModel):
    """A table of a configuration file: frozen, with exact types; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def listed(names: Any) -> str:
    """Sorted names, for a message."""
    return ", ".join(map(str, sorted(names))) or "none"


def at(key: str, message: str) -> PydanticCustomError:
    """An error for a validator to raise about a key of the table that it validates."""
    return PydanticCustomError("at", "{message}", {"key": key, "message": message})


def fitting(fits: Callable[[str], object], allowed: str) -> AfterValidator:
    """A validator for strings: requires that `fits(value)` is true; the message describes the rule as `allowed`."""

    def check(value: str) -> str:
        if not fits(value):
            raise ValueError(f"seen {value!r}; allowed: {allowed}")
        return value

    return AfterValidator(check)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


RegularExpression = Annotated[str, fitting(_compiles, "a regular expression")]


def _allowed_keys(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys allowed in the table at `loc`."""
    node: Any = model
    for part in loc:
        if isinstance(node, type) and issubclass(node, BaseModel):
            node = node.model_fields[str(part)].annotation if part in node.model_fields else None
        else:  # dict[str, Table]
            node = get_args(node)[-1] if get_args(node) else None
        if type(None) in get_args(node):  # an optional table
            node = get_args(node)[0]
    return sorted(node.model_fields) if isinstance(node, type) and issubclass(node, BaseModel) else []


def first_error(error: ValidationError, model: type[BaseModel], prefix: str = "") -> tuple[str, str]:
    """Key and one-line message of the first error that pydantic found."""
    found = error.errors(include_url=False)  # a misspelt key is also reported as missing: report the misspelling
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    loc = tuple(part for part in first["loc"] if part != "[key]")
    below = (first["ctx"]["key"],) if first["type"] == "at" else ()
    key = prefix + ".".join(str(part) if str(part).isprintable() else repr(part) for part in (*loc, *below))
    if first["type"] == "at":
        return key, first["ctx"]["message"]
    if first["type"] == "json_invalid":
        return key, f"not valid JSON: {first['ctx']['error']}"
    if first["type"] == "missing":
        return key, "missing; it is required"
    if first["type"] == "extra_forbidden":
        allowed = _allowed_keys(model, loc[:-1])
        close = difflib.get_close_matches(str(loc[-1]).lower(), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return key, f"unknown key (seen {first['input']!r}); allowed: {', '.join(allowed)}{hint}"
    if first["type"] == "value_error":
        return key, first["msg"].removeprefix("Value error, ")
    message = _WORDS.get(first["type"]) or first["msg"].replace("Input should be", "it must be").replace("\n", " ")
    seen = str(first["input"]).lower() if isinstance(first["input"], bool) else repr(first["input"])  # as in TOML
    return key, f"seen {seen}; {message[0].lower()}{message[1:]}"


def checked(model: type[Made], data: dict[str, Any] | str | bytes, place: object, prefix: str = "") -> Made:
    """Validates JSON, or parsed TOML, as `model`. Raises InputError with `place` and the first wrong key."""
    # TOML is validated as JSON: types are exact, but an array may fill a tuple, and an integer a float.
    text = json.dumps(data, default=str) if isinstance(data, dict) else data
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        key, message = first_error(error, model, prefix)
        raise InputError(": ".join(map(str, filter(None, (place, key, message))))) from None


def read_toml(path: Path) -> dict[str, Any]:
    """Parses a TOML file. Raises InputError in one line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte order mark
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None

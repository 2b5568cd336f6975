"""How a mistake in a file of ours becomes one line: the key, the value seen, what is allowed."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


class Table(BaseModel):
    """A table of a file: its keys are all known, its types are exact, it does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def listed(names: Any) -> str:
    return ", ".join(map(str, sorted(names))) or "none"


def at(key: str, message: str) -> ValueError:
    return ValueError(f"@{key}@{message}")


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
    key = prefix + ".".join(map(str, loc))
    message = first["msg"].removeprefix("Value error, ")
    if message.startswith("@"):
        _, key, message = message.split("@", 2)
        return key, message
    if first["type"] in ("extra_forbidden", "missing"):
        allowed = _allowed_keys(model, loc[:-1])
        if first["type"] == "missing":
            return key, "missing; it has to be given"
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return key, f"unknown key (seen {first['input']!r}); allowed: {', '.join(allowed)}{hint}"
    if first["type"] == "value_error":
        return key, message
    message = message[0].lower() + message[1:].replace("\n", " ")
    return key, f"seen {first['input']!r}; {message}"

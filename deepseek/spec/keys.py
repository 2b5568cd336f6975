"""Every key of `deploy.toml`, with its type, default and meaning, read from the table classes.

Contract: the meaning of a key is the text under its field; the meaning of a table is the docstring of its class.
"""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from deepseek.spec.checks import Table

_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_NAMES = {"inputs": "<tensor>", "outputs": "<tensor>", "axes": "<axis>", "targets": "<target>"}


@dataclass(frozen=True, kw_only=True)
class SpecKey:
    """One key, or a table of keys."""

    name: str
    """Full name, from the top of the file: `batching.max_queue_size`."""
    takes: str
    """Empty for a table."""
    default: str | None
    """In TOML; None if the key is required, empty if it is optional without a default."""
    meaning: str


def keys_of(table: type[Table], prefix: str = "") -> Iterator[SpecKey]:
    """The keys of a table, then the tables inside it with their keys."""
    tables: list[tuple[str, type[Table], bool]] = []
    for name, field in table.model_fields.items():
        if inner := _table_in(field.annotation):
            many = f".{_NAMES[name]}" if get_origin(field.annotation) is dict else ""
            tables.append((f"{prefix}{name}{many}", inner, field.is_required()))
        else:
            meaning = " ".join((field.description or "").split())
            yield SpecKey(name=prefix + name, takes=_takes(field), default=_default(field), meaning=meaning)
    for place, inner, required in tables:
        meaning = inspect.getdoc(inner) or ""
        yield SpecKey(name=place, takes="", default=None if required else "", meaning=meaning)
        yield from keys_of(inner, f"{place}.")


def _table_in(annotation: Any) -> type[Table] | None:
    """The table class of a field that is a table, an optional one or a dict of tables; None for other fields."""
    if get_origin(annotation) is dict:
        annotation = get_args(annotation)[1]
    elif type(None) in get_args(annotation):
        annotation = get_args(annotation)[0]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Table) else None


def _takes(field: FieldInfo) -> str:
    """The values that a key accepts, in words."""
    low = next((each for each in field.metadata if isinstance(each, Ge | Gt)), None)
    high = next((each for each in field.metadata if isinstance(each, Le)), None)
    text = _in_words(field.annotation)
    if low is not None:
        text += f" from {low.ge}" if isinstance(low, Ge) else f" above {low.gt}"
    return text + (f" to {high.le}" if high is not None else "")


def _in_words(annotation: Any) -> str:
    origin, inner = get_origin(annotation), [each for each in get_args(annotation) if each is not type(None)]
    if origin is Annotated:
        return _in_words(inner[0])
    if origin is Literal:
        return ", ".join(map(str, inner[:-1])) + f" or {inner[-1]}" if len(inner) > 1 else str(inner[0])
    if origin is tuple:
        return f"a list of: {_in_words(inner[0])}"
    if origin is dict:
        return "a table"
    if origin is Union or inner:
        return " or ".join(map(_in_words, inner))
    return _WORDS[annotation]


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = None if field.default_factory else field.get_default()  # what a factory gives depends on the machine
    return "" if value is None or value == {} else json.dumps(value)

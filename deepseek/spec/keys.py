"""Every key of `deploy.toml`: what it takes, its default, what it means; read off the tables themselves.

Contract: a key's meaning is the text under its field, its table's that of the class, so that nothing is said twice.

Example:
    for key in keys_of(DeploymentSpec):
        print(key.name, key.takes, key.default, key.meaning)
"""

from __future__ import annotations

import ast
import inspect
import itertools
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic.fields import FieldInfo

from deepseek.spec.checks import Table

_WORDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_NAMES = {"inputs": "<tensor>", "outputs": "<tensor>", "axes": "<axis>", "targets": "<target>"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key, or a table of keys."""

    name: str
    """From the top of the file: `batching.max_queue_size`."""
    takes: str
    """Empty for a table."""
    default: str | None
    """As TOML has it; None where the key has to be given, empty where it may be left out."""
    meaning: str


def keys_of(table: type[Table], prefix: str = "") -> Iterator[Key]:
    """The keys of a table, those of the tables in it after their own."""
    meanings = _meanings(table)
    tables: list[tuple[str, type[Table], bool]] = []
    for name, field in table.model_fields.items():
        if inner := _table_in(field.annotation):
            many = f".{_NAMES[name]}" if get_origin(field.annotation) is dict else ""
            tables.append((f"{prefix}{name}{many}", inner, field.is_required()))
        else:
            yield Key(name=prefix + name, takes=_takes(field), default=_default(field), meaning=meanings.get(name, ""))
    for place, inner, required in tables:
        meaning = inspect.getdoc(inner) or ""
        yield Key(name=place, takes="", default=None if required else "", meaning=meaning)
        yield from keys_of(inner, f"{place}.")


def _meanings(table: type[Table]) -> dict[str, str]:
    """By field the text that stands under it, in the class or in one that it is made from."""
    found: dict[str, str] = {}
    for owner in reversed(table.__mro__):
        if not issubclass(owner, Table) or owner is Table:
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(body, ast.ClassDef)
        for field, below in itertools.pairwise(body.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    found[name] = " ".join(text.split())
    return found


def _table_in(annotation: Any) -> type[Table] | None:
    """The table that a field is, or holds by name."""
    if get_origin(annotation) is dict:
        annotation = get_args(annotation)[1]
    return annotation if isinstance(annotation, type) and issubclass(annotation, Table) else None


def _takes(field: FieldInfo) -> str:
    """The values that a key takes, in words."""
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
    value = field.get_default()
    return "" if value is None or value == {} else json.dumps(value)

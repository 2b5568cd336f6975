"""Configuration classes that check their values when they are created: frozen dataclasses with exact types.

Contract: a wrong type, value or name raises InputError in one line that names the class and the field. Types are
exact: neither True nor "12" is a number, but numpy's numbers are. `__post_init__` checks rules that involve several
fields.

Example:
    @settings
    class TrainingConfig:
        max_epochs: Count
        learning_rate: Positive = 5e-5
"""

import functools
import numbers
from typing import Annotated, Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from deepseek.spec import InputError

Made = TypeVar("Made")
_WORDS = {
    "Input should be a valid integer": "a whole number",
    "Input should be a valid number": "a number",
    "Input should be a valid string": "a string",
    "Input should be a valid boolean": "True or False",
    "Input should be a valid tuple": 'a tuple, such as (0.9, 0.999) or ("a",)',
    "Field required": "one number more",
    "Input should be an instance of Path": "a path",
    "Tuple should have at least 1 item after validation, not 0": "at least one",
}
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
"""0 <= value < 1."""
PositiveShare = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(owner: type[Made]) -> type[Made]:
    """Decorator: makes a frozen, keyword-only dataclass that checks its fields."""
    made: Any = dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))(owner)
    check = made.__init__

    @functools.wraps(check)
    def initialize(self: Any, **values: Any) -> None:
        numpy = {k: int(v) for k, v in values.items() if isinstance(v, numbers.Integral) and not isinstance(v, int)}
        values |= numpy
        try:
            check(self, **values)
        except ValidationError as error:
            raise InputError(_in_one_line(owner.__name__, error)) from None

    made.__init__ = initialize
    return made


def _in_one_line(owner: str, error: ValidationError) -> str:
    found = error.errors(include_url=False)
    first, place = found[0], found[0]["loc"]
    if first["type"] == "value_error":  # without a place it comes from __post_init__, which names the field itself
        field = f"{place[0]}: " if place else ""
        return f"{owner}: {field}{first['msg'].removeprefix('Value error, ')}"
    if first["type"] == "missing" and len(place) == 1:
        return f"{owner}: {place[0]}: missing; it is required"
    if first["type"] == "unexpected_keyword_argument":
        return f"{owner}: {place[0]}: unknown"
    of_it = (each["msg"] for each in found if each["input"] is first["input"] and each["loc"][0] == place[0])
    allowed = dict.fromkeys(_WORDS.get(message, message.removeprefix("Input should be ")) for message in of_it)
    return f"{owner}: {place[0]}: seen {first['input']!r}; allowed: {' or '.join(allowed)}"

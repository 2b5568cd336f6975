"""A result that is one JSON file of a fixed form, read back with every mistake in one line.

Contract: the file appears whole or not at all; what cannot be read is an InputError that says how to make it anew.

Example:
    class Capacity(Saved):
        made_by = "make capacity"
        model: str

    Capacity(model="recommender").save(path)
    Capacity.load(path)
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import ValidationError

from deepseek.spec import InputError
from deepseek.spec.checks import Table, first_error
from deepseek.spec.folders import write_whole


class Saved(Table):
    """Of such a file."""

    made_by: ClassVar[str]
    """The command that makes it."""

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads one; InputError in one line where it is not one."""
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; make it with: {cls.made_by}") from None
        except ValidationError as error:
            key, message = first_error(error, cls)
            raise InputError(f"{path}: {key}: {message}; make it anew with: {cls.made_by}") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); make it anew with: {cls.made_by}") from None

    def save(self, path: Path) -> None:
        """Writes it, whole or not at all."""
        write_whole(path, self.model_dump_json(indent=2) + "\n")

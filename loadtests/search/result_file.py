"""A result that is stored as one JSON file with a schema.

Contract: the file is written atomically; `load` raises a one-line InputError that names the command that makes it.
"""

from pathlib import Path
from typing import ClassVar, Self

from deepseek.spec import InputError, variables_for
from deepseek.spec.checks import Table, checked
from deepseek.spec.files.folders import write_whole


class SavedResult(Table):
    """Base class: the content of such a file."""

    made_by: ClassVar[str]
    """The command that makes the file, without the model."""

    @classmethod
    def load(cls, path: str | Path, model: str) -> Self:
        """Reads a file of this model; InputError if it is missing, unreadable or invalid."""
        command = f"{cls.made_by} {variables_for(model)}"
        try:
            return checked(cls, Path(path).read_bytes(), path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; make it with: {command}") from None
        except (InputError, OSError) as error:
            raise InputError(f"{error}; make it again with: {command}") from None

    def save(self, path: Path) -> None:
        write_whole(path, self.model_dump_json(indent=2) + "\n")

"""The catalogue of a model with `[vocabulary]`, as the server uses it.

Contract: raises InputError in one line if the file is missing or cannot be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deepseek.spec.command import InputError
from deepseek.spec.deployment import DeploymentSpec, catalogue_path

if TYPE_CHECKING:
    from deepseek.vocabulary import Vocabulary


def catalogue_of(spec: DeploymentSpec) -> tuple[Path, Vocabulary]:
    """The file and the names in it."""
    from deepseek.vocabulary import Vocabulary

    path = catalogue_path(spec)
    try:
        return path, Vocabulary(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None

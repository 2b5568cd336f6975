"""Versions of a model in a repository, told from the names of its folders: which there are, and which are kept.

Contract: numbers are those that Triton sees, newest first. Publishing, releasing and checking all go by these.
"""

from __future__ import annotations

from pathlib import Path

KEPT_VERSIONS = 3  # the one that is served and two to go back to


def versions_of(model: Path) -> list[int]:
    """Numbers of the version directories as Triton sees them, newest first: it leaves out those with leading zeros.

    None where there is no such model.
    """
    places = model.iterdir() if model.is_dir() else ()
    names = [path.name for path in places if path.is_dir() and path.name.isascii() and path.name.isdigit()]
    return sorted((int(name) for name in names if name == str(int(name))), reverse=True)


def retired(model: Path) -> list[int]:
    """Versions that are too old to go back to: all but the newest few, however their numbers lie."""
    return versions_of(model)[KEPT_VERSIONS:]

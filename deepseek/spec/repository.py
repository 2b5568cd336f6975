"""Versions of a model in a repository: which there are, which are kept, and which `config.pbtxt` is whose.

Contract: numbers are those that Triton sees, newest first. Publishing, releasing, checking and comparing go by these.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.spec.folders import SCRATCH

CONFIG = "config.pbtxt"
KEPT_VERSIONS = 3  # the one that is served and two to go back to


def model_folders(repository: Path) -> list[Path]:
    """Those of the models in it, by name, without a version on its way, or one that a killed publisher left."""
    found = sorted(path.parent for path in repository.glob(f"*/{CONFIG}"))
    return [path for path in found if not path.name.startswith(SCRATCH)]


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


def config_path(model: Path, version: int) -> Path:
    """The `config.pbtxt` of a version: the model's belongs to the newest one, an older one brings its own.

    A newest one brings its own, too, where the model's is still that of another version: whoever put it there was cut
    off between the version and its configuration.
    """
    common, own = model / CONFIG, model / str(version) / CONFIG
    if not own.is_file():
        return common
    newest, *others = versions_of(model)
    if version != newest:
        return own
    try:
        text = common.read_bytes()
        copies = (model / str(other) / CONFIG for other in others)
        stale = text != own.read_bytes() and any(copy.is_file() and copy.read_bytes() == text for copy in copies)
    except OSError:  # told by who reads the configuration
        return common
    return own if stale else common

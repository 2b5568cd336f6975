"""Versions of a model in a repository: which exist, which are kept, and which `config.pbtxt` belongs to which.

Contract: version numbers are those that Triton sees, newest first. Publish, release, check and compare all use these
functions.
"""

import re
from pathlib import Path

from deepseek.spec.files.folders import SCRATCH

CONFIG = "config.pbtxt"
ENGINE = "engine"
"""For a model that takes strings and calls the engine's model: the folder in its version that holds the engine's model,
and the parameter of its `config.pbtxt` that names that model."""
TF32 = "tf32"
"""The parameter of `config.pbtxt` of an fp32 engine that may multiply in TF32."""
_NAMED = re.compile(rb"\bversions\s*:[\s\d,\[]+")  # in the version policy of a `config.pbtxt`
KEPT_VERSIONS = 3  # the served version and two to roll back to


def engine_model(version: Path, name: str) -> Path:
    """Folder of the engine's model, inside the version of a model `name` that takes strings for it."""
    return version / ENGINE / f"{name}_{ENGINE}"


def model_folders(repository: Path) -> list[Path]:
    """Folders of the models in it, sorted; skips unfinished ones, also those of a killed publisher."""
    found = sorted(path.parent for path in repository.glob(f"*/{CONFIG}"))
    return [path for path in found if not path.name.startswith(SCRATCH)]


def versions_of(model: Path) -> list[int]:
    """Numbers of the version directories, newest first; like Triton, it ignores names with leading zeros.

    Empty if there is no such model.
    """
    places = model.iterdir() if model.is_dir() else ()
    names = [path.name for path in places if path.is_dir() and path.name.isascii() and path.name.isdigit()]
    return sorted((int(name) for name in names if name == str(int(name))), reverse=True)


def retired(model: Path) -> list[int]:
    """Versions too old to roll back to: all but the newest KEPT_VERSIONS, also if numbers are missing between them."""
    return versions_of(model)[KEPT_VERSIONS:]


def config_path(model: Path, version: int) -> Path:
    """The `config.pbtxt` of a version: the model's for the newest version, the version's own for an older one.

    The newest version also uses its own if the model's names other versions: its publisher was killed before it
    replaced the configuration, or a newer version was removed by hand.
    """
    common, own = model / CONFIG, model / str(version) / CONFIG
    if not own.is_file():
        return common
    if version != versions_of(model)[0]:
        return own
    try:
        named = re.findall(rb"\d+", b" ".join(_NAMED.findall(common.read_bytes())))
    except OSError:  # the reader of the configuration reports it
        return common
    return own if named and version not in map(int, named) else common

"""What BASE and NEW of a comparison are: a model repository, one version of a model, or runs that were recorded.

Contract: what is to be served is laid out in a repository of its own, with links to the version that is meant and the
configuration that belongs to it, so that nothing else is loaded and the user's repository is not touched.

Example:
    side = side_of("base", "recommender/2", "recommender", Path("model_repository"))
    side.lay_out(folder)        # folder/repository/recommender/2 -> model_repository/recommender/2
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.repository import CONFIG, config_path, versions_of
from loadtests.results import Run


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison."""

    name: str
    """base or new."""
    given: str
    """As the user named it."""
    model: Path | None = None
    """Its folder in a repository; None where runs were recorded."""
    version: str | None = None
    """None: what the repository serves."""
    runs: tuple[Path, ...] = ()

    @property
    def recorded(self) -> bool:
        """Nothing is to be served."""
        return self.model is None

    def lay_out(self, folder: Path) -> Path:
        """A repository in `folder` with this side's model alone."""
        assert self.model is not None
        place = folder / "repository" / self.model.name
        shutil.rmtree(folder / "repository", ignore_errors=True)
        place.mkdir(parents=True)
        for path in self.model.iterdir():
            meant = not path.name.isdigit() or self.version in (None, path.name)
            if meant and path.name != CONFIG and not path.name.startswith("."):
                (place / path.name).symlink_to(path.resolve())
        shutil.copyfile(self._config(), place / CONFIG)
        return folder / "repository"

    def _config(self) -> Path:
        """That of the version, or of the newest one."""
        assert self.model is not None
        version = self.version or next(iter(versions_of(self.model)), None)
        return self.model / CONFIG if version is None else config_path(self.model, int(version))

    def load_runs(self, model: str) -> list[Run]:
        """The recorded runs, by age."""
        runs = [Run.load(folder) for folder in self.runs]
        for run in runs:
            if run.settings.model != model:
                raise InputError(f"{run.folder}: a run of {run.settings.model}, not of {model}; give MODEL=")
        return runs


def side_of(name: str, given: str, model: str, repository: Path) -> Side:
    """What the user meant; InputError in one line where it is nothing of the kind."""
    variable = name.upper()
    if not given:
        raise InputError(
            f"{variable}= is not given; it is a model repository, a version such as {model}/1, or a folder of runs"
        )
    path = Path(given)
    if (path / "run.json").is_file():
        return Side(name=name, given=given, runs=(path,))
    if runs := sorted(found.parent for found in path.glob("[!.]*/run.json")):
        return Side(name=name, given=given, runs=tuple(runs))
    if (path / model / CONFIG).is_file():
        return Side(name=name, given=given, model=path / model)
    for folder in (path, repository / path):
        numbers = map(str, versions_of(folder.parent))  # as Triton sees them: no leading zeros
        if folder.name in numbers and (folder.parent / CONFIG).is_file():
            named = Path(os.path.abspath(folder)).parent  # as it is called here, where it is a link, too
            if named.name != model:
                raise InputError(f"{variable}={given}: a version of {named.name}, not of {model}")
            return Side(name=name, given=given, model=named, version=folder.name)
    raise InputError(
        f"{variable}={given}: neither a repository with {model}/{CONFIG}, nor a version in {repository} "
        f"({_versions(repository / model)}), nor a folder of runs (*/run.json)"
    )


def _versions(model: Path) -> str:
    return (
        ", ".join(f"{model.name}/{version}" for version in reversed(versions_of(model)))
        or f"it has none of {model.name}"
    )

"""One side of a comparison: a model repository, one version of a model, or recorded runs.

Contract: a served version gets a repository of its own, with links to the version and a copy of its configuration. The
server loads nothing else, and the user's repository stays untouched.

Example:
    baseline = ComparedVersion.of("baseline", "recommender/2", "recommender", Path("model_repository"))
    baseline.lay_out(folder)        # folder/repository/recommender/2 -> model_repository/recommender/2
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek.spec import InputError
from deepseek.spec.files.repository import CONFIG, config_path, versions_of
from loadtests.results.run import Run

Role = Literal["baseline", "candidate"]
VARIABLES: dict[Role, str] = {"baseline": "BASE=", "candidate": "NEW="}


@dataclass(frozen=True, kw_only=True)
class ComparedVersion:
    role: Role
    given: str
    """The user's name for it."""
    model: Path | None = None
    """The model's folder in a repository; None for recorded runs."""
    version: str | None = None
    """None: the version that the repository serves."""
    runs: tuple[Path, ...] = ()

    @classmethod
    def of(cls, role: Role, given: str, model: str, repository: Path) -> "ComparedVersion":
        """Finds what `given` names; InputError if it is none of the three kinds."""
        variable, path = VARIABLES[role], Path(given)
        if not given:
            kinds = f"a model repository, a version such as {model}/1, or a folder of runs"
            raise InputError(f"{variable} is missing; give {kinds}")
        if (path / "run.json").is_file():
            return cls(role=role, given=given, runs=(path,))
        if runs := sorted(found.parent for found in path.glob("[!.]*/run.json")):
            return cls(role=role, given=given, runs=tuple(runs))
        if (path / model / CONFIG).is_file():
            return cls(role=role, given=given, model=path / model)
        for folder in (path, repository / path):
            numbers = map(str, versions_of(folder.parent))  # without leading zeros, as Triton reads them
            if folder.name in numbers and (folder.parent / CONFIG).is_file():
                named = Path(os.path.abspath(folder)).parent  # a link keeps its own name
                if named.name != model:
                    raise InputError(f"{variable}{given}: a version of {named.name}, not of {model}")
                return cls(role=role, given=given, model=named, version=folder.name)
        known = ", ".join(f"{model}/{version}" for version in reversed(versions_of(repository / model)))
        raise InputError(
            f"{variable}{given}: neither a repository with {model}/{CONFIG}, nor a version in {repository} "
            f"({known or f'no version of {model} there'}), nor a folder of runs (*/run.json)"
        )

    @property
    def recorded(self) -> bool:
        """Whether the runs are recorded, so that no server is needed."""
        return self.model is None

    def lay_out(self, folder: Path) -> Path:
        """Makes a repository in `folder` with only this version of the model; returns its path."""
        assert self.model is not None
        place = folder / "repository" / self.model.name
        shutil.rmtree(folder / "repository", ignore_errors=True)
        place.mkdir(parents=True)
        for path in self.model.iterdir():
            wanted = not path.name.isdigit() or self.version in (None, path.name)
            if wanted and path.name != CONFIG and not path.name.startswith("."):
                (place / path.name).symlink_to(path.resolve())
        version = self.version or next(iter(versions_of(self.model)), None)  # the newest
        config = self.model / CONFIG if version is None else config_path(self.model, int(version))
        shutil.copyfile(config, place / CONFIG)
        return folder / "repository"

    def load_runs(self, model: str) -> list[Run]:
        """The recorded runs, oldest first; InputError if one is of another model."""
        runs = [Run.load(folder) for folder in self.runs]
        for run in runs:
            if run.settings.model != model:
                raise InputError(f"{run.folder}: a run of {run.settings.model}, not of {model}; set MODEL=")
        return runs

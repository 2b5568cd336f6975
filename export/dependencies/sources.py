"""Finds a stage's code: modules of this repository, the model folder, and the packages that both import.

Contract: imports, lazy ones included, are read from the source without importing anything. They are followed through
this repository, the model folder and other Python files that are not installed packages.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from packaging.utils import canonicalize_name

import deepseek
from export.dependencies.digests import RememberedDigests

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("deepseek", "export", "models", "serving")
_INSTALLED = tuple(
    str(Path(sysconfig.get_paths()[name]).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@dataclass(frozen=True, kw_only=True)
class ImportedCode:
    """Python files by display name, and top-level names of the installed packages that they import."""

    files: dict[str, Path] = field(default_factory=dict)
    packages: set[str] = field(default_factory=set)


class Sources:
    """Follows imports. The model folder can be imported as `models.<name>`, and its files as siblings."""

    def __init__(self, digests: RememberedDigests, model_folder: Path) -> None:
        self._digests, self._folder = digests, model_folder
        self._files_of = cache(self._find_files)
        self._edges = cache(self._imported)
        self.of_module = cache(self._of_module)
        self._not_installed = cache(_not_installed)

    def _of_module(self, name: str, without: tuple[str, ...]) -> ImportedCode:
        """A module of this repository and everything it imports, except packages in `without`."""
        code = ImportedCode()
        for path, module in self._files_of(name):
            self._follow(path, module, code, without)
        return code

    def of_model(self, without: tuple[str, ...] = ()) -> ImportedCode:
        """What the Python files of the model folder import from outside it."""
        code, package = ImportedCode(), f"models.{self._folder.name}"
        for name, path in files_in(self._folder).items():
            if path.suffix == ".py":
                self._follow(path, f"{package}.{name.removesuffix('.py').replace('/', '.')}", code, without)
        inside = self._folder.resolve()
        kept = {name: path for name, path in code.files.items() if not path.resolve().is_relative_to(inside)}
        return ImportedCode(files=kept, packages=code.packages)

    def _follow(self, path: Path, module: str, code: ImportedCode, without: tuple[str, ...]) -> None:
        shown = _shown(path)
        if shown in code.files:
            return
        code.files[shown] = path
        imported, packages = self._edges(path, module)
        code.packages.update(packages)
        for file, name in imported:
            if not any(name == room or name.startswith(f"{room}.") for room in without):
                self._follow(file, name, code, without)

    def _imported(self, path: Path, module: str) -> tuple[tuple[tuple[Path, str], ...], set[str]]:
        """The files that a file imports, each with its module's name, and the installed packages."""
        found: dict[Path, str] = {}
        packages = set()
        for each in self._digests.imports(path):
            name = _absolute(each, module)
            if name.startswith("deepseek.") and name.removeprefix("deepseek.") in deepseek.MODULE_OF:  # a lazy name
                name = f"deepseek.{deepseek.MODULE_OF[name.removeprefix('deepseek.')]}"
            top = name.partition(".")[0]
            if ours := self._files_of(name):
                found |= dict(ours)
            elif top not in sys.stdlib_module_names and top not in ROOMS:
                outside = self._not_installed(top)
                found |= {file: f"{top}.{file.stem}" for file in outside}
                packages |= set() if outside else {top}
        return tuple(found.items()), packages

    def _find_files(self, name: str) -> tuple[tuple[Path, str], ...]:
        """The file of one of our modules and the `__init__.py` of each package above it, with module names."""
        top, _, below = name.partition(".")
        if top == "models" and below.partition(".")[0] == self._folder.name:
            return _files_below(self._folder, name, 2)
        if top in ROOMS:
            return _files_of_repository(name)
        if (self._folder / f"{top}.py").is_file() or (self._folder / top / "__init__.py").is_file():
            return _files_below(self._folder, name, 0)
        return ()


@cache
def _files_of_repository(name: str) -> tuple[tuple[Path, str], ...]:
    """The files of a module of this repository. They stay where they are while it runs."""
    return _files_below(ROOT, name, 0)


def _files_below(base: Path, name: str, start: int) -> tuple[tuple[Path, str], ...]:
    """The files of a module; the folder `base` is what the first `start` parts of its name stand for."""
    parts = name.split(".")
    below = parts[start:]
    found = [
        (base.joinpath(*below[:end], "__init__.py"), ".".join([*parts[: start + end], "__init__"]))
        for end in range(1, len(below) + 1)
    ]
    if below:
        found.append((base.joinpath(*below).with_suffix(".py"), name))
    return tuple((path, module) for path, module in found if path.is_file())


def _absolute(name: str, module: str) -> str:
    """The full name of a relative import (`..x`); other names are unchanged."""
    dots = len(name) - len(name.lstrip("."))
    if not dots:
        return name
    return ".".join([*module.split(".")[:-dots], name[dots:]]).strip(".")


@cache
def _shown(path: Path) -> str:
    resolved = path.resolve()
    return str(resolved.relative_to(ROOT)) if resolved.is_relative_to(ROOT) else str(resolved)


def _not_installed(top: str) -> tuple[Path, ...]:
    """Python files of a top-level module that is neither in the standard library nor an installed package."""
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    places = places or ([spec.origin] if spec and spec.origin else [])
    found = [Path(place).resolve() for place in places]
    outside = [path for path in found if path.exists() and not _is_installed(path)]
    return tuple(file for path in outside for file in ([path] if path.is_file() else sorted(path.rglob("*.py"))))


def _is_installed(path: Path) -> bool:
    """Whether a file belongs to this Python or to another environment on its path, such as that of the system."""
    return str(path).startswith(_INSTALLED) or not {"site-packages", "dist-packages"}.isdisjoint(path.parts)


def files_in(folder: Path) -> dict[str, Path]:
    """Files of a model folder by relative path. Links are followed; hidden files and __pycache__ are ignored."""
    return {str(path.relative_to(folder)): path for path in _walk(folder)}


def _walk(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        folders[:] = sorted(name for name in folders if _is_source(name) and not _leads_back(here / name))
        yield from (here / name for name in sorted(names) if _is_source(name) and (here / name).is_file())


def _is_source(name: str) -> bool:
    return name != "__pycache__" and not name.startswith(".")


def _leads_back(folder: Path) -> bool:
    """Whether it is a link to a folder that contains it."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


class InstalledVersions:
    """Installed versions of packages, each read once."""

    def __init__(self) -> None:
        self._version = cache(_version)
        self._requirements = cache(_requirements)
        self._distributions = cache(self._find_distributions)

    def of(self, imports: Iterable[str], also: Iterable[str] = ()) -> dict[str, str]:
        """Versions of the distributions that `imports` belong to, of those in `also`, and of all their requirements.

        `also` may name extras: `nvidia-modelopt[onnx]`.
        """
        found: dict[str, str] = {}
        waiting = [name for top in imports for name in self._distributions(top)] + list(also)
        seen = set(waiting)
        while waiting:
            name, _, extra = waiting.pop().partition("[")
            version = self._version(name)
            if version is not None:
                found[canonicalize_name(name)] = version
                new = [each for each in self._requirements(name, extra.rstrip("]")) if each not in seen]
                seen.update(new)
                waiting += new
        return found

    def _find_distributions(self, top: str) -> tuple[str, ...]:
        """The distributions that install a top-level module: usually the one of the same name."""
        if self._version(top) is not None:
            return (canonicalize_name(top),)
        return tuple(sorted({canonicalize_name(name) for name in _owners().get(top, ())}))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(name: str, extra: str) -> tuple[str, ...]:
    """Names of the distributions that one requires, including those of its `extra`."""
    found = []
    for line in importlib.metadata.requires(name) or ():
        requirement, _, marker = line.partition(";")
        needed = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
        if needed is None or needed[1] == extra:
            match = re.match(r"\s*([A-Za-z0-9._-]+)", requirement)
            found += [canonicalize_name(match[1])] if match else []
    return tuple(found)


@cache
def _owners() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())  # slow: reads the names of all installed files

"""Installs a model folder's `requirements.txt`: the packages that its model.py needs besides this project's.

Contract: `install(folder)` runs before the stages. pip uses `requirements.lock` and the installed torch as constraints:
no package that the build itself needs changes, and a requirement that contradicts them is one error line. If all
requirements are met, pip is not called for this environment, so a finished build needs no network.
"""

import fcntl
import importlib
import importlib.metadata
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from deepseek.spec import InputError

FILE = "requirements.txt"
LOCK = Path(__file__).resolve().parents[2] / "requirements.lock"
_HIDING = ("-r", "-c", "-e", "--requirement", "--constraint", "--editable")  # what they name would not be checked


def requirements_in(folder: Path) -> list[tuple[str, Requirement]]:
    """The requirements of a model folder for this machine, each with `file:line`; none without the file.

    Lines with options of pip, such as `--find-links wheels`, are left to pip.
    """
    path, found = folder / FILE, []
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:  # Windows' PowerShell writes UTF-16
        raise InputError(f"{path}: not a text in UTF-8; save it in UTF-8") from None
    for number, line in enumerate(lines, 1):
        text, where = re.sub(r"(^|\s)#.*", "", line).strip(), f"{path}:{number}"
        if not text or (text.startswith("-") and not text.startswith(_HIDING)):
            continue
        try:
            requirement = Requirement(re.split(r"\s--", text)[0])
        except InvalidRequirement:
            raise InputError(
                f"{where}: seen {text!r}; allowed: a package with its versions, such as timm>=1.0, `name @ URL`, "
                "--find-links and --index-url"
            ) from None
        if requirement.marker is None or requirement.marker.evaluate():
            found.append((where, requirement))
    return found


def pinned_versions() -> dict[str, str]:
    """Versions that must not change, by package: those of `requirements.lock`, and the installed torch."""
    pins = [Requirement(line) for line in LOCK.read_text().splitlines() if line.strip()]
    found = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }
    return found | {"torch": importlib.metadata.version("torch")}


def _check(requirements: Sequence[tuple[str, Requirement]]) -> None:
    """Raises InputError for a requirement that a pinned version does not meet."""
    pinned = pinned_versions()
    for where, requirement in requirements:
        version = pinned.get(canonicalize_name(requirement.name))
        if version is None or (requirement.url is None and requirement.specifier.contains(version, prereleases=True)):
            continue
        if canonicalize_name(requirement.name) == "torch":
            raise InputError(f"{where}: seen {requirement}; the build has torch {version}: allow it or remove it")
        raise InputError(f"{where}: seen {requirement}; requirements.lock has {version}: allow it or remove it")


def _is_met(requirement: Requirement) -> bool:
    """Whether a package that meets the requirement is installed, with the packages of its extras."""
    try:
        installed = importlib.metadata.distribution(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return False
    if requirement.url is not None:
        source = json.loads(installed.read_text("direct_url.json") or "{}")
        revision = source.get("vcs_info", {}).get("requested_revision", "")
        return bool(source) and source["url"] in requirement.url and revision in requirement.url
    if not requirement.specifier.contains(installed.version, prereleases=True):
        return False
    needed = [Requirement(text) for text in installed.requires or ()] if requirement.extras else []
    wanted = [each for each in needed if each.marker and "extra" in str(each.marker)]
    return all(
        _is_met(each)
        for each in wanted
        if each.marker and any(each.marker.evaluate({"extra": extra}) for extra in requirement.extras)
    )


def install(folder: Path, *pythons: str) -> None:
    """Installs what is missing into this environment, and into those of other `pythons`; raises InputError."""
    requirements = requirements_in(folder)
    if not requirements:
        return
    _check(requirements)
    missing = [str(requirement) for _, requirement in requirements if not _is_met(requirement)]
    for python in ([sys.executable] if missing else []) + [each for each in pythons if each != sys.executable]:
        print(f"install   {', '.join(missing) or FILE}, for {folder}", flush=True)
        with LOCK.open() as alone, tempfile.NamedTemporaryFile("w", suffix=".txt") as torch:
            fcntl.flock(alone, fcntl.LOCK_EX)  # builds of other models share the environment
            torch.write(f"torch=={_torch_of(python)}\n")
            torch.flush()
            _pip(python, folder / FILE, LOCK, Path(torch.name))
    importlib.invalidate_caches()


def _torch_of(python: str) -> str:
    """The version of torch in an interpreter's environment."""
    if python == sys.executable:
        return importlib.metadata.version("torch")
    command = [python, "-c", "import importlib.metadata; print(importlib.metadata.version('torch'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _pip(python: str, path: Path, *constraints: Path) -> None:
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--retries", "1"]
    command += [word for constraint in constraints for word in ("--constraint", str(constraint))]
    environment = {**os.environ, "PIP_CONSTRAINT": ""}  # NVIDIA's images set one for their own packages
    run = subprocess.run([*command, "--requirement", str(path)], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise InputError(f"{path}: {_why_not(path, run.stdout + run.stderr)}")


def _why_not(path: Path, output: str) -> str:
    """One line from pip's output."""
    if "The conflict is caused by:" in output:
        lines = output.partition("The conflict is caused by:")[2].splitlines()[1:]
        sides = [line.strip() for line in itertools.takewhile(str.strip, lines)]
        return (
            "contradicts requirements.lock or the installed torch, which the build needs: "
            f"{'; '.join(sides).replace('The user requested (constraint)', 'pinned:')}; choose a version that fits them"
        )
    if re.search(r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|Max retries exceeded", output):
        return (
            "this machine reaches no package index; on one that does: pip download -c requirements.lock "
            f"-r {path} -d wheels, then here: PIP_NO_INDEX=1 PIP_FIND_LINKS=wheels make engine"
        )
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return f"pip cannot install it: {' '.join(errors)[:400] or ' '.join(output.split())[-400:]}"

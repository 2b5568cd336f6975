"""Commands for work on this repository: lint, types, tests, docs and the lock files."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from deepseek.spec import InputError, build_dir

RUFF = (("ruff", "check", "."), ("ruff", "format", "--check", "."))
FAST = "not server and not slow"  # the tests of `check`; tests/conftest.py marks them
# A file's tests stay in one process, so that shared fixtures are set up once.
BY_FILE = ("--dist", "loadfile", "--no-loadscope-reorder")
# torch and its dependencies (CUDA, compiler) are not pinned: the build of torch depends on the machine.
UNLOCKED = re.compile(r"torch=|triton=|cuda-|nvidia-(cu|nccl|nvj|nvs|nvt)")


def lint(options: argparse.Namespace) -> int:
    return _all(*RUFF, ("mypy",))


def check(options: argparse.Namespace) -> int:
    return _tested("-m", FAST, "-n", "2", *BY_FILE, *options.words)


def test(options: argparse.Namespace) -> int:
    """Lint, types and all tests except the slow ones. Tests wait much, so three processes keep two cores busy."""
    return _tested("-m", "not slow", "-n", "3", *BY_FILE, *options.words)


def test_all(options: argparse.Namespace) -> int:
    """The slow tests, which `test` leaves out; without arguments for pytest also a sample of mutants."""
    mutants = () if options.words else (("tests.mutants", "--count", "10"),)
    return _all(("pytest", "-m", "slow", "-n", "2", *BY_FILE, *options.words), *mutants)


def docs(options: argparse.Namespace) -> int:
    """Generates the pages of `docs/reference/`, and builds the site in `build/site`; a broken link is an error."""
    from cli.reference import write_pages

    write_pages()
    os.environ["NO_MKDOCS_2_WARNING"] = "1"  # an advertisement for its successor
    site = build_dir("") / "site"
    code = _all(("mkdocs", "build", "--strict", "--site-dir", str(site.resolve())))
    if not code:
        print(f"built     {site / 'index.html'}")
    return code


def lock(options: argparse.Namespace) -> None:
    _all(("pip", "install", "-q", "uv"))
    everything = _pins("--all-extras", "pyproject.toml", "client/pyproject.toml")
    kept = [line for line in everything.splitlines(keepends=True) if not UNLOCKED.match(line)]
    Path("requirements.lock").write_text("".join(kept))
    wish = build_dir("") / "checkov.in"
    wish.parent.mkdir(parents=True, exist_ok=True)
    wish.write_text("checkov\n")
    Path("tests/checkov.lock").write_text(_pins(str(wish)))


def _pins(*sources: str) -> str:
    flags = ("-q", "--upgrade", "--universal", "--python-version", "3.11")
    quiet = ("--no-emit-index-url", "--no-annotate", "--no-header")
    command = [sys.executable, "-m", "uv", "pip", "compile", *flags, *quiet, *sources]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise InputError(f"uv ended with {run.returncode}; its own lines are above")
    return run.stdout


def _tested(*words: str) -> int:
    """Runs ruff, and pytest with these arguments while mypy runs too: without its cache it takes half a minute."""
    if code := _all(*RUFF):
        return code
    # Each process of the tests would compile all files again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "mypy"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as types:
        code = _all(("pytest", *words))
        print(f"mypy      {types.communicate()[0].strip()}")
    return code or types.returncode


def _all(*modules: tuple[str, ...]) -> int:
    """Runs modules in order, up to the first that fails; returns its exit code."""
    for module in modules:
        code = subprocess.run([sys.executable, "-m", *module]).returncode
        if code:
            return code
    return 0

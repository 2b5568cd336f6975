"""The words of the pages: plain English, a short README, and error lines that the program prints."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from cli.reference import FOLDER
from cli.reference import PAGES as GENERATED

PHRASES = tomllib.loads(Path("tests/phrases.toml").read_text())
PAGES = [
    *map(Path, ("README.md", "CONTRIBUTING.md", "client/README.md", "CHANGELOG.md")),
    *sorted(Path("docs").rglob("*.md")),
]
LONGEST_README = 160  # lines
ROOMS = ("cli", "client", "deepseek", "docker", "export", "loadtests", "serving")
OTHERS = ("dependency failed to start", "Request for unknown model")  # lines of Docker and Triton


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_has_no_unclear_phrase(page: Path) -> None:
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", page.read_text(), flags=re.DOTALL)
    found = {seen[0]: better for phrase, better in PHRASES.items() if (seen := re.search(phrase, prose, re.IGNORECASE))}
    assert not found


def test_the_readme_is_short() -> None:
    assert len(Path("README.md").read_text().splitlines()) <= LONGEST_README


@pytest.mark.parametrize("page", GENERATED)
def test_a_generated_page_is_current(page: str) -> None:
    assert (FOLDER / page).read_text() == GENERATED[page](), "make docs"


@pytest.mark.slow
def test_the_site_has_every_page_and_no_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "InferenceClient" in (tmp_path / "reference" / "client.html").read_text()


@cache
def _sources() -> str:
    files = (path for room in ROOMS for path in Path(room).rglob("*") if path.suffix in {".py", ".sh", ".conf", ".js"})
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))


@pytest.mark.parametrize(
    "line", re.findall(r"^\| (`[^|]*) \|", Path("docs/troubleshooting.md").read_text(), re.MULTILINE)
)
def test_the_program_prints_each_line_in_troubleshooting(line: str) -> None:
    """Three dots stand for text that varies."""
    for text in re.findall(r"`([^`]*)`", line):
        for piece in filter(None, map(str.strip, text.split("..."))):
            assert piece in _sources() or piece in OTHERS

"""The pages match the code: targets, links, flags and examples exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from deepseek_client.cli import main as client

from cli.commands import BY_NAME
from deepseek.targets import PROVIDERS

WRITTEN = sorted(
    page for page in Path("docs").rglob("*.md") if page.parent.name != "reference"
)  # the reference is generated
PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("client/README.md"), *WRITTEN]
NOT_COMMANDS = ("help", "help-all")


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_make_target_named_in_a_page_exists(page: Path) -> None:
    """The target also accepts the variables shown with it."""
    for line in re.findall(r"(?:`|^)make ([a-z][^`\n#>|&;]*)", page.read_text(), re.MULTILINE):
        words = re.sub(r"\"[^\"]*\"|'[^']*'", "", line).split()
        goals = [word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)]
        commands = [BY_NAME[goal.removeprefix("help-")] for goal in goals if goal not in NOT_COMMANDS]
        variables = {option.variable_name for command in commands for option in command.options}
        variables |= {command.flags_variable for command in commands}
        assert set(re.findall(r"\b([A-Z][A-Z_0-9]*)=", line)) <= variables | {"VENV"}, line


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_file_named_in_a_page_exists(page: Path) -> None:
    for name in re.findall(
        r"`((?:deepseek|export|serving|client|loadtests|models|tests|docs)/[\w/.]+\.\w+)`", page.read_text()
    ):
        assert Path(name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_key_files_in_examples_are_ignored_by_git(page: Path) -> None:
    assert "build/" in Path(".gitignore").read_text().splitlines()
    for name in re.findall(r"make keys [^\n#>]*>\s*(\S+)|\$\(cat ([^)]*key)\)", page.read_text()):
        assert "".join(name).startswith("build/"), name


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_in_a_page_exists_and_accepts_its_flags(page: Path) -> None:
    for name, words in re.findall(r"(?:`|^|\$\()deepseek ([a-z][a-z-]*)([^\n`|)]*)", page.read_text(), re.MULTILINE):
        allowed = {option.flag for option in BY_NAME[name].options} | {"--help"}
        assert set(re.findall(r"(?<=\s)(--[a-z][a-z0-9-]*)", words.split(" -- ")[0].partition("#")[0])) <= allowed, name


@pytest.mark.parametrize(
    ("source", "metric", "page"),
    [
        ("serving/backend/*.py", "onnxruntime_[a-z_]+", "docs/observe.md"),
        ("docker/gateway/gateway.js", "gateway_[a-z_]+", "docs/observe.md"),
        ("serving/openai/metrics.py", "openai_[a-z_]+", "docs/text.md"),
    ],
)
def test_every_metric_is_in_a_page(source: str, metric: str, page: str) -> None:
    text = "".join(path.read_text() for path in Path().glob(source))
    declared = set(re.findall(rf"(?<=[\"'`]){metric}(?=[\"'`{{ ])", text))
    assert declared
    assert declared <= set(re.findall(rf"`({metric})", Path(page).read_text())), f"{page} lacks a metric of {source}"


def test_the_page_of_releases_has_a_line_for_each_step() -> None:
    steps = re.findall(r"steps\.do\(\"([a-z-]+)\"", Path("serving/release/release.py").read_text())
    table = Path("docs/release.md").read_text().partition("\n## The gates\n")[2].partition("\n\n#")[0]
    assert steps == re.findall(r"^\| ([a-z-]+) \|", table, re.MULTILINE)[1:], "docs/release.md: The gates"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_page_of_targets_has_each_execution_provider(provider: str) -> None:
    assert f"| `onnxruntime`, `{provider}` |" in Path("docs/targets.md").read_text(), "docs/targets.md"


def test_the_client_accepts_the_examples_of_its_help() -> None:
    lines = re.findall(r"^    .*python -m deepseek_client (.*)$", client.__doc__ or "", re.MULTILINE)
    assert len(lines) >= 5
    for line in lines:
        client._parser().parse_args(shlex.split(line, comments=True))

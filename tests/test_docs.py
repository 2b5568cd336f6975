"""What a user reads is true: targets, links, flags and examples exist."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import run_module

PAGES = [Path("README.md"), Path("CONTRIBUTING.md"), Path("client/README.md"), *sorted(Path("docs").glob("*.md"))]
COMMANDS = [
    "deepseek.spec", "deepseek.sizing", "deepseek.sizing.published", "deepseek.training.launch", "deepseek_client", "export.train", "export.prune", "export.to_onnx", "export.to_torchscript", "export.quantize", "export.compare", "export.parity",
    "export.to_tensorrt", "export.check_engine", "export.container", "export.to_triton", "export.cache", "serving.embedded", "serving.doctor", "serving.flags", "serving.keys", "serving.stack", "serving.kubernetes", "serving.fetch", "serving.release", "serving.rollback", "serving.releases", "serving.alerts", "serving.dashboard", "loadtests.run", "loadtests.slo", "loadtests.capacity", "loadtests.simulate_scale", "loadtests.compare_runs", "loadtests.tune", "loadtests.shadow", "loadtests.steady", "loadtests.report", "loadtests.profile", "loadtests.profile.record",
]  # fmt: skip

# What they run, serve or write for others is all there is.
WITHOUT_RESULT = (
    "deepseek.training.launch",
    "export.container",
    "export.cache",
    "serving.embedded",
    "loadtests.profile.record",
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_make_target_named_in_a_page_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):.*##", Path("Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
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
def test_a_key_is_kept_where_git_does_not_look(page: Path) -> None:
    assert "build/" in Path(".gitignore").read_text().splitlines()
    for name in re.findall(r"make keys [^\n#>]*>\s*(\S+)|\$\(cat ([^)]*key)\)", page.read_text()):
        assert "".join(name).startswith("build/"), name


@functools.cache
def help_of(module: str) -> str:
    """What `python -m module --help` prints; each is asked once."""
    run = run_module(module, "--help")
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("module", COMMANDS)
def test_help_has_examples_that_name_the_command(module: str) -> None:
    assert help_of(module).count(f"python -m {module}") >= 2


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_with_a_result_gives_it_as_json(module: str) -> None:
    assert ("--json" in help_of(module)) is (module not in WITHOUT_RESULT)


def test_every_example_of_a_commands_help_is_one_that_it_takes() -> None:
    run = subprocess.run([sys.executable, "-m", "tests.parse_examples", *COMMANDS], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_module_run_in_a_page_takes_the_flags_shown(page: Path) -> None:
    for module, flags in re.findall(
        r"python -m ((?:export|serving|loadtests|deepseek)[\w.]*)([^\n`|]*)", page.read_text()
    ):
        for flag in re.findall(r"(--[a-z-]+\w)", flags.split(" -- ")[0]):
            assert flag in help_of(module), f"{module} {flag}"

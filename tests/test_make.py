"""The Makefile: targets and variables call the command with their name, for any value."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.commands import BY_NAME, COMMANDS
from cli.table import HIDDEN

TARGETS = re.findall(
    r"\S+",
    """demo engine doctor serve infer compare parity metadata release retrain rollback releases keys stack loadtest
    verdict capacity compare-runs regression tune report profile simulate-scale kubernetes plan setup check-engine
    test lint measure-training measure-failure bench lock clean clean-cache distclean help help-all check test-all
    new""",
)
VARIABLES = re.findall(
    r"\S+",
    """MODEL MODELS DATA PRECISION PRUNE TARGET TRITON_TAG NATIVE ANYWAY HTTP_PORT GRPC_PORT METRICS_PORT OPENAI_PORT
    POLL_S PROTOCOL URL CA_CERT ROW RATE SHAPE USERS MIX WORKERS DURATION_S WEB WEB_PORT RUN REQUESTS BUDGET_S BASE NEW
    NEW_BUILD PROJECT GATEWAY_PORT LOCAL_PORTS GATEWAY_HOSTS NAME REVOKE EXPIRES_DAYS KEY_RPS REGISTRY IMAGE_TAG MODELS_URL
    AUTOSCALER TRAFFIC SCALE P99_MS PRESET ONNX LAYERS HIDDEN HEADS LENGTH BATCH DEVICES MEASURE PLAN BUILD REPOSITORY
    VENV ENV_FILE CACHE CACHE_GIB""",
)
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}


def make(
    *arguments: str, folder: Path | None = None, venv: str | Path = sys.prefix, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `make` with the tests' Python; it writes only inside `folder`."""
    places = (
        [f"BUILD={folder / 'build'}", f"REPOSITORY={folder / 'repository'}", f"ENV_FILE={folder / 'env'}"]
        if folder
        else []
    )
    line = ["make", *arguments, *places, f"VENV={venv}"]
    return subprocess.run(line, capture_output=True, text=True, env={**ENVIRONMENT, **environment})


def test_make_without_a_target_lists_first_commands_with_examples() -> None:
    lines = make().stdout.splitlines()
    examples = [line.strip() for line in lines if line.strip().startswith("make ")]
    assert 7 <= len(examples) <= 10
    for word in ("make demo", "make engine", "make serve", "make loadtest", "make test"):
        assert any(example.startswith(word) for example in examples)


def test_help_lists_every_target_with_its_variables_and_each_has_a_page() -> None:
    text = make("help-all").stdout
    for command in COMMANDS:
        assert (f"\n  {command.name} " in text and command.help in text) is (command.group not in HIDDEN)
    assert " NAME EXPIRES_DAYS KEY_RPS BULK REVOKE " in text
    assert "\n  EXPIRES_DAYS=N " in make("help-keys").stdout


def test_former_targets_and_variables_still_work() -> None:
    run = make("--dry-run", *TARGETS)
    assert run.returncode == 0, run.stderr
    known = {option.variable_name for command in COMMANDS for option in command.options}
    known |= {command.flags_variable for command in COMMANDS}
    assert set(VARIABLES) <= known
    assert {BY_NAME[name].name for name in ("compare", "compare-runs")} == {"parity", "regression"}


@pytest.fixture
def called(tmp_path: Path) -> Callable[..., list[str]]:
    """The Python commands that make calls, in order, with a fake Python; a fake load test takes half a second."""
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *loadtest*) sleep 0.5;; esac\necho "$@" >>{tmp_path}/called\n'
        'case "$*" in *"--make verdict"*) exit 3;; esac\n'
    )
    python.chmod(0o755)

    def run(*arguments: str) -> list[str]:
        make(*arguments, venv=tmp_path / "environment")
        lines = (tmp_path / "called").read_text().splitlines()
        (tmp_path / "called").unlink()
        return lines

    return run


def test_a_target_sets_up_the_environment_and_calls_its_command(
    tmp_path: Path, called: Callable[..., list[str]]
) -> None:
    set_up = f"-S cli/environment.py --venv {tmp_path / 'environment'}"
    assert called("infer") == [set_up, "-m cli --make infer"]
    assert called("setup", "NEED=rtx test") == [f"{set_up} rtx test"]


@pytest.mark.parametrize(
    ("arguments", "needs"),
    [
        (("engine",), []),
        (("engine", "TARGET=tensorrt_rtx"), ["rtx"]),
        (("release", "NATIVE=1"), ["tensorrt"]),
        (("check-engine",), ["rtx"]),
        (("lint",), ["test"]),
        (("test",), ["test", "checkov", "system"]),
    ],
)
def test_a_target_sets_up_its_additional_needs(
    called: Callable[..., list[str]], arguments: tuple[str, ...], needs: list[str]
) -> None:
    assert called(*arguments)[0].split()[4:] == needs


def test_goals_run_in_order_even_with_j_and_stop_at_a_failure(called: Callable[..., list[str]]) -> None:
    lines = called("-j4", "loadtest", "verdict", "report")
    assert [line.split()[-1] for line in lines if "--make" in line] == ["loadtest", "verdict"]


def test_a_signal_to_make_alone_reaches_the_command(tmp_path: Path) -> None:
    python = tmp_path / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/bin/sh\ncase \"$*\" in *--make*) trap 'echo stopped; exit' TERM; echo started;; *) exit;; esac\n"
        "for wait in $(seq 100); do sleep 0.1; done; echo missed\n"
    )
    python.chmod(0o755)
    line = ["make", "serve", f"VENV={tmp_path / 'environment'}"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        run.terminate()
        assert run.stdout.readline() == "stopped\n"


@pytest.mark.parametrize("repository", ["repository", "nosuch"])
def test_distclean_finds_what_was_built_and_keeps_sources_and_the_users_files(tmp_path: Path, repository: str) -> None:
    for name in ("build", "elsewhere/text", "repository/text/1", "repository/notes", "environment/bin"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "repository" / "README.md").touch()
    (tmp_path / "repository" / "text" / "config.pbtxt").touch()
    (tmp_path / ".env").write_text("MINE=1\n")
    python = tmp_path / "environment" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    places = {"PYTHONPATH": os.getcwd(), "DEEPSEEK_BUILD": "elsewhere", "DEEPSEEK_REPOSITORY": repository}
    line = ["make", "-f", str(Path("Makefile").resolve()), "distclean", "VENV=environment"]
    run = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT | places)
    assert run.returncode == 0, run.stderr
    kept = {"text", "1", "config.pbtxt"} if repository == "nosuch" else set()
    assert {path.name for path in tmp_path.rglob("*")} == {"build", "repository", "notes", "README.md", ".env"} | kept


def test_a_former_name_calls_the_command_and_prints_its_new_name(called: Callable[..., list[str]]) -> None:
    assert called("compare")[-1] == "-m cli --make parity"
    assert called("compare-runs")[-1] == "-m cli --make regression"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("engine", "MODLE=text"), "MODLE: no such variable; did you mean MODEL?"),
        (("engine", "MODEL=nosuch"), "no model 'nosuch'"),
        (
            ("keys", r"NAME=o'brien & co; $HOME \x #1"),
            """key name "o'brien & co; $HOME \\\\x #1": use 1 to 64 letters""",
        ),
        (("infer", "GRPC_PORT=18459"), "build the model first: make engine MODEL=recommender"),
        (("metadata", "GRPC_PORT=18459"), "`make serve` starts one here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_before_makes_own(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    run = make(*arguments, folder=tmp_path)
    assert run.returncode == 2
    error, own = run.stderr.splitlines()
    assert error.startswith("error: ")
    assert told in error
    assert re.fullmatch(rf"make: \*\*\* \[Makefile:\d+: {arguments[0]}\] Error 2", own)
    assert list(tmp_path.iterdir()) == []


def test_paths_with_blanks_and_an_unexpanded_tilde_work(tmp_path: Path) -> None:
    run = make("new", "NAME=shop", "MODELS=~/my models", HOME=str(tmp_path))
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "my models" / "shop" / "model.py").is_file()


def test_the_shells_name_variable_creates_no_key(tmp_path: Path) -> None:
    run = make("keys", folder=tmp_path, NAME="me", REVOKE="")
    assert run.returncode == 0, run.stderr
    assert not (tmp_path / "build").exists()


@pytest.mark.slow
def test_the_demo_works_for_a_model_in_another_folder(tmp_path: Path) -> None:
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")
    model = (f"MODELS={tmp_path / 'models'}", "MODEL=text", "PRECISION=fp32")
    ports = ("HTTP_PORT=18450", "GRPC_PORT=18451", "METRICS_PORT=18452")
    run = make(
        "demo", *model, *ports, "DURATION_S=1", "WARMUP_S=1", folder=tmp_path
    )  # a verdict may fail on a busy machine
    for stage in ("embedding", "first 10", "p99_ms"):  # infer, parity, verdict
        assert stage in run.stdout, run.stdout + run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    (loadtest,) = (path for path in (tmp_path / "build" / "text" / "loadtests").iterdir() if path.is_dir())
    assert (loadtest / "report.html").is_file()

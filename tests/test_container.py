"""The container of the engine build: what a machine lacks, the command line, and the Dockerfile.

A GPU and NVIDIA's runtime are not to be had here: small programs named nvidia-smi and docker stand in for them, only to
see which command line would run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek.spec import InputError
from export.container import DOCKERFILE, check_tag, image_name
from tests.conftest import run_module

TAG = re.search(r"^TRITON_TAG \?= (\S+?)##", Path("Makefile").read_text(), re.MULTILINE)
NVIDIA_SMI = "echo 'GPU 0: NVIDIA L4'"
DOCKER = 'echo "$@" >>"$RECORD"; case "$1" in info) echo "Runtimes: runc nvidia";; run) exit 7;; esac'


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that is all of PATH but the system's own; $RECORD is what `docker` was called with."""
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "cat"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    monkeypatch.setenv("BUILD", str(tmp_path / "build"))
    return tmp_path / "bin"


def program(folder: Path, name: str, body: str) -> None:
    """A shell script on the machine's PATH."""
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("programs", "lacks"),
    [
        ({}, "an NVIDIA GPU (no nvidia-smi) and Docker (no docker on PATH)"),
        ({"nvidia-smi": NVIDIA_SMI}, "Docker (no docker on PATH)"),
        ({"nvidia-smi": "echo No devices found", "docker": DOCKER}, "an NVIDIA GPU (nvidia-smi lists none)"),
        ({"nvidia-smi": NVIDIA_SMI, "docker": "exit 1"}, "a Docker engine that answers"),
        ({"nvidia-smi": NVIDIA_SMI, "docker": "echo Runtimes: runc"}, "the NVIDIA runtime of Docker"),
    ],
    ids=["nothing", "no docker", "no gpu", "no engine", "no runtime"],
)
def test_what_a_machine_lacks_is_one_line(machine: Path, programs: dict[str, str], lacks: str) -> None:
    for name, body in programs.items():
        program(machine, name, body)
    run = run_module("export.container", "--check")
    assert run.returncode == 2
    assert run.stderr.startswith(f"error: TARGET=tensorrt: this machine lacks {lacks}")
    assert "make check-engine" in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_a_stage_runs_in_the_image_with_the_gpus_the_tree_and_no_network(machine: Path, tmp_path: Path) -> None:
    program(machine, "nvidia-smi", NVIDIA_SMI)
    program(machine, "docker", DOCKER)
    stage = ("export.to_tensorrt", "--model", "image", "--precision", "fp16")
    run = run_module("export.container", "--models", str(tmp_path), "--", *stage, DATA="/elsewhere/clicks.csv")
    assert run.returncode == 7  # the stage's own
    lines = (tmp_path / "record").read_text().splitlines()
    command = next(line for line in lines if line.startswith("run "))
    here, build = Path.cwd(), tmp_path / "build"
    assert "--gpus all --network none" in command
    assert f"--user {os.getuid()}:{os.getgid()}" in command
    assert f"--volume {here}:{here}:ro --volume {build}:{build} --volume {tmp_path}:{tmp_path}:ro" in command
    assert "--env DATA=/elsewhere/clicks.csv" in command
    assert "--volume /elsewhere/clicks.csv:/elsewhere/clicks.csv:ro" in command
    assert command.endswith(f"{image_name('26.10')} python -m {' '.join(stage)}")
    assert build.is_dir()


def test_the_image_is_built_once_and_named_after_what_it_is_made_of(machine: Path, tmp_path: Path) -> None:
    program(machine, "nvidia-smi", NVIDIA_SMI)
    program(
        machine,
        "docker",
        DOCKER.replace(
            "run)", 'image) [ -e "$RECORD.made" ] && echo id;; build) touch="$RECORD.made"; : >"$touch";; run)'
        ),
    )
    for _ in range(2):
        run_module("export.container", "--tag", "26.08", "--", "export.to_tensorrt")
    builds = [line for line in (tmp_path / "record").read_text().splitlines() if line.startswith("build ")]
    assert builds == [f"build --file {DOCKERFILE} --build-arg TRITON_TAG=26.08 --tag {image_name('26.08')} ."]


@pytest.mark.parametrize("tag", ["26.06", "25.12", "26.13", "latest", "26.7", ""])
def test_a_tag_that_is_no_release_or_has_known_holes_is_refused(tag: str) -> None:
    with pytest.raises(InputError, match="TRITON_TAG: seen"):
        check_tag(tag)


@pytest.mark.parametrize("tag", ["26.07", "26.10", "27.01"])
def test_a_newer_tag_is_taken(tag: str) -> None:
    assert check_tag(tag) == tag


def test_one_tag_stands_in_makefile_dockerfile_and_command() -> None:
    assert TAG is not None
    assert f"ARG TRITON_TAG={TAG[1]}\n" in DOCKERFILE.read_text()
    assert f"default: {TAG[1]}" in run_module("export.container", "--help").stdout


@pytest.mark.parametrize("goal", ["fp16/tensorrt/model.plan", "choice-tensorrt.json"])
def test_make_runs_the_stages_that_need_tensorrt_in_the_container(tmp_path: Path, goal: str) -> None:
    wanted = dry_run(tmp_path, goal, "TRITON_TAG=26.08")
    assert f"-m export.container --tag 26.08 --models tests/models -- export.{stage_of(goal)} " in wanted
    assert "export.container --tag 26.08 --check" in wanted


@pytest.mark.parametrize("goal", ["fp16/tensorrt/model.plan", "choice-tensorrt.json"])
def test_make_runs_them_as_they_are_inside_the_image_and_where_native_asks_for_it(tmp_path: Path, goal: str) -> None:
    assert f"{sys.prefix}/bin/python -m export.{stage_of(goal)} " in dry_run(tmp_path, goal, "NATIVE=1")
    inside = dry_run(tmp_path, goal, DEEPSEEK_TRITON_TAG="26.10")
    assert f"/opt/export/bin/python -m export.{stage_of(goal)} " in inside
    assert "export.container" not in inside
    assert "export.container" in dry_run(tmp_path, goal, DEEPSEEK_TRITON_TAG="26.09")  # not the server's


STAGES = """[ "$2" = deepseek.spec ] && exec {python} "$@"
case "$*" in
    *export.to_onnx*) touch {model}/fp32/model.onnx ;;
    *export.quantize*) touch {model}/fp16/model.onnx ;;
    *export.to_tensorrt*) echo "$2 $4" >>{model}/fp16/tensorrt/model.plan ;;
esac"""


def test_an_engine_is_built_anew_where_another_tensorrt_is_to_build_it(tmp_path: Path) -> None:
    model, environment = tmp_path / "image", tmp_path / "environment"
    for folder in (environment / "bin", model / "fp32", model / "fp16" / "tensorrt"):
        folder.mkdir(parents=True)
    program(environment / "bin", "python", STAGES.format(python=sys.executable, model=model))
    for name in (".ready", ".ready-tensorrt"):
        (environment / name).touch()
    plan = model / "fp16" / "tensorrt" / "model.plan"
    settings = ("MODELS=tests/models", "MODEL=image", "TARGET=tensorrt", f"BUILD={tmp_path}", f"VENV={environment}")
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "BUILD")}
    image = {"DEEPSEEK_TRITON_TAG": "26.10"}
    for arguments, more in (("NATIVE=1",), {}), ((), {}), ((), image), (("TRITON_TAG=26.11",), {}):
        for _ in range(2):
            command = ["make", *settings, *arguments, str(plan)]
            subprocess.run(command, check=True, env={**kept, **more}, stdout=subprocess.DEVNULL)
    containers = ["export.container 26.10", "export.container 26.11"]
    assert plan.read_text().splitlines() == ["export.to_tensorrt image", *containers]


def stage_of(goal: str) -> str:
    """The stage that makes a file."""
    return "to_tensorrt" if goal.endswith(".plan") else "compare"


def dry_run(folder: Path, goal: str, *arguments: str, **environment: str) -> str:
    """The commands that make would run for a file of the model `image`."""
    settings = (f"BUILD={folder}", f"VENV={sys.prefix}", "MODELS=tests/models", "MODEL=image", "TARGET=tensorrt")
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "BUILD")}
    command = ["make", "--dry-run", *settings, *arguments, f"{folder}/image/{goal}"]
    return subprocess.run(command, capture_output=True, text=True, env={**kept, **environment}).stdout


@pytest.mark.parametrize(
    ("programs", "arguments", "target"),
    [
        ({}, (), "onnxruntime"),
        ({"nvidia-smi": NVIDIA_SMI}, (), "onnxruntime"),
        ({"nvidia-smi": NVIDIA_SMI, "docker": "echo Runtimes: runc"}, (), "onnxruntime"),
        ({"nvidia-smi": NVIDIA_SMI, "docker": DOCKER}, (), "tensorrt"),
        ({"nvidia-smi": NVIDIA_SMI}, ("NATIVE=1",), "tensorrt"),
        ({"docker": DOCKER}, (), "onnxruntime"),
    ],
    ids=["nothing", "gpu alone", "no runtime", "gpu and runtime", "gpu and native", "runtime alone"],
)
def test_the_target_is_tensorrt_where_a_gpu_and_a_tensorrt_for_it_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, programs: dict[str, str], arguments: tuple[str, ...], target: str
) -> None:
    for name, body in {"nvidia-smi": "exit 1", "docker": "exit 1", **programs}.items():
        program(tmp_path, name, body)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    kept = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "--eval=show: ; @echo $(T)", *arguments, f"BUILD={tmp_path}", "show"]
    assert subprocess.run(command, capture_output=True, text=True, env=kept).stdout == f"{target}\n"

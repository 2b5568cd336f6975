"""The container of the engine build: what a machine lacks, the command line, and the Dockerfile.

There is no GPU and no NVIDIA runtime here. Small programs named nvidia-smi and docker stand in for them and record the
command line that would run.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from deepseek.spec import InputError
from deepseek.spec.machine.triton_release import check_tag
from export import machine as export_machine
from export.runtimes import tensorrt_container
from export.runtimes.tensorrt_container import DOCKERFILE, image_name
from tests.conftest import Refused, RunHere

NVIDIA_SMI = "echo 'GPU 0: NVIDIA L4'"
# Its output after an update of the driver without a restart.
DIFFERS = "echo Failed to initialize NVML: Driver/library version mismatch; echo NVML library version: 580.95; exit 18"
DOCKER = 'echo "$@" >>"$RECORD"; case "$1" in info) echo "Runtimes: runc nvidia";; run) exit 7;; esac'


@pytest.fixture
def machine(tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of programs that is the whole PATH; the file $RECORD has the arguments of `docker`."""
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "cat"):
        (tmp_path / "bin" / tool).symlink_to(f"/bin/{tool}")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    for seen in (export_machine.output_of, export_machine._docker_information):
        monkeypatch.setattr(export_machine, seen.__name__, cache(seen.__wrapped__))
    monkeypatch.setattr(tensorrt_container, "output_of", export_machine.output_of)
    return tmp_path / "bin"


def program(folder: Path, name: str, body: str) -> None:
    """A shell script on the machine's PATH."""
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def host(machine: Path) -> Path:
    """The same with a GPU and a Docker engine that runs nothing."""
    program(machine, "nvidia-smi", NVIDIA_SMI)
    program(machine, "docker", DOCKER)
    return machine


@pytest.mark.parametrize(
    ("programs", "lacks"),
    [
        ({}, "an NVIDIA GPU (no nvidia-smi) and Docker (no docker on PATH)"),
        ({"nvidia-smi": NVIDIA_SMI}, "Docker (no docker on PATH)"),
        ({"nvidia-smi": "echo No devices found", "docker": DOCKER}, "an NVIDIA GPU (nvidia-smi lists none)"),
        (
            {"nvidia-smi": DIFFERS, "docker": DOCKER},
            "an NVIDIA GPU (nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch)",
        ),
        ({"nvidia-smi": NVIDIA_SMI, "docker": "exit 1"}, "a Docker engine that answers"),
        (
            {"nvidia-smi": NVIDIA_SMI, "docker": "echo Runtimes: runc; echo Name: nvidia"},
            "the NVIDIA runtime of Docker",
        ),
        ({"nvidia-smi": NVIDIA_SMI, "docker": "echo permission denied >&2; exit 1"}, "permission to use Docker"),
    ],
    ids=["nothing", "no docker", "no gpu", "another driver", "no engine", "no runtime", "no permission"],
)
def test_what_a_machine_lacks_is_one_error_line(
    machine: Path, programs: dict[str, str], lacks: str, refused: Refused
) -> None:
    for name, body in programs.items():
        program(machine, name, body)
    said = refused("tensorrt-container")
    assert said.startswith(f"error: TARGET=tensorrt: this machine lacks {lacks}")
    assert "make check-engine" in said


def test_a_stage_runs_in_the_image_with_the_gpus_the_tree_and_no_network(
    host: Path, tmp_path: Path, run_here: RunHere
) -> None:
    stage = ("to-tensorrt", "--model", "image", "--precision", "fp16")
    flags = ("--models", str(tmp_path), "--", *stage)
    run = run_here("tensorrt-container", *flags, DEEPSEEK_DATA="/elsewhere/clicks.csv", DEEPSEEK_CACHE_GIB="20")
    assert run.returncode == 7  # the stage's own
    lines = (tmp_path / "record").read_text().splitlines()
    command = next(line for line in lines if line.startswith("run "))
    here, build = Path.cwd(), tmp_path / "build"
    assert "--gpus all --network none" in command
    assert f"--user {os.getuid()}:{os.getgid()}" in command
    assert f"--volume {here}:{here}:ro --volume {build}:{build} --volume {tmp_path}:{tmp_path}:ro" in command
    assert "--env DEEPSEEK_DATA=/elsewhere/clicks.csv" in command
    assert "--env DEEPSEEK_CACHE_GIB=20" in command
    assert "--volume /elsewhere/clicks.csv:/elsewhere/clicks.csv:ro" in command
    assert command.endswith(f"{image_name('26.10')} python -m cli {' '.join(stage)}")
    assert build.is_dir()


def test_what_links_in_the_model_folder_lead_to_is_mounted(host: Path, tmp_path: Path, run_here: RunHere) -> None:
    """A link to a checkpoint of Hugging Face's cache, whose files are links too, and one to such a file."""
    hub, folder = tmp_path / "hub", tmp_path / "models" / "shop"
    snapshot, blob = hub / "snapshots", hub / "blobs" / "b"
    for place in (snapshot, blob.parent, folder):
        place.mkdir(parents=True)
    blob.write_text("weights")
    (snapshot / "weights").symlink_to("../blobs/b")
    (folder / "checkpoint").symlink_to(snapshot)
    (folder / "file").symlink_to("../../hub/snapshots/weights")
    run_here("tensorrt-container", "--models", str(folder.parent), "--", "select-precision", "--model", "shop")
    command = (tmp_path / "record").read_text().splitlines()[-1]
    for place in (folder.parent, snapshot, blob, snapshot / "weights"):
        assert f"--volume {place}:{place}:ro " in command


def test_the_image_is_built_once_and_named_after_its_inputs(host: Path, tmp_path: Path, run_here: RunHere) -> None:
    program(
        host,
        "docker",
        DOCKER.replace(
            "run)", 'image) [ -e "$RECORD.made" ] && echo id;; build) touch="$RECORD.made"; : >"$touch";; run)'
        ),
    )
    for _ in range(2):
        export_machine.output_of.cache_clear()
        run_here("tensorrt-container", "--tag", "26.08", "--", "to-tensorrt")
    builds = [line for line in (tmp_path / "record").read_text().splitlines() if line.startswith("build ")]
    assert builds == [f"build --tag {image_name('26.08')} --file {DOCKERFILE} --build-arg TRITON_TAG=26.08 ."]


def test_a_changed_dockerfile_gives_another_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "changed").write_bytes(DOCKERFILE.read_bytes() + b"# changed\n")
    before, files = image_name("26.10"), tensorrt_container.IMAGE_FILES[1:]
    monkeypatch.setattr(tensorrt_container, "IMAGE_FILES", (tmp_path / "changed", *files))
    assert image_name("26.10") != before


def test_the_image_is_built_with_the_network_that_the_stacks_images_take(
    host: Path, tmp_path: Path, run_here: RunHere
) -> None:
    run_here("tensorrt-container", "--", "to-tensorrt", BUILD_NETWORK="host")
    assert f"build --tag {image_name('26.10')} --network host --file" in (tmp_path / "record").read_text()


def test_the_requirements_of_a_model_folder_are_installed_in_an_image_on_top(
    host: Path, tmp_path: Path, run_here: RunHere
) -> None:
    program(host, "docker", DOCKER.replace("run)", 'build) cat "${@: -1}"/Dockerfile* >>"$RECORD" || true;; run)'))
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "requirements.txt").write_text("timm>=1\n")
    stage = ("--models", str(tmp_path), "--", "select-precision", "--model", "shop")
    assert run_here("tensorrt-container", *stage).returncode == 7
    record = (tmp_path / "record").read_text()
    assert f"FROM {image_name('26.10')}\nCOPY requirements.txt" in record
    own = next(
        line.split()[2] for line in record.splitlines() if line.startswith(f"build --tag {image_name('26.10')}-")
    )
    assert f" {own} python -m cli select-precision" in record


@pytest.mark.parametrize("tag", ["26.07", "25.12", "26.13", "latest", "26.7", ""])
def test_an_invalid_tag_or_a_release_with_known_faults_is_refused(tag: str) -> None:
    with pytest.raises(InputError, match="TRITON_TAG: seen"):
        check_tag(tag)
    assert check_tag("27.01") == "27.01"

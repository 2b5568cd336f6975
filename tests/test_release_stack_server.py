"""A release's candidate in the stack's Triton; a small program stands in for docker and starts the embedded Triton."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal
from unittest.mock import Mock

import numpy as np
import pytest
from deepseek_client import InferenceClient

import cli.release
from cli.main import values_of
from deepseek.spec import DeploymentSpec, InputError, Target
from deepseek.spec.processes.child_server import ChildServer
from deepseek.spec.processes.stack_triton import stack_command
from deepseek.spec.tables import OnnxRuntimeSpec
from export.publishing.triton_config import config_text, model_config
from loadtests.search.local_server import EMBEDDED, server_command
from serving.embedded.model_control import is_ready
from serving.release.candidate import Candidate
from serving.release.journal import ReleaseJournal
from serving.release.stack_server import check_stack, needs_stack, start_on_stack
from tests.add_one import write_add_one
from tests.test_tensorrt_container import program

GPU_ENV = "COMPOSE_FILE=compose.yaml:docker/compose.gpu.yaml\n"
# Compose would give the container the ports and the repository from these variables.
DOCKER = f"""
echo "$COMPOSE_FILE $*" >>"$RECORD"
case "$*" in
    *' build --quiet triton') echo "no route to the registry" >&2; exit "${{BUILT:-0}}" ;;
    *' run '*) echo $$ >"$RECORD.pid"; exec {sys.executable} -m cli serve --repository "$STACK_REPOSITORY" --http-port "$TUNE_HTTP_PORT" \\
        --grpc-port "$TUNE_GRPC_PORT" --metrics-port 0 ;;
    'rm --force '*) kill $(<"$RECORD.pid"); while kill -0 $(<"$RECORD.pid"); do sleep 0.1; done ;;
esac
"""


@pytest.fixture
def host(tmp_path: Path, own_build: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an env file of a GPU stack, and `docker` on PATH; `record` has its calls."""
    (tmp_path / "bin").mkdir()
    program(tmp_path / "bin", "docker", DOCKER)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    (tmp_path / "env").write_text(GPU_ENV)
    return tmp_path


@contextmanager
def server(host: Path) -> Iterator[ChildServer]:
    with ExitStack() as stack:
        yield start_on_stack(stack, stack_command(host / "env"), host / "new", host / "triton.log", 60)


@pytest.mark.server
def test_a_candidate_is_served_on_loopback_by_the_stacks_triton_and_its_container_is_removed(host: Path) -> None:
    write_add_one(host / "new")
    with server(host) as running, InferenceClient(running.grpc_url) as client:
        answer = client.infer("add_one", {"x": np.ones((1, 2, 3), np.float32)})
        assert (answer["y"] == 2).all()
    calls = (host / "record").read_text().splitlines()
    files = "compose.yaml:docker/compose.gpu.yaml:docker/compose.tune.yaml"
    assert calls[0] == f"{files} compose --env-file {host / 'env'} build --quiet triton"
    assert f"{files} compose --env-file {host / 'env'} run --rm --no-TTY --no-deps --service-ports --name" in calls[1]
    assert "rm --force deepseek-stack-server-" in calls[2]
    assert not is_ready(running.http_url)


@pytest.mark.server
def test_a_candidate_that_does_not_start_is_one_line_with_the_last_line_of_its_log(host: Path) -> None:
    (host / "new").mkdir()
    with pytest.raises(InputError, match=r"no model in it .*triton\.log\)"), server(host):
        pass


def candidate(host: Path) -> Candidate:
    options = values_of("release", "--env-file", str(host / "env"))
    journal = ReleaseJournal(host / "releases", "release", 2, before=None)
    return Candidate(options, DeploymentSpec.load("tests/models/text"), journal, 2)


def test_an_image_that_cannot_be_built_is_no_fault_of_the_candidate(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUILT", "1")
    new = candidate(host)
    new.on_stack = True
    with pytest.raises(InputError, match=r"Triton cannot be built \(no route to the registry\)"), new.started:
        new.start()


def test_a_missing_wheel_is_no_fault_of_the_candidate(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.embedded.wheel.WHEEL", "no-such-wheel")
    with pytest.raises(InputError, match="no-such-wheel is not installed"):
        candidate(host).start()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "env: is missing, but the candidate for tensorrt starts in NVIDIA's Triton; publish a first version with"),
        ("COMPOSE_FILE=compose.yaml\n", "env: has COMPOSE_FILE=compose.yaml, but the candidate for tensorrt starts in"),
    ],
)
def test_without_the_env_file_of_a_gpu_stack_a_release_says_what_to_do(host: Path, content: str, reason: str) -> None:
    (host / "env").write_text(content)
    with pytest.raises(InputError, match=reason):
        check_stack("tensorrt", host / "env")


@pytest.mark.parametrize(
    ("asked", "env", "built_for"),
    [
        ((), f"{GPU_ENV}TRITON_TAG=26.09\n", "26.09"),
        (("--triton-tag", "26.09"), f"{GPU_ENV}TRITON_TAG=26.09\n", "26.09"),
        (("--triton-tag", "26.11"), "", "26.11"),
        ((), "COMPOSE_FILE=compose.yaml\nTRITON_TAG=26.09\n", None),
    ],
    ids=["the stack's", "the same", "no stack", "a stack without a GPU"],
)
def test_a_release_builds_for_the_triton_of_the_gpu_stack(
    host: Path, asked: tuple[str, ...], env: str, built_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(options: Namespace, publish: bool) -> None:
        raise KeyboardInterrupt(options.triton_tag)

    (host / "env").write_text(env)
    monkeypatch.setattr("cli.release.build", build)
    with pytest.raises(KeyboardInterrupt, match=f"^{built_for}$"):
        cli.release.main(values_of("release", "--env-file", str(host / "env"), *asked))


def test_a_release_for_another_triton_than_the_stacks_says_how_to_update_the_stack(host: Path) -> None:
    (host / "env").write_text(f"{GPU_ENV}TRITON_TAG=26.09\n")
    reason = r"TRITON_TAG=26\.10: the candidate starts in the Triton of .*env, 26\.09; .* make engine TRITON_TAG=26\.10"
    with pytest.raises(InputError, match=reason):
        cli.release.main(values_of("release", "--env-file", str(host / "env"), "--triton-tag", "26.10"))


def test_the_doctor_gate_checks_for_the_stacks_triton_and_not_this_hosts_tensorrt(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.doctor.machine._tensorrt_version", lambda: "11.4.0")
    checked = Mock(return_value=([], []))
    monkeypatch.setattr("serving.release.candidate.examine", checked)
    (host / "env").write_text(f"{GPU_ENV}TRITON_TAG=26.09\n")
    candidate(host).doctor()
    machine = checked.call_args.args[1]
    assert (machine.triton_tag, machine.tensorrt) == ("26.09", None)


@pytest.mark.parametrize(
    ("target", "backend", "on_stack"),
    [
        ("onnxruntime", "python", False),
        ("onnxruntime", "onnxruntime", True),
        ("tensorrt", "python", True),
        ("torchscript", "python", True),
    ],
)
def test_a_model_whose_backend_the_embedded_triton_lacks_is_tried_in_the_stacks(
    host: Path, target: Target, backend: Literal["python", "onnxruntime"], on_stack: bool
) -> None:
    spec = DeploymentSpec.load("tests/models/image")
    spec = spec.model_copy(update={"onnxruntime": OnnxRuntimeSpec(backend=backend)})
    (host / "image" / "1").mkdir(parents=True)
    (host / "image" / "config.pbtxt").write_text(config_text(model_config(spec, "fp32", target, {})))
    assert needs_stack(host / "image", 1) == on_stack
    tuned_in = server_command(None, spec, target, host / "env")
    assert tuned_in == (stack_command(host / "env") if on_stack else EMBEDDED)


def test_the_stacks_env_file_is_read_as_compose_reads_it(host: Path) -> None:
    (host / "env").write_text("COMPOSE_FILE=old.yaml\nexport COMPOSE_FILE='compose.yaml'  # my own\n")
    start = "env COMPOSE_FILE=compose.yaml:docker/compose.tune.yaml docker/stack-server.sh {repository} {http_port}"
    assert stack_command(host / "env").startswith(start)
    (host / "env").rename(host / "{env}")
    filled = stack_command(host / "{env}").format(repository="r", http_port=1, grpc_port=2)
    assert filled.endswith(f" r 1 2 '{host}/{{env}}'")


@pytest.mark.parametrize(
    ("lacks", "reason"),
    [
        ("env", "no .*/env of the stack; run make engine there"),
        ("docker", "docker is not installed; install it"),
        ("image", r"the image of the stack's Triton cannot be built \(no route to the registry\); see docker compose"),
    ],
)
def test_what_the_stacks_server_needs_is_named_with_the_other_way_to_tune(
    host: Path, lacks: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "env":
        (host / "env").unlink()
    elif lacks == "docker":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        monkeypatch.setenv("BUILT", "1")
    with pytest.raises(InputError, match=f"^--server stack: {reason}.*, or give the command of a server: --server '"):
        server_command("stack", DeploymentSpec.load("tests/models/text"), "tensorrt", host / "env")

"""The Makefile: real file targets, nothing done twice, and models that live elsewhere."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from deepseek_client import InferenceClient

from serving.embedded import EmbeddedServer

FILES = ("fp32/model.onnx", "fp16/model.onnx", "int8/model.onnx", "choice-onnxruntime.json")


ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL", "BUILD")}
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


def command(folder: Path, *arguments: str) -> list[str]:
    """`make` with everything that it writes inside `folder`, by the Python that runs the tests."""
    return [
        "make",
        *arguments,
        f"BUILD={folder / 'build'}",
        f"REPOSITORY={folder / 'repository'}",
        f"VENV={sys.prefix}",
        f"ENV_FILE={folder / 'env'}",
    ]


def make(folder: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    run = subprocess.run(command(folder, *arguments), capture_output=True, text=True, env=ENVIRONMENT)
    assert not check or run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `models/text` outside the repository, built."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree("tests/models/text", folder / "models" / "text")
    make(folder, "engine", f"MODELS={folder / 'models'}", "MODEL=text")
    return folder


def times(folder: Path) -> dict[str, int]:
    """Modification times of the artifacts and the number of versions."""
    found = {name: (folder / "build" / "text" / name).stat().st_mtime_ns for name in FILES}
    return found | {
        "versions": len([path for path in (folder / "repository" / "text").iterdir() if path.name.isdigit()])
    }


@pytest.mark.slow
def test_another_target_is_published_anew_and_back(elsewhere: Path, tmp_path: Path) -> None:
    shutil.copytree(elsewhere, tmp_path / "copy")  # with its times
    folder = tmp_path / "copy"
    config = folder / "repository" / "text" / "config.pbtxt"
    for target, backend in (("torchscript", "pytorch"), ("onnxruntime", "python")):
        make(folder, "engine", f"MODELS={folder / 'models'}", "MODEL=text", f"TARGET={target}")
        assert f'backend: "{backend}"' in config.read_text()
    run = make(
        folder,
        "engine",
        f"MODELS={folder / 'models'}",
        "MODEL=text",
        "TARGET=torchscript",
        "PRECISION=int8",
        check=False,
    )
    assert run.returncode == 2
    assert "invalid choice: 'int8'" in run.stderr


def test_make_alone_prints_the_targets_by_section() -> None:
    text = subprocess.run(["make"], capture_output=True, text=True).stdout
    for word in ("The main job", "make demo", "make engine", "make loadtest", "make verdict", "PRECISION", "HTTP_PORT"):
        assert word in text


@pytest.mark.slow
def test_a_second_make_engine_does_nothing(elsewhere: Path) -> None:
    before = times(elsewhere)
    run = make(elsewhere, "engine", f"MODELS={elsewhere / 'models'}", "MODEL=text")
    assert run.stdout.strip().endswith("is up to date")
    assert times(elsewhere) == before


@pytest.mark.slow
def test_touching_a_stage_rebuilds_only_what_follows(elsewhere: Path) -> None:
    before = times(elsewhere)
    Path("export/quantize.py").touch()
    make(elsewhere, "engine", f"MODELS={elsewhere / 'models'}", "MODEL=text")
    after = times(elsewhere)
    assert after["fp32/model.onnx"] == before["fp32/model.onnx"]
    assert all(after[name] > before[name] for name in FILES[1:])
    assert after["versions"] == before["versions"] + 1


@pytest.mark.slow
def test_tuned_values_are_published_as_they_come_and_go_and_nothing_is_built_anew(elsewhere: Path) -> None:
    model = ("engine", f"MODELS={elsewhere / 'models'}", "MODEL=text")
    config, tuned = elsewhere / "repository" / "text" / "config.pbtxt", elsewhere / "models" / "text" / "tuned.toml"
    make(elsewhere, *model)
    before = times(elsewhere)
    tuned.write_text("[targets.onnxruntime.batching]\nmax_batch = 4\n")
    make(elsewhere, *model)
    assert "max_batch_size: 4" in config.read_text()
    tuned.unlink()
    make(elsewhere, *model)
    assert "max_batch_size: 8" in config.read_text()
    after = times(elsewhere)
    assert {name: after[name] for name in FILES} == {name: before[name] for name in FILES}


@pytest.mark.slow
def test_a_precision_asked_for_by_name_is_what_is_published(elsewhere: Path) -> None:
    make(elsewhere, "engine", f"MODELS={elsewhere / 'models'}", "MODEL=text", "PRECISION=int8")
    assert 'string_value: "int8"' in (elsewhere / "repository" / "text" / "config.pbtxt").read_text()


@pytest.mark.slow
def test_serve_infer_and_load_test_a_model_from_elsewhere(elsewhere: Path) -> None:
    model = (f"MODELS={elsewhere / 'models'}", "MODEL=text")
    ports = ("HTTP_PORT=18450", "GRPC_PORT=18451", "METRICS_PORT=18452")
    run = make(elsewhere, "demo", *model, *ports, "DURATION_S=3", check=False)
    assert "embedding" in run.stdout, run.stdout + run.stderr
    runs = [path for path in (elsewhere / "build" / "text" / "loadtests").iterdir() if path.is_dir()]
    assert len(runs) == 1


@pytest.fixture
def image(tmp_path: Path) -> tuple[str, ...]:
    """Arguments that build a copy of the model `image`, with a cache of its own."""
    shutil.copytree("tests/models/image", tmp_path / "models" / "image")
    return "engine", f"MODELS={tmp_path / 'models'}", "MODEL=image", f"CACHE={tmp_path / 'cache'}"


def ends(folder: Path, arguments: tuple[str, ...], how: signal.Signals, after_s: float) -> None:
    """Starts a make and ends it, and all that it started, after a time."""
    process = subprocess.Popen(command(folder, *arguments), env=ENVIRONMENT, start_new_session=True, **QUIET)
    time.sleep(after_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize(("how", "rounds"), [(signal.SIGINT, 3), (signal.SIGKILL, 6)], ids=["SIGINT", "SIGKILL"])
def test_builds_ended_at_random_leave_a_build_a_cache_and_a_repository_that_work(
    tmp_path: Path, image: tuple[str, ...], how: signal.Signals, rounds: int
) -> None:
    moments = random.Random(how)
    for _ in range(rounds):
        ends(tmp_path, image, how, moments.uniform(0.3, 9))
        for artifact in tmp_path.rglob("model.onnx"):
            onnx.checker.check_model(artifact)
    make(tmp_path, *image)
    assert list(tmp_path.rglob(".scratch-*")) == []
    shutil.rmtree(tmp_path / "build")
    make(tmp_path, *image)  # another clone: from the cache
    with EmbeddedServer(tmp_path / "repository", http_port=0, grpc_port=0, metrics_port=0) as server:
        pixels = np.zeros((2, 3, 32, 32), np.float32)
        assert InferenceClient(server.grpc_url).infer("image", {"pixels": pixels})["scores"].shape == (2, 10)


@pytest.mark.slow
def test_two_builds_in_one_folder_take_turns(tmp_path: Path, image: tuple[str, ...]) -> None:
    builds = [
        subprocess.Popen(command(tmp_path, *image), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [build.communicate()[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert sum(f"waiting for another make in {tmp_path / 'build' / 'image'}" in output for output in outputs) == 1
    assert [path.name for path in (tmp_path / "repository" / "image").iterdir() if path.name.isdigit()] == ["1"]


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    run = make(tmp_path, "engine", "MODEL=nosuch", check=False)
    assert run.returncode == 2
    assert "error: no model 'nosuch'" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("setting", ["TARGET=onnx", "PRECISION=int4", "PRECISION=fp16,int8"])
def test_a_word_that_is_no_choice_is_one_line_before_anything_is_made(tmp_path: Path, setting: str) -> None:
    run = make(tmp_path, "engine", setting, check=False)
    name, _, value = setting.partition("=")
    assert run.returncode == 2
    assert f'{name}: seen "{value}"; allowed: auto ' in run.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["infer", "metadata", "loadtest", "capacity"])
def test_without_a_server_each_client_target_says_how_to_start_one(tmp_path: Path, target: str) -> None:
    run = make(tmp_path, target, "GRPC_PORT=18459", check=False)
    assert run.returncode == 2
    assert "error: " in run.stderr
    assert "Traceback" not in run.stderr

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
from collections.abc import Callable
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
    before, stage = times(elsewhere), Path("export/quantize.py")
    of_the_stage = stage.stat()
    stage.touch()
    try:
        make(elsewhere, "engine", f"MODELS={elsewhere / 'models'}", "MODEL=text")
    finally:
        os.utime(stage, ns=(of_the_stage.st_atime_ns, of_the_stage.st_mtime_ns))
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


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A folder whose `models/text` is a link to a model folder, in which model.py and a folder of files are links."""
    for name in ("models", "other"):
        shutil.copytree("tests/models/text", tmp_path / name / "text")
        os.utime(tmp_path / name / "text" / "model.py", (1, 1))
    (tmp_path / "models" / "text").rename(tmp_path / "text")
    (tmp_path / "models" / "text").symlink_to(tmp_path / "text")
    (tmp_path / "text" / "model.py").rename(tmp_path / "shared.py")
    (tmp_path / "text" / "model.py").symlink_to(tmp_path / "shared.py")
    (tmp_path / "assets").mkdir()
    (tmp_path / "text" / "assets").symlink_to(tmp_path / "assets")
    (tmp_path / "text" / ".git").mkdir()
    return tmp_path


def weights_made_anew(folder: Path, *arguments: str) -> bool:
    """Whether `make` of the weights of `models/text`, which brings them, ran its stage."""
    weights, models = folder / "build" / "text" / "weights", f"MODELS={folder / 'models'}"
    before = weights.stat().st_mtime_ns if weights.exists() else 0
    make(folder, str(weights), "MODEL=text", models, *arguments)
    return weights.stat().st_mtime_ns > before


@pytest.mark.slow
def test_weights_follow_every_source_in_the_model_folder_through_links_and_nothing_else(linked: Path) -> None:
    assert weights_made_anew(linked)
    (linked / "text" / "deploy.toml").touch()
    (linked / "text" / "tuned.toml").write_text("")
    (linked / "text" / ".git" / "index").write_text("")
    (linked / "text" / "__pycache__").mkdir()
    (linked / "text" / "__pycache__" / "model.pyc").write_text("")
    assert not weights_made_anew(linked)
    os.utime(linked / "shared.py", (2, 2))
    assert weights_made_anew(linked)
    (linked / "assets" / "10:30 words #1.txt").write_text("")
    assert weights_made_anew(linked)
    assert weights_made_anew(linked, f"MODELS={linked / 'other'}")
    assert not weights_made_anew(linked, f"MODELS={linked / 'other'}")


@pytest.mark.slow
def test_weights_follow_what_is_in_the_click_log_not_its_name(linked: Path) -> None:
    log = linked / "it's my log.csv"
    log.write_text("user,item,timestamp\n")
    assert weights_made_anew(linked, f"DATA={log}")
    assert not weights_made_anew(linked, f"DATA={log}")
    log.write_text("user,item,timestamp\n1,2,3\n")
    assert weights_made_anew(linked, f"DATA={log}")
    assert weights_made_anew(linked)


@pytest.mark.slow
def test_a_precision_asked_for_by_name_is_what_is_published(elsewhere: Path) -> None:
    make(elsewhere, "engine", f"MODELS={elsewhere / 'models'}", "MODEL=text", "PRECISION=int8")
    assert 'string_value: "int8"' in (elsewhere / "repository" / "text" / "config.pbtxt").read_text()


@pytest.mark.slow
def test_serve_infer_and_load_test_a_model_from_elsewhere(elsewhere: Path) -> None:
    model = (f"MODELS={elsewhere / 'models'}", "MODEL=text")
    ports = ("HTTP_PORT=18450", "GRPC_PORT=18451", "METRICS_PORT=18452")
    run = make(elsewhere, "demo", *model, *ports, "DURATION_S=3", check=False)  # a verdict may fail on a busy machine
    for stage in ("embedding", "first 10 of", "p99_ms"):  # infer, compare, verdict
        assert stage in run.stdout, run.stdout + run.stderr
    assert "Traceback" not in run.stderr, run.stderr
    (loadtest,) = (path for path in (elsewhere / "build" / "text" / "loadtests").iterdir() if path.is_dir())
    assert (loadtest / "report.html").is_file()


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
def test_builds_ended_at_random_leave_a_build_a_cache_and_a_repository_that_work(
    tmp_path: Path, image: tuple[str, ...]
) -> None:
    moments = random.Random(1)
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL) * 3:
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
    line = command(tmp_path, *image, "PRECISION=fp32")
    builds = [subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [build.communicate()[0] for build in builds]
    assert [build.returncode for build in builds] == [0, 0]
    assert sum(f"waiting for another make in {tmp_path / 'build' / 'image'}" in output for output in outputs) == 1
    assert [path.name for path in (tmp_path / "repository" / "image").iterdir() if path.name.isdigit()] == ["1"]


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    run = make(tmp_path, "engine", "MODEL=nosuch", check=False)
    assert run.returncode == 2
    assert "error: no model 'nosuch'" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_tilde_that_no_shell_took_up_is_the_home_folder(tmp_path: Path, commands: Callable[..., list[str]]) -> None:
    own = ("HOME=" + str(tmp_path), "MODELS=~/models", "BUILD=~/build", "REPOSITORY=~/repository")
    commands("engine", *own)
    assert "\nmodel.py " in (tmp_path / "build" / "text" / "settings" / "folder").read_text()
    assert " --repository ~" not in commands("serve", *own)[-1]


def test_a_model_folder_whose_changes_make_cannot_follow_is_refused(tmp_path: Path) -> None:
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")
    weights = str(tmp_path / "build" / "text" / "weights")
    run = make(tmp_path, weights, "MODEL=text", f"MODELS={tmp_path}/mod\\els", check=False)  # a shell drops the stroke
    assert run.returncode == 2
    assert "error: MODELS: seen '" in run.stderr
    assert "/text can be read, whose changes are to be followed" in run.stderr


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


STAND_IN = """#!/bin/sh
[ "$2" = deepseek.spec ] && exec {python} "$@"
[ "$2" = loadtests.run ] && sleep 0.5
[ "$2" = loadtests.tune ] && echo new >{folder}/build/text/tuning.json
echo "$@" >>{folder}/commands
[ "$2" != loadtests.capacity ] || exit 3
"""


@pytest.fixture
def commands(tmp_path: Path) -> Callable[..., list[str]]:
    """What make runs of Python, in order, on a machine that seems to have a GPU and NVIDIA's Docker; none of it runs."""
    scripts = {
        "bin/nvidia-smi": "#!/bin/sh\necho GPU 0\n",
        "bin/docker": "#!/bin/sh\necho nvidia\n",
        "environment/bin/python": STAND_IN.format(python=sys.executable, folder=tmp_path),
        "environment/.ready": "",
    }
    for name, text in scripts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    shutil.copytree("tests/models/text", tmp_path / "models" / "text")

    def run(*arguments: str) -> list[str]:
        own = (f"VENV={tmp_path / 'environment'}", f"MODELS={tmp_path / 'models'}", "MODEL=text", *arguments)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        subprocess.run([*command(tmp_path), *own], env={**ENVIRONMENT, "PATH": path}, check=False, **QUIET)
        return (tmp_path / "commands").read_text().splitlines()

    return run


def test_the_demo_on_a_gpu_machine_is_judged_as_what_it_serves(commands: Callable[..., list[str]]) -> None:
    served = commands("demo")[-1]
    assert served.startswith("-m serving.embedded ")
    assert " TARGET=onnxruntime infer compare loadtest report verdict" in served


def test_goals_follow_one_another_whatever_j_says(commands: Callable[..., list[str]]) -> None:
    stages = [line.split()[1] for line in commands("-j4", "loadtest", "report", "verdict")]
    assert stages == ["loadtests.run", "loadtests.report", "loadtests.slo"]


def test_a_search_that_wrote_nothing_has_no_page_drawn(tmp_path: Path, commands: Callable[..., list[str]]) -> None:
    (tmp_path / "build" / "text").mkdir(parents=True)
    for name in ("capacity.json", "tuning.json"):
        (tmp_path / "build" / "text" / name).write_text("of an earlier search")
    assert [line.split()[1] for line in commands("capacity")] == ["loadtests.capacity"]
    assert commands("tune")[-1].endswith("--tuning")


@pytest.mark.slow
@pytest.mark.parametrize("made", ["bin/python", "pip/_vendor", "pip-*-info", "pip-*-info/RECORD"])
def test_a_set_up_killed_while_it_makes_the_environment_is_taken_up(tmp_path: Path, made: str) -> None:
    environment = tmp_path / "environment"
    offline = ("setup", "PIP=:", "TORCH_CPU_INDEX=http://127.0.0.1:9")  # all but the packages
    line = [*command(tmp_path, *offline), f"VENV={environment}"]
    process = subprocess.Popen(line, env=ENVIRONMENT, start_new_session=True, **QUIET)
    places = [made, f"lib/*/site-packages/{made}"]
    while not any(list(environment.glob(place)) for place in places):
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    subprocess.run(line, env=ENVIRONMENT, check=True, **QUIET)
    whole = (
        "import importlib.metadata as m; files = m.files('pip'); assert all(file.locate().exists() for file in files); "
        "assert {file.name for file in files} >= {'pip', 'INSTALLER'}"
    )
    for check in (("-c", whole), ("-m", "pip", "check")):
        subprocess.run([environment / "bin" / "python", *check], check=True, **QUIET)


@pytest.mark.slow
def test_two_makes_set_one_environment_up_once(tmp_path: Path) -> None:
    line = [*command(tmp_path, "setup", "PIP=echo pip", "TORCH_CPU_INDEX=http://127.0.0.1:9"), f"VENV={tmp_path / 'v'}"]
    both = [subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = "".join(each.communicate()[0] for each in both)
    assert [each.returncode for each in both] == [0, 0]
    assert told.count("setup     ") == 1
    assert told.count("pip -e ") == 1

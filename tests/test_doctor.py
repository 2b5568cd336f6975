"""The doctor on real engines: intact, damaged, truncated, renamed, and built for another batch."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek.spec import InputError
from deepseek.spec.files.read_env_file import CPU_FILES, GPU_FILES
from deepseek.spec.machine.triton_release import TRITON_TAG
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from tests.add_one import write_add_one
from tests.conftest import Refused, RunHere
from tests.test_embedded import damage

CPU = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    """A repository with `image/1`, as `export.stages.publish` wrote it."""
    shutil.copytree(built / "repository" / "image", tmp_path / "repository" / "image")
    return tmp_path / "repository"


def lines(repository: Path, machine: Machine = CPU, level: str = "mismatch") -> list[str]:
    return [str(finding) for finding in examine(repository, machine)[1] if finding.level == level]


def only(findings: list[str]) -> str:
    assert len(findings) == 1, findings
    assert "\n" not in findings[0]
    return findings[0]


def check(repository: Path, machine: Machine, mismatch: str, warning: str = "") -> None:
    """At most one finding of each level, with this beginning; none if that is empty."""
    for level, expected in (("mismatch", mismatch), ("warning", warning)):
        found = lines(repository, machine, level)
        assert len(found) == bool(expected), found
        assert "".join(found).startswith(expected)


def edit_config(repository: Path, old: str, new: str) -> None:
    """Replaces `old`, a regular expression, in config.pbtxt."""
    path = repository / "image" / "config.pbtxt"
    text, count = re.subn(old, new, path.read_text())
    assert count
    path.write_text(text)


def test_a_published_repository_passes_and_the_table_lists_it(built: Path, run_here: RunHere) -> None:
    run = run_here("doctor", "--repository", str(built / "repository"), DEEPSEEK_BUILD=str(built / "build"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"image/1 .* onnxruntime +1 to 8 ", run.stdout)
    assert "mismatch" not in run.stdout
    assert "Triton" not in run.stdout  # a release of NVIDIA's container serves none of these


def test_json_has_what_was_found_the_engines_and_the_machine(repository: Path, run_here: RunHere) -> None:
    (repository / "image" / "1" / "model.onnx").unlink()
    run = run_here("doctor", "--repository", str(repository), "--json")
    result = json.loads(run.stdout)
    assert (run.returncode, result["holds"]) == (1, False)
    assert result["findings"][0]["where"] == "image/1"
    assert result["findings"][0]["fix"].startswith("publish it again: deepseek publish")
    assert result["engines"][0]["inputs"]["pixels"]["dtype"] == "float32"
    assert result["machine"]["ram_bytes"] > 0


@pytest.mark.parametrize(("files", "tag"), [(GPU_FILES, "26.09"), (CPU_FILES, TRITON_TAG)])
def test_engines_are_compared_with_the_release_of_the_gpu_stack(
    files: str, tag: str, tmp_path: Path, run_here: RunHere
) -> None:
    write_add_one(tmp_path / "repository")
    (tmp_path / "env").write_text(f"COMPOSE_FILE={files}\nTRITON_TAG=26.09\n")
    run = run_here(
        "doctor", "--repository", str(tmp_path / "repository"), "--env-file", str(tmp_path / "env"), "--json"
    )
    assert json.loads(run.stdout)["machine"]["triton_tag"] == tag


def says(**changes: object) -> Callable[[Path], object]:
    """Changes the manifest beside a file."""

    def change(path: Path) -> None:
        manifest = path.with_name("manifest.json")
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        (damage, "model.onnx is damaged: sha256 "),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "model.onnx is truncated: 1000 bytes, "),
        (lambda path: path.write_bytes(path.read_bytes() + b"!"), "model.onnx is longer than it was: "),
        (lambda path: path.unlink(), "model.onnx is missing; publish it again: deepseek publish"),
        (lambda path: damage(path.with_name("model.py")), "model.py is damaged: sha256 "),
        (lambda path: path.with_name("manifest.json").write_text("{}"), "manifest.json: model: missing"),
        (lambda path: path.with_name("manifest.json").unlink(), "manifest.json is missing; publish it again"),
        (says(target="tensorrt_rtx"), "is an engine of TensorRT for RTX, which Triton cannot load"),
        (says(schema_version=2), "manifest.json: schema_version: seen 2; it must be 1"),
    ],
    ids=["flipped", "truncated", "longer", "missing", "backend", "manifest", "no manifest", "another target", "schema"],
)  # fmt: skip
def test_a_damaged_engine_is_one_line(repository: Path, breakage: Callable[[Path], object], reason: str) -> None:
    breakage(repository / "image" / "1" / "model.onnx")
    assert only(lines(repository)).startswith(f"image/1: {reason}")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("max_batch_size: 8", "max_batch_size: 9", "max_batch_size 9 is above the profile's largest batch, 8; set"),
        ("max_batch_size: 8", "max_batch_size: 0", "max_batch_size 0 turns batching off; set max_batch_size: 8"),
        (r"dims: 3\n", "dims: -1 dims: 3\n", "input 'pixels' has dims [-1, 3, 32, 32]: the batch axis is listed"),
        (r"dims: 3\n", "dims: 4\n", "input 'pixels' has dims [4, 32, 32]: the engine has 3 in place of 4"),
        ("max_queue_size: 512", "", "the queue is unbounded: "),
        (r"default_timeout_microseconds: \d+", "", "requests wait in the queue without a time-out; set "),
        ("allow_timeout_override: true", "timeout_action: DELAY", "timed-out requests are delayed, not refused; set"),
        ("TYPE_FP32", "TYPE_FP16", "input 'pixels' is TYPE_FP16; set data_type: TYPE_FP32"),
        ('name: "pixels"', 'name: "pixel"', "input 'pixel' is unknown to the engine, which has pixels; rename"),
        ('name: "image"', 'name: "picture"', "name is 'picture', but the folder is 'image'; set name: \"image\""),
        ('backend: "python"', 'backend: "tensorrt"', "backend is 'tensorrt', but the engine's target is onnxruntime; set"),
        ('file: "1-pixels"', 'file: "0-pixels"', "warm-up file warmup/0-pixels is missing; publish"),
        (r"dims: 32(\s+input_data_file)", r"dims: 31\1", "warm-up file warmup/1-pixels has 12288 bytes, a row has "),
        (r"(?s)dynamic_batching \{.*?\n\}\n", "", "dynamic batching is off: every request"),
        ("^", "optimization { cuda { graph_spec { batch_size: 9 } } } ", "CUDA graphs are asked for batches of 9, but"),
        ("max_batch_size", "batch_size", 'cannot be read: 7:1 : Message type "inference.ModelConfig" has no field'),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_the_engine(repository: Path, old: str, new: str, reason: str) -> None:
    edit_config(repository, old, new)
    assert lines(repository)[0].startswith(f"image/config.pbtxt: {reason}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        *((lambda place, name=name: (place / name).mkdir(), f"{name}: a folder without config.pbtxt") for name in ("notes", ".git", "lost+found")),
        (lambda place: (place / "image" / "1").rename(place / "image" / "01"), "image: has no version directory"),  # a leading zero
    ],
)  # fmt: skip
def test_a_folder_that_triton_does_not_load_is_a_mismatch(
    repository: Path, change: Callable[[Path], object], reason: str
) -> None:
    change(repository)
    assert only(lines(repository)).startswith(reason)


def test_a_version_policy_that_names_no_version_is_a_mismatch(repository: Path) -> None:
    (repository / "image" / "1" / "config.pbtxt").unlink()  # else the version is served with its own
    edit_config(repository, "versions: 1", "versions: 7")
    assert only(lines(repository)).startswith(
        "image/config.pbtxt: its version_policy names no version that is here (1)"
    )


def test_a_published_model_that_lost_its_configuration_is_not_moved_away(repository: Path) -> None:
    write_add_one(repository)
    (repository / "image" / "config.pbtxt").unlink()
    assert "publish it again: deepseek publish --model image " in only(lines(repository))


@pytest.mark.parametrize("name", ["config.pbtxt", "manifest.json"])
def test_a_file_of_another_user_is_to_be_made_readable(
    repository: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    opens = Path.open

    def refuse(path: Path, *how: Any, **more: Any) -> Any:
        if path.name == name:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opens(path, *how, **more)

    monkeypatch.setattr(Path, "open", refuse)  # read_text and read_bytes call it
    assert only(lines(repository)).endswith("make it readable")


def test_a_damaged_older_version_is_a_warning(repository: Path) -> None:
    shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    edit_config(repository, "versions: 1", "versions: 2")
    damage(repository / "image" / "1" / "model.onnx")
    assert lines(repository) == []
    warning = only(lines(repository, level="warning"))
    assert warning.startswith("image/1: model.onnx is damaged")
    assert warning.endswith(f"no rollback goes to it; it may be removed: rm -r '{repository / 'image' / '1'}'")


def test_a_model_without_a_manifest_is_not_checked_and_fails_only_a_strict_doctor(
    repository: Path, run_here: RunHere
) -> None:
    write_add_one(repository)
    assert lines(repository) == []
    assert only(lines(repository, level="warning")).startswith("add_one: not checked: it has no manifest.json")
    command = ("doctor", "--repository", str(repository))
    assert [run_here(*command, *flags).returncode for flags in ((), ("--strict",))] == [0, 1]


def preflight(repository: Path, flags: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the doctor like a container's entrypoint: tritonserver starts only after `&&`."""
    step = f"{sys.executable} -m cli doctor --repository {repository} --preflight {flags} && echo tritonserver"
    return subprocess.run(["sh", "-c", step], capture_output=True, text=True)


def test_preflight_lets_triton_start_or_says_why_not(repository: Path) -> None:
    good = preflight(repository)
    assert (good.returncode, good.stdout, good.stderr) == (0, "tritonserver\n", "")
    damage(repository / "image" / "1" / "model.onnx")
    bad = preflight(repository)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (1, "", 1)
    assert bad.stderr.startswith("mismatch  image/1: model.onnx is damaged")


def test_a_model_or_repository_that_is_not_there_is_one_line(
    repository: Path, tmp_path: Path, refused: Refused
) -> None:
    with pytest.raises(InputError, match=r"no model 'nosuch' in .*; it has image"):
        examine(repository, CPU, model="nosuch")
    refused("doctor", "--repository", str(tmp_path / "nosuch"))


def test_it_imports_no_package_that_the_images_lack() -> None:
    seen = "import sys, serving.doctor.doctor; print({'cryptography', 'onnx', 'torch'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True).stdout == "set()\n"

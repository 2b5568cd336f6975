"""The doctor on real engines: intact, damaged, truncated, renamed, and built for another batch or chip."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.spec import DeploymentSpec, FileDigest, InputError, PublishedManifest
from deepseek.spec.files.measured_batches import BatchingPlan, BatchTime, MeasuredBatches
from deepseek.spec.machine.cpu import Cpu
from deepseek.spec.machine.gpus import Gpu
from export.publishing.triton_config import config_text, model_config
from export.runtimes.tensorrt_engine import engine_from_onnx, library_prints_to_stderr, tensorrt_module
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.flags import engine_flags
from serving.embedded.wheel import parts
from tests.conftest import RunHere, write_add_one
from tests.test_embedded import damage

IMAGE = DeploymentSpec.load("tests/models/image")
H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", driver="580.95.05", memory_bytes=80 << 30)
CPU = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
GPU_HOST = replace(CPU, gpus=(H100,), docker=("nvidia", "runc"))
TRITONS = replace(CPU, gpus=(H100,), in_container=True, tensorrt="11.2.1")  # the server's container of 26.10


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    """A repository with `image/1`, as `export.stages.publish` wrote it."""
    shutil.copytree(built / "repository" / "image", tmp_path / "repository" / "image")
    return tmp_path / "repository"


@pytest.fixture(scope="module")
def rtx_plan(built: Path) -> bytes:
    """A real plan: the fp16 graph of `image`, compiled ahead of time by TensorRT for RTX."""
    pytest.importorskip("tensorrt_rtx")
    with library_prints_to_stderr():
        source = built / "build" / "image" / "fp16" / "model.onnx"
        plan, _ = engine_from_onnx(tensorrt_module("tensorrt_rtx"), source, IMAGE)
    return plan


@pytest.fixture
def on_gpu(repository: Path, rtx_plan: bytes) -> Path:
    """The same repository as if built with TARGET=tensorrt: TensorRT 11.2.1.6 of 26.10, compute capability 9.0."""
    # No GPU, no TensorRT plan: it is the RTX one under TensorRT's tag and version, as its first 28 bytes hold them.
    write_tensorrt_version(repository / "image", b"ptrt" + rtx_plan[4:24] + bytes([11, 2, 1, 6]) + rtx_plan[28:])
    return repository


def write_tensorrt_version(model: Path, plan: bytes) -> None:
    """Makes version 1 of a model an engine of TensorRT."""
    folder = model / "1"
    manifest = PublishedManifest.load(folder / "manifest.json")
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.plan").write_bytes(plan)
    changed = {
        "target": "tensorrt",
        "compute_capability": "9.0",
        "versions": {"tensorrt": "11.2.1.6", "triton_tag": "26.10"},
        "files": {"model.plan": FileDigest.of(folder / "model.plan")},
    }
    (folder / "manifest.json").write_text(manifest.model_copy(update=changed).model_dump_json())
    (model / "config.pbtxt").write_text(config_text(model_config(IMAGE, "fp16", "tensorrt", {})))


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


def test_json_has_what_was_found_the_engines_and_the_machine(repository: Path, run_here: RunHere) -> None:
    (repository / "image" / "1" / "model.onnx").unlink()
    run = run_here("doctor", "--repository", str(repository), "--json")
    result = json.loads(run.stdout)
    assert (run.returncode, result["holds"]) == (1, False)
    assert result["findings"][0]["where"] == "image/1"
    assert result["findings"][0]["fix"].startswith("publish it again: deepseek publish")
    assert result["engines"][0]["inputs"]["pixels"]["dtype"] == "float32"
    assert result["machine"]["ram_bytes"] > 0


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


def test_a_version_policy_that_names_no_version_is_a_mismatch(repository: Path) -> None:
    (repository / "image" / "1" / "config.pbtxt").unlink()  # else the version is served with its own
    edit_config(repository, "versions: 1", "versions: 7")
    assert only(lines(repository)).startswith(
        "image/config.pbtxt: its version_policy names no version that is here (1)"
    )


@pytest.mark.parametrize("name", ["notes", ".git", "lost+found"])
def test_a_folder_without_a_configuration_is_a_mismatch(repository: Path, name: str) -> None:
    (repository / name).mkdir()
    assert only(lines(repository)).startswith(f"{name}: a folder without config.pbtxt")


def test_a_published_model_that_lost_its_configuration_is_not_moved_away(repository: Path) -> None:
    write_add_one(repository)
    (repository / "image" / "config.pbtxt").unlink()
    assert "publish it again: deepseek publish --model image " in only(lines(repository))


def test_a_model_without_versions(repository: Path) -> None:
    (repository / "image" / "1").rename(repository / "image" / "01")  # Triton leaves it out: a leading zero
    assert only(lines(repository)).startswith("image: has no version directory")


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


def test_a_wheel_that_make_serve_needs_is_a_warning(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.embedded.wheel.WHEEL", "no-such-wheel")
    missing = replace(CPU, no_embedded=Machine.detect().no_embedded)
    warning = only(lines(repository, missing, level="warning"))
    assert warning.startswith("make serve: no-such-wheel is not installed; install it with: pip install --no-deps")
    assert lines(repository, missing) == []


@pytest.mark.parametrize(
    "lost",
    ["pytriton/tritonserver/bin/tritonserver", "nvidia_pytriton.libs", "pytriton/tritonserver/python_backend_stubs"],
)
def test_a_wheel_without_a_part_of_it_is_to_be_installed_again(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = f"pytriton/tritonserver/python_backend_stubs/{python}/triton_python_backend_stub"
    for file in (
        "pytriton/tritonserver/bin/tritonserver",
        "pytriton/tritonserver/backends/python/x",
        "nvidia_pytriton.libs/x",
        stub,
    ):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).touch()
    wheel = SimpleNamespace(version="0.7.0", locate_file=tmp_path.joinpath)
    monkeypatch.setattr("serving.embedded.wheel.importlib.metadata.distribution", lambda name: wheel)
    assert parts()[-1] == tmp_path / stub
    (tmp_path / lost).rename(tmp_path / "moved")
    damaged = replace(CPU, no_embedded=Machine.detect().no_embedded)
    assert only(lines(repository, damaged, level="warning")) == (
        f"make serve: nvidia-pytriton 0.7.0 is damaged: {tmp_path / lost} is missing; install it again: "
        "pip install --no-deps --force-reinstall nvidia-pytriton; docker compose up does not need it"
    )


def test_a_damaged_older_version_is_a_warning(repository: Path) -> None:
    shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    edit_config(repository, "versions: 1", "versions: 2")
    damage(repository / "image" / "1" / "model.onnx")
    assert lines(repository) == []
    warning = only(lines(repository, level="warning"))
    assert warning.startswith("image/1: model.onnx is damaged")
    assert warning.endswith(f"no rollback goes to it; it may be removed: rm -r '{repository / 'image' / '1'}'")


def test_a_model_without_a_manifest_is_not_checked(repository: Path) -> None:
    write_add_one(repository)
    assert lines(repository) == []
    assert only(lines(repository, level="warning")).startswith("add_one: not checked: it has no manifest.json")


def edit_manifest(repository: Path, **changes: object) -> None:
    says(**changes)(repository / "image" / "1" / "model")


def host(**changes: Any) -> Machine:
    return replace(GPU_HOST, **changes)


def gpu(**changes: Any) -> tuple[Gpu]:
    return (replace(H100, **changes),)


T4 = replace(H100, name="Tesla T4", compute_capability="7.5")
SMALL, LARGE = gpu(memory_bytes=1 << 20), gpu(memory_bytes=1 << 30)
TWO_MIB = {"size_bytes": 2 << 20}
NATIVE = {"versions": {"tensorrt": "11.2.1.6"}}
COMPATIBLE = {"settings": {"hardware_compatibility": "ampere_plus", "version_compatible": True}}
TOO_SMALL = "GPU memory: GPU 0 (NVIDIA H100 80GB HBM3 9.0) has 1.00 MiB, the weights of image alone take"
REBUILD = "rebuild it for this machine: make engine MODEL=image TARGET=tensorrt TRITON_TAG="


@pytest.mark.parametrize(
    ("manifest", "group", "machine", "mismatch", "warning"),
    [
        ({}, "", host(), "", ""),
        ({}, "", TRITONS, "", ""),
        ({}, "", host(gpus=(T4,)), "image/1: was built for compute capability 9.0, this machine has Tesla T4 7.5; rebuild it for this machine", ""),
        ({}, "", host(gpus=()), "image/1: needs a GPU of compute capability 9.0, but nvidia-smi shows none; give it a GPU", ""),
        ({}, "", host(gpus=(T4, H100)), "image/1: was built for compute capability 9.0, which GPU 0 (Tesla T4 7.5) cannot run; set gpus: [1] in", ""),
        ({}, "gpus: 1", host(gpus=(T4, H100)), "", "image/1: was built for compute capability 9.0: GPU 0 (Tesla T4 7.5) will not serve it; GPU 1 will"),
        ({}, "gpus: 1", host(), "image/1: instance_group names GPU 1, but this machine has 1 GPU;", ""),
        (TWO_MIB, "", host(gpus=SMALL), TOO_SMALL, ""),
        (TWO_MIB, "", host(gpus=SMALL + LARGE), TOO_SMALL, ""),
        (TWO_MIB, "gpus: 1", host(gpus=SMALL + LARGE), "", ""),
        ({}, "", host(gpus=gpu(driver="535.183.01")), "", "driver: NVIDIA H100 80GB HBM3: 535.183.01 is older"),
        ({}, "", host(docker=None), "Docker: no Docker engine answers", ""),
        ({}, "", host(docker=("runc",)), "Docker: has only the runtimes runc, so containers see no GPU; install", ""),
        ({}, "", host(triton_tag="26.11"), "image/1: was built in the container of 26.10, but Triton will be 26.11; rebuild", ""),
        # Only Triton's container has the TensorRT that Triton loads; one on the host changes nothing.
        ({}, "", host(tensorrt="11.4.0"), "", ""),
        ({}, "", host(tensorrt="11.2.1", triton_tag="26.11"), "image/1: was built in the container of 26.10, but Triton", ""),
        (NATIVE, "", host(tensorrt="11.2.1"), "", f"image/1: was built by TensorRT 11.2.1.6 outside the containers; only Triton 26.10 itself can tell at start-up if it loads; {REBUILD}26.10"),
        ({}, "", replace(TRITONS, tensorrt="11.3.0"), f"image/1: was built by TensorRT 11.2.1.6, this container has 11.3.0; {REBUILD}26.10", ""),
        ({}, "", replace(TRITONS, triton_tag="26.11"), "", ""),
        ({}, "", replace(TRITONS, triton_tag="26.11", tensorrt=None), "image/1: was built in the container of 26.10, but Triton", ""),
        ({}, "", replace(TRITONS, triton_tag="26.05"), "TRITON_TAG: seen 26.05; 26.08 or newer", ""),
        (COMPATIBLE, "", replace(TRITONS, gpus=gpu(compute_capability="10.0"), tensorrt="11.3.0"), "", ""),
        (COMPATIBLE, "", replace(TRITONS, gpus=(T4,)), "image/1: was built for compute capability 9.0", ""),
        (COMPATIBLE, "", host(triton_tag="26.11"), "", "image/1: was built by TensorRT 11.2.1.6 in the container of 26.10; only Triton 26.11 itself can tell"),
        (COMPATIBLE, "", host(triton_tag="26.09"), "image/1: was built in the container of 26.10, but Triton will be 26.09", ""),
    ],
)  # fmt: skip
def test_an_engine_of_tensorrt_needs_the_gpu_and_release_that_it_was_built_for(
    on_gpu: Path, manifest: dict[str, Any], group: str, machine: Machine, mismatch: str, warning: str
) -> None:
    edit_manifest(on_gpu, **manifest)
    edit_config(on_gpu, "kind: KIND_GPU", f"kind: KIND_GPU {group}")
    check(on_gpu, machine, mismatch, warning)


def test_a_flag_allows_version_compatible_engines_only_if_one_is_served(repository: Path) -> None:
    assert engine_flags(repository) == []
    edit_manifest(repository, settings={"version_compatible": True})
    assert engine_flags(repository) == ["--backend-config=tensorrt,version-compatible=true"]
    shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    edit_config(repository, "versions: 1", "versions: 2")
    says(settings={})(repository / "image" / "2" / "model.onnx")
    assert engine_flags(repository) == []  # the other one is only kept
    edit_config(repository, "max_batch_size", "batch_size")
    with pytest.raises(InputError, match=r"image/\S*config.pbtxt cannot be read: "):
        engine_flags(repository)


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (lambda plan: plan, "model.plan is an engine of TensorRT for RTX 1."),
        (lambda plan: b"ptrt" + plan[4:24] + bytes([10, 16, 1, 0]) + plan[28:], "model.plan was built by TensorRT 10.16."),
        (lambda plan: b"ONNX" + plan[4:], "its target is tensorrt, but it has no TensorRT model.plan"),
        # The rest of the header is not documented: a wrong guess would keep a good engine from being served.
        (lambda plan: b"ptrt" + b"\xff" * 20 + bytes([11, 2, 1, 6]) + plan[28:], ""),
    ],
    ids=["rtx", "version", "no-plan", "unknown bytes"],
)  # fmt: skip
def test_a_plan_is_known_by_its_header(
    repository: Path, rtx_plan: bytes, plan: Callable[[bytes], bytes], reason: str
) -> None:
    write_tensorrt_version(repository / "image", plan(rtx_plan))
    check(repository, GPU_HOST, f"image/1: {reason}" if reason else "")


EPYC = Cpu(model="EPYC", cores=2)
MEASURED = MeasuredBatches(
    precision="fp32", instances=2, threads=1, at_once=2, cpu=EPYC, times=(BatchTime(rows=1, ms=3.0),)
)
PLAN = BatchingPlan(queue_timeout_ms=194, max_queue_size=259, reasons={}, measured=MEASURED).model_dump(mode="json")


@pytest.mark.parametrize(
    ("provider", "machine", "mismatch", "warning"),
    [
        ("cpu", replace(CPU, onnxruntime=None), "image/1: ONNX Runtime cannot be imported here; ", ""),
        ("migraphx", CPU, "image/1: needs the execution provider 'migraphx', ONNX Runtime here has cpu", ""),
        ("cpu", replace(CPU, ram_bytes=1 << 10), "RAM: this machine has 1.0 KiB, the weights of image alone take", ""),
        ("cpu", replace(CPU, cpu=EPYC), "", ""),
        ("cpu", replace(CPU, cpu=replace(EPYC, cores=8)), "", "image/1: its batching and queue follow from batches measured on EPYC, 2 cores; this machine has EPYC, 8 cores; measure here: make engine MODEL=image TARGET=onnxruntime"),
    ],
)  # fmt: skip
def test_an_engine_of_onnxruntime_needs_its_provider_memory_and_the_measured_cpu(
    repository: Path, provider: str, machine: Machine, mismatch: str, warning: str
) -> None:
    edit_manifest(repository, batching=PLAN)
    edit_config(repository, r'string_value: "cpu"', f'string_value: "{provider}"')
    check(repository, machine, mismatch, warning)


def test_a_strict_doctor_fails_over_a_warning(repository: Path, run_here: RunHere) -> None:
    write_add_one(repository)
    assert run_here("doctor", "--repository", str(repository)).returncode == 0
    assert run_here("doctor", "--repository", str(repository), "--strict").returncode == 1


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
    repository: Path, tmp_path: Path, run_here: RunHere
) -> None:
    with pytest.raises(InputError, match=r"no model 'nosuch' in .*; it has image"):
        examine(repository, CPU, model="nosuch")
    run = run_here("doctor", "--repository", str(tmp_path / "nosuch"))
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)

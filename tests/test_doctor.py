"""The doctor on real engines: intact, damaged, truncated, renamed, and built for another batch or chip."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from deepseek.spec import DeploymentSpec, FileDigest, InputError, PublishedManifest
from deepseek.spec.cpu import Cpu
from deepseek.spec.files.measured_batches import BatchingPlan, BatchTime, MeasuredBatches
from deepseek.spec.gpus import Gpu
from export.runtimes.tensorrt_engine import engine_from_onnx, library_prints_to_stderr, tensorrt_module
from export.triton_config import config_text, model_config
from serving.doctor.examine import examine
from serving.doctor.machine import Machine
from serving.embedded.flags import engine_flags
from tests.conftest import run_module, write_add_one
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


def edit_config(repository: Path, old: str, new: str) -> None:
    """Replaces `old`, a regular expression, in config.pbtxt."""
    path = repository / "image" / "config.pbtxt"
    text, count = re.subn(old, new, path.read_text())
    assert count
    path.write_text(text)


def test_what_export_published_fits_and_the_table_says_so(built: Path) -> None:
    run = run_module("cli", "doctor", "--repository", str(built / "repository"), DEEPSEEK_BUILD=str(built / "build"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"image/1 .* onnxruntime +1 to 8 ", run.stdout)
    assert "mismatch" not in run.stdout


def test_json_has_what_was_found_the_engines_and_the_machine(repository: Path) -> None:
    (repository / "image" / "1" / "model.onnx").unlink()
    run = run_module("cli", "doctor", "--repository", str(repository), "--json")
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
def test_an_engine_that_is_not_what_was_published_is_one_line(
    repository: Path, breakage: Callable[[Path], object], reason: str
) -> None:
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
        ("versions: 1", "versions: 7", "its version_policy names no version that is here (1): nothing is served"),
        ("max_batch_size", "batch_size", 'cannot be read: 7:1 : Message type "inference.ModelConfig" has no field'),
    ],
)  # fmt: skip
def test_a_configuration_that_does_not_fit_the_engine(repository: Path, old: str, new: str, reason: str) -> None:
    edit_config(repository, old, new)
    assert lines(repository)[0].startswith(f"image/config.pbtxt: {reason}")


@pytest.mark.parametrize("name", ["notes", ".git", "lost+found"])
def test_a_folder_that_is_no_model_keeps_triton_from_starting(repository: Path, name: str) -> None:
    (repository / name).mkdir()
    assert only(lines(repository)).startswith(f"{name}: a folder without config.pbtxt")


def test_a_model_without_versions(repository: Path) -> None:
    (repository / "image" / "1").rename(repository / "image" / "01")  # Triton leaves it out: a leading zero
    assert only(lines(repository)).startswith("image: has no version directory")


def test_what_is_only_kept_is_a_warning(repository: Path) -> None:
    shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    edit_config(repository, "versions: 1", "versions: 2")
    damage(repository / "image" / "1" / "model.onnx")
    assert lines(repository) == []
    assert only(lines(repository, level="warning")).startswith("image/1: model.onnx is damaged")


def test_a_model_of_somebody_else_is_left_to_triton(repository: Path) -> None:
    write_add_one(repository)
    assert lines(repository) == []
    assert only(lines(repository, level="warning")).startswith("add_one: not checked: it has no manifest.json")


def test_an_engine_of_tensorrt_fits_the_gpu_and_release_that_it_was_built_for(on_gpu: Path) -> None:
    for machine in (GPU_HOST, TRITONS):
        assert lines(on_gpu, machine) == lines(on_gpu, machine, "warning") == []


T4 = replace(H100, name="Tesla T4", compute_capability="7.5")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpus": (T4,)}, "image/1: was built for compute capability 9.0, this machine has Tesla T4 7.5; rebuild it for this machine"),
        ({"gpus": ()}, "image/1: needs a GPU of compute capability 9.0, but nvidia-smi shows none; give it a GPU"),
        ({"triton_tag": "26.11"}, "image/1: was built in the container of 26.10, but Triton will be 26.11; rebuild"),
        ({"in_container": True, "triton_tag": "26.11"}, "image/1: was built in the container of 26.10, but Triton"),
        ({"in_container": True, "triton_tag": "26.05", "tensorrt": "11.2.1"}, "TRITON_TAG: seen 26.05; 26.08 or newer"),
        ({"gpus": (replace(H100, memory_bytes=1 << 20),)}, "GPU memory: GPU 0 (NVIDIA H100 80GB HBM3 9.0) has 1.00 MiB, the weights of image alone take"),
        ({"docker": None}, "Docker: no Docker engine answers"),
        ({"docker": ("runc",)}, "Docker: has only the runtimes runc, so containers see no GPU; install"),
    ],
    ids=["chip", "no-gpu", "tag", "tag-of-the-container", "old-tag", "gpu-memory", "no-docker", "no-runtime"],
)  # fmt: skip
def test_an_engine_of_tensorrt_on_a_machine_that_it_does_not_fit(
    on_gpu: Path, change: dict[str, object], reason: str
) -> None:
    if reason.startswith("GPU memory"):
        edit_manifest(on_gpu, size_bytes=2 << 20)
    assert only(lines(on_gpu, replace(GPU_HOST, **change))).startswith(reason)  # type: ignore[arg-type]


def test_each_gpu_that_loads_an_engine_needs_the_memory_and_no_other(on_gpu: Path) -> None:
    edit_manifest(on_gpu, size_bytes=2 << 20)
    small, large = replace(H100, memory_bytes=1 << 20), replace(H100, memory_bytes=1 << 30)
    told = "GPU memory: GPU 0 (NVIDIA H100 80GB HBM3 9.0) has 1.00 MiB, the weights of image alone take"
    assert only(lines(on_gpu, replace(GPU_HOST, gpus=(small, large)))).startswith(told)
    edit_config(on_gpu, "kind: KIND_GPU", "kind: KIND_GPU gpus: 1")
    assert lines(on_gpu, replace(GPU_HOST, gpus=(small, large))) == []


def test_in_a_machine_with_several_kinds_of_gpu_the_engine_is_loaded_only_where_it_runs(on_gpu: Path) -> None:
    mixed = replace(GPU_HOST, gpus=(T4, H100))
    wrong = "image/1: was built for compute capability 9.0, which GPU 0 (Tesla T4 7.5) cannot run; set gpus: [1] in"
    assert only(lines(on_gpu, mixed)).startswith(wrong)
    edit_config(on_gpu, "kind: KIND_GPU", "kind: KIND_GPU gpus: 1")
    assert lines(on_gpu, mixed) == []
    told = "image/1: was built for compute capability 9.0: GPU 0 (Tesla T4 7.5) will not serve it; GPU 1 will"
    assert only(lines(on_gpu, mixed, "warning")) == told
    assert only(lines(on_gpu, GPU_HOST)).startswith("image/1: instance_group names GPU 1, but this machine has 1 GPU;")


def test_an_old_driver_is_a_warning(on_gpu: Path) -> None:
    machine = replace(GPU_HOST, gpus=(replace(H100, driver="535.183.01"),))
    assert lines(on_gpu, machine) == []
    assert only(lines(on_gpu, machine, "warning")).startswith("driver: NVIDIA H100 80GB HBM3: 535.183.01 is older")


def edit_manifest(repository: Path, **changes: object) -> None:
    says(**changes)(repository / "image" / "1" / "model")


def test_in_tritons_container_its_own_tensorrt_counts(on_gpu: Path) -> None:
    wrong = "image/1: was built by TensorRT 11.2.1.6, this container has 11.3.0; rebuild it for this machine: make engine MODEL=image"
    assert only(lines(on_gpu, replace(TRITONS, tensorrt="11.3.0"))).startswith(wrong)
    assert lines(on_gpu, replace(TRITONS, triton_tag="26.11")) == []  # another release with the same TensorRT


@pytest.mark.parametrize("installed", [None, "11.2.1", "11.4.0"])
def test_a_hosts_own_tensorrt_neither_clears_nor_condemns_an_engine(on_gpu: Path, installed: str | None) -> None:
    host = replace(GPU_HOST, tensorrt=installed)
    assert lines(on_gpu, host) == lines(on_gpu, host, "warning") == []
    assert "Triton will be 26.11" in only(lines(on_gpu, replace(host, triton_tag="26.11")))
    edit_manifest(on_gpu, versions={"tensorrt": "11.2.1.6"})  # as of NATIVE=1
    native = "image/1: was built by TensorRT 11.2.1.6 outside the containers; only Triton 26.10 itself can tell at start-up if it loads; "
    assert lines(on_gpu, host) == []
    assert only(lines(on_gpu, host, "warning")).startswith(native)
    assert only(lines(on_gpu, host, "warning")).endswith("make engine MODEL=image TARGET=tensorrt TRITON_TAG=26.10")


def test_an_engine_that_is_compatible_with_newer_hardware_and_software_fits_them(on_gpu: Path) -> None:
    edit_manifest(on_gpu, settings={"hardware_compatibility": "ampere_plus", "version_compatible": True})
    blackwell = replace(TRITONS, gpus=(replace(H100, compute_capability="10.0"),), tensorrt="11.3.0")
    assert lines(on_gpu, blackwell) == []
    assert "compute capability" in only(lines(on_gpu, replace(blackwell, gpus=(T4,))))


def test_triton_is_told_of_a_version_compatible_engine_where_it_serves_one(repository: Path) -> None:
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


def test_nothing_of_a_plan_but_its_kind_and_its_version_is_read(on_gpu: Path, rtx_plan: bytes) -> None:
    """The rest of the header is not documented, and a wrong guess would keep a good engine from being served."""
    unknown = b"ptrt" + b"\xff" * 20 + bytes([11, 2, 1, 6]) + rtx_plan[28:]
    write_tensorrt_version(on_gpu / "image", unknown)
    assert lines(on_gpu, GPU_HOST) == []


def test_outside_a_later_container_is_only_warned_of_where_the_engine_is_version_compatible(on_gpu: Path) -> None:
    edit_manifest(on_gpu, settings={"version_compatible": True})
    later, earlier = (replace(GPU_HOST, triton_tag=tag) for tag in ("26.11", "26.09"))
    assert lines(on_gpu, later) == []
    assert "in the container of 26.10; only Triton 26.11 itself can tell" in only(lines(on_gpu, later, "warning"))
    assert "Triton will be 26.09" in only(lines(on_gpu, earlier))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (lambda plan: plan, "model.plan is an engine of TensorRT for RTX 1."),
        (lambda plan: b"ptrt" + plan[4:24] + bytes([10, 16, 1, 0]) + plan[28:], "model.plan was built by TensorRT 10.16."),
        (lambda plan: b"ONNX" + plan[4:], "its target is tensorrt, but it has no TensorRT model.plan"),
    ],
    ids=["rtx", "version", "no-plan"],
)  # fmt: skip
def test_a_plan_is_known_by_its_header(
    repository: Path, rtx_plan: bytes, plan: Callable[[bytes], bytes], reason: str
) -> None:
    write_tensorrt_version(repository / "image", plan(rtx_plan))
    assert only(lines(repository, GPU_HOST)).startswith(f"image/1: {reason}")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"onnxruntime": None}, "image/1: ONNX Runtime cannot be imported here; "),
        ({"ram_bytes": 1 << 10}, "RAM: this machine has 0.00 MiB, the weights of image alone take"),
    ],
    ids=["onnxruntime", "ram"],
)
def test_an_engine_of_onnxruntime_on_a_machine_that_it_does_not_fit(
    repository: Path, change: dict[str, object], reason: str
) -> None:
    assert only(lines(repository, replace(CPU, **change))).startswith(reason)  # type: ignore[arg-type]


def test_an_execution_provider_that_is_not_here(repository: Path) -> None:
    edit_config(repository, r'string_value: "cpu"', 'string_value: "migraphx"')
    assert "needs the execution provider 'migraphx', ONNX Runtime here has cpu" in only(lines(repository))


def test_a_strict_doctor_fails_over_a_warning(repository: Path) -> None:
    write_add_one(repository)
    flags = ("--repository", str(repository))
    assert run_module("cli", "doctor", *flags).returncode == 0
    assert run_module("cli", "doctor", *flags, "--strict").returncode == 1


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


def test_a_model_or_repository_that_is_not_there_is_one_line(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model 'nosuch' in .*; it has image"):
        examine(repository, CPU, model="nosuch")
    run = run_module("cli", "doctor", "--repository", str(tmp_path / "nosuch"))
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)


def test_batches_measured_on_another_cpu_are_a_warning(repository: Path) -> None:
    epyc = Cpu(model="EPYC", cores=2)
    times = (BatchTime(rows=1, ms=3.0),)
    measured = MeasuredBatches(precision="fp32", instances=2, threads=1, at_once=2, cpu=epyc, times=times)
    plan = BatchingPlan(queue_timeout_ms=194, max_queue_size=259, reasons={}, measured=measured)
    says(batching=plan.model_dump(mode="json"))(repository / "image" / "1" / "model.onnx")
    assert lines(repository, replace(CPU, cpu=epyc), "warning") == []
    assert lines(repository, replace(CPU, cpu=None), "warning") == []
    assert only(lines(repository, replace(CPU, cpu=replace(epyc, cores=8)), "warning")) == (
        "image/1: its batching and queue follow from batches measured on EPYC, 2 cores; this machine has EPYC, 8 cores; "
        "measure here: make engine MODEL=image TARGET=onnxruntime"
    )

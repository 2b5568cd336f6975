"""The doctor over real engines: whole, damaged, cut short, renamed, and built for another batch or chip."""

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

from deepseek.spec import DeploymentSpec, FileDigest, InputError, PublishedManifest, TensorrtSpec
from export.engine import engine_from_onnx, library_prints_to_stderr, tensorrt_module
from export.to_triton import config_text, model_config
from serving.doctor import examine, for_embedded
from serving.machine import Disk, Gpu, Machine
from serving.repository import Finding, plan_header
from tests.conftest import run_module, write_add_one

IMAGE = DeploymentSpec.load("tests/models/image")
H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", driver="580.95.05", memory_bytes=80 << 30)
CPU = Machine(ram_bytes=16 << 30, onnxruntime=("CPUExecutionProvider",))
GPU_HOST = replace(CPU, gpus=(H100,), docker=("nvidia", "runc"))
TRITONS = replace(CPU, gpus=(H100,), in_container=True, tensorrt="11.2.1")  # the server's container of 26.10


@pytest.fixture
def repository(built: Path, tmp_path: Path) -> Path:
    """A repository with `image/1`, as `export.to_triton` wrote it."""
    shutil.copytree(built / "repository" / "image", tmp_path / "repository" / "image")
    return tmp_path / "repository"


@pytest.fixture(scope="module")
def rtx_plan(built: Path) -> bytes:
    """A real plan: the fp16 graph of `image`, compiled ahead of time by TensorRT for RTX."""
    pytest.importorskip("tensorrt_rtx")
    with library_prints_to_stderr():
        source = built / "build" / "image" / "fp16" / "model.onnx"
        plan, _ = engine_from_onnx(tensorrt_module("tensorrt_rtx"), source, IMAGE, TensorrtSpec())
    return plan


@pytest.fixture
def on_gpu(repository: Path, rtx_plan: bytes) -> Path:
    """The same repository as of TARGET=tensorrt, built by TensorRT 11.2.1.6 of 26.10 for compute capability 9.0."""
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
    """What the doctor says at one level."""
    return [str(finding) for finding in examine(repository, machine)[1] if finding.level == level]


def only(findings: list[str]) -> str:
    """The one line there is."""
    assert len(findings) == 1, findings
    assert "\n" not in findings[0]
    return findings[0]


def edit_config(repository: Path, old: str, new: str) -> None:
    """Changes config.pbtxt where it says `old`, a regular expression that ignores how the text is laid out."""
    path = repository / "image" / "config.pbtxt"
    text, count = re.subn(old, new, path.read_text())
    assert count
    path.write_text(text)


def test_what_export_published_fits_and_the_table_says_so(built: Path) -> None:
    run = run_module("serving.doctor", "--repository", str(built / "repository"), BUILD=str(built / "build"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"image/1 .* onnxruntime +1 to 8 ", run.stdout)
    assert "mismatch" not in run.stdout


def test_json_has_what_was_found_the_engines_and_the_machine(repository: Path, tmp_path: Path) -> None:
    (repository / "image" / "1" / "model.onnx").unlink()
    flags = ("--repository", str(repository), "--disk", str(tmp_path), "--json")
    run = run_module("serving.doctor", *flags)
    result = json.loads(run.stdout)
    assert (run.returncode, result["holds"]) == (1, False)
    assert result["findings"][0]["where"] == "image/1"
    assert result["findings"][0]["fix"].startswith("publish it again: python -m export.to_triton")
    assert result["engines"][0]["inputs"]["pixels"]["dtype"] == "float32"
    assert result["machine"]["ram_bytes"] > 0


def damage(path: Path) -> None:
    """Flips one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def for_rtx(path: Path) -> None:
    """Has the manifest name a target that no server loads."""
    manifest = path.with_name("manifest.json")
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"target": "tensorrt_rtx"}))


@pytest.mark.parametrize(
    ("breakage", "reason"),
    [
        (damage, "model.onnx is damaged: sha256 "),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "model.onnx is truncated: 1000 bytes, "),
        (lambda path: path.write_bytes(path.read_bytes() + b"!"), "model.onnx is longer than it was: "),
        (lambda path: path.unlink(), "model.onnx is missing; publish it again: python -m export.to_triton"),
        (lambda path: path.rename(path.with_name("net.onnx")), "model.onnx is missing, net.onnx has its content; rename"),
        (lambda path: damage(path.with_name("model.py")), "model.py is damaged: sha256 "),
        (lambda path: path.with_name("manifest.json").write_text("{}"), "manifest.json: model: missing"),
        (lambda path: path.with_name("manifest.json").unlink(), "manifest.json is missing; publish it again"),
        (for_rtx, "is an engine of TensorRT for RTX, which Triton cannot load"),
    ],
    ids=["flipped", "truncated", "longer", "missing", "renamed", "backend", "manifest", "no manifest", "another target"],
)  # fmt: skip
def test_an_engine_that_is_not_what_was_published_is_one_line(
    repository: Path, breakage: Callable[[Path], object], reason: str
) -> None:
    breakage(repository / "image" / "1" / "model.onnx")
    assert only(lines(repository)).startswith(f"image/1: {reason}")


def test_a_manifest_of_another_schema_is_refused(repository: Path) -> None:
    path = repository / "image" / "1" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    assert "manifest.json: schema_version: seen 2; it has to be 1" in only(lines(repository))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("max_batch_size: 8", "max_batch_size: 9", "max_batch_size 9 is above the profile's largest batch, 8; set"),
        ("max_batch_size: 8", "max_batch_size: 0", "max_batch_size 0 turns batching off; set max_batch_size: 8"),
        (r"dims: 3\n", "dims: -1 dims: 3\n", "input 'pixels' has dims [-1, 3, 32, 32]: the batch axis is listed"),
        (r"dims: 3\n", "dims: 4\n", "input 'pixels' has dims [4, 32, 32]: the engine has 3 where they have 4"),
        ("max_queue_size: 512", "", "the queue is unbounded: "),
        (r"default_timeout_microseconds: \d+", "", "requests wait in the queue without a time-out; set "),
        ("allow_timeout_override: true", "timeout_action: DELAY", "timed-out requests are delayed, not refused; set"),
        ("TYPE_FP32", "TYPE_FP16", "input 'pixels' is TYPE_FP16; set data_type: TYPE_FP32"),
        ('name: "pixels"', 'name: "pixel"', "input 'pixel' is not the engine's, which has pixels; rename"),
        ('name: "image"', 'name: "picture"', "name is 'picture' in a folder 'image'; set name: \"image\""),
        ('backend: "python"', 'backend: "tensorrt"', "backend is 'tensorrt', the engine's target is onnxruntime; set"),
        ('file: "1-pixels"', 'file: "0-pixels"', "warm-up file warmup/0-pixels is missing; publish"),
        ("max_batch_size", "batch_size", 'cannot be read: 2:1 : Message type "inference.ModelConfig" has no field'),
    ],
    ids=[
        "above-the-profile",
        "batching-off",
        "batch-in-dims",
        "dims",
        "unbounded",
        "no-time-out",
        "delayed",
        "type",
        "tensor-name",
        "name",
        "backend",
        "warm-up",
        "unparsable",
    ],
)
def test_a_configuration_that_does_not_fit_the_engine(repository: Path, old: str, new: str, reason: str) -> None:
    edit_config(repository, old, new)
    assert lines(repository)[0].startswith(f"image/config.pbtxt: {reason}")


def test_a_warm_up_file_of_another_size_keeps_triton_from_loading(repository: Path) -> None:
    path = repository / "image" / "warmup" / "1-pixels"
    path.write_bytes(path.read_bytes()[:-4])
    assert "warm-up file warmup/1-pixels has 12284 bytes, a row has 12288; publish" in only(lines(repository))


def test_batching_without_a_scheduler_is_off(repository: Path) -> None:
    edit_config(repository, r"dynamic_batching \{\s+default_queue_policy \{[^}]+\}\s+\}", "")
    assert only(lines(repository)).startswith("image/config.pbtxt: dynamic batching is off: every request runs alone")


@pytest.mark.parametrize("name", ["notes", ".git", "lost+found"])
def test_a_folder_that_is_no_model_keeps_triton_from_starting(repository: Path, name: str) -> None:
    (repository / name).mkdir()
    assert only(lines(repository)).startswith(f"{name}: a folder without config.pbtxt")


def test_a_model_without_versions(repository: Path) -> None:
    (repository / "image" / "1").rename(repository / "image" / "01")  # Triton leaves it out: a leading zero
    assert only(lines(repository)).startswith("image: it has no version directory")


def test_what_is_only_kept_is_a_warning(repository: Path) -> None:
    shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    damage(repository / "image" / "1" / "model.onnx")
    assert lines(repository) == []
    assert only(lines(repository, level="warning")).startswith("image/1: model.onnx is damaged")


def test_a_model_of_somebody_else_is_left_to_triton(repository: Path) -> None:
    write_add_one(repository)
    assert lines(repository) == []
    assert only(lines(repository, level="warning")).startswith("add_one: not checked: no manifest.json")


def test_an_engine_of_tensorrt_fits_the_gpu_and_release_that_it_was_built_for(on_gpu: Path) -> None:
    for machine in (GPU_HOST, TRITONS):
        assert lines(on_gpu, machine) == lines(on_gpu, machine, "warning") == []


T4 = replace(H100, name="Tesla T4", compute_capability="7.5")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpus": (T4,)}, "image/1: was built for compute capability 9.0, here is Tesla T4 7.5; build it for here: make"),
        ({"gpus": ()}, "image/1: needs a GPU of compute capability 9.0, nvidia-smi shows none; give it one"),
        ({"triton_tag": "26.11"}, "image/1: was built in the container of 26.10, Triton's is to be 26.11; build"),
        ({"in_container": True, "triton_tag": "26.11"}, "image/1: was built in the container of 26.10, Triton's is to"),
        ({"in_container": True, "triton_tag": "26.05", "tensorrt": "11.2.1"}, "TRITON_TAG: 26.05 has published vulner"),
        ({"gpus": (replace(H100, memory_bytes=1 << 20),)}, "GPU memory: 1.00 MiB here, the weights of image alone take"),
        ({"docker": None}, "Docker: no Docker engine answers"),
        ({"docker": ("runc",)}, "Docker: its runtimes are runc: containers see no GPU; install"),
    ],
    ids=["chip", "no-gpu", "tag", "tag-of-the-container", "old-tag", "gpu-memory", "no-docker", "no-runtime"],
)  # fmt: skip
def test_an_engine_of_tensorrt_on_a_machine_that_it_does_not_fit(
    on_gpu: Path, change: dict[str, object], reason: str
) -> None:
    if reason.startswith("GPU memory"):
        path = on_gpu / "image" / "1" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"size_bytes": 2 << 20}))
    assert only(lines(on_gpu, replace(GPU_HOST, **change))).startswith(reason)  # type: ignore[arg-type]


def test_an_old_driver_is_a_warning(on_gpu: Path) -> None:
    machine = replace(GPU_HOST, gpus=(replace(H100, driver="535.183.01"),))
    assert lines(on_gpu, machine) == []
    assert only(lines(on_gpu, machine, "warning")).startswith("driver: NVIDIA H100 80GB HBM3: 535.183.01 is older")


def edit_manifest(repository: Path, **changes: object) -> None:
    """Changes what the manifest of `image/1` says."""
    path = repository / "image" / "1" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_in_tritons_container_its_own_tensorrt_counts(on_gpu: Path) -> None:
    wrong = "image/1: was built by TensorRT 11.2.1.6, here is 11.3.0; build it for here: make engine MODEL=image"
    assert only(lines(on_gpu, replace(TRITONS, tensorrt="11.3.0"))).startswith(wrong)
    assert lines(on_gpu, replace(TRITONS, triton_tag="26.11")) == []  # another release with the same TensorRT


@pytest.mark.parametrize("installed", [None, "11.2.1", "11.4.0"])
def test_a_hosts_own_tensorrt_neither_clears_nor_condemns_an_engine(on_gpu: Path, installed: str | None) -> None:
    host = replace(GPU_HOST, tensorrt=installed)
    assert lines(on_gpu, host) == lines(on_gpu, host, "warning") == []
    assert "Triton's is to be 26.11" in only(lines(on_gpu, replace(host, triton_tag="26.11")))
    edit_manifest(on_gpu, versions={"tensorrt": "11.2.1.6"})  # as of NATIVE=1
    native = "image/1: was built by TensorRT 11.2.1.6 outside the containers, and the one of Triton 26.10 decides at its start; "
    assert lines(on_gpu, host) == []
    assert only(lines(on_gpu, host, "warning")).startswith(native)
    assert only(lines(on_gpu, host, "warning")).endswith("make engine MODEL=image TARGET=tensorrt TRITON_TAG=26.10")


def test_an_engine_that_is_compatible_with_newer_hardware_and_software_fits_them(on_gpu: Path) -> None:
    edit_manifest(on_gpu, settings={"hardware_compatibility": "ampere_plus", "version_compatible": True})
    blackwell = replace(TRITONS, gpus=(replace(H100, compute_capability="10.0"),), tensorrt="11.3.0")
    assert lines(on_gpu, blackwell) == []
    assert any("--backend-config=tensorrt,version-compatible=true" in line for line in lines(on_gpu, blackwell, "info"))
    assert "compute capability" in only(lines(on_gpu, replace(blackwell, gpus=(T4,))))


@pytest.mark.parametrize("served", [True, False], ids=["served", "only kept"])
def test_triton_is_told_of_a_version_compatible_engine_where_it_serves_one(repository: Path, served: bool) -> None:
    def flags() -> list[str]:
        run = run_module("serving.flags", "--repository", str(repository), "--behind-gateway")
        assert run.returncode == 0, run.stderr
        return run.stdout.splitlines()

    assert not any("backend-config" in flag for flag in flags())
    if not served:
        shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    edit_manifest(repository, settings={"version_compatible": True})
    assert ("--backend-config=tensorrt,version-compatible=true" in flags()) == served


def test_flags_over_a_configuration_that_cannot_be_read_are_one_line(repository: Path) -> None:
    edit_config(repository, "max_batch_size", "batch_size")
    run = run_module("serving.flags", "--repository", str(repository))
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith(f"error: {repository}/image/config.pbtxt cannot be read: ")


def test_outside_a_later_container_is_only_warned_of_where_the_engine_is_version_compatible(on_gpu: Path) -> None:
    edit_manifest(on_gpu, settings={"version_compatible": True})
    later, earlier = (replace(GPU_HOST, triton_tag=tag) for tag in ("26.11", "26.09"))
    assert lines(on_gpu, later) == []
    assert "in the container of 26.10, and the one of Triton 26.11 decides" in only(lines(on_gpu, later, "warning"))
    assert "Triton's is to be 26.09" in only(lines(on_gpu, earlier))


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (lambda plan: plan, "is an engine of TensorRT for RTX 1."),
        (lambda plan: b"ptrt" + plan[4:24] + bytes([10, 16, 1, 0]) + plan[28:], "was built by TensorRT 10.16.1.0, its"),
        (lambda plan: b"ptrt" + plan[4:5000], "is truncated: 5000 bytes, its header says "),
        (lambda plan: b"ONNX" + plan[4:], "is not a TensorRT plan"),
    ],
    ids=["rtx", "version", "truncated-before-it-was-published", "no-plan"],
)  # fmt: skip
def test_a_plan_is_known_by_its_header(
    repository: Path, rtx_plan: bytes, plan: Callable[[bytes], bytes], reason: str
) -> None:
    write_tensorrt_version(repository / "image", plan(rtx_plan))
    assert only(lines(repository, GPU_HOST)).startswith(f"image/1: model.plan {reason}")


def test_the_header_of_a_plan_has_its_length_and_version(rtx_plan: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(rtx_plan)
    version = tensorrt_module("tensorrt_rtx").__version__
    assert plan_header(tmp_path / "model.plan") == ("tensorrt_rtx", len(rtx_plan), version)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"onnxruntime": None}, "image/1: ONNX Runtime cannot be imported here; "),
        ({"ram_bytes": 1 << 10}, "RAM: 0.00 MiB here, the weights of image alone take"),
    ],
    ids=["onnxruntime", "ram"],
)
def test_an_engine_of_onnxruntime_on_a_machine_that_it_does_not_fit(
    repository: Path, change: dict[str, object], reason: str
) -> None:
    assert only(lines(repository, replace(CPU, **change))).startswith(reason)  # type: ignore[arg-type]


def test_an_execution_provider_that_is_not_here(repository: Path) -> None:
    edit_config(repository, r'string_value: "auto"', 'string_value: "migraphx"')
    assert "asks for the execution provider 'migraphx', ONNX Runtime here has cpu" in only(lines(repository))


def test_no_docker_is_no_mismatch_for_onnxruntime(repository: Path) -> None:
    assert lines(repository) == []
    assert any("no Docker engine answers; what is here needs none" in line for line in lines(repository, level="info"))


def test_a_slow_disk_is_a_warning(repository: Path) -> None:
    slow = replace(CPU, disk=Disk(folder="build", write_bytes_s=120e6, read_bytes_s=2e9))
    assert only(lines(repository, slow, "warning")).startswith("disk: build: 120 MB/s written, 2000 MB/s read")


def test_a_strict_doctor_fails_over_a_warning(repository: Path, tmp_path: Path) -> None:
    write_add_one(repository)
    flags = ("--repository", str(repository), "--disk", str(tmp_path))
    assert run_module("serving.doctor", *flags).returncode == 0
    assert run_module("serving.doctor", *flags, "--strict").returncode == 1


def preflight(repository: Path, flags: str = "") -> subprocess.CompletedProcess[str]:
    """As a container's entrypoint runs it: tritonserver starts only after `&&`."""
    step = f"{sys.executable} -m serving.doctor --repository {repository} --preflight {flags} && echo tritonserver"
    return subprocess.run(["sh", "-c", step], capture_output=True, text=True)


def test_preflight_lets_triton_start_or_says_why_not(repository: Path) -> None:
    good = preflight(repository)
    assert (good.returncode, good.stdout, good.stderr) == (0, "tritonserver\n", "")
    damage(repository / "image" / "1" / "model.onnx")
    bad = preflight(repository)
    assert (bad.returncode, bad.stdout, bad.stderr.count("\n")) == (1, "", 1)
    assert bad.stderr.startswith("mismatch  image/1: model.onnx is damaged")


def test_before_the_embedded_server_only_a_model_without_a_good_version_is_a_mismatch(repository: Path) -> None:
    shutil.copytree(repository / "image" / "1", repository / "image" / "2")
    damage(repository / "image" / "2" / "model.onnx")
    (repository / "notes").mkdir()  # that server leaves it out
    assert preflight(repository).returncode == 1
    older = preflight(repository, "--embedded")
    assert (older.returncode, older.stdout) == (0, "tritonserver\n")
    assert re.search(r"^warning   image/2: model.onnx is damaged", older.stderr, re.MULTILINE)
    assert "mismatch" not in older.stderr
    damage(repository / "image" / "1" / "model.onnx")
    none = preflight(repository, "--embedded")
    assert (none.returncode, none.stdout) == (1, "")
    assert [line[:18] for line in none.stderr.splitlines()] == [
        "mismatch  image/2:",
        "mismatch  image/1:",
        "warning   notes: a",
    ]


def test_what_the_machine_lacks_stays_a_mismatch_before_the_embedded_server_too(repository: Path) -> None:
    small = replace(CPU, ram_bytes=1)
    engines, findings = examine(repository, small)
    kept = for_embedded(repository, findings, engines, small)
    assert [each.where for each in kept if each.level == "mismatch"] == ["RAM"]


def test_before_nvidias_triton_the_doctor_stays_strict() -> None:
    scripts = {name: Path("docker", name).read_text() for name in ("server.sh", "server-cpu.sh")}
    assert {name: "--preflight --embedded\n" in text for name, text in scripts.items()} == {
        "server.sh": False,
        "server-cpu.sh": True,
    }


def test_a_model_or_repository_that_is_not_there_is_one_line(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model 'nosuch' in .*; it has image"):
        examine(repository, CPU, model="nosuch")
    run = run_module("serving.doctor", "--repository", str(tmp_path / "nosuch"))
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)


def test_a_finding_reads_as_one_line() -> None:
    finding = Finding(level="mismatch", where="text/2", what="is damaged", fix="publish it again")
    assert str(finding) == "text/2: is damaged; publish it again"

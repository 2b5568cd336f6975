"""The doctor on engines that need another machine: GPU, release of Triton, execution provider, memory, wheel."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deepseek.spec import DeploymentSpec, FileDigest, InputError, PublishedManifest
from deepseek.spec.command import stdout_to_stderr
from deepseek.spec.files.measured_batches import BatchingPlan, BatchTime, MeasuredBatches
from deepseek.spec.machine.cpu import Cpu
from deepseek.spec.machine.gpus import Gpu
from export.publishing.triton_config import config_text, model_config
from export.runtimes.tensorrt_engine import engine_from_onnx, tensorrt_module
from serving.doctor.machine import Machine
from serving.embedded.flags import engine_flags
from serving.embedded.wheel import parts
from tests.test_doctor import CPU, check, edit_config, lines, only, repository, says

__all__ = ["repository"]  # a fixture

IMAGE = DeploymentSpec.load("tests/models/image")
H100 = Gpu(name="NVIDIA H100 80GB HBM3", compute_capability="9.0", driver="580.95.05", memory_bytes=80 << 30)
GPU_HOST = replace(CPU, gpus=(H100,), docker=("nvidia", "runc"))
TRITONS = replace(CPU, gpus=(H100,), in_container=True, tensorrt="11.2.1")  # the server's container of 26.10


@pytest.fixture(scope="module")
def rtx_plan(built: Path) -> bytes:
    """A real plan: the fp16 graph of `image`, compiled ahead of time by TensorRT for RTX."""
    pytest.importorskip("tensorrt_rtx")
    with stdout_to_stderr():
        source = built / "build" / "image" / "fp16" / "model.onnx"
        plan, _ = engine_from_onnx(tensorrt_module("tensorrt_rtx"), source, IMAGE)
    return plan


@pytest.fixture
def on_gpu(repository: Path, rtx_plan: bytes) -> Path:
    """The same repository as if built with TARGET=tensorrt: TensorRT 11.2.1.6 of 26.10, compute capability 9.0."""
    # No GPU, no TensorRT plan: it is the RTX one under TensorRT's tag and version, as its first 28 bytes hold them.
    write_tensorrt_version(repository / "image", b"ftrt" + rtx_plan[4:24] + bytes([11, 2, 1, 6]) + rtx_plan[28:])
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
        ({}, "", host(gpus=()), "image/1: needs a GPU of compute capability 9.0, but this machine has none: nvidia-smi lists none; give it a GPU", ""),
        ({}, "", host(gpus=(T4, H100)), "image/1: was built for compute capability 9.0, which GPU 0 (Tesla T4 7.5) cannot run; set gpus: [1] in", ""),
        ({}, "gpus: 1", host(gpus=(T4, H100)), "", "image/1: was built for compute capability 9.0: GPU 0 (Tesla T4 7.5) will not serve it; GPU 1 will"),
        ({}, "gpus: 1", host(), "image/1: instance_group names GPU 1, but this machine has 1 GPU;", ""),
        (TWO_MIB, "", host(gpus=SMALL), TOO_SMALL, ""),
        (TWO_MIB, "", host(gpus=SMALL + LARGE), TOO_SMALL, ""),
        (TWO_MIB, "", host(gpus=gpu(memory_bytes=3 << 20)), TOO_SMALL.replace("1.00", "3.00") + " 4.00 MiB", ""),
        (TWO_MIB, "gpus: 1", host(gpus=SMALL + LARGE), "", ""),
        (TWO_MIB, "", host(gpus=gpu(memory_bytes=None)), "", ""),
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
        (lambda plan: b"ftrt" + plan[4:24] + bytes([10, 16, 1, 0]) + plan[28:], "model.plan was built by TensorRT 10.16."),
        (lambda plan: b"ONNX" + plan[4:], "its target is tensorrt, but it has no TensorRT model.plan"),
        # The rest of the header is not documented: a wrong guess would keep a good engine from being served.
        (lambda plan: b"ftrt" + b"\xff" * 20 + bytes([11, 2, 1, 6]) + plan[28:], ""),
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


CUDA = host(onnxruntime=("CUDAExecutionProvider", "CPUExecutionProvider"), docker=None)  # make serve needs no Docker


@pytest.mark.parametrize(
    ("machine", "mismatch", "warning"),
    [
        (CUDA, "", ""),
        (
            replace(CUDA, gpus=()),
            "image/1: needs a GPU, but this machine has none: nvidia-smi lists none; give it a GPU",
            "",
        ),
        (replace(CUDA, gpus=SMALL), TOO_SMALL + " 4.00 MiB", ""),  # 2 instances, each with its own weights
        (replace(CUDA, gpus=gpu(driver="535.183.01")), "", "driver: NVIDIA H100 80GB HBM3: 535.183.01 is older"),
        (replace(CUDA, ram_bytes=1 << 10), "", ""),
    ],
)
def test_an_engine_of_onnxruntime_on_cuda_needs_a_gpu_its_driver_and_memory(
    repository: Path, machine: Machine, mismatch: str, warning: str
) -> None:
    edit_manifest(repository, **TWO_MIB)
    edit_config(repository, r'string_value: "cpu"', 'string_value: "cuda"')
    edit_config(repository, "KIND_CPU", "KIND_GPU")
    check(repository, machine, mismatch, warning)


@pytest.mark.parametrize(("cpu", "warned"), [(replace(EPYC, model="Xeon"), True), (replace(EPYC, cores=8), False)])
def test_int8_of_another_kind_of_cpu_may_be_less_accurate(repository: Path, cpu: Cpu, warned: bool) -> None:
    edit_manifest(repository, batching=PLAN | {"measured": MEASURED.model_dump(mode="json") | {"precision": "int8"}})
    warning = f"this machine has {cpu}" + ". int8 may be less accurate on a CPU without VNNI" * warned
    check(repository, replace(CPU, cpu=cpu), "", f"image/1: its batching and queue follow from batches measured on {EPYC}; {warning}; measure here: make engine MODEL=image TARGET=onnxruntime")  # fmt: skip

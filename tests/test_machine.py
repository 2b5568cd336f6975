"""The machine as the doctor sees it: GPUs, Docker, TensorRT, Triton's release."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek.sizing import measure as sizing_measure
from deepseek.spec import InputError
from deepseek.spec.machine.cpu import Cpu, memory_bytes
from deepseek.spec.machine.gpus import matching, parse_gpus, runs_engine
from loadtests.load import measure as load_measure
from serving.doctor import machine as machine_module
from serving.doctor.machine import Machine

# What nvidia-smi prints for --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader,nounits.
NVIDIA_SMI = "NVIDIA H100 80GB HBM3, 9.0, 580.95.05, 81559\nTesla T4, 7.5, 580.95.05, 15360\n"


def test_tensorrts_version_is_found_in_its_own_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "/usr/local/tensorrt/lib" in machine_module.TENSORRT_FOLDERS
    (tmp_path / "libnvinfer.so.11.2.1").touch()
    monkeypatch.setattr(machine_module, "TENSORRT_FOLDERS", (str(tmp_path / "absent"), str(tmp_path)))
    assert Machine.detect(in_container=True).tensorrt == "11.2.1"


def test_only_gpus_of_the_engines_kind_are_named_and_none_if_all_are() -> None:
    found = parse_gpus(NVIDIA_SMI)
    assert (matching(found, "7.5", {}), matching(found[:1], "9.0", {}), matching(found, None, {})) == ([1], [], [])
    assert matching(found, "8.6", {"hardware_compatibility": "ampere_plus"}) == [0]


@pytest.mark.parametrize("settings", [{}, {"hardware_compatibility": "ampere_plus"}])
def test_a_gpu_that_does_not_tell_its_compute_capability_runs_no_engine_built_for_one(settings: dict[str, str]) -> None:
    (unknown,) = parse_gpus("NVIDIA GPU, [N/A], 580.95.05, 15360\n")
    assert not runs_engine(unknown, "8.6", settings)
    assert runs_engine(unknown, None, settings)


def test_the_doctor_keeps_what_a_failing_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    machine = Machine.detect(in_container=True)
    assert machine.gpus == ()
    assert machine.no_gpu == "nvidia-smi fails: Failed to initialize NVML: Driver/library version mismatch"


def test_gpus_are_read_from_nvidia_smi() -> None:
    assert [gpu.compute_capability for gpu in parse_gpus(NVIDIA_SMI)] == ["9.0", "7.5"]
    assert parse_gpus(NVIDIA_SMI)[0].memory_bytes == 81559 << 20
    assert parse_gpus("No devices were found\n") == ()
    (mig,) = parse_gpus("NVIDIA H100 80GB HBM3, 9.0, 580.95.05, [Insufficient Permissions]\n")
    assert (mig.compute_capability, mig.memory_bytes) == ("9.0", None)


def test_this_machine_is_seen_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_TRITON_TAG", "26.09")
    machine = Machine.detect()
    assert machine.triton_tag == "26.09"
    assert machine.gpus == ()  # tests/conftest.py hides those of a GPU host
    assert "CPUExecutionProvider" in (machine.onnxruntime or ())
    with pytest.raises(InputError, match=r"TRITON_TAG: seen '26.9'; .* YY.MM"):
        Machine.detect(triton_tag="26.9")


def test_inside_a_server_image_its_own_release_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_TRITON_TAG", "26.09")
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "26.11")
    assert Machine.detect(in_container=True).triton_tag == "26.11"
    assert Machine.detect(in_container=True, triton_tag="26.10").triton_tag == "26.10"


def test_measurements_count_the_cores_and_the_memory_that_a_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (load_measure, sizing_measure):
        monkeypatch.setattr(module, "this_cpu", lambda: Cpu(model="EPYC", cores=6))
        monkeypatch.setattr(module, "memory_bytes", lambda: 3 * 2**30)
    machine = load_measure._machine()
    assert (machine["cpu"], machine["cores"], machine["memory_gib"]) == ("EPYC", 6, 3.0)
    assert sizing_measure.instance_threads() == 3


def test_memory_is_the_least_limit_of_the_groups_that_the_process_is_in(tmp_path: Path) -> None:
    """As systemd's MemoryMax= sets one."""
    (tmp_path / "own").write_text("0::/web.slice/web.service\n")
    (tmp_path / "web.slice" / "web.service").mkdir(parents=True)
    (tmp_path / "web.slice" / "memory.max").write_text("max\n")
    (tmp_path / "web.slice" / "web.service" / "memory.max").write_text("4096000\n")
    assert memory_bytes(tmp_path, tmp_path / "own") == 4096000
    (tmp_path / "web.slice" / "memory.max").write_text("2048000\n")
    assert memory_bytes(tmp_path, tmp_path / "own") == 2048000

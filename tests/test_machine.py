"""The machine as the doctor sees it: GPUs, Docker, TensorRT, Triton's release, the disk."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from deepseek.spec import InputError
from deepseek.spec.triton_release import TRITON_TAG
from serving.machine import Machine, measure_disk, parse_gpus

# What nvidia-smi prints for --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader,nounits.
NVIDIA_SMI = "NVIDIA H100 80GB HBM3, 9.0, 580.95.05, 81559\nTesla T4, 7.5, 580.95.05, 15360\n"


def test_the_python_package_of_tensorrt_is_nothing_that_triton_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Machine.detect(in_container=True).tensorrt
    metadata = tmp_path / "tensorrt-99.1.0.dist-info" / "METADATA"  # what NATIVE=1 puts into the environment
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 99.1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Machine.detect(in_container=True).tensorrt == before


def test_the_disk_is_measured_and_nothing_stays_on_it(tmp_path: Path) -> None:
    disk = measure_disk(tmp_path / "new", size_bytes=32 << 20, limit_s=0.5)
    assert min(disk.write_bytes_s, disk.read_bytes_s) > 0
    assert list((tmp_path / "new").iterdir()) == []


def test_a_disk_that_cannot_be_written_is_one_line() -> None:
    with pytest.raises(InputError, match="/proc: cannot measure the disk"):
        measure_disk(Path("/proc"))


def test_gpus_are_read_from_nvidia_smi() -> None:
    assert [gpu.compute_capability for gpu in parse_gpus(NVIDIA_SMI)] == ["9.0", "7.5"]
    assert parse_gpus(NVIDIA_SMI)[0].memory_bytes == 81559 << 20
    assert parse_gpus("No devices were found\n") == ()


def test_this_machine_is_seen_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_TAG", "26.09")
    machine = Machine.detect()
    assert machine.triton_tag == "26.09"
    assert (machine.gpus != ()) == (shutil.which("nvidia-smi") is not None)
    assert "CPUExecutionProvider" in (machine.onnxruntime or ())
    with pytest.raises(InputError, match=r"TRITON_TAG: seen '26.9'; .* YY.MM"):
        Machine.detect(triton_tag="26.9")


def test_inside_a_server_image_its_own_release_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_TAG", "26.09")
    monkeypatch.setenv("NVIDIA_TRITON_SERVER_VERSION", "26.11")
    assert Machine.detect(in_container=True).triton_tag == "26.11"
    assert Machine.detect(in_container=True, triton_tag="26.10").triton_tag == "26.10"


def test_the_default_release_is_the_makefiles() -> None:
    assert re.findall(r"^TRITON_TAG \?= ([\d.]+)##", Path("Makefile").read_text(), re.MULTILINE) == [TRITON_TAG]

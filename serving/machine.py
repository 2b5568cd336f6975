"""What a machine has that decides whether an engine runs on it: GPUs, memory, Triton's release, disk, Docker.

Contract: `Machine` is plain data, so that the doctor can be asked about a machine that is not this one; `detect`
fills it for this one. What cannot be found out is None, never a guess.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.triton_release import TRITON_TAG, parse_tag

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    compute_capability: str
    driver: str
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Sequential speed of the file system under a folder, in bytes a second, the flush to the device included."""

    folder: str
    write_bytes_s: float
    read_bytes_s: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where engines are to run."""

    triton_tag: str = TRITON_TAG
    """Release of NVIDIA's containers, YY.MM."""
    tensorrt: str | None = None
    """Version of the system's TensorRT library: what Triton loads in its container, and nothing's on a host."""
    gpus: tuple[Gpu, ...] = ()
    ram_bytes: int
    """What processes may use in all: the machine's, or a container's limit."""
    onnxruntime: tuple[str, ...] | None = None
    """Execution providers of the installed ONNX Runtime; None where it cannot be imported."""
    docker: tuple[str, ...] | None = None
    """Runtimes of a Docker engine that answers; None without one."""
    in_container: bool = False
    """Docker and disk are then the host's concern, not ours."""
    disk: Disk | None = field(default=None)

    @classmethod
    def detect(
        cls, *, triton_tag: str | None = None, in_container: bool = False, disk_folder: Path | None = None
    ) -> Machine:
        """This machine. The tag comes from the argument, $TRITON_TAG, the container's own, else the default.

        Raises InputError for a tag that is not YY.MM, or a folder that cannot be written.
        """
        own = os.environ.get("NVIDIA_TRITON_SERVER_VERSION")  # set in NVIDIA's server images
        tag = triton_tag or (own if in_container else None) or os.environ.get("TRITON_TAG") or own or TRITON_TAG
        parse_tag(tag)
        return cls(
            triton_tag=tag,
            tensorrt=_tensorrt_version(),
            gpus=parse_gpus(_output(*_NVIDIA_SMI) or ""),
            ram_bytes=_ram_bytes(),
            onnxruntime=_onnxruntime_providers(),
            docker=None if in_container else _docker_runtimes(),
            in_container=in_container,
            disk=None if disk_folder is None else measure_disk(disk_folder),
        )


_NVIDIA_SMI = (
    "nvidia-smi",
    "--query-gpu=name,compute_cap,driver_version,memory.total",
    "--format=csv,noheader,nounits",
)


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """GPUs out of nvidia-smi's CSV, whose memory is in MiB."""
    gpus = []
    for line in text.strip().splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[3].isdigit():
            name, capability, driver, memory_mib = parts
            gpus.append(
                Gpu(name=name, compute_capability=capability, driver=driver, memory_bytes=int(memory_mib) << 20)
            )
    return tuple(gpus)


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout if run.returncode == 0 else None


def _tensorrt_version() -> str | None:
    """Of the library that Triton's backend would load in this container; a Python package brings another."""
    for folder in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/opt/tritonserver/lib"):
        for path in Path(folder).glob("libnvinfer.so.*.*.*"):
            return path.name.removeprefix("libnvinfer.so.")
    return None


def _onnxruntime_providers() -> tuple[str, ...] | None:
    try:
        import onnxruntime  # the one heavy import, and only of who asks about the machine
    except ImportError:
        return None
    return tuple(onnxruntime.get_available_providers())


def _docker_runtimes() -> tuple[str, ...] | None:
    """Names of the runtimes; a CDI device of NVIDIA's counts as its runtime."""
    text = _output("docker", "info", "--format", "{{json .}}")
    if text is None:
        return None
    try:
        information = json.loads(text)
    except json.JSONDecodeError:
        return None
    names = set(information.get("Runtimes") or ())
    if any(
        str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in information.get("DiscoveredDevices") or ()
    ):
        names.add("nvidia")
    return tuple(sorted(names))


def _ram_bytes() -> int:
    """The machine's memory, or the control group's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def measure_disk(folder: Path, *, size_bytes: int = 256 << 20, limit_s: float = 2.0) -> Disk:
    """Writes up to `size_bytes`, each block to the device, and reads back; each way stops after about `limit_s`.

    It takes at most a tenth of what is free. The figures are one short sample of a disk that others may share.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        size_bytes = max(_BLOCK_BYTES, min(size_bytes, shutil.disk_usage(folder).free // 10))
        with tempfile.TemporaryFile(dir=folder) as file:
            started = time.monotonic()
            written = sum(_write_blocks(file.fileno(), size_bytes, started + limit_s))
            write_s = time.monotonic() - started
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is what is measured
            os.lseek(file.fileno(), 0, os.SEEK_SET)
            started = time.monotonic()
            read = sum(_read_blocks(file.fileno(), started + limit_s))
            read_s = time.monotonic() - started
    except OSError as error:
        raise InputError(
            f"{folder}: cannot measure the disk there: {error.strerror}; choose another with --disk"
        ) from None
    return Disk(folder=str(folder), write_bytes_s=written / write_s, read_bytes_s=read / read_s)


def _write_blocks(descriptor: int, size_bytes: int, deadline: float) -> Iterator[int]:
    block = os.urandom(_BLOCK_BYTES)  # a file system that compresses gains nothing
    for _ in range(size_bytes // _BLOCK_BYTES):
        yield os.write(descriptor, block)
        os.fsync(descriptor)  # block by block: one flush at the end could take any time
        if time.monotonic() > deadline:
            return


def _read_blocks(descriptor: int, deadline: float) -> Iterator[int]:
    while block := os.read(descriptor, _BLOCK_BYTES):
        yield len(block)
        if time.monotonic() > deadline:
            return

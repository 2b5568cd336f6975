"""Detects this machine's GPU, its CPU and support for NVIDIA's containers. Imports nothing heavy."""

import os
import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from deepseek.spec.machine.cpu import fact
from deepseek.spec.machine.gpus import why_none
from deepseek.targets import PROVIDERS

# In the lines of `docker info` for runtimes and for CDI devices; other lines hold names of hosts and kernels.
_NVIDIA_IN_DOCKER = re.compile(r"^\s*Runtimes:.*\bnvidia\b|\bnvidia\.com/gpu\b", re.MULTILINE)


@cache
def output_of(*command: str) -> str:
    """Standard output of a command; "" if it fails or is not installed."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def gpu() -> str:
    """Name and driver version of the first NVIDIA GPU; "" if there is none."""
    if "GPU" not in output_of("nvidia-smi", "-L"):
        return ""
    lines = output_of("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "GPU"


def accelerator() -> str:
    """The GPU or NPU that an execution provider of ONNX Runtime may use; "" if there is none."""
    found = (name for name, facts in PROVIDERS.items() if facts.is_there is not None and facts.is_there())
    return gpu() or next(found, "")


def missing_for_container() -> list[str]:
    """Requirements for TensorRT builds in NVIDIA's container that this machine does not meet."""
    listed = output_of("nvidia-smi", "-L")
    missing = [] if "GPU" in listed else [f"an NVIDIA GPU ({why_none()})"]
    if shutil.which("docker") is None:
        return [*missing, "Docker (no docker on PATH)"]
    information, why = _docker_information()
    if why:
        missing.append(why)
    elif not _NVIDIA_IN_DOCKER.search(information):
        missing.append(
            "the NVIDIA runtime of Docker (docker info names none; install nvidia-container-toolkit, run "
            "sudo nvidia-ctk runtime configure --runtime=docker, and restart Docker)"
        )
    return missing


@cache
def _docker_information() -> tuple[str, str]:
    """What `docker info` prints, or why it cannot be read."""
    try:
        run = subprocess.run(["docker", "info"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return "", "a Docker engine that answers (docker info failed)"
    if "permission denied" in (run.stdout + run.stderr).lower():
        return "", "permission to use Docker (sudo usermod -aG docker $USER, then log in again)"
    return run.stdout, "" if run.returncode == 0 and run.stdout else "a Docker engine that answers (docker info failed)"


def cpu() -> str:
    """The CPU's architecture and instruction sets: results round and saturate differently on others."""
    return f"{platform.machine()} {fact(Path('/proc/cpuinfo'), 'flags', 'Features')}"


def inside_container(tag: str) -> bool:
    """Whether this process runs in the export image of that Triton release (docker/export.Dockerfile)."""
    return os.environ.get("DEEPSEEK_INSIDE_TAG") == tag

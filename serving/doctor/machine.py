"""Facts about a machine that decide whether an engine runs on it: GPUs, memory, Triton's release, Docker.

Contract: `Machine` is plain data, so the doctor can check for another machine than this one; `detect` fills it for this
one. An unknown fact is None, never a guess.
"""

import importlib.util
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from deepseek.spec import InputError
from deepseek.spec.machine.cpu import Cpu, memory_bytes, this_cpu
from deepseek.spec.machine.gpus import Gpu, gpus, why_none
from deepseek.spec.machine.triton_release import TRITON_TAG, parse_tag
from serving.embedded.wheel import parts, scratch_place

# Where NVIDIA's images have libnvinfer.so.
TENSORRT_FOLDERS = (
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/aarch64-linux-gnu",
    "/usr/local/tensorrt/lib",
    "/opt/tritonserver/lib",
)


@dataclass(frozen=True, kw_only=True)
class Machine:
    triton_tag: str = TRITON_TAG
    """Release of NVIDIA's containers, YY.MM."""
    tensorrt: str | None = None
    """Version of the system's TensorRT library, which Triton loads in its container; not used on a host."""
    gpus: tuple[Gpu, ...] = ()
    no_gpu: str = "nvidia-smi lists none"
    """Why it has none, if it has none."""
    ram_bytes: int
    """Memory that processes may use in total: the machine's, or the container's limit."""
    onnxruntime: tuple[str, ...] | None = None
    """Execution providers of the installed ONNX Runtime; None if it cannot be imported."""
    cpu: Cpu | None = None
    tokenizers: bool | None = None
    """Whether the package tokenizers, which models with `[text]` need, is installed."""
    no_embedded: str = ""
    """Why the embedded Triton cannot start."""
    docker: tuple[str, ...] | None = None
    """Runtimes of the Docker engine; None if no engine answers."""
    in_container: bool = False
    """Docker is not checked in a container: it is the host's."""

    @classmethod
    def detect(cls, *, triton_tag: str | None = None, in_container: bool = False) -> "Machine":
        """Detects this machine. The tag is the argument, $DEEPSEEK_TRITON_TAG, the container's own, or the default.

        Raises InputError for a tag that is not YY.MM.
        """
        own = os.environ.get("NVIDIA_TRITON_SERVER_VERSION")  # set in NVIDIA's server images
        tag = (
            triton_tag or (own if in_container else None) or os.environ.get("DEEPSEEK_TRITON_TAG") or own or TRITON_TAG
        )
        parse_tag(tag)
        found = gpus()
        return cls(
            triton_tag=tag,
            tensorrt=_tensorrt_version(),
            gpus=found,
            no_gpu="" if found else why_none(),
            ram_bytes=memory_bytes(),
            onnxruntime=_onnxruntime_providers(),
            cpu=this_cpu(),
            tokenizers=importlib.util.find_spec("tokenizers") is not None,
            no_embedded="" if in_container else _no_embedded(),
            docker=None if in_container else _docker_runtimes(),
            in_container=in_container,
        )


def _tensorrt_version() -> str | None:
    """Version of the library that Triton's backend loads in this container; Python packages may bring another one."""
    for folder in TENSORRT_FOLDERS:
        for path in Path(folder).glob("libnvinfer.so.*.*.*"):
            return path.name.removeprefix("libnvinfer.so.")
    return None


def _onnxruntime_providers() -> tuple[str, ...] | None:
    try:
        import onnxruntime  # heavy: imported only if needed
    except ImportError:
        return None
    return tuple(onnxruntime.get_available_providers())


def _no_embedded() -> str:
    try:
        parts()
        scratch_place()
    except InputError as error:
        return str(error)
    return ""


def _docker_runtimes() -> tuple[str, ...] | None:
    """Names of the runtimes, None if no engine answers; an NVIDIA CDI device counts as the runtime "nvidia"."""
    command = ["docker", "info", "--format", "{{json .}}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
        information = json.loads(answer)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None
    names = set(information.get("Runtimes") or ())
    devices = information.get("DiscoveredDevices") or ()
    if any(str(device.get("ID", "")).startswith("nvidia.com/gpu") for device in devices):
        names.add("nvidia")
    return tuple(sorted(names))

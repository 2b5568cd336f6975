"""The NVIDIA GPUs of this machine, and which of them run an engine of TensorRT.

Contract: `gpus` asks the driver's management library (NVML) through `nvidia-smi`, so it needs neither torch nor CUDA.
GPUs are in the order of the PCI bus; CUDA has the same order with CUDA_DEVICE_ORDER=PCI_BUS_ID, which the images set.

Example:
    [gpu.compute_capability for gpu in gpus()]      # ["9.0", "7.5"]
"""

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One line of nvidia-smi."""

    name: str
    compute_capability: str
    driver: str
    memory_bytes: int | None
    """None if the driver does not say: a container with a MIG device may not read its GPU's."""

    def __str__(self) -> str:
        return f"{self.name} {self.compute_capability}"


_QUERY = ("--query-gpu=name,compute_cap,driver_version,memory.total", "--format=csv,noheader,nounits")


def gpus() -> tuple[Gpu, ...]:
    """All GPUs of this machine; empty if there is none, or no driver."""
    try:
        # It starts each GPU that nothing uses, which takes seconds.
        run = subprocess.run(["nvidia-smi", *_QUERY], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse_gpus(run.stdout) if run.returncode == 0 else ()


def why_none() -> str:
    """Why `gpus` found none: what nvidia-smi says, such as that the driver was updated without a restart."""
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return "no nvidia-smi"
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    said = (run.stdout + run.stderr).strip().partition("\n")[0]
    return f"nvidia-smi fails: {said or f'exit code {run.returncode}'}" if run.returncode else "nvidia-smi lists none"


def parse_gpus(text: str) -> tuple[Gpu, ...]:
    """Parses nvidia-smi's CSV, which gives memory in MiB."""
    found = []
    for line in text.strip().splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4:
            name, capability, driver, memory_mib = parts
            memory_bytes = int(memory_mib) << 20 if memory_mib.isdigit() else None
            found.append(Gpu(name=name, compute_capability=capability, driver=driver, memory_bytes=memory_bytes))
    return tuple(found)


def runs_engine(gpu: Gpu, built_for: str | None, settings: Mapping[str, object]) -> bool:
    """Whether an engine built for a compute capability runs on a GPU, by TensorRT's hardware compatibility levels.

    `settings` are those of the engine's manifest. An engine whose compute capability is unknown may run anywhere. A GPU
    whose driver does not tell its own ("[N/A]") runs none of the others.
    """
    if built_for is None:
        return True
    if settings.get("hardware_compatibility") == "ampere_plus":
        major = gpu.compute_capability.partition(".")[0]
        return major.isdigit() and int(major) >= 8
    return gpu.compute_capability == built_for


def matching(found: tuple[Gpu, ...], built_for: str | None, settings: Mapping[str, object]) -> list[int]:
    """Numbers of the GPUs that run the engine, if there are others too; empty if all do, or none does."""
    numbers = [number for number, gpu in enumerate(found) if runs_engine(gpu, built_for, settings)]
    return numbers if len(numbers) < len(found) else []

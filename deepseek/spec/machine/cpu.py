"""This machine's memory, and its CPU: the model, the cores to use, and whether it is fast at int8."""

import contextlib
import os
import platform
from dataclasses import dataclass
from pathlib import Path

from deepseek.onnxruntime_session import control_group, cores


@dataclass(frozen=True, kw_only=True)
class Cpu:
    """The facts on which the time of a batch depends."""

    model: str
    """As the kernel names it."""
    cores: int
    """Cores that the process can use: its CPU affinity, capped by the quota of its control group."""

    def __str__(self) -> str:
        return f"{self.model}, {self.cores} core{'s' * (self.cores > 1)}"


def this_cpu() -> Cpu:
    return Cpu(model=cpu_model(), cores=cores())


def cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """The model's name; the architecture if the kernel gives none, as on ARM."""
    return fact(file, "model name") or platform.processor() or platform.machine()


def fact(file: Path, *keys: str) -> str:
    """The value on the first line of /proc/cpuinfo with one of these keys; "" without such a line."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")


# Flags of /proc/cpuinfo for products of 8-bit integers: VNNI and AMX on x86, dot products and i8mm on ARM.
INT8_DOT_PRODUCTS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")


def int8_instructions(file: Path = Path("/proc/cpuinfo")) -> tuple[str, ...] | None:
    """The flags of INT8_DOT_PRODUCTS that the CPU has; None if the kernel does not say."""
    flags = fact(file, "flags", "Features").split()
    return tuple(flag for flag in INT8_DOT_PRODUCTS if flag in flags) if flags else None


def has_int8_dot_products(file: Path = Path("/proc/cpuinfo")) -> bool | None:
    """Whether the CPU multiplies 8-bit integers faster than floats; None if the kernel does not say."""
    found = int8_instructions(file)
    return None if found is None else bool(found)


def memory_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Memory that processes may use in total: the machine's, or the least limit of their control groups."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = control_group(groups, own)
    second = [folder / "memory.max" for folder in (group, *group.parents)]
    for path in (*second, groups / "memory" / "memory.limit_in_bytes"):  # of versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # control groups of another version, or "max": no limit
            limits.append(int(path.read_text()))
    return min(limits)

"""Checks whether a machine has what all its engines need together: release, driver, memory, Docker.

Contract: `machine_findings` checks all engines at once; each finding is one line with one fix.
"""

from collections.abc import Iterator

from deepseek.spec.machine.triton_release import OLDEST, OLDEST_TAG, TRITON_TAG, WHY_OLDEST, parse_tag
from deepseek.targets import TARGETS
from serving.doctor.engine_checks import ServedEngine
from serving.doctor.machine import Machine
from serving.repository.checks import Finding, Level, mismatch

CUDA_13_TAG, CUDA_13_DRIVER = (25, 8), 580  # 25.08 is the first with CUDA 13, 580 the oldest driver branch for it


def machine_findings(machine: Machine, engines: list[ServedEngine]) -> list[Finding]:
    """Findings about the machine, given all engines that it has to serve."""
    on_gpu = [engine for engine in engines if engine.on_gpu]
    on_cpu = [engine for engine in engines if not engine.on_gpu]
    embedded = [engine for engine in engines if not TARGETS[engine.manifest.target].needs_gpu]
    return [
        *_check_tag(machine),
        *(_check_driver(machine) if on_gpu else ()),
        *_check_gpu_memory(machine, on_gpu),
        *_check_memory("RAM", "this machine", machine.ram_bytes, on_cpu),
        *(_check_embedded(machine) if embedded and machine.no_embedded else ()),
        *(_check_docker(machine) if len(embedded) < len(engines) and not machine.in_container else ()),
    ]


def _check_tag(machine: Machine) -> Iterator[Finding]:
    if parse_tag(machine.triton_tag) < OLDEST_TAG:
        what = f"seen {machine.triton_tag}; {OLDEST} or newer is needed: {WHY_OLDEST}"
        yield mismatch("TRITON_TAG", what, f"set TRITON_TAG={TRITON_TAG} and rebuild the engines in it")


def _check_driver(machine: Machine) -> Iterator[Finding]:
    for gpu in machine.gpus if parse_tag(machine.triton_tag) >= CUDA_13_TAG else ():
        major = gpu.driver.partition(".")[0]
        if major.isdigit() and int(major) < CUDA_13_DRIVER:
            what = (
                f"{gpu.name}: {gpu.driver} is older than {CUDA_13_DRIVER}, which CUDA 13 of {machine.triton_tag} needs"
            )
            fix = "update it; only data-centre GPUs can use an older one, with CUDA's forward compatibility"
            yield Finding(level="warning", where="driver", what=what, fix=fix)


def _check_gpu_memory(machine: Machine, engines: list[ServedEngine]) -> Iterator[Finding]:
    """Triton loads an engine on each GPU of its instance group, so every one of them needs the memory."""
    for number, gpu in enumerate(machine.gpus):
        if gpu.memory_bytes is not None:
            loaded = [engine for engine in engines if engine.loads_on(number, gpu)]
            yield from _check_memory("GPU memory", f"GPU {number} ({gpu})", gpu.memory_bytes, loaded)


def _check_memory(kind: str, place: str, have_bytes: int, engines: list[ServedEngine]) -> Iterator[Finding]:
    need_bytes = sum(engine.memory_bytes for engine in engines)
    if need_bytes > 0.8 * have_bytes:
        names = ", ".join(sorted({engine.model for engine in engines}))
        what = f"{place} has {mib(have_bytes)}, the weights of {names} alone take {mib(need_bytes)}"
        level: Level = "mismatch" if need_bytes > have_bytes else "warning"
        fix = "serve fewer models or instances here, or use a lower precision"
        yield Finding(level=level, where=kind, what=what, fix=fix)


def _check_embedded(machine: Machine) -> Iterator[Finding]:
    what, _, fix = machine.no_embedded.partition("; ")
    fix = f"{fix}; docker compose up does not need it"
    yield Finding(level="warning", where="make serve", what=what, fix=fix)


def _check_docker(machine: Machine) -> Iterator[Finding]:
    if machine.docker is None:
        yield mismatch("Docker", "no Docker engine answers; Triton's TensorRT backend needs its image", "start Docker")
    elif "nvidia" not in machine.docker:
        what = f"has only the runtimes {', '.join(machine.docker)}, so containers see no GPU"
        fix = "install nvidia-container-toolkit, run nvidia-ctk runtime configure --runtime=docker, and restart Docker"
        yield mismatch("Docker", what, fix)


def mib(value_bytes: float) -> str:
    if value_bytes < 2**20:
        return f"{value_bytes / 2**10:.1f} KiB"
    return f"{value_bytes / 2**20:,.{0 if value_bytes >= 2**24 else 2}f} MiB"

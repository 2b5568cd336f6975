"""Opens ONNX Runtime sessions on a given execution provider: CPU, CUDA, TensorRT, MIGraphX (AMD) or CANN (Ascend).

Contract: `open_session` returns a session that runs on the requested provider, or raises `ProviderError` in one line.
ONNX Runtime alone would silently fall back to the CPU if a provider is missing, cannot load its libraries or supports
no node of the graph.

`export` and the server use this module. The server has a copy beside the backend's model.py, put there by
`export.stages.publish`, so it must not import other modules of this project. It imports ONNX Runtime lazily, because
`deepseek.targets` reads PROVIDERS from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
# Optimizers whose CPU kernels are slower than the nodes they replace: without them, an encoder like MiniLM takes 0.83
# to 0.96 of the time in fp32 (docs/triton.md). Accelerators have fast kernels for them.
SLOW_ON_CPU = ("SkipLayerNormFusion", "BiasGeluFusion")


def _has_nvidia_gpu() -> bool:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _has_amd_gpu() -> bool:
    return Path("/dev/kfd").exists()  # the compute interface of AMD's driver


def _has_ascend_npu() -> bool:
    return any(Path("/dev").glob("davinci[0-9]*"))


class ProviderFacts(NamedTuple):
    """An execution provider of ONNX Runtime."""

    name: str
    """Its name in ONNX Runtime."""
    package: str
    """The package that contains it."""
    is_accelerator: bool = True
    is_nvidia: bool = False
    """Triton can place instances on its devices, and Triton's own ONNX Runtime backend has the provider."""
    is_there: Callable[[], bool] | None = None
    """Detects the hardware: a package lists its providers on any machine. None: "auto" never chooses it."""


# To add one: a row here, and its key in `Provider` of `deepseek/targets.py`.
PROVIDERS = {
    "cpu": ProviderFacts(CPU, "onnxruntime", is_accelerator=False),
    "cuda": ProviderFacts("CUDAExecutionProvider", "onnxruntime-gpu", is_nvidia=True, is_there=_has_nvidia_gpu),
    # Only by name: it compiles for minutes while the model loads.
    "tensorrt": ProviderFacts("TensorrtExecutionProvider", "onnxruntime-gpu and TensorRT 10", is_nvidia=True),
    "migraphx": ProviderFacts("MIGraphXExecutionProvider", "onnxruntime-migraphx", is_there=_has_amd_gpu),
    "cann": ProviderFacts("CANNExecutionProvider", "onnxruntime-cann", is_there=_has_ascend_npu),
}


class ProviderError(RuntimeError):
    """The graph cannot run on the requested execution provider."""


class Opened(NamedTuple):
    """A session and the provider that it runs on."""

    session: onnxruntime.InferenceSession
    provider: str
    nodes: dict[str, int]
    """Number of nodes by provider, with ONNX Runtime's names; empty if ONNX Runtime does not report it."""

    def __str__(self) -> str:
        import onnxruntime

        placed = ", ".join(f"{count} on {name}" for name, count in self.nodes.items())
        return f"ONNX Runtime {onnxruntime.__version__}, provider {self.provider}" + (
            f", nodes: {placed}" if placed else ""
        )


def control_group(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Path:
    """The folder of this process's control group of version 2; the root if it is in none."""
    with contextlib.suppress(OSError):
        return groups / own.read_text().partition("0::/")[2].split("\n")[0]
    return groups


def cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process can use: its CPU affinity, capped by the quota of its control group.

    A container with a CPU limit may run on all cores of its node, but is throttled once it has used its quota.
    """
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # "max": no quota
        quota_us, period_us = (control_group(groups, own) / "cpu.max").read_text().split()
        return min(count, max(1, math.ceil(int(quota_us) / int(period_us))))
    with contextlib.suppress(OSError, ValueError):  # control groups version 1
        quota_us, period_us = ((groups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        if int(quota_us) > 0:
            return min(count, max(1, math.ceil(int(quota_us) / int(period_us))))
    return count


def open_session(
    path: str | Path,
    options: onnxruntime.SessionOptions,
    provider: str = "auto",
    provider_options: dict[str, str] | None = None,
    device_id: int | None = None,
    left_out: Collection[str] = (),
) -> Opened:
    """Opens the graph at `path` on `provider`, a key of PROVIDERS or "auto".

    `provider_options` are passed to the provider unchanged. `device_id` is the accelerator's number, by default the
    provider's own default, 0. `left_out` are ONNX Runtime optimizers to disable; on the CPU, SLOW_ON_CPU are always
    disabled. Raises ProviderError, or ONNX Runtime's own error for a graph that it cannot load.
    """
    import onnxruntime

    chosen = choose_provider(provider)
    facts = PROVIDERS[chosen]
    if facts.is_nvidia:
        with contextlib.redirect_stdout(sys.stderr):  # it prints the libraries that it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN from pip's nvidia-* packages, if installed
    device = {} if device_id is None or not facts.is_accelerator else {"device_id": str(device_id)}
    wanted: list[Any] = [(facts.name, {**(provider_options or {}), **device})]
    if chosen == "tensorrt":
        wanted.append((PROVIDERS["cuda"].name, device))  # for nodes that TensorRT does not support
    disabled = [*left_out, *(() if facts.is_accelerator else SLOW_ON_CPU)]
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    wanted += [CPU] if facts.is_accelerator else []
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=wanted, enable_fallback=0, disabled_optimizers=disabled
        )
    except Exception as error:
        if not facts.is_accelerator:
            raise
        raise ProviderError(f"execution provider {chosen!r}: {' '.join(str(error).split())[:500]}") from None
    if facts.name not in session.get_providers():
        raise ProviderError(
            f"execution provider {chosen!r} did not start, ONNX Runtime uses {_listed(session.get_providers())}: "
            f"the device or a library that {facts.package} needs is missing (ONNX Runtime's log says which)"
        )
    nodes = _placement(session)
    if nodes and facts.name not in nodes:
        raise ProviderError(f"execution provider {chosen!r} supports no node of {path}; {_listed(nodes)} would run it")
    return Opened(session, chosen, nodes)


def choose_provider(asked: str) -> str:
    """Returns `asked` if the installed ONNX Runtime has it; for "auto", this machine's accelerator, else the CPU."""
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if asked == "auto":
        for key, facts in PROVIDERS.items():
            if facts.name in available and facts.is_there is not None and facts.is_there():
                return key
        return "cpu"
    if asked not in PROVIDERS:
        raise ProviderError(f"execution provider {asked!r} is unknown; allowed: auto, {', '.join(PROVIDERS)}")
    facts = PROVIDERS[asked]
    if facts.name not in available:
        raise ProviderError(
            f"execution provider {asked!r} is not in ONNX Runtime {onnxruntime.__version__}, which has "
            f"{_listed(available)}; install {facts.package}, or set onnxruntime.provider in deploy.toml to auto"
        )
    return asked


def _placement(session: onnxruntime.InferenceSession) -> dict[str, int]:
    placed = getattr(session, "get_provider_graph_assignment_info", None)  # missing in older versions
    return dict(Counter(part.ep_name for part in (placed() if placed else ()) for _ in part.get_nodes()))


def _listed(names: Any) -> str:
    return ", ".join(names)

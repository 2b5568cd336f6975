"""ONNX Runtime on the execution provider asked for: CPU, CUDA, TensorRT, MIGraphX (AMD) or CANN (Ascend).

Contract: `open_session` gives a session that runs where it was told to, or raises `ProviderError` in one line. ONNX
Runtime by itself goes on with the CPU, silently, where a provider is missing, cannot load its libraries or takes no
node of the graph. Used by `export` and by the server, which has a copy beside the backend's model.py
(`export.to_triton` lays it there): so it imports nothing of ours.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime

CPU = "CPUExecutionProvider"
# ONNX Runtime's own name, and the package that carries it.
PROVIDERS = {
    "cpu": (CPU, "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu and tensorrt"),
    "migraphx": ("MIGraphXExecutionProvider", "onnxruntime-migraphx"),
    "cann": ("CANNExecutionProvider", "onnxruntime-cann"),
}
# TensorRT's only by name: it compiles for minutes while the model loads.
AUTO = ("cuda", "migraphx", "cann")
# Optimizers whose kernels on the CPU are slower than the nodes they replace: an encoder like MiniLM in fp32 takes 0.83
# to 0.96 of the time without them (docs/triton.md). Accelerators have fast ones.
SLOW_ON_CPU = ("SkipLayerNormFusion", "BiasGeluFusion")


class ProviderError(RuntimeError):
    """The graph cannot run on the execution provider asked for."""


class Opened(NamedTuple):
    """A session and where it runs."""

    session: onnxruntime.InferenceSession
    provider: str
    nodes: dict[str, int]
    """Nodes of the graph by ONNX Runtime's name of the provider that runs them; empty where it does not say."""

    def __str__(self) -> str:
        placed = ", ".join(f"{count} on {name}" for name, count in self.nodes.items())
        return f"ONNX Runtime {onnxruntime.__version__}, provider {self.provider}" + (
            f", nodes: {placed}" if placed else ""
        )


def cores(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that threads are worth having for: those that we may run on, or what the control group's quota comes to.

    A container with a limit of CPU may run on all cores of its node, and is stopped once it has used its share.
    """
    count = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # no quota is no number
        folder = own.read_text().partition("0::/")[2].split("\n")[0]
        quota_us, period_us = (groups / folder / "cpu.max").read_text().split()
        return min(count, max(1, math.ceil(int(quota_us) / int(period_us))))
    with contextlib.suppress(OSError, ValueError):  # the first version of control groups
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

    `provider_options` go to the provider as they are; `device_id` is the accelerator's number, by default the
    provider's (0); `left_out` are optimizers of ONNX Runtime that this graph does without, as on the CPU each does
    without SLOW_ON_CPU. Raises ProviderError, and what ONNX Runtime raises for a graph that it cannot load.
    """
    chosen = choose_provider(provider)
    name, package = PROVIDERS[chosen]
    if chosen in ("cuda", "tensorrt"):
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            onnxruntime.preload_dlls()  # CUDA and cuDNN out of pip's nvidia-* packages, where they are
    device = {} if device_id is None or chosen == "cpu" else {"device_id": str(device_id)}
    wanted: list[Any] = [(name, {**(provider_options or {}), **device})]
    if chosen == "tensorrt":
        wanted.append((PROVIDERS["cuda"][0], device))  # for nodes that TensorRT does not take
    disabled = [*left_out, *(SLOW_ON_CPU if chosen == "cpu" else ())]
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    wanted += [] if chosen == "cpu" else [CPU]
    try:
        session = onnxruntime.InferenceSession(
            path, options, providers=wanted, enable_fallback=0, disabled_optimizers=disabled
        )
    except Exception as error:
        if chosen == "cpu":
            raise
        raise ProviderError(f"execution provider {chosen!r}: {' '.join(str(error).split())[:500]}") from None
    if name not in session.get_providers():
        raise ProviderError(
            f"execution provider {chosen!r} did not start, ONNX Runtime took {_listed(session.get_providers())}: "
            f"the device or a library that {package} needs is missing (ONNX Runtime's log says which)"
        )
    nodes = _placement(session)
    if nodes and name not in nodes:
        raise ProviderError(f"execution provider {chosen!r} takes no node of {path}; {_listed(nodes)} would run them")
    return Opened(session, chosen, nodes)


def choose_provider(asked: str) -> str:
    """`asked`, if the installed ONNX Runtime has it; for "auto" the accelerator that is there, else the CPU."""
    available = onnxruntime.get_available_providers()
    if asked == "auto":
        return next((name for name in AUTO if PROVIDERS[name][0] in available and _has_device(name)), "cpu")
    if asked not in PROVIDERS:
        raise ProviderError(f"execution provider {asked!r} is not known; allowed: auto, {', '.join(PROVIDERS)}")
    name, package = PROVIDERS[asked]
    if name not in available:
        raise ProviderError(
            f"execution provider {asked!r} is not in ONNX Runtime {onnxruntime.__version__}, which has "
            f"{_listed(available)}; install {package}, or set onnxruntime.provider in deploy.toml to auto"
        )
    return asked


def _has_device(provider: str) -> bool:
    """Whether the hardware is there: a package lists its providers on any machine."""
    if provider == "migraphx":
        return Path("/dev/kfd").exists()  # the compute interface of AMD's driver
    if provider == "cann":
        return any(Path("/dev").glob("davinci[0-9]*"))
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def _placement(session: onnxruntime.InferenceSession) -> dict[str, int]:
    """Nodes by provider."""
    told = getattr(session, "get_provider_graph_assignment_info", None)  # not in older ones
    return dict(Counter(part.ep_name for part in (told() if told else ()) for _ in part.get_nodes()))


def _listed(names: Any) -> str:
    return ", ".join(names)

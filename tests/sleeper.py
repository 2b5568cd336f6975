"""A model repository with a model that sleeps, so that its capacity is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.add_one import ADD_ONE

CONFIG = """
name: "tiny" backend: "python" max_batch_size: 1 instance_group { kind: KIND_CPU }
input { name: "x" data_type: TYPE_FP32 dims: [2] } output { name: "y" data_type: TYPE_FP32 dims: [2] }
parameters { key: "delay_s" value { string_value: "DELAY_S" } }
"""
SPEC = """
name = "tiny"
inputs.x = { dtype = "float32", shape = ["batch", 2] }
outputs.y = { dtype = "float32", shape = ["batch", 2] }
axes.batch = { min = 1, opt = 1, max = 1 }
slo = { p50_ms = 100, rate_rps = 10 }
"""


def write_sleeper(folder: Path, delay_s: float, name: str = "repository") -> Path:
    """Writes a repository whose model answers at most 1 / delay_s requests/s, with its spec and inputs beside it."""
    version = folder / name / "tiny" / "1"
    version.mkdir(parents=True)
    (version / "model.py").write_text(ADD_ONE)
    (version.parent / "config.pbtxt").write_text(CONFIG.replace("DELAY_S", str(delay_s)))
    (folder / "models" / "tiny").mkdir(parents=True, exist_ok=True)
    (folder / "models" / "tiny" / "deploy.toml").write_text(SPEC)
    rows = {f"{row:05d}/x": np.full((1, 2), row, np.float32) for row in range(20)}
    np.savez(folder / "inputs.npz", **rows)  # type: ignore[arg-type]
    return folder / name

"""A tiny model folder whose forward is given as text."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from export.model_folder import ModelFolder

SIZES = "min = 1\nopt = 4\nmax = 9"
TOML = f"""
name = "tiny"
[inputs.x]
dtype = "float32"
shape = ["batch", 8]
[outputs.y]
dtype = "float32"
shape = ["batch", 8]
[axes.batch]
{SIZES}
"""
FIXED = TOML.replace(SIZES, "min = 4\nopt = 4\nmax = 4")
MODEL = """
import numpy as np
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(8, 8)

    def forward(self, x):
        {body}

def load():
    torch.manual_seed(0)
    return Tiny()

def samples(split):
    random = np.random.default_rng(len(split))
    for _ in range(12):
        yield {{"x": random.standard_normal((1, 8)).astype(np.float32)}}
"""


@cache
def read_operators_once() -> None:
    """Saves the exporter from reading all operators' definitions for each export, most of a tiny model's second."""
    from torch.onnx._internal.exporter._registration import onnxscript_apis  # a second, and few tests need it

    onnxscript_apis.get_torchlib_ops = cache(onnxscript_apis.get_torchlib_ops)


def tiny(
    folder: Path, *, toml: str = TOML, body: str = "return self.line(x)", code: str = "", name: str = "tiny"
) -> ModelFolder:
    """A model folder whose forward is `body`."""
    read_operators_once()
    (folder / name).mkdir(parents=True)
    (folder / name / "deploy.toml").write_text(toml.replace('"tiny"', f'"{name}"'))
    (folder / name / "model.py").write_text(MODEL.format(body=body) + code)
    return ModelFolder(name, folder)


def with_outputs(*names: str) -> str:
    """The signature of the tiny model with these outputs, each like `y`."""
    head, tail = TOML.split("[outputs.y]")
    block, axes = tail.split("[axes")
    return head + "".join(f"[outputs.{name}]{block}" for name in names) + "[axes" + axes

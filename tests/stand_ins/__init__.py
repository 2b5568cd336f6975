"""Stand-ins for a GPU host and for NVIDIA's images, none of which can be had here: tests/test_stand_in_gpu.py."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch


def install_tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces TensorRT's package by the stand-in, which makes torch's CUDA calls work on the CPU; returns it."""
    for owner, name in ((torch, "empty"), (torch.Tensor, "to"), (torch.Tensor, "pin_memory")):
        monkeypatch.setattr(owner, name, getattr(owner, name), raising=False)  # so that it is restored
    for name in ("Stream", "Event", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(torch.cuda, name))
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "image"))
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "exists", lambda path: True)  # of nvidia-smi
        package = importlib.import_module("tensorrt")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
    return package

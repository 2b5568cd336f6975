"""ONNX Runtime's wheels send usage data to Microsoft by default; they first write an id into the home folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BACKEND = (
    "import sys; sys.modules['triton_python_backend_utils'] = sys; sys.path[:0] = ['serving/backend', 'deepseek']; "
    "import onnxruntime_backend"
)


@pytest.mark.parametrize("first", ["import deepseek, onnxruntime", BACKEND], ids=["commands", "backend"])
def test_onnxruntime_starts_without_its_telemetry(first: str, tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", first], capture_output=True, text=True, env={"HOME": str(tmp_path)})
    assert (run.returncode, list(tmp_path.iterdir())) == (0, []), run.stderr

"""Facts of the targets that decide tolerances."""

from __future__ import annotations

import pytest

from deepseek.spec import Target
from deepseek.targets import in_tf32


@pytest.mark.parametrize(
    ("target", "provider", "found", "tf32"),
    [
        ("onnxruntime", "cpu", {}, False),
        ("onnxruntime", "cuda", {}, True),
        ("onnxruntime", "auto", {}, False),
        ("tensorrt", None, {"tf32": True}, True),
        ("tensorrt", None, {"tf32": False}, False),
        ("torchscript", None, {"tf32": True}, True),
        ("tensorrt_rtx", None, {"tf32": True}, False),  # its graph runs on the CPU
    ],
)
def test_fp32_on_an_nvidia_gpu_is_in_tf32(target: Target, provider: str, found: dict[str, bool], tf32: bool) -> None:
    assert in_tf32(target, provider, found) == tf32

"""Which release of NVIDIA's containers, YY.MM: Triton's and, of the same tag, TensorRT's.

Example:
    parse_tag("26.10") >= OLDEST_TAG     # True
"""

from __future__ import annotations

import re

from deepseek.spec.command import InputError

TRITON_TAG = "26.10"  # the Makefile's default too
OLDEST_TAG = (26, 7)  # older ones have published vulnerabilities, see docs/tensorrt.md
OLDEST = ".".join(f"{part:02}" for part in OLDEST_TAG)


def parse_tag(tag: str) -> tuple[int, int]:
    """`"26.10"` as (26, 10); raises InputError for anything else."""
    match = re.fullmatch(r"(\d\d)\.(0[1-9]|1[0-2])", tag)
    if not match:
        raise InputError(f"TRITON_TAG: seen {tag!r}; a release of NVIDIA's containers is YY.MM, e.g. {TRITON_TAG}")
    return int(match[1]), int(match[2])

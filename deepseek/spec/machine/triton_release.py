"""The release (YY.MM) of NVIDIA's containers: Triton's, and TensorRT's with the same tag."""

import re

from deepseek.spec.command import InputError

TRITON_TAG = "26.10"  # also in docker/server.Dockerfile and docker/export.Dockerfile
OLDEST_TAG = (26, 8)  # see WHY_OLDEST and docs/triton.md
OLDEST = ".".join(f"{part:02}" for part in OLDEST_TAG)
WHY_OLDEST = "older ones have published vulnerabilities, or lose throughput with a queue delay"


def parse_tag(tag: str) -> tuple[int, int]:
    """`"26.10"` gives (26, 10). Raises InputError for anything that is not YY.MM."""
    match = re.fullmatch(r"(\d\d)\.(0[1-9]|1[0-2])", tag)
    if not match:
        raise InputError(
            f"TRITON_TAG: seen {tag!r}; allowed: a release of NVIDIA's containers, YY.MM, e.g. {TRITON_TAG}"
        )
    return int(match[1]), int(match[2])


def check_tag(tag: str) -> str:
    """The tag; raises InputError if it is not YY.MM or too old."""
    if parse_tag(tag) < OLDEST_TAG:
        raise InputError(f"TRITON_TAG: seen {tag}; {OLDEST} or newer is needed: {WHY_OLDEST}")
    return tag

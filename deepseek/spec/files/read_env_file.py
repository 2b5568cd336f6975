"""Reads the env file that Compose reads.

The doctor reads it too, inside the images, which have only a few packages.
"""

import contextlib
import re
import socket
from pathlib import Path

CPU_FILES, GPU_FILES = "compose.yaml", "compose.yaml:docker/compose.gpu.yaml"


def setting_before(path: Path, name: str) -> str:
    """The value of a variable in the env file, as Compose reads it; "" if it is not set there."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    value = r"""(?:'([^'\n]*)'|"([^"\n]*)"|(.*?))"""
    found = re.findall(rf"^[ \t]*(?:export[ \t]+)?{name}[ \t]*=[ \t]*{value}[ \t]*(?:[ \t]#.*)?$", text, re.MULTILINE)
    return "".join(found[-1]) if found else ""


def gpu_stack_tag(path: Path) -> str:
    """The release of NVIDIA's Triton in the env file of a stack with a GPU, whose engines need it; "" for another."""
    on_gpu = setting_before(path, "COMPOSE_FILE").startswith(GPU_FILES)
    return setting_before(path, "TRITON_TAG") if on_gpu else ""


def other_stack(env_file: Path, repository: Path, build: Path) -> str:
    """The setting and folder by which the env file's stack belongs to another repository or build folder.

    "" if the stack belongs to these, if its folder is gone, or without a stack.
    """
    for name, ours in (("STACK_REPOSITORY", repository), ("STACK_BUILD", build)):
        theirs = setting_before(env_file, name)
        if theirs and Path(theirs) != ours.resolve() and Path(theirs).is_dir():
            return f"{name}={theirs}"
    return ""


def running_gateway(repository: Path, env_file: Path) -> str:
    """host:port of the stack's gateway if the env file's stack serves this repository and something listens there."""
    served, port = (setting_before(env_file, name) for name in ("STACK_REPOSITORY", "GATEWAY_PORT"))
    if not port.isdecimal() or Path(served) != repository.resolve():
        return ""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port)), timeout=5):
        return f"localhost:{port}"
    return ""

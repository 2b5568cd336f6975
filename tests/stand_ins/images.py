"""Builds stand-ins for NVIDIA's images under NVIDIA's names, from the Python, PyTorch and Triton of the tests' environment.

Contract: `build` needs an engine with `debian:trixie-slim` (tests/docker_engine.py) and a package index. Nothing is
pulled. The images are kept in the engine's folder, so the next run only rebuilds what changed.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from packaging.requirements import Requirement

from tests.docker_engine import run

HERE = Path(__file__).parent
HOST = HERE / "host"
BASE = "deepseek-stand-in"
NVIDIA = "nvcr.io/nvidia"
LEFT_OUT = ("site-packages", "test", "__pycache__", "idlelib", "tkinter")  # of the standard library


def build(environment: Mapping[str, str], triton_tag: str) -> None:
    """Builds both images of a release; drops what was built on older ones."""
    _build(BASE, "base", environment, root=True)
    settings = ("--build-arg", f"BASE={BASE}", "--build-arg", f"TRITON_TAG={triton_tag}")
    for name, built_on_it in (("tensorrt", "deepseek-export"), ("tritonserver", "*-server")):
        image = f"{NVIDIA}/{name}:{triton_tag}-py3"
        before = _id(image, environment)
        _build(image, name, environment, *settings)
        if _id(image, environment) != before:
            listed = (
                "docker",
                "images",
                "--format",
                "{{.Repository}}:{{.Tag}}",
                "--filter",
                f"reference={built_on_it}",
            )
            if old := run(*listed, environment=environment).stdout.split():
                run("docker", "image", "rm", "--force", *old, environment=environment)


def _id(image: str, environment: Mapping[str, str]) -> str:
    inspect = ("docker", "image", "inspect", "--format", "{{.Id}}", image)
    return run(*inspect, check=False, environment=environment).stdout


def _build(image: str, dockerfile: str, environment: Mapping[str, str], *flags: str, root: bool = False) -> None:
    command = ["docker", "build", "--quiet", "--network", "host", "--tag", image, *flags]
    with subprocess.Popen(
        [*command, "--file", f"{dockerfile}.Dockerfile", "-"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, **environment},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        # Docker recognizes a tar archive by its first block, which in Python's default format may be an extension.
        with (
            suppress(BrokenPipeError),  # it says why it stopped reading
            process.stdin,
            tarfile.open(fileobj=process.stdin, mode="w|", format=tarfile.GNU_FORMAT) as context,
        ):
            context.add(HERE / f"{dockerfile}.Dockerfile", f"{dockerfile}.Dockerfile")
            context.add(HERE / "image", "image")
            for source, place in _root() if root else ():
                context.add(source, f"root/{place}", filter=_kept)
        told = process.stdout.read().decode()
    assert process.returncode == 0, told


def _kept(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if Path(entry.name).name in LEFT_OUT and "-packages/" not in entry.name else entry


def _root() -> Iterator[tuple[Path, str]]:
    """Files of the images, each with its path there: the interpreter, unless it is the distribution's, and packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base, packages = Path(sys.base_prefix), "dist-packages"
    if base != Path("/usr"):
        packages = "site-packages"
        yield base / "bin" / version, "usr/local/bin/python3"
        yield base / "lib" / version, f"usr/local/lib/{version}"
        for library in base.glob("lib/libpython3*.so*"):
            yield library, f"usr/local/lib/{library.name}"
    for distribution in _distributions():
        for file in distribution.files or ():
            path = Path(str(distribution.locate_file(file)))
            if file.parts[0] != ".." and "__pycache__" not in file.parts and path.is_file():
                yield path, f"usr/local/lib/{version}/{packages}/{file}"


def _distributions() -> list[importlib.metadata.Distribution]:
    """PyTorch with its requirements, pip, and Triton's wheel, whose requirements are for an API that is not used."""
    found: dict[str, importlib.metadata.Distribution] = {}
    names = ["torch", "pip"]
    while names:
        name = names.pop().lower().replace("_", "-")
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            wanted = map(Requirement, found[name].requires or ())
            names += [each.name for each in wanted if each.marker is None or each.marker.evaluate({"extra": ""})]
    return [*found.values(), importlib.metadata.distribution("nvidia-pytriton")]

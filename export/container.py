"""A stage run inside the export image: NVIDIA's TensorRT container of the server's tag, on this machine's GPU.

Contract: `python -m export.container -- <module> <flags>` runs `python -m <module> <flags>` in the image that
`docker/export.Dockerfile` makes (built first where it is missing), with the working tree mounted read-only at its
own path, $BUILD read-write, the caller's user id and no network. An engine so built has the TensorRT of the server
of the same tag. What the machine lacks is said in one line (exit 2).

Examples:
    python -m export.container --check
    python -m export.container --tag 26.10 -- export.to_tensorrt --model recommender --precision fp16
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from deepseek.spec import InputError, Parser, build_dir, run_command
from deepseek.spec.triton_release import OLDEST, OLDEST_TAG, TRITON_TAG, parse_tag
from export.cache import root

DOCKERFILE = Path("docker/export.Dockerfile")
IMAGE_FILES = (DOCKERFILE, Path("pyproject.toml"), Path("requirements.lock"))  # what an image is made of
WITHOUT = (
    "without them: make check-engine compiles with TensorRT for RTX, make engine TARGET=onnxruntime serves on the CPU"
)


def check_tag(tag: str) -> str:
    """The tag, or InputError where it is no YY.MM or too old."""
    if parse_tag(tag) < OLDEST_TAG:
        raise InputError(
            f"TRITON_TAG: seen {tag}; {OLDEST} or newer is needed: published vulnerabilities in older ones"
        )
    return tag


def missing_here() -> list[str]:
    """What this machine lacks to build engines in the container; empty where it can."""
    missing = []
    gpus = _output("nvidia-smi", "-L")
    if "GPU" not in gpus:
        missing.append("an NVIDIA GPU (nvidia-smi lists none)" if gpus else "an NVIDIA GPU (no nvidia-smi)")
    if shutil.which("docker") is None:
        return [*missing, "Docker (no docker on PATH)"]
    information = _output("docker", "info")
    if not information:
        missing.append("a Docker engine that answers (docker info failed)")
    elif "nvidia" not in information:  # as a runtime, or as a CDI device
        missing.append("the NVIDIA runtime of Docker (docker info names none; install nvidia-container-toolkit)")
    return missing


def _output(*command: str) -> str:
    """What a command prints, "" where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def image_name(tag: str) -> str:
    """The image of a tag and of what it is made of: an edited Dockerfile or lock file makes a new one."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in IMAGE_FILES)).hexdigest()
    return f"deepseek-export:{tag}-{digest[:12]}"


def build_image(tag: str, image: str) -> None:
    """Makes the image where it is missing; the one step that needs the network."""
    if _output("docker", "image", "inspect", "--format", "{{.Id}}", image):
        return
    print(f"image     {image}: building, once (about 20 GB, from nvcr.io)", file=sys.stderr)
    command = ["docker", "build", "--file", str(DOCKERFILE), "--build-arg", f"TRITON_TAG={tag}", "--tag", image, "."]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise InputError(f"{image}: docker build failed, see above; it needs nvcr.io and a package index once")


def run_command_line(image: str, models: Path, command: list[str]) -> list[str]:
    """`docker run …` of a stage. Paths are the same inside and outside, so that manifests and messages are too."""
    here, build = Path.cwd(), build_dir("").resolve()
    mounts = [f"{here}:{here}:ro", f"{build}:{build}"]
    data = os.environ.get("DATA", "")
    read = [models, *([Path(os.path.abspath(data))] if data else [])]
    mounts += [f"{path}:{path}:ro" for path in read if not path.is_relative_to(here)]
    if (cache := root()) is not None:
        cache.mkdir(parents=True, exist_ok=True)  # or Docker makes it, for root
        mounts.append(f"{cache.resolve()}:{cache.resolve()}")
    return [
        *("docker", "run", "--rm", "--init", "--gpus", "all", "--network", "none"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),  # the files under build/ are to be the caller's
        *("--env", f"BUILD={build}", "--env", f"DATA={data}", "--env", "HOME=/tmp"),
        *("--env", f"CACHE={cache.resolve() if cache else 'off'}"),
        *("--env", "PYTHONDONTWRITEBYTECODE=1"),
        *("--shm-size", "1g"),  # PyTorch; Docker's 64 MB are few
        *(part for mount in mounts for part in ("--volume", mount)),
        *("--workdir", str(here), image, "python", "-m", *command),
    ]


def main() -> int:
    """Runs one stage in the container; its exit code is the stage's."""
    parser = Parser(__doc__, prog="python -m export.container")
    parser.add_argument(
        "--tag", default=TRITON_TAG, help="release of NVIDIA's containers, YY.MM (default: %(default)s)"
    )
    parser.add_argument("--models", default="models", help="folder of model folders, mounted (default: %(default)s)")
    parser.add_argument("--check", action="store_true", help="only say what this machine lacks")
    parser.add_argument("command", nargs="*", metavar="module", help="module to run and, after --, its flags")
    args = parser.parse_args()
    tag = check_tag(args.tag)
    missing = missing_here()
    if missing:
        raise InputError(f"TARGET=tensorrt: this machine lacks {' and '.join(missing)}; {WITHOUT}")
    if args.check:
        return 0
    if not args.command:
        parser.error("a module to run is needed")
    image = image_name(tag)
    build_image(tag, image)
    build_dir("").mkdir(parents=True, exist_ok=True)
    return subprocess.run(run_command_line(image, Path(os.path.abspath(args.models)), args.command)).returncode


if __name__ == "__main__":
    run_command(main)

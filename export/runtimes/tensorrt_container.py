"""Runs a stage inside the export image: NVIDIA's TensorRT container of the server's tag, on this machine's GPU.

Contract: `deepseek tensorrt-container -- <command> <flags>` runs `deepseek <command> <flags>` in the image of
`docker/export.Dockerfile` (built first if it is missing), with the working tree mounted read-only at its own path,
$DEEPSEEK_BUILD read-write, the caller's user id and no network. The engine then has the TensorRT of the server of the
same tag. If the machine lacks something, one line says what (exit 2).
"""

import argparse
import hashlib
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deepseek.spec import InputError, build_dir
from deepseek.spec.machine.triton_release import TRITON_TAG, check_tag
from export.cache import GIB, STAGE_KEYS, root
from export.dependencies.requirements import FILE, requirements_in
from export.dependencies.sources import files_in
from export.machine import missing_for_container, output_of
from export.plan import WITHOUT

DOCKERFILE = Path("docker/export.Dockerfile")
# torch is a pin too, although the lock file leaves its build to the machine.
INSTALL = f"""COPY {FILE} /opt/model/
RUN python -m pip freeze | grep -i '^torch==' >/opt/model/torch.txt; PIP_CONSTRAINT='' python -m pip install \\
    --no-cache-dir -r /opt/model/{FILE} -c /opt/export/requirements.lock -c /opt/model/torch.txt
"""
IMAGE_FILES = (DOCKERFILE, Path("pyproject.toml"), Path("requirements.lock"))  # the inputs of an image


def image_name(tag: str) -> str:
    """Name of a tag's image, with a digest of its inputs: an edited Dockerfile or lock file gives a new one."""
    digest = hashlib.sha256(b"\0".join(path.read_bytes() for path in IMAGE_FILES)).hexdigest()
    return f"deepseek-export:{tag}-{digest[:12]}"


def build_model_image(image: str, folder: Path) -> str:
    """The image for a model folder: with its `requirements.txt` installed on top, or `image` if it has none."""
    if not requirements_in(folder):
        return image
    wanted = (folder / FILE).read_bytes()
    own = f"{image}-{hashlib.sha256(wanted).hexdigest()[:12]}"
    with tempfile.TemporaryDirectory() as context:
        Path(context, "Dockerfile").write_text(f"FROM {image}\n{INSTALL}")
        Path(context, FILE).write_bytes(wanted)
        _build(own, [context], f"the packages of {folder / FILE}", "a package index")
    return own


def _build(image: str, arguments: list[str], what: str, needs: str) -> None:
    """Builds an image if it is missing; building is the only step that needs the network."""
    if output_of("docker", "image", "inspect", "--format", "{{.Id}}", image):
        return
    print(f"image     {image}: building, once ({what})", file=sys.stderr)
    network = os.environ.get("BUILD_NETWORK")  # as for compose.yaml
    command = ["docker", "build", "--tag", image, *(("--network", network) if network else ())]
    if subprocess.run([*command, *arguments], stdout=sys.stderr).returncode:
        raise InputError(f"{image}: docker build failed, see above; it needs {needs} once")


def link_targets(folder: Path) -> set[Path]:
    """The places that links in a model folder, or the folder itself, lead to. Docker follows a chain of links."""
    found = set[Path]()
    for name in files_in(folder):
        place = folder
        for part in ("", *Path(name).parts):
            place /= part
            if place.is_symlink():
                place = Path(os.path.abspath(place.parent / place.readlink()))
                found.add(place)
    return found


def run_command_line(image: str, models: Path, model: str, command: list[str]) -> list[str]:
    """The `docker run` command of a stage. Paths are equal inside and outside, so manifests and messages are too."""
    here, build = Path.cwd(), build_dir("").resolve()
    mounts = [f"{here}:{here}:ro", f"{build}:{build}"]
    data = os.environ.get("DEEPSEEK_DATA", "")
    read = [models, *([Path(os.path.abspath(data))] if data else []), *sorted(link_targets(models / model))]
    outside = (path for path in dict.fromkeys(read) if not any(map(path.is_relative_to, (here, build))))
    mounts += [f"{path}:{path}:ro" for path in outside]
    if (cache := root()) is not None:
        cache.mkdir(parents=True, exist_ok=True)  # otherwise Docker creates it, owned by root
        mounts.append(f"{cache.resolve()}:{cache.resolve()}")
    return [
        *("docker", "run", "--rm", "--init", "--gpus", "all", "--network", "none"),
        *("--user", f"{os.getuid()}:{os.getgid()}"),  # so that the caller owns the files under build/
        *("--env", f"DEEPSEEK_BUILD={build}", "--env", f"DEEPSEEK_DATA={data}", "--env", "HOME=/tmp"),
        *("--env", f"DEEPSEEK_CACHE={cache.resolve() if cache else 'off'}"),
        *(part for name in (GIB, STAGE_KEYS) for part in ("--env", f"{name}={os.environ.get(name, '')}")),
        *("--env", "PYTHONDONTWRITEBYTECODE=1"),
        *("--env", "CUDA_DEVICE_ORDER=PCI_BUS_ID"),  # as nvidia-smi numbers GPUs, and the server
        *("--shm-size", "1g"),  # for PyTorch; Docker's default is 64 MB
        *(part for mount in mounts for part in ("--volume", mount)),
        *("--workdir", str(here), image, "python", "-m", "cli", *command),
    ]


def main(options: argparse.Namespace) -> int:
    """The command `tensorrt-container`; returns the stage's exit code."""
    tag = check_tag(options.tag or TRITON_TAG)
    missing = missing_for_container()
    if missing:
        raise InputError(f"TARGET=tensorrt: this machine lacks {' and '.join(missing)}; {WITHOUT}")
    if not options.command:
        raise InputError("no command: give one of `deepseek` after --, such as -- to-tensorrt --precision fp16")
    image = image_name(tag)
    arguments = ["--file", str(DOCKERFILE), "--build-arg", f"TRITON_TAG={tag}", "."]
    _build(image, arguments, "about 20 GB, from nvcr.io", "nvcr.io and a package index")
    model = dict(itertools.pairwise(options.command)).get("--model", "")  # of the stage's own flags
    image = build_model_image(image, Path(options.models, model))
    build_dir("").mkdir(parents=True, exist_ok=True)
    models = Path(os.path.abspath(options.models))
    return subprocess.run(run_command_line(image, models, model, options.command)).returncode

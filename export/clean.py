"""The commands `clean` and `distclean`: remove what was built, for a model or all; wait for running builds first.

With its last model, a repository also loses the generated part of the env file. The stack's name and ports stay: under
the default ones, `docker compose up` could replace another clone's stack.
"""

import argparse
import shutil
from contextlib import ExitStack
from pathlib import Path

from deepseek.spec import build_dir
from deepseek.spec.files.folders import SCRATCH, alone_in, write_whole
from deepseek.spec.files.read_env_file import other_stack
from deepseek.spec.files.repository import model_folders

OURS = ("# Yours: ", "# Written by make engine")
CHOICES = ("COMPOSE_PROJECT_NAME=", "GATEWAY_PORT=", "LOCAL_PORTS=")


def remove_env_file(options: argparse.Namespace) -> None:
    """Removes what `make stack` computes; the user's choices, and the lines below "# Yours:", stay.

    The env file of a stack that serves another repository is left unchanged.
    """
    path = Path(options.env_file)
    if not path.is_file() or other_stack(path, Path(options.repository), build_dir("")):
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if not any(line.startswith(OURS) for line in lines):
        return
    mark = next((number for number, line in enumerate(lines) if line.startswith("# Yours: ")), len(lines))
    chosen = [line for line in lines[:mark] if line.startswith(CHOICES)]
    if lines[mark + 1 :] or (chosen and lines[mark:]):
        write_whole(path, "".join([*chosen, *lines[mark:]]))
    else:
        path.unlink()


def main(options: argparse.Namespace) -> None:
    published, built = Path(options.repository) / options.model, build_dir(options.model)
    if not (published.exists() or built.exists()):
        print(f"clean     no {published} and no {built}")
    with alone_in(built):
        _remove(published)
        _remove(built)
        if model_folders(Path(options.repository)):
            print("clean     other models are left; make stack rewrites the stack's limits and alerts for them")
        else:
            remove_env_file(options)


def everything(options: argparse.Namespace) -> None:
    """Removes the build folder and the repository's models; waits for running builds first. Other files there stay."""
    with ExitStack() as builds:
        # The gateway's folder last: a build, which holds its model's folder, locks it too.
        for folder in sorted(build_dir("").glob("*/"), key=lambda folder: folder.name == "gateway"):
            builds.enter_context(alone_in(folder))
        repository = Path(options.repository)
        for path in (*model_folders(repository), *repository.glob(f"{SCRATCH}*")):
            _remove(path)
        _remove(build_dir(""))
        remove_env_file(options)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

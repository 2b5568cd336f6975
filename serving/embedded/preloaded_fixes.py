"""The library that keeps clients from faults of Triton 2.51, built from `preloaded_fixes.c` if there is a C compiler.

Contract: `library` returns the one in the CPU image, or builds one under `$DEEPSEEK_BUILD/serving`; None if the
compiler (`$CC`, else `cc`) cannot build one that loads. docs/triton.md says what callers see without it.
"""

import ctypes
import hashlib
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

from deepseek.spec import build_dir
from serving.repository.checks import Finding

SOURCE = Path(__file__).with_name("preloaded_fixes.c")
MISSING = Finding(
    level="warning",
    where="Triton",
    what="without a C compiler callers meet seven of its faults: requests that wait, lost answers and crashes "
    "(docs/triton.md)",
    fix="apt-get install gcc libc6-dev",
)


def library() -> Path | None:
    """The library to preload into `tritonserver`; None if it cannot be built."""
    # A name that Python cannot import as a module, and that published versions look for.
    brought = SOURCE.with_name("libwakeup.so")
    if brought.is_file():
        return brought
    version = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    path = build_dir("serving").absolute() / f"libwakeup-{version}.so"
    return path if _loads(path) or _built(path) else None  # rebuilt if another kind of machine built it


def preload(fixes: Path, folder: Path, others: str) -> str:
    """The value of `LD_PRELOAD`: a link in `folder` to the library, since a path with a space would count as two."""
    link = folder / "libwakeup.so"
    link.symlink_to(fixes)
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
    except (OSError, ValueError, subprocess.CalledProcessError):  # ValueError: a CC with an unclosed quote
        return False


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path))
    except OSError:
        return False
    return True

"""`python -m …` by a fork of a process that has the heavy libraries loaded: a command without seconds of imports.

Contract: `run_warm` gives what `subprocess.run` gives for `python -m` with these arguments in this environment. Every
command is a process of its own, which loads our modules itself; only the third-party libraries in `PRELOADED` are
there already. Not for commands that patch the standard library as they start (Locust's gevent): they come first.

Example:
    run_warm(["export.to_onnx", "--help"], dict(os.environ)).stdout
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PRELOADED = ["torch", "onnx", "onnxruntime", "numpy", "pydantic", "rich", "google.protobuf"]
LIBRARIES_OF = {"export", "serving", "deepseek"}  # rooms whose commands load some of them

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOADED)


def run_warm(
    arguments: Sequence[str], environment: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A module and its arguments, as `python -m` takes them, in the folder `cwd` (default: the current one)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = _context.Process(
            target=_become, args=(list(arguments), environment, str(cwd or Path.cwd()), out, err)
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text(), err.read_text())


def _become(arguments: list[str], environment: dict[str, str], folder: str, out: Path, err: Path) -> None:
    """Inside the fork: it turns into the command."""
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)

"""Runs `python -m ...` in a fork of a process with the heavy libraries loaded, which saves seconds of imports.

Contract: `run_warm` returns what `subprocess.run` returns for `python -m` with these arguments in this environment. Each
command is a separate process, which imports this project's modules itself; only the third-party libraries in
`PRELOADED` are already loaded. Not for commands that must patch the standard library first (Locust's gevent).

Example:
    run_warm(["cli", "to-onnx", "--help"], dict(os.environ)).stdout
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
LIBRARIES_OF = {"cli", "deepseek", "export", "serving"}  # rooms whose commands import some of them

WARM = multiprocessing.get_context("forkserver")
WARM.set_forkserver_preload(PRELOADED)


def run_warm(
    arguments: Sequence[str], environment: dict[str, str], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a module with arguments, as `python -m` does, in the folder `cwd` (default: the current one)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = WARM.Process(
            target=_become,
            args=(list(arguments), environment, str(cwd or Path.cwd()), os.sched_getaffinity(0), out, err),
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess(list(arguments), process.exitcode, out.read_text(), err.read_text())


def _become(
    arguments: list[str], environment: dict[str, str], folder: str, cores: set[int], out: Path, err: Path
) -> None:
    """Turns the fork into the command."""
    for path, descriptor in ((out, 1), (err, 2)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.sched_setaffinity(0, cores)  # the warm process has those of the thread that started it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.argv = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)

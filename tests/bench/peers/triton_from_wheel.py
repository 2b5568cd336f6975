"""Stock Triton from the wheel: `python -m tests.bench.peers.triton_from_wheel WORKLOAD HTTP GRPC METRICS`.

The wheel's own server with its own flags, without this project's launcher, backend, supervisor or wake-up fix. It has no
C++ backend of ONNX Runtime, so `triton/model.py` runs the graph in the Python backend. The server is the wheel that this
project serves with; the model runs with the packages of the Python that is first on PATH.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from serving.embedded.wheel import assemble_backend, environment, parts
from tests.bench.peers.table import HERE


def main() -> None:
    """Writes the model repository and the backend to $SCRATCH, then becomes the server."""
    workload, *ports = sys.argv[1:]
    scratch = Path(os.environ["SCRATCH"])
    version = scratch / "models" / "graph" / "1"
    version.mkdir(parents=True)
    for source in ("triton/model.py", "graph/graph.py"):  # the stub has its own path of modules
        shutil.copy(HERE / source, version)
    shutil.copy(HERE / "triton" / f"{workload}.pbtxt", version.parent / "config.pbtxt")
    server, libraries, backend, stub = parts()
    assemble_backend(scratch / "backends" / "python", backend, stub)
    flags = [f"--model-repository={scratch / 'models'}", f"--backend-directory={scratch / 'backends'}"]
    flags += ["--exit-timeout-secs=5", f"--backend-config=python,shm-region-prefix-name=stock-triton-{os.getpid()}"]
    for name, port in zip(("http", "grpc", "metrics"), ports, strict=True):
        flags += [f"--{name}-address=127.0.0.1", f"--{name}-port={port}"]
    variables = {**environment(libraries, scratch), "PATH": os.environ["PATH"]}
    os.execve(server, [str(server), *flags], variables)


if __name__ == "__main__":
    main()

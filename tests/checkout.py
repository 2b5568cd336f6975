"""A copy of the checkout in which the code blocks of README and docs run unchanged."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deepseek_client import InferenceClient

from cli.environment import missing
from deepseek.spec.processes.children import free_ports

BUSY = (0, 2)  # make's exit codes; 2 also if a measurement is inconclusive on a busy machine


@dataclass(frozen=True)
class Checkout:
    """A copy of the files in git, with the tests' environment and free ports."""

    folder: Path
    ports: tuple[int, ...]

    @classmethod
    def copied_to(cls, folder: Path) -> Checkout:
        """Copies the checkout, without its tests, and finds free ports."""
        assert not missing(Path(sys.prefix), ["base"]), "make setup"  # otherwise make would install this copy
        for name in subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True).stdout.split("\0"):
            if name and not name.startswith("tests/") and Path(name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, folder / name)
        return cls(folder, tuple(free_ports(4)))

    @property
    def environment(self) -> dict[str, str]:
        names = ("HTTP_PORT", "GRPC_PORT", "METRICS_PORT", "OPENAI_PORT")
        ports = {f"DEEPSEEK_{name}": str(port) for name, port in zip(names, self.ports, strict=True)}
        path = f"{sys.prefix}/bin:{os.environ['PATH']}"
        clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
        return {**clean, **ports, "VENV": sys.prefix, "PATH": path}

    def sh(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs shell lines of a page."""
        script = script.replace("localhost:8000", f"localhost:{self.ports[0]}")
        settings = {**self.environment, **environment}
        return subprocess.run(["sh", "-ec", script], cwd=self.folder, env=settings, capture_output=True, text=True)

    def python(self, code: str) -> str:
        code = code.replace("127.0.0.1:8001", f"127.0.0.1:{self.ports[1]}")
        run = subprocess.run([sys.executable, "-c", code], cwd=self.folder, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout

    @contextlib.contextmanager
    def serve(self, model: str, script: str) -> Iterator[None]:
        """Serves in a second terminal: waits until the model is ready, and stops the server with Ctrl-C afterwards."""
        with (self.folder / "serve.log").open("w") as log:
            server = subprocess.Popen(
                ["sh", "-c", f"exec {script}"],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        try:
            with InferenceClient(f"127.0.0.1:{self.ports[1]}") as client:
                while not _is_ready(client, model):
                    assert server.poll() is None, (self.folder / "serve.log").read_text()
                    time.sleep(0.2)
            yield
        finally:
            os.killpg(server.pid, signal.SIGINT)
            server.wait()


def _is_ready(client: InferenceClient, model: str) -> bool:
    try:
        return client.ready(model, timeout_s=5)
    except Exception:  # nothing listens yet
        return False


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", Path(page).read_text(), re.MULTILINE | re.DOTALL)

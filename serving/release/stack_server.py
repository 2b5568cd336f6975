"""The compose stack's Triton alone over a candidate: for targets that the embedded server cannot load.

Contract: `StackServer` has the addresses that the gates use, on loopback. It runs the image of the env file's stack
(docker/stack-server.sh), builds it first, and removes the container at the end. The stack itself keeps serving.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from deepseek.spec import InputError, Target
from deepseek.spec.children import ends_with_us
from deepseek.spec.files.folders import let_all_read
from deepseek.targets import TARGETS
from serving.embedded.model_control import is_ready
from serving.embedded.ports import ReservedPorts
from serving.stack.env_file import GPU_FILES, setting_before

ALONE_FILE = "docker/compose.tune.yaml"
SCRIPT = "docker/stack-server.sh"
STOP_S = 60


def needs_stack(target: Target) -> bool:
    """Whether the embedded server cannot load the target's engines."""
    return TARGETS[target].backends[:1] != ("python",)


def check_stack(target: Target, env_file: Path) -> None:
    """Raises InputError if a candidate of the target could not be started here."""
    files = setting_before(env_file, "COMPOSE_FILE")
    if not files.startswith(GPU_FILES):
        seen = f"has COMPOSE_FILE={files}" if files else "is missing"
        raise InputError(
            f"{env_file}: {seen}, but the candidate for {target} starts in NVIDIA's Triton; publish a first version "
            f"with make engine TARGET={target}, which writes it, or name it with --env-file"
        )
    if shutil.which("docker") is None:
        raise InputError(f"no docker on PATH, but the candidate for {target} starts in NVIDIA's Triton; install Docker")


class StackServer:
    """The stack's Triton over `repository`, inside the `with` block; raises InputError if it does not start."""

    def __init__(self, repository: Path, *, env_file: Path, log_path: Path, timeout_s: float) -> None:
        self.repository, self.env_file, self.log_path, self.timeout_s = repository, env_file, log_path, timeout_s
        ports = ReservedPorts("127.0.0.1", {"HTTP": 0, "gRPC": 0})
        self._ports = ports.numbers
        self.http_url, self.grpc_url = (f"127.0.0.1:{self._ports[name]}" for name in ("HTTP", "gRPC"))
        ports.release()  # Docker could not publish them otherwise
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> StackServer:
        files = f"{setting_before(self.env_file, 'COMPOSE_FILE')}:{ALONE_FILE}"
        environment = {**os.environ, "COMPOSE_FILE": files}
        let_all_read(self.repository)
        build = ("docker", "compose", "--env-file", str(self.env_file), "build", "triton")
        serve = (SCRIPT, str(self.repository.resolve()), *map(str, self._ports.values()), str(self.env_file))
        try:
            with self.log_path.open("wb") as log:
                if subprocess.run(build, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode:
                    raise InputError(f"the image of the stack's Triton cannot be built, see {self.log_path}")
                self._process = subprocess.Popen(
                    serve,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server
                    preexec_fn=ends_with_us(),
                )
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        ends_at = time.monotonic() + self.timeout_s
        while not is_ready(self.http_url):
            if process.poll() is not None:
                lines = self.log_path.read_text(errors="replace").strip().splitlines()
                raise InputError(f"{lines[-1] if lines else 'it ended'} (all of it: {self.log_path})")
            if time.monotonic() > ends_at:
                raise InputError(f"not ready within {self.timeout_s:g} s; see {self.log_path}, or --start-timeout-s")
            time.sleep(0.1)

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
            self._process.kill()
            self._process.wait()
            self._process = None

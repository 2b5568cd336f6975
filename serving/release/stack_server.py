"""The compose stack's Triton alone over a candidate: for engines that the embedded server cannot load.

Contract: `stack_server` runs what `built_triton` built (docker/stack-server.sh) and removes the container at the end.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from deepseek.spec import InputError, Target
from deepseek.spec.children import ends_with_us
from deepseek.spec.files.folders import let_all_read
from deepseek.spec.files.read_env_file import GPU_FILES, setting_before
from deepseek.spec.stack_triton import SCRIPT
from serving.embedded.model_control import is_ready
from serving.embedded.ports import ReservedPorts
from serving.repository.checks import config_of, engine_config

STOP_S = 60


def needs_stack(model: Path, version: int) -> bool:
    """Whether the embedded server lacks the backend of a version's engine."""
    return engine_config(model, version, config_of(model, version)).backend != "python"


def check_stack(target: Target, env_file: Path) -> None:
    """Raises InputError without the env file of a stack with NVIDIA's Triton."""
    files = setting_before(env_file, "COMPOSE_FILE")
    if not files.startswith(GPU_FILES):
        seen = f"has COMPOSE_FILE={files}" if files else "is missing"
        raise InputError(
            f"{env_file}: {seen}, but the candidate for {target} starts in NVIDIA's Triton; publish a first version "
            f"with make engine TARGET={target}, which writes it, or name it with --env-file"
        )


@dataclass(frozen=True, kw_only=True)
class StackServer:
    """Where the candidate's server listens, as host:port on loopback."""

    http_url: str
    grpc_url: str


@contextmanager
def stack_server(
    repository: Path, compose_file: str, *, env_file: Path, log_path: Path, timeout_s: float
) -> Iterator[StackServer]:
    """The stack's Triton over `repository`, inside the `with` block; raises InputError if it does not start."""
    ports = ReservedPorts("127.0.0.1", {"HTTP": 0, "gRPC": 0})
    numbers = [str(ports.numbers[name]) for name in ("HTTP", "gRPC")]
    ports.release()  # Docker could not publish them otherwise
    let_all_read(repository)
    serve = (SCRIPT, str(repository.resolve()), *numbers, str(env_file))
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            serve,
            env={**os.environ, "COMPOSE_FILE": compose_file},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches only this process, which then stops the server
            preexec_fn=ends_with_us(),
        )
    try:
        server = StackServer(http_url=f"127.0.0.1:{numbers[0]}", grpc_url=f"127.0.0.1:{numbers[1]}")
        _wait_until_ready(server, process, log_path, timeout_s)
        yield server
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
        process.kill()
        process.wait()


def _wait_until_ready(server: StackServer, process: subprocess.Popen[bytes], log_path: Path, timeout_s: float) -> None:
    ends_at = time.monotonic() + timeout_s
    while not is_ready(server.http_url):
        if process.poll() is not None:
            lines = log_path.read_text(errors="replace").strip().splitlines()
            raise InputError(f"{lines[-1] if lines else 'it ended'} (all of it: {log_path})")
        if time.monotonic() > ends_at:
            raise InputError(f"not ready within {timeout_s:g} s; see {log_path}, or --start-timeout-s")
        time.sleep(0.1)

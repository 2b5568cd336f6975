"""The command that runs the compose stack's Triton over a repository: NVIDIA's container, or the embedded one.

Contract: a template for `loadtests.search.local_server`. It reads the env file and the compose files in the current
folder, and builds the server's image if it is missing. Only `triton` is started; its ports are on loopback.

Example:
    stack_command(Path(".env"))     # env COMPOSE_FILE=... docker/stack-server.sh {repository} {http_port} ...
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from deepseek.spec import InputError
from loadtests.search.local_server import EMBEDDED, last_line

STACK = "stack"
TUNE_FILE = "docker/compose.tune.yaml"
SCRIPT = "docker/stack-server.sh"


def server_command(server: str | None, target: str, env_file: Path) -> str:
    """The command for the option --server: the embedded Triton, or the stack's if that cannot serve the target."""
    if server == STACK or (server is None and target != "onnxruntime"):
        return stack_command(env_file)
    return server or EMBEDDED


def stack_command(env_file: Path) -> str:
    """The command for the stack of the env file; raises InputError without Docker, .env or an image."""
    lines = env_file.read_text(encoding="utf-8").splitlines() if env_file.is_file() else []
    files = [line.partition("=")[2] for line in lines if line.startswith("COMPOSE_FILE=")]
    hint = "or give the command of a server: --server '... {repository} ... {grpc_port} ...' (docs/tuning.md)"
    if not files:
        raise InputError(f"--server stack: no {env_file.resolve()} of the stack; run make engine there, {hint}")
    if shutil.which("docker") is None:
        raise InputError(f"--server stack: docker is not installed; install it, {hint}")
    compose_file = f"{files[-1]}:{TUNE_FILE}"
    compose = ["docker", "compose", "--env-file", str(env_file)]
    built = subprocess.run(
        [*compose, "build", "--quiet", "triton"],
        env={**os.environ, "COMPOSE_FILE": compose_file},
        capture_output=True,
        text=True,
    )
    if built.returncode:
        reason = last_line(built.stderr) or f"exit code {built.returncode}"
        raise InputError(f"--server stack: no image ({reason}); see docker compose build triton, {hint}")
    ports = "{repository} {http_port} {grpc_port}"
    return f"env COMPOSE_FILE={shlex.quote(compose_file)} {SCRIPT} {ports} {shlex.quote(str(env_file))}"

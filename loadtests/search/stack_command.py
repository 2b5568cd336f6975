"""The command that runs the compose stack's Triton over a repository: NVIDIA's container, or the embedded one.

Contract: a template for `loadtests.search.local_server`. It reads the env file and the compose files in the current
folder, and builds the server's image if it is missing. Only `triton` is started; its ports are on loopback.

Example:
    stack_command(Path(".env"))     # env COMPOSE_FILE=... docker/stack-server.sh {repository} {http_port} ...
"""

from __future__ import annotations

import shlex
from pathlib import Path

from deepseek.spec import DeploymentSpec, InputError, Target
from deepseek.spec.stack_triton import SCRIPT, built_triton
from loadtests.search.local_server import EMBEDDED

STACK = "stack"


def server_command(server: str | None, spec: DeploymentSpec, target: Target, env_file: Path) -> str:
    """The command for the option --server: the embedded Triton, or the stack's if that lacks the model's backend."""
    if server == STACK or (server is None and not spec.runs_in_python(target)):
        return stack_command(env_file)
    return server or EMBEDDED


def stack_command(env_file: Path) -> str:
    """The command for the stack of the env file; raises InputError without Docker, .env or an image."""
    try:
        compose_file = built_triton(env_file)
    except InputError as error:
        hint = "or give the command of a server: --server '... {repository} ... {grpc_port} ...' (docs/tuning.md)"
        raise InputError(f"--server stack: {error}, {hint}") from None
    ports = "{repository} {http_port} {grpc_port}"
    return f"env COMPOSE_FILE={shlex.quote(compose_file)} {SCRIPT} {ports} {shlex.quote(str(env_file))}"

"""The command that runs the compose stack's Triton alone over another repository, while the stack keeps serving.

Contract: a template for `deepseek.spec.processes.child_server`. It reads the env file, and the compose files and
scripts in the current folder. Only `triton` is started; its ports are on loopback.
"""

import os
import shlex
import shutil
import subprocess
from pathlib import Path

from deepseek.spec.command import InputError
from deepseek.spec.files.read_env_file import setting_before

ALONE_FILE = "docker/compose.tune.yaml"
SCRIPT = "docker/stack-server.sh"


def stack_command(env_file: Path) -> str:
    """The command for the env file's Triton; builds its image if that is not up to date.

    Raises InputError without the env file, without Docker, or if the image cannot be built.
    """
    files = setting_before(env_file, "COMPOSE_FILE")
    if not files:
        raise InputError(f"no {env_file.resolve()} of the stack; run make engine there")
    if shutil.which("docker") is None:
        raise InputError("docker is not installed; install it")
    compose_file = f"{files}:{ALONE_FILE}"
    built = subprocess.run(
        ["docker", "compose", "--env-file", str(env_file), "build", "--quiet", "triton"],
        env={**os.environ, "COMPOSE_FILE": compose_file},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if built.returncode:
        reason = (built.stderr.strip().splitlines() or [f"exit code {built.returncode}"])[-1]
        raise InputError(f"the image of the stack's Triton cannot be built ({reason}); see docker compose build triton")
    ports = "{repository} {http_port} {grpc_port}"
    compose_word, env_word = (
        shlex.quote(each).replace("{", "{{").replace("}", "}}") for each in (compose_file, str(env_file))
    )
    return f"env COMPOSE_FILE={compose_word} {SCRIPT} {ports} {env_word}"

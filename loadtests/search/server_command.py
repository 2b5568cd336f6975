"""The server that a load starts for itself: the embedded Triton, the compose stack's, or the command of --server."""

from pathlib import Path

from deepseek.spec import DeploymentSpec, InputError, Target
from deepseek.spec.processes.stack_triton import stack_command
from loadtests.search.local_server import EMBEDDED

STACK = "stack"


def server_command(server: str | None, spec: DeploymentSpec, target: Target, env_file: Path) -> str:
    """The command for the option --server: the embedded Triton, or the stack's if that lacks the model's backend.

    Raises InputError if the stack's is needed, but Docker, the env file or an image is missing.
    """
    if server != STACK and (server is not None or spec.runs_in_python(target)):
        return server or EMBEDDED
    try:
        return stack_command(env_file)
    except InputError as error:
        hint = "or give the command of a server: --server '... {repository} ... {grpc_port} ...' (docs/tuning.md)"
        raise InputError(f"--server stack: {error}, {hint}") from None

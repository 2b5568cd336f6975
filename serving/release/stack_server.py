"""The compose stack's Triton over a candidate: for engines that the embedded server cannot load."""

from contextlib import ExitStack
from pathlib import Path

from deepseek.spec import InputError, Target
from deepseek.spec.files.read_env_file import GPU_FILES, setting_before
from deepseek.spec.processes.child_server import ChildServer, NotServed, child_server
from serving.embedded.model_control import is_ready
from serving.repository.checks import config_of, engine_config


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


def start_on_stack(stack: ExitStack, command: str, repository: Path, log: Path, timeout_s: float) -> ChildServer:
    """Serves `repository` by the `stack_command` until `stack` closes; raises InputError if it does not start."""

    def ready(server: ChildServer) -> bool:
        return is_ready(server.http_url)

    limit = ", the limit of --start-timeout-s"
    server = child_server(command, repository, log, ready=ready, timeout_s=timeout_s, limit=limit)
    try:
        return stack.enter_context(server)
    except NotServed as error:
        raise InputError(f"{error} (log: {log})") from None

"""A server of its own for a load: its command, settings with its addresses, and the wait until it answers.

Contract: `deepseek.spec.processes.child_server` runs the command. Its output is in `<folder>/server.log`; the embedded
server writes its own log beside it.

Example:
    with local_server(EMBEDDED, repository, folder, settings) as server:
        server.settings.url      # 127.0.0.1:45123
"""

import argparse
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_client import InferenceClient, InferenceError

from deepseek.spec import DeploymentSpec, InputError, Target
from deepseek.spec.processes.child_server import ChildServer, child_server
from deepseek.spec.processes.stack_triton import stack_command
from loadtests.load.settings_from_options import inputs_of
from loadtests.results.settings import LoadSettings
from loadtests.slo.slo_demands import timeout_for

# The server of the target onnxruntime; {names} are filled in. It exits fast: no request is in flight at its stop.
EMBEDDED = (
    f"{shlex.quote(sys.executable)} -m cli serve --repository {{repository}} --http-port {{http_port}} "
    "--grpc-port {grpc_port} --metrics-port {metrics_port} --openai-port {openai_port} --exit-timeout-s 1"
)
STACK = "stack"
START_TIMEOUT_S = 180.0


@dataclass(frozen=True, kw_only=True)
class LocalServer:
    settings: LoadSettings
    """Those given, with the addresses of this server."""
    child: ChildServer


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


def settings_of_local(options: argparse.Namespace, spec: DeploymentSpec, command: str) -> LoadSettings:
    """The settings that all loads on such servers share; addresses, rate and length are set later."""
    if options.route and spec.text is None:
        raise InputError(f"--route {options.route}: deploy.toml of {spec.name} has no [text]; leave --route out")
    if options.route and "{openai_port}" not in command:
        raise InputError(f"--route {options.route}: the server's command has no {{openai_port}}; give one: --server")
    return LoadSettings(
        model=options.model,
        models=str(options.models),
        target=options.target,
        protocol=options.protocol,
        url="",
        route=options.route,
        inputs=options.inputs or inputs_of(options.model),
        warmup_s=options.warmup_s,
        priority=options.priority,
        timeout_s=timeout_for(options.timeout_s, spec.slo),
    )


@contextmanager
def local_server(command: str, repository: Path, folder: Path, settings: LoadSettings) -> Iterator[LocalServer]:
    """Serves `repository`; NotServed if the server does not start, InputError if `command` is not a valid template."""

    def ready(server: ChildServer) -> bool:
        here = _settings_at(server, settings)
        client = InferenceClient(here.url, here.protocol, timeout_s=2, retries=0)
        with client, suppress(InferenceError, OSError):
            if client.ready(here.model):
                host, _, port = here.place.partition(":")
                socket.create_connection((host, int(port)), 2).close()  # the routes open after the model
                return True
        return False

    log, build = folder / "server.log", str(folder)  # Triton's own log goes there, too
    with child_server(command, repository, log, ready=ready, timeout_s=START_TIMEOUT_S, DEEPSEEK_BUILD=build) as server:
        yield LocalServer(settings=_settings_at(server, settings), child=server)


def _settings_at(server: ChildServer, settings: LoadSettings) -> LoadSettings:
    url = server.grpc_url if settings.protocol == "grpc" else server.http_url
    return replace(settings, url=url, route=settings.route and f"{server.openai_url}{settings.route}")

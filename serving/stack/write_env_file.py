"""The env file that Compose reads: which server image, paths, memory.

Contract: lines that a user wrote stay below ours; comments in the file show the arithmetic.
"""

import argparse
from pathlib import Path

from deepseek.spec.files.folders import write_whole
from deepseek.spec.files.image_tag import image_tag
from deepseek.spec.files.read_env_file import CPU_FILES, GPU_FILES
from deepseek.spec.machine.gpus import gpus
from serving.repository.served_models import MIB, ServedModel
from serving.stack.certificate import STAND_IN, name_of, owner
from serving.stack.gateway_folder import observe_folder, results_folder
from serving.stack.gateway_limits import BODY_IN_MEMORY, GATEWAY_FILES_MIB, GATEWAY_MIB, gateway_sizes
from serving.stack.server_sizes import REST_S, SHM_MIB, server_sizes

WRITTEN = "# Written by make engine (deepseek stack)"
MARK = "# Yours: "
OWN = f"{MARK}settings below this line are kept, and override those above."
OPENAI_FILE, CLOSED_FILE = ":docker/compose.openai.yaml", ":docker/compose.closed.yaml"


def environment(models: list[ServedModel], options: argparse.Namespace) -> str:
    """The env file's content for the options of `deepseek stack`, down to the line above the user's settings."""
    folder = options.folder
    on_gpu = [model.name for model in models if model.needs_gpu]
    gpu_count = max(1, len(gpus())) if on_gpu else 1
    size, gateway = server_sizes(models, gpu_count), gateway_sizes(models)
    user, group = owner(folder)
    regions = ", ".join(f"{model.name} {model.shm_bytes / MIB:.0f} MiB" for model in models)
    on_each = f", on each of {gpu_count} GPUs" if gpu_count > 1 else ""
    why = f"{', '.join(on_gpu)} need a GPU" if on_gpu else "no model needs a GPU"
    files = GPU_FILES if on_gpu else CPU_FILES
    files += OPENAI_FILE if on_gpu and size.openai_mib else ""
    files += "" if options.local_ports else CLOSED_FILE
    beside = "" if on_gpu else f" + {size.openai_mib} MiB for the /v1 routes"
    names = ("LOCAL_HTTP_PORT", "LOCAL_GRPC_PORT")
    local = "".join(f"{name}={port}\n" for name, port in zip(names, options.local_ports, strict=False))
    return f"""\
{WRITTEN}; docker compose reads it. Not in git.
# Paths are named STACK_…, since a BUILD or MODELS in the shell's environment would override them here.
# The server: {why}.
COMPOSE_FILE={files}
# Names containers, volumes and images. Two clones with the same name share one stack: make stack PROJECT=another.
COMPOSE_PROJECT_NAME={options.project}
STACK_IMAGES={options.project}
TRITON_TAG={options.triton_tag}
# Digests of what the images copy: after an update Compose builds new ones, and the old ones stay for a rollback.
SERVER_TAG={image_tag("server" if on_gpu else "server-cpu")}
GATEWAY_TAG={image_tag("gateway")}
LOADTESTS_TAG={image_tag("loadtests")}
STACK_REPOSITORY='{options.repository.resolve()}'
STACK_GATEWAY='{folder.resolve()}'
GATEWAY_PORT={options.gateway_port}
# HTTP and gRPC on 127.0.0.1, without TLS and key. Other ports: make stack LOCAL_PORTS=8100,8101; none: LOCAL_PORTS=0
LOCAL_PORTS={",".join(map(str, options.local_ports)) or 0}
{local}# For docker compose run loadtest: the model, each model's target, and a name in the gateway's certificate.
MODEL={options.model or models[0].name}
STACK_TARGETS='{" ".join(f"{model.name}={model.target}" for model in models)}'
STACK_HOST={name_of(folder)}
STACK_MODELS='{options.models.resolve()}'
STACK_BUILD='{folder.resolve().parent}'
STACK_RESULTS='{results_folder(folder).resolve()}'
# For docker compose --profile observe up
STACK_OBSERVE='{observe_folder(folder).resolve()}'
# Owner of the gateway's folder; {STAND_IN} if root made it, since containers do not run as root.
STACK_USER={user}:{group}
# {SHM_MIB} MiB + per instance 1 MiB and twice the largest batch with its answer ({regions}){on_each}
SHM_SIZE={size.shm_mib}m
# {size.base_mib} MiB for the server + 4 x the weights of all instances ({size.weights_mib} MiB)
# + 32 x their largest batches ({size.work_mib} MiB){beside} + shared memory
TRITON_MEMORY={size.memory_mib}m
# {GATEWAY_FILES_MIB} MiB + {gateway.at_once} x the largest body ({gateway.body_mib:.2f} MiB); more bodies are refused
GATEWAY_TMP={gateway.tmp_mib}m
# {GATEWAY_MIB} MiB for nginx and requests under 1 MB + /tmp + {BODY_IN_MEMORY} x those bodies as JSON
GATEWAY_MEMORY={gateway.memory_mib}m
# Longest answer of Triton, for requests in flight at a stop
EXIT_TIMEOUT_S={size.exit_timeout_s}
# {size.openai_drain_s} s before that for requests in flight on the /v1 routes, and {REST_S} s spare after it
STOP_GRACE={size.stop_s}s
{OWN}
"""


def write_env_file(path: Path, content: str) -> None:
    """Writes our part; keeps the user's lines and the file's mode."""
    mode = path.stat().st_mode & 0o777 if path.is_file() else None
    write_whole(path, content + _own_lines(path))
    if mode is not None:
        path.chmod(mode)


def _own_lines(env_file: Path) -> str:
    """The user's lines: those below ours, or all of a file that we did not write."""
    if not env_file.is_file():
        return ""
    lines = env_file.read_text(encoding="utf-8").splitlines(keepends=True)
    ours = next((number for number, line in enumerate(lines, 1) if line.startswith(MARK)), 0)
    return "".join(lines[ours:])

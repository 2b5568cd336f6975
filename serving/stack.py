"""What `docker compose up` needs to serve a repository: `.env`, the gateway's limits, alerts and a dashboard.

Contract: reads the repository and each model's `deploy.toml`, in --models or where it was for an earlier build; writes
the env file that Compose reads by itself (which server image, where things lie, sizes of memory), in which somebody's
own lines stay, and, in the gateway's folder, `limits.conf` (longest answer, largest body, rate of a key, histogram
buckets) and a certificate; beside that folder, in `observe/`, the rules of Prometheus (`serving.alerts`), Grafana's
dashboard (`serving.dashboard`) and a copy of `docker/observe/`, which their users may read whatever the clone's umask
was. Which server it is follows from what was built: engines that need a GPU get NVIDIA's Triton, all else the embedded
one. The sums are in the files. `refresh` writes anew what a running stack reads by itself, after a release or a
rollback.

Examples:
    python -m serving.stack                                     # model_repository/ -> .env, build/gateway/
    python -m serving.stack --repository /srv/models --env-file /srv/.env --gateway-port 443 --json
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deepseek.spec import InputError, Parser, histogram_bounds_ms, run_command
from deepseek.spec.folders import beside, let_all_read, write_whole
from deepseek.spec.triton_release import TRITON_TAG, parse_tag
from serving.alerts import RUNBOOK, as_yaml, rules
from serving.certificate import STAND_IN, give, name_of, owner
from serving.dashboard import dashboard
from serving.flags import GATEWAY_EXIT_TIMEOUT_S
from serving.keys import ensure_folder, gateway_folder
from serving.served import HEADER_BYTES, JSON_BYTES, LATENESS, MIB, Served, bound_s, served_models

OBSERVE = Path(__file__).parents[1] / "docker" / "observe"
PROJECT = "deepseek"
WRITTEN = "# Written by make engine (python -m serving.stack)"
OWN = "# Yours: what stands below this line is kept, and counts before what stands above."
PROJECT_NAME = re.compile(r"[a-z0-9]+([_-][a-z0-9]+)*")  # what Compose takes, and what may stand in an image's name
CPU_FILES, GPU_FILES = "compose.yaml", "compose.yaml:docker/compose.gpu.yaml"
SHM_MIB = 256  # seen to be enough for small models; what is not used takes no memory
CPU_MEMORY, GPU_MEMORY = 2**30, 8 * 2**30  # CUDA and TensorRT keep some of theirs on the host
LEAST_RATE_RPS = 100
GATEWAY_MIB = 512  # for nginx and for requests under 1 MB, which stay in memory
GATEWAY_FILES_MIB = 16  # what gateway.sh writes, which is little
LEAST_LARGE, MOST_LARGE = 4, 512  # of the largest bodies, at a time: as many as LARGE_BYTES have room for
LARGE_BYTES = 128 * MIB
BODY_IN_MEMORY = 5  # times a body of JSON: up to three copies, 35 bytes a number; seen with nginx 1.26 and njs 0.8
REST_S = 10  # for what is left when requests in flight have had their time
RATE_HEADROOM = 2  # times the highest rate of the SLO that one key may send


def limits(models: list[Served]) -> str:
    """nginx's limits: those of the model that needs most."""
    body = max(models, key=lambda model: model.body_bytes)
    late = max(models, key=lambda model: model.timeout_s)
    rate = max(LEAST_RATE_RPS, math.ceil(RATE_HEADROOM * sum(model.rate_rps for model in models)))
    headroom = f"{RATE_HEADROOM} times the SLOs' rates, {LEAST_RATE_RPS} at the least"
    bounds_ms = [histogram_bounds_ms(model.p99_ms, model.latency_limits_ms.values()) for model in models]
    bounds = sorted({bound_s(bound) for each in bounds_ms for bound in each}, key=float)
    large = gateway_sizes(models).at_once
    return f"""\
# Written by python -m serving.stack from the models in the repository; the gateway reads it again when it changes.
# {body.name}: {body.input_numbers} numbers of up to {JSON_BYTES} bytes in JSON, and {HEADER_BYTES} bytes around them
client_max_body_size {body.body_bytes};
client_body_buffer_size {min(body.body_bytes, MIB)};
# JSON of 1 MB or more that is held in memory at a time; the sums of GATEWAY_MEMORY
limit_conn large_json {large};
# {late.name}: {late.queue_timeout_ms:g} ms in the queue, then {LATENESS} times the p99 of {late.p99_ms:g} ms
proxy_read_timeout {late.timeout_s}s;
grpc_read_timeout {late.timeout_s}s;
# requests in any second of a key without a rate of its own: {headroom}
js_var $default_rate_rps {rate};
# shares of each p99, and each latency that the SLOs name
js_var $buckets_s "{" ".join(bounds)}";
"""


@dataclass(frozen=True, kw_only=True)
class GatewaySizes:
    """What the gateway takes, so that as many of the largest bodies as it promises find room."""

    body_mib: float
    at_once: int

    @property
    def tmp_mib(self) -> int:
        """Of `/tmp`, which is memory: each body of 1 MB or more is a file there. What finds no room is refused."""
        return math.ceil(GATEWAY_FILES_MIB + self.at_once * self.body_mib)

    @property
    def memory_mib(self) -> int:
        """All of it: `/tmp`, too."""
        return math.ceil(GATEWAY_MIB + self.tmp_mib + BODY_IN_MEMORY * self.at_once * self.body_mib)


def gateway_sizes(models: list[Served]) -> GatewaySizes:
    """The sums of the gateway, wherever it runs."""
    body = max(model.body_bytes for model in models)
    at_once = min(MOST_LARGE, max(LEAST_LARGE, LARGE_BYTES // body))
    return GatewaySizes(body_mib=body / MIB, at_once=at_once)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the server takes, whoever starts it."""

    base_mib: int
    weights_mib: int
    """Of all instances, once."""
    work_mib: int
    shm_mib: int
    memory_mib: int
    """All of it: the shared memory, too."""
    exit_timeout_s: int


def sizes(models: list[Served]) -> Sizes:
    """The sums of the env file, of Kubernetes' manifests, too."""
    shm = SHM_MIB * MIB + sum(model.shm_bytes for model in models)
    weights = sum(model.weights_bytes * model.instances for model in models)
    work = sum(32 * model.instances * (model.input_bytes + model.output_bytes) for model in models)
    base = GPU_MEMORY if any(model.needs_gpu for model in models) else CPU_MEMORY
    return Sizes(
        base_mib=base // MIB,
        weights_mib=round(weights / MIB),
        work_mib=round(work / MIB),
        shm_mib=math.ceil(shm / MIB),
        memory_mib=math.ceil((base + 4 * weights + work + shm) / MIB),
        exit_timeout_s=max(GATEWAY_EXIT_TIMEOUT_S, max(model.timeout_s for model in models)),
    )


def environment(
    models: list[Served],
    repository: Path,
    models_folder: Path,
    folder: Path,
    settings: str,
    port: int,
    tag: str,
    default: str,
    project: str,
) -> str:
    """The env file's content; `default` is the model that a load test asks where it is told none."""
    on_gpu = [model.name for model in models if model.needs_gpu]
    size, gateway = sizes(models), gateway_sizes(models)
    user, group = owner(folder)
    regions = ", ".join(f"{model.name} {model.shm_bytes / MIB:.0f} MiB" for model in models)
    why = f"{', '.join(on_gpu)} need a GPU" if on_gpu else "no model needs a GPU"
    return f"""\
# {settings}
{WRITTEN}; Compose reads it by itself. Not in git.
# Paths are called STACK_…, not as make calls them: Compose would take a BUILD of the shell, or of a make that it runs
# under, before what stands here.
# The server: {why}.
COMPOSE_FILE={GPU_FILES if on_gpu else CPU_FILES}
# Two stacks of one name are one stack, from whichever clone: PROJECT= of make names containers, volumes and images.
COMPOSE_PROJECT_NAME={project}
STACK_IMAGES={project}
TRITON_TAG={tag}
STACK_REPOSITORY='{repository.resolve()}'
STACK_GATEWAY='{folder.resolve()}'
GATEWAY_PORT={port}
# For docker compose run loadtest: the model that it asks, what each was built for, whose SLO is judged, and a name that
# the gateway's certificate is for
MODEL={default}
STACK_TARGETS='{" ".join(f"{model.name}={model.target}" for model in models)}'
STACK_HOST={name_of(folder)}
STACK_MODELS='{models_folder.resolve()}'
STACK_BUILD='{folder.resolve().parent}'
STACK_RESULTS='{results_folder(folder).resolve()}'
# For docker compose --profile observe up
STACK_OBSERVE='{observe_folder(folder).resolve()}'
# Whose the gateway's folder is; one that root makes is given to {STAND_IN}, since no container runs as root.
STACK_USER={user}:{group}
# {SHM_MIB} MiB, and for each instance 1 MiB and twice the largest batch, in and out: {regions}
SHM_SIZE={size.shm_mib}m
# {size.base_mib} MiB for the server, four times the weights of all instances ({size.weights_mib} MiB), 32 times their
# largest batches for what is computed in between ({size.work_mib} MiB), and the shared memory
TRITON_MEMORY={size.memory_mib}m
# {GATEWAY_FILES_MIB} MiB, and {gateway.at_once} of the largest bodies ({gateway.body_mib:.2f} MiB) at a time;
# what finds no room is refused
GATEWAY_TMP={gateway.tmp_mib}m
# {GATEWAY_MIB} MiB for nginx and for requests under 1 MB, /tmp,
# and {BODY_IN_MEMORY} times those bodies, while they are JSON
GATEWAY_MEMORY={gateway.memory_mib}m
# Requests in flight when it stops: no answer takes longer; then 10 s for what is left
EXIT_TIMEOUT_S={size.exit_timeout_s}
STOP_GRACE={size.exit_timeout_s + REST_S}s
{OWN}
"""


def _own_lines(env_file: Path) -> str:
    """What somebody has put into the file: below our last line, or all of one that we have not written."""
    if not env_file.is_file():
        return ""
    found = env_file.read_text(encoding="utf-8")
    _, ours, below = found.partition(f"{OWN}\n")
    return below if ours else "" if WRITTEN in found else found


def results_folder(folder: Path) -> Path:
    """Where load tests in a container leave their runs: its user may write there and nowhere else."""
    return folder.with_name("stack")


def observe_folder(folder: Path) -> Path:
    """Where Prometheus and Grafana find what was made for them."""
    return folder.with_name("observe")


def source_file(folder: Path) -> Path:
    """What limits, rules and dashboard were made from: a release makes them anew from the same."""
    return folder.with_name("stack.json")


def container_sizes(models: list[Served]) -> dict[str, int]:
    """What Compose gives the containers once, when it makes them."""
    size, gateway = sizes(models), gateway_sizes(models)
    return {
        "MiB of shared memory": size.shm_mib,
        "MiB of memory of triton": size.memory_mib,
        "MiB of /tmp of the gateway": gateway.tmp_mib,
        "MiB of memory of the gateway": gateway.memory_mib,
        "s to stop in": size.exit_timeout_s,
    }


def refresh(repository: Path, folder: Path) -> list[str] | None:
    """Limits, rules and dashboard as a changed `repository` asks for them; None where no stack was made for it.

    Returns what the stack's containers have too little of for it. Gateway and Prometheus read them by themselves. A
    file that says what it said is left as it is, so that the gateway starts nothing anew under load.
    """
    source = source_of(repository, folder)
    if not source:
        return None
    models = served_models(repository, Path(source["models"]), _folders(source))
    if (folder / "limits.conf").read_text() != limits(models):
        _write_limits(models, folder)
    write_observed(models, observe_folder(folder), source["runbook"])
    had, asked = source.get("sizes", {}), container_sizes(models)
    return [f"{had[name]} of {size} {name}" for name, size in asked.items() if size > had.get(name, size)]


def _folders(source: Mapping[str, Any]) -> dict[str, Path]:
    """Where each model's `deploy.toml` was when the stack was last made for the repository."""
    return {name: Path(place) for name, place in source.get("folders", {}).items()}


def source_of(repository: Path, folder: Path) -> dict[str, Any]:
    """What the stack over a repository was made from when it was last made; nothing where none was."""
    path = source_file(folder)
    source: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return source if source.get("repository") == str(repository.resolve()) else {}


def other_folders(repository: Path, folder: Path) -> dict[str, Path]:
    """Where the `deploy.toml` of each model of other builds is, each with its own MODELS."""
    return _folders(source_of(repository, folder))


def _write_limits(models: list[Served], folder: Path) -> None:
    write_whole(folder / "limits.conf", limits(models))
    (folder / "limits.conf").chmod(0o644)  # the gateway is another user where root writes it


def write_observed(models: list[Served], folder: Path, runbook: str = RUNBOOK) -> None:
    """Rules and dashboard; anybody may read them, since those programs run as users of their own."""
    for part, content in (
        ("rules/deepseek.yml", as_yaml(rules(models, runbook))),
        ("dashboards/deepseek.json", json.dumps(dashboard(models), indent=2)),
    ):
        write_whole(folder / part, content)
        (folder / part).chmod(0o644)
        (folder / part).parent.chmod(0o755)


def write_settings(folder: Path) -> None:
    """What `docker/observe` has for those programs, readable as the above."""
    files = [path for path in OBSERVE.rglob("*") if path.is_file() and not re.match(r"\.|.*~$", path.name)]
    kept = {folder / path.relative_to(OBSERVE) for path in files}
    for gone in {path for part in OBSERVE.iterdir() for path in (folder / part.name).rglob("*")} - kept:
        if gone.is_file():
            gone.unlink()
    for path in files:
        with beside(copy := folder / path.relative_to(OBSERVE)) as draft:
            draft.write_bytes(path.read_bytes())
        copy.chmod(0o644)
        for above in (each for each in copy.parents if folder in each.parents):
            above.chmod(0o755)


def other_clone(project: str) -> str | None:
    """Where containers of a Compose project were started, if not here; None where there are none, or no Docker."""
    label = "com.docker.compose.project"
    command = ["docker", "ps", "--all", "--filter", f"label={label}={project}"]
    command += ["--format", f'{{{{.Label "{label}.working_dir"}}}}']
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((place for place in found if place and Path(place).resolve() != Path.cwd()), None)


def main() -> None:
    """Writes what the stack reads."""
    parser = Parser(__doc__, prog="python -m serving.stack")
    parser.add_argument("--repository", type=Path, default=Path("model_repository"), help="(default: %(default)s)")
    parser.add_argument(
        "--models", type=Path, default=Path("models"), help="folder of model folders (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="the gateway's folder (default: gateway/ in $BUILD)")
    parser.add_argument("--env-file", type=Path, default=Path(".env"), help="(default: %(default)s)")
    parser.add_argument(
        "--gateway-port", type=int, default=8443, help="published by the gateway (default: %(default)s)"
    )
    parser.add_argument("--project", default=PROJECT, help="Compose's name of the stack (default: %(default)s)")
    parser.add_argument("--triton-tag", default=TRITON_TAG, help="NVIDIA's release, YY.MM (default: %(default)s)")
    parser.add_argument("--model", help="that load tests ask by default (default: the first in the repository)")
    parser.add_argument("--host", action="append", default=[], help="name of the gateway for its certificate; repeat")
    parser.add_argument("--runbook", help=f"where alerts link to (default: as before, at first {RUNBOOK})")
    parser.add_argument("--settings", default="python -m serving.stack", help="first line of the env file, for make")
    parser.add_argument("--json", action="store_true", help="print what each model asks for as JSON")
    args = parser.parse_args()
    if not 0 < args.gateway_port < 65536:
        raise InputError(f"GATEWAY_PORT: seen {args.gateway_port}; a port is 1 to 65535")
    if not PROJECT_NAME.fullmatch(args.project):
        raise InputError(f"PROJECT: seen {args.project!r}; lower-case letters and digits, single - or _ between them")
    parse_tag(args.triton_tag)
    folder = args.folder or gateway_folder()
    before = source_of(args.repository, folder)
    models = served_models(args.repository, args.models, _folders(before))
    runbook = args.runbook or before.get("runbook") or RUNBOOK
    names = [model.name for model in models]
    default = args.model or names[0]
    if default not in names:
        raise InputError(f"--model {default!r}: not in {args.repository}, which has {', '.join(names)}")
    for path in (args.repository, args.models, folder):
        if "'" in str(path.resolve()):
            raise InputError(f"{path.resolve()}: Compose reads no path with an apostrophe; use one without")
    ensure_folder(folder, args.host)
    _write_limits(models, folder)
    write_observed(models, observe_folder(folder), runbook)
    write_settings(observe_folder(folder))
    places = {"repository": str(args.repository.resolve()), "models": str(args.models.resolve())}
    folders = {model.name: str(model.models.resolve()) for model in models if model.models}
    source = {**places, "folders": folders, "runbook": runbook, "sizes": container_sizes(models)}
    write_whole(source_file(folder), json.dumps(source, indent=2) + "\n")
    let_all_read(args.repository)
    results_folder(folder).mkdir(exist_ok=True)
    give(results_folder(folder), folder)
    for model in (model for model in models if not model.models):
        print(
            f"note: {model.name}: no deploy.toml of it in {args.models}, so no alert watches its SLO; make stack with "
            "its MODELS= tells where it is",
            file=sys.stderr,
        )
    content = environment(
        models,
        args.repository,
        args.models,
        folder,
        args.settings,
        args.gateway_port,
        args.triton_tag,
        default,
        args.project,
    )
    mode = args.env_file.stat().st_mode & 0o777 if args.env_file.is_file() else None
    write_whole(args.env_file, content + _own_lines(args.env_file))
    if mode is not None:
        args.env_file.chmod(mode)
    if other := other_clone(args.project):
        print(
            f"note: {args.project} has containers of {other}, which docker compose up would replace; "
            "a stack of its own: make stack PROJECT=another GATEWAY_PORT=another",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps([asdict(model) for model in models], indent=2, default=str))
    else:
        server = "NVIDIA's Triton" if any(model.needs_gpu for model in models) else "the embedded Triton, no GPU"
        print(
            f"stack     {args.env_file}: docker compose up serves {', '.join(names)} ({server})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)

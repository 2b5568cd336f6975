"""What `docker compose up` needs to serve a repository: `.env`, and the gateway's limits.

Contract: reads the repository and, where it finds it in --models, each model's `deploy.toml`; writes the env file that
Compose reads by itself (which server image, where things lie, sizes of memory) and, in the gateway's folder,
`limits.conf` (longest answer, largest body, rate of a key, histogram buckets) and a certificate. Which server it is
follows from what was built: engines that need a GPU get NVIDIA's Triton, all else the embedded one. The sums are in
the files.

Examples:
    python -m serving.stack                                     # model_repository/ -> .env, build/gateway/
    python -m serving.stack --repository /srv/models --env-file /srv/.env --gateway-port 443 --json
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tritonclient.grpc.model_config_pb2 import ModelConfig, ModelInstanceGroup

from deepseek.spec import BATCH, DeploymentSpec, InputError, Parser, PublishedManifest, Target, run_command
from serving.certificate import STAND_IN, give, owner
from serving.flags import GATEWAY_EXIT_TIMEOUT_S
from serving.keys import ensure_folder, gateway_folder
from serving.machine import TRITON_TAG
from serving.repository import CONFIG, MANIFEST, models_in, read_config, versions_of, wanted_versions

MIB = 2**20
CPU_FILES, GPU_FILES = "compose.yaml", "compose.yaml:docker/compose.gpu.yaml"
SHM_MIB = 256  # seen to be enough for small models; what is not used takes no memory
CPU_MEMORY, GPU_MEMORY = 2**30, 8 * 2**30  # CUDA and TensorRT keep some of theirs on the host
JSON_BYTES = 26  # a number as JSON has it, at the most: -1.2345678901234567e-308 and a comma
HEADER_BYTES = 64 * 1024  # names, shapes and parameters around the numbers
LATENESS = 10  # times the p99 of the SLO after which an answer is not waited for
LEAST_TIMEOUT_S = 1
DEFAULT_P99_MS = 3000  # of a model whose SLO names none
LEAST_RATE_RPS = 100
RATE_HEADROOM = 2  # times the highest rate of the SLO that one key may send
# Shares of the p99: a bound is the p99 itself, so that the histogram tells how many met it.
BUCKETS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 10)


@dataclass(frozen=True, kw_only=True)
class Served:
    """What one model asks of the stack."""

    name: str
    needs_gpu: bool
    instances: int
    weights_bytes: int
    input_bytes: int
    """Of the largest request, as raw tensors."""
    output_bytes: int
    input_numbers: int
    queue_timeout_ms: float
    p99_ms: float
    rate_rps: float

    @property
    def body_bytes(self) -> int:
        """Of the largest request, as JSON, which is larger than raw tensors."""
        return max(self.input_numbers * JSON_BYTES, self.input_bytes) + HEADER_BYTES

    @property
    def timeout_s(self) -> int:
        """How long an answer may take: longer, and Triton or the model has stalled."""
        return max(LEAST_TIMEOUT_S, math.ceil((self.queue_timeout_ms + LATENESS * self.p99_ms) / 1000))

    @property
    def shm_bytes(self) -> int:
        """Of the Python backend, for each instance: 1 MiB to start, the batch in work and the one being answered."""
        return self.instances * (2 * (self.input_bytes + self.output_bytes) + MIB)


def served_models(repository: Path, models: Path) -> list[Served]:
    """What each model of a repository asks for."""
    return [_served(folder, models) for folder in models_in(repository)]


def _served(folder: Path, models: Path) -> Served:
    try:
        config = read_config(folder / CONFIG)
    except InputError as error:
        raise InputError(f"{folder / CONFIG} {error}") from None
    manifest = _manifest(folder, config)
    spec = _spec(folder.name, models, manifest)
    inputs = _tensors(config, manifest, "input")
    policy = config.dynamic_batching.default_queue_policy
    group = config.instance_group[0] if config.instance_group else ModelInstanceGroup(count=1)
    provider = config.parameters["provider"].string_value if "provider" in config.parameters else "auto"
    rates = [line.rate_rps for line in spec.slo.all_objectives() if line.rate_rps] if spec else []
    return Served(
        name=folder.name,
        needs_gpu=config.backend not in ("", "python") or provider not in ("auto", "cpu"),
        instances=max(1, group.count),
        weights_bytes=manifest.size_bytes if manifest else 0,
        input_bytes=sum(numbers * size for numbers, size in inputs),
        output_bytes=sum(numbers * size for numbers, size in _tensors(config, manifest, "output")),
        input_numbers=sum(numbers for numbers, _ in inputs),
        queue_timeout_ms=policy.default_timeout_microseconds / 1000,
        p99_ms=(spec.slo.p99_ms if spec else None) or DEFAULT_P99_MS,
        rate_rps=max([*rates, (spec.slo.rate_rps if spec else None) or 0]),
    )


def _manifest(folder: Path, config: ModelConfig) -> PublishedManifest | None:
    """That of the newest version that is served; None of a model that was not made here."""
    for version in wanted_versions(config, versions_of(folder)):
        if (path := folder / str(version) / MANIFEST).is_file():
            return PublishedManifest.load(path)
    return None


def _spec(name: str, models: Path, manifest: PublishedManifest | None) -> DeploymentSpec | None:
    """A model's `deploy.toml`, for the target it was built for; None where it is not in `models`."""
    if not (models / name / "deploy.toml").is_file():
        return None
    target: Target = manifest.target if manifest else "onnxruntime"
    return DeploymentSpec.of_model(name, models).for_target(target)


def _tensors(config: ModelConfig, manifest: PublishedManifest | None, kind: str) -> list[tuple[int, int]]:
    """Numbers and bytes a number of each tensor of the largest request."""
    if manifest is None:  # what a variable dimension may be is known to nobody: 1024 is as good a guess as any
        entries = config.input if kind == "input" else config.output
        batch = max(1, config.max_batch_size)
        return [(batch * math.prod(dim if dim > 0 else 1024 for dim in entry.dims), 8) for entry in entries]
    found = []
    for tensor in (manifest.inputs if kind == "input" else manifest.outputs).values():
        sizes = [dim if isinstance(dim, int) else manifest.axes[dim]["max"] for dim in tensor.shape]
        sizes[0] = min(manifest.axes[BATCH]["max"], config.max_batch_size or 1)
        found.append((math.prod(sizes), np.dtype(tensor.dtype).itemsize))
    return found


def limits(models: list[Served]) -> str:
    """nginx's limits: those of the model that needs most."""
    body = max(models, key=lambda model: model.body_bytes)
    late = max(models, key=lambda model: model.timeout_s)
    rate = max(LEAST_RATE_RPS, math.ceil(RATE_HEADROOM * sum(model.rate_rps for model in models)))
    headroom = f"{RATE_HEADROOM} times the SLOs' rates, {LEAST_RATE_RPS} at the least"
    bounds = sorted({round(share * model.p99_ms / 1000, 6) for model in models for share in BUCKETS})
    return f"""\
# Written by python -m serving.stack from the models in the repository; the gateway reads it again when it changes.
# {body.name}: {body.input_numbers} numbers of up to {JSON_BYTES} bytes in JSON, and {HEADER_BYTES} bytes around them
client_max_body_size {body.body_bytes};
client_body_buffer_size {min(body.body_bytes, MIB)};
# {late.name}: {late.queue_timeout_ms:g} ms in the queue, then {LATENESS} times the p99 of {late.p99_ms:g} ms
proxy_read_timeout {late.timeout_s}s;
grpc_read_timeout {late.timeout_s}s;
# requests in any second of a key without a rate of its own: {headroom}
js_var $default_rate_rps {rate};
# shares of each p99, and the p99 itself
js_var $buckets_s "{" ".join(f"{bound:g}" for bound in bounds)}";
"""


def environment(
    models: list[Served],
    repository: Path,
    models_folder: Path,
    folder: Path,
    settings: str,
    port: int,
    tag: str,
) -> str:
    """The env file's content."""
    on_gpu = [model.name for model in models if model.needs_gpu]
    shm = SHM_MIB * MIB + sum(model.shm_bytes for model in models)
    weights = sum(model.weights_bytes * model.instances for model in models)
    work = sum(32 * model.instances * (model.input_bytes + model.output_bytes) for model in models)
    base = GPU_MEMORY if on_gpu else CPU_MEMORY
    memory = base + 4 * weights + work + shm
    exit_timeout_s = max(GATEWAY_EXIT_TIMEOUT_S, max(model.timeout_s for model in models))
    user, group = owner()
    regions = ", ".join(f"{model.name} {model.shm_bytes / MIB:.0f} MiB" for model in models)
    why = f"{', '.join(on_gpu)} need a GPU" if on_gpu else "no model needs a GPU"
    return f"""\
# {settings}
# Written by make engine (python -m serving.stack); Compose reads it by itself. Not in git.
# The server: {why}.
COMPOSE_FILE={GPU_FILES if on_gpu else CPU_FILES}
COMPOSE_PROJECT_NAME=deepseek
TRITON_TAG={tag}
REPOSITORY='{repository.resolve()}'
GATEWAY='{folder.resolve()}'
GATEWAY_PORT={port}
# For docker compose run loadtest
MODELS='{models_folder.resolve()}'
BUILD='{folder.resolve().parent}'
RESULTS='{results_folder(folder).resolve()}'
# Whose the gateway's files are; what root makes is given to {STAND_IN}, since no container runs as root.
STACK_USER={user}:{group}
# {SHM_MIB} MiB, and for each instance 1 MiB and twice the largest batch, in and out: {regions}
SHM_SIZE={math.ceil(shm / MIB)}m
# {base / MIB:.0f} MiB for the server, four times the weights of all instances ({weights / MIB:.0f} MiB), 32 times their
# largest batches for what is computed in between ({work / MIB:.0f} MiB), and the shared memory
TRITON_MEMORY={math.ceil(memory / MIB)}m
# Requests in flight when it stops: no answer takes longer; then 10 s for what is left
EXIT_TIMEOUT_S={exit_timeout_s}
STOP_GRACE={exit_timeout_s + 10}s
"""


def results_folder(folder: Path) -> Path:
    """Where load tests in a container leave their runs: its user may write there and nowhere else."""
    return folder.with_name("stack")


def _write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(content)
    part.replace(path)


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
    parser.add_argument("--triton-tag", default=TRITON_TAG, help="NVIDIA's release (default: %(default)s)")
    parser.add_argument("--host", action="append", default=[], help="name of the gateway for its certificate; repeat")
    parser.add_argument("--settings", default="python -m serving.stack", help="first line of the env file, for make")
    parser.add_argument("--json", action="store_true", help="print what each model asks for as JSON")
    args = parser.parse_args()
    if not 0 < args.gateway_port < 65536:
        raise InputError(f"GATEWAY_PORT: seen {args.gateway_port}; a port is 1 to 65535")
    folder = args.folder or gateway_folder()
    models = served_models(args.repository, args.models)
    ensure_folder(folder, args.host)
    _write(folder / "limits.conf", limits(models))
    results_folder(folder).mkdir(exist_ok=True)
    give(results_folder(folder))
    content = environment(
        models, args.repository, args.models, folder, args.settings, args.gateway_port, args.triton_tag
    )
    _write(args.env_file, content)
    if args.json:
        print(json.dumps([asdict(model) for model in models], indent=2))
    else:
        names = ", ".join(model.name for model in models)
        server = "NVIDIA's Triton" if any(model.needs_gpu for model in models) else "the embedded Triton, no GPU"
        print(
            f"stack     {args.env_file}: docker compose up serves {names} ({server})",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_command(main)

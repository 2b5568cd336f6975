"""The steps of `deepseek gpu-check`: what each runs, what it needs, its time limit and the guide's claim.

Contract: a step is one command. `needs` names facts of the machine (`cli.gpu_check.missing`) and earlier steps, which
must have passed. Everything is built and published in the check's own folder, with free ports and a stack of its own.
"""

import sys
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from deepseek.precisions import PRECISIONS

ON_GPU = ("gpu", "runtime")
IN_PYTORCH = ("gpu", "torch")
PROJECT = "deepseek-gpu-check"
STACK_UP, STACK_DOWN = "stack up", "stack down"
FIRST_BUILD_S = 3600  # pulls NVIDIA's images, about 40 GB
# Both fail if there is nothing to kill, or if Docker does not restart it.
KILL = (
    'killed=1; for each in /proc/[0-9]*; do [ "$(cat "$each/comm")" != tritonserver ] || '
    '{ kill -9 "${each#/proc/}" && killed=0; }; done; exit $killed'
)
RESTARTED = (
    'until [ "$(docker inspect --format "{{.RestartCount}} {{.State.Health.Status}}" "$(docker compose "$@" ps --quiet '
    'triton)" | sed "s/^[1-9][0-9]* /restarted /")" = "restarted healthy" ]; do sleep 1; done'
)


@dataclass(frozen=True)
class GpuStep:
    """One line of the report."""

    name: str
    command: tuple[str, ...]
    _: KW_ONLY
    limit_s: int
    needs: tuple[str, ...] = ()
    needs_one_of: tuple[str, ...] = ()
    """At least one of these earlier steps must have passed."""
    claim: str = ""
    """The guide's claim; the step's output has the figure."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the check builds and serves."""

    folder: Path
    models: str
    triton_tag: str
    gateway_port: int
    http_port: int
    grpc_port: int

    def published(self, suffix: str = "") -> tuple[str, ...]:
        """A repository, and the env file of the stack that serves it."""
        return ("--repository", f"{self.folder}/repository{suffix}", "--env-file", f"{self.folder}/env{suffix}")


def ours(*words: str) -> tuple[str, ...]:
    """A command of this project."""
    return (sys.executable, "-m", "cli", *words)


def steps(where: Where, models: list[str]) -> list[GpuStep]:
    first = models[0]
    return [
        *look(),
        *(step for model in models for step in build(where, model)),
        *serve(where, models),
        *improve(where, first),
        *train_and_plan(where, models),
    ]


def look() -> list[GpuStep]:
    """Lists what this machine has."""
    query = "--query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm"
    listed = ("docker", "images", "--filter", "reference=nvcr.io/nvidia/*", "--filter", "reference=deepseek*")
    return [
        GpuStep("GPU and driver", ("nvidia-smi", query, "--format=csv"), limit_s=60, needs=("gpu",)),
        GpuStep("Docker and Compose", ("docker", "compose", "version"), limit_s=60, needs=("docker",)),
        GpuStep("NVIDIA's runtime", ("docker", "info"), limit_s=60, needs=("runtime",)),
        GpuStep("images", listed, limit_s=60, needs=("docker",)),
    ]


def build(where: Where, model: str) -> list[GpuStep]:
    """An engine of each precision, then the choice, then the same model without TensorRT."""
    which = ("--model", model, "--models", where.models)
    tag = ("--target", "tensorrt", "--triton-tag", where.triton_tag)
    ports = ("--gateway-port", str(where.gateway_port), "--local-ports", f"{where.http_port},{where.grpc_port}")
    claims = {
        "fp16": "TensorRT in FP16 has 40 % less latency",
        "int8": "INT8: a quarter of the size, 2 to 3 times as fast",
        "fp8": "FP8: a quarter of the size, 2 to 3 times as fast",
    }
    engine = ("engine", *which, *tag, *ports, "--project", PROJECT)
    return [
        *(
            GpuStep(
                f"engine {model} {precision}",
                ours(*engine, *where.published(f"-{precision}"), "--precision", precision),
                limit_s=FIRST_BUILD_S,
                needs=(*ON_GPU, "fp8") if precision == "fp8" else ON_GPU,
                claim=claims.get(precision, ""),
            )
            for precision in reversed(PRECISIONS)
        ),
        GpuStep(f"engine {model}", ours(*engine, *where.published()), limit_s=FIRST_BUILD_S, needs=ON_GPU),
        GpuStep(
            f"PyTorch, torch.compile, ONNX Runtime CUDA: {model}",
            ours("gpu-baselines", *which),
            limit_s=300,
            needs=(*IN_PYTORCH, f"engine {model}"),
        ),
    ]


def serve(where: Where, models: list[str]) -> list[GpuStep]:
    """The doctor, the stack, what callers get, a kill."""
    project = ("--project-name", PROJECT, "--env-file", f"{where.folder}/env")
    compose = ("docker", "compose", *project)
    grpc, http = f"127.0.0.1:{where.grpc_port}", f"127.0.0.1:{where.http_port}"
    built = tuple(f"engine {model}" for model in models)
    doctor = ours("doctor", "--repository", f"{where.folder}/repository")
    start = (*compose, "up", "--detach", "--wait", "triton", "gateway")
    found = [
        GpuStep("doctor", doctor, limit_s=60, needs_one_of=built),
        GpuStep(STACK_UP, start, limit_s=FIRST_BUILD_S, needs_one_of=built),
    ]
    for model in models:
        which, served = ("--model", model, "--models", where.models), (STACK_UP, f"engine {model}")
        slo = (*which, "--target", "tensorrt", "--url", grpc)
        parity = ours("parity", *which, "--url", grpc, "--http-url", http)
        capacity, loaded = ours("capacity", *slo, "--duration-s", "5", "--max-s", "60"), f"load test {model}"
        found += [
            GpuStep(f"parity {model}", parity, limit_s=300, needs=served),
            GpuStep(loaded, ours("loadtest", *slo), limit_s=240, needs=served),
            GpuStep(f"verdict {model}", ours("verdict", *which), limit_s=60, needs=(loaded,)),
            GpuStep(f"capacity {model}", capacity, limit_s=180, needs=served),
        ]
    kill = (*compose, "exec", "-T", "triton", "bash", "-c", KILL)
    restarted = ("sh", "-c", RESTARTED, "sh", *project)
    return [
        *found,
        GpuStep("a kill", kill, limit_s=60, needs=(STACK_UP,)),
        GpuStep("serving again after the kill", restarted, limit_s=300, needs=("a kill",)),
        GpuStep(STACK_DOWN, (*compose, "down", "--volumes"), limit_s=120, needs=("docker",), needs_one_of=built),
    ]


def improve(where: Where, model: str) -> list[GpuStep]:
    """Settings on and off, a release and a rollback, a profile; the stack is down, so the GPU is free."""
    which = ("--model", model, "--models", where.models)
    tune = ("tune", *which, "--target", "tensorrt", "--server", "stack", "--env-file", f"{where.folder}/env")
    short = ("--instances", "1", "--delay-us", "0", "--least-s", "2", "--max-s", "240", "--dry-run")
    grpc = ("--grpc-port", str(where.grpc_port))
    other = (*which, *where.published("-fp32"), *grpc)
    profiled = ("nsys", "profile", "--force-overwrite=true", f"--output={where.folder}/nsys")
    return [
        GpuStep(
            "dynamic batching and CUDA graphs, on and off",
            ours(*tune, "--max-batch", "1,8", *short),
            limit_s=600,
            needs=(*ON_GPU, STACK_UP, f"engine {model}"),
            claim="dynamic batching gives 30 % more throughput",
        ),
        GpuStep(
            "release",
            ours(
                *("release", *other, "--target", "tensorrt", "--triton-tag", where.triton_tag),
                # Not the choice, which may be the fp32 that the repository has: then there is nothing to release.
                # Which of them is faster is for the engines' steps to say.
                *("--precision", "fp16", "--threshold", "100"),
            ),
            limit_s=900,
            needs=(*ON_GPU, f"engine {model} fp16", f"engine {model} fp32"),
        ),
        GpuStep("rollback", ours("rollback", *other), limit_s=120, needs=("release",)),
        GpuStep(
            "nsys profile",
            (*profiled, *ours("gpu-baselines", *which)),
            limit_s=300,
            needs=(*IN_PYTORCH, "nsys", f"engine {model}"),
            claim="Nsight finds the cause of slow inference",
        ),
    ]


def train_and_plan(where: Where, models: list[str]) -> list[GpuStep]:
    """The guide's claims about training, and the plan's predictions."""
    return [
        GpuStep(
            "mixed precision and checkpointing against fp32",
            ours("measure-training"),
            limit_s=300,
            needs=IN_PYTORCH,
            claim="mixed precision is 1.8 times as fast; checkpointing saves 60 % of memory",
        ),
        *(
            GpuStep(
                f"plan against measured, on the CPU: {model}",
                ours("plan", "--model", model, "--models", where.models, "--measure"),
                limit_s=180,
                needs=("gpu", f"engine {model}"),
            )
            for model in models
        ),
    ]

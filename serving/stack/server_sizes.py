"""The server's memory, shared memory and stop time, computed from the models that it serves.

Contract: the Compose stack and Kubernetes use the same numbers.
"""

import math
from dataclasses import dataclass

from serving.embedded.flags import GATEWAY_EXIT_TIMEOUT_S, OPENAI_DRAIN_S
from serving.repository.served_models import MIB, ServedModel, has_openai_routes

SHM_MIB = 256  # enough for small models; unused shared memory takes none
CPU_MEMORY, GPU_MEMORY = 2**30, 8 * 2**30  # CUDA and TensorRT use host memory too
OPENAI_MIB = 512  # the process of the OpenAI routes: 76 MiB idle, the rest for texts and vectors in flight
REST_S = 10  # spare time after the requests in flight


@dataclass(frozen=True, kw_only=True)
class ServerSizes:
    """What the server needs, under Compose and on Kubernetes."""

    base_mib: int
    weights_mib: int
    """All instances together."""
    work_mib: int
    openai_mib: int
    """For the process of the OpenAI routes; 0 without one. On a GPU it has a container of its own."""
    shm_mib: int
    memory_mib: int
    """All memory of Triton's container, shared memory included."""
    exit_timeout_s: int
    """For requests in flight on Triton."""
    openai_drain_s: int
    """For those on the OpenAI routes, which stop before Triton; 0 without them."""

    @property
    def stop_s(self) -> int:
        return self.openai_drain_s + self.exit_timeout_s + REST_S

    @property
    def answer_s(self) -> int:
        """The longest answer, for which the gateway waits when it stops."""
        return max(self.openai_drain_s, self.exit_timeout_s)


def server_sizes(models: list[ServedModel], gpus: int = 1) -> ServerSizes:
    """`gpus`: on how many GPUs Triton loads each model that needs one, with all its instances."""
    loaded = [(model, gpus if model.needs_gpu else 1) for model in models]
    shm = SHM_MIB * MIB + sum(times * model.shm_bytes for model, times in loaded)
    weights = sum(times * model.weights_bytes * model.instances for model, times in loaded)
    work = sum(32 * times * model.instances * (model.input_bytes + model.output_bytes) for model, times in loaded)
    openai_mib = OPENAI_MIB if has_openai_routes(models) else 0
    on_gpu = any(model.needs_gpu for model in models)
    base = GPU_MEMORY if on_gpu else CPU_MEMORY
    return ServerSizes(
        base_mib=base // MIB,
        weights_mib=round(weights / MIB),
        work_mib=round(work / MIB),
        openai_mib=openai_mib,
        shm_mib=math.ceil(shm / MIB),
        memory_mib=math.ceil((base + 4 * weights + work + shm) / MIB) + (0 if on_gpu else openai_mib),
        exit_timeout_s=max(GATEWAY_EXIT_TIMEOUT_S, max(model.timeout_s for model in models)),
        openai_drain_s=OPENAI_DRAIN_S if has_openai_routes(models) else 0,
    )

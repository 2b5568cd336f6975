"""The settings that a search may try, and how it varies one thing at a time.

Contract: pure. What the command line names is tried as named; the rest follows from the spec, the target and the
number of cores:

- layouts of the target onnxruntime on a CPU: instances that share the cores out (2, 4, ... up to one a core), and twice
  as many as the cores have room for, from two that take all of them, which compute in turn: the others hold the next
  batches. One instance alone is left out: two that compute in turn have the next batch at hand.
- layouts elsewhere: 1, 2, 3 and 4 instances a GPU.
- batch sizes: powers of 4, opt and max of the batch axis, and twice and half the best so far.
- queue delays: none, and up to a quarter of the tightest latency of the SLO.
- CUDA graphs on and off for the target tensorrt, unless deploy.toml names the batches to capture.

Example:
    space = space_of(spec, "onnxruntime", cores=2)
    list(space.varied(default, "max_batch"))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from deepseek.spec import BATCH, DeploymentSpec, InputError, Target
from loadtests.limits import latency_limits
from loadtests.tuning import Setting

Part = Literal["layout", "max_batch", "max_queue_delay_us", "cuda_graphs"]
DELAYS_US = (0, 200, 1000, 5000)
SHARE_OF_LIMIT = 4  # the delay that a request may spend waiting for company, of its latency limit
MOST_GPU_INSTANCES = 4


@dataclass(frozen=True, kw_only=True)
class Space:
    """Values by what they are of."""

    layouts: tuple[tuple[int, int | None], ...]
    """Instances and the threads of each."""
    max_batch: tuple[int, ...]
    delays_us: tuple[int, ...]
    cuda_graphs: tuple[bool | None, ...]
    refine: tuple[int, int] | None
    """Bounds within which twice and half the best batch size are tried, too."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order in which they are varied: what matters most comes first."""
        return ("layout", "max_batch", "max_queue_delay_us", "cuda_graphs")

    def varied(self, setting: Setting, part: Part) -> Iterator[Setting]:
        """The setting with each value of one part."""
        for values in self._values(setting, part):
            yield setting.model_copy(update=values)

    def _values(self, setting: Setting, part: Part) -> list[dict[str, Any]]:
        if part == "layout":
            return [{"instances": instances, "threads": threads} for instances, threads in self.layouts]
        if part == "max_batch":
            sizes = set(self.max_batch)
            if self.refine:
                near = (setting.max_batch // 2, setting.max_batch * 2)
                sizes |= {size for size in near if self.refine[0] <= size <= self.refine[1]}
            return [{part: size} for size in sorted(sizes)]
        return [{part: value} for value in (self.delays_us if part == "max_queue_delay_us" else self.cuda_graphs)]


def space_of(
    spec: DeploymentSpec,
    target: Target,
    cores: int,
    max_batch: tuple[int, ...] | None = None,
    delays_us: tuple[int, ...] | None = None,
    instances: tuple[int, ...] | None = None,
    threads: tuple[int, ...] | None = None,
) -> Space:
    """The space for a target's spec; InputError where a value that was asked for cannot be."""
    axis = spec.axes[BATCH]
    for flag, values, least, most in (
        ("--max-batch", max_batch, axis.min, axis.max),
        ("--delay-us", delays_us, 0, 10_000_000),
        ("--instances", instances, 1, 1024),
        ("--threads", threads, 1, 1024),
    ):
        for value in values or ():
            if not least <= value <= most:
                raise InputError(f"{flag} {value}: {least} to {most} are possible")
    if threads and target != "onnxruntime":
        raise InputError(f"--threads: only the target onnxruntime has threads to set, not {target}")
    powers = {4**power for power in range(axis.max.bit_length())}
    sizes = {size for size in powers | {axis.opt, axis.max} if axis.min <= size <= axis.max}
    own_graphs = target == "tensorrt" and not spec.tensorrt.cuda_graph_batches
    graphs = spec.tensorrt.cuda_graphs if target == "tensorrt" else None
    return Space(
        layouts=_layouts(target, cores, instances, threads),
        max_batch=max_batch or tuple(sorted(sizes)),
        delays_us=delays_us or tuple(_delays(spec)),
        cuda_graphs=(False, True) if own_graphs else (graphs,),
        refine=None if max_batch else (axis.min, axis.max),
    )


def _layouts(
    target: Target, cores: int, instances: tuple[int, ...] | None, threads: tuple[int, ...] | None
) -> tuple[tuple[int, int | None], ...]:
    if target != "onnxruntime":
        return tuple((count, None) for count in instances or range(1, MOST_GPU_INSTANCES + 1))
    if instances or threads:
        counts = instances or tuple(_counts(cores))
        return tuple(product(counts, threads)) if threads else tuple((n, max(1, cores // n)) for n in counts)
    shared = [(count, max(1, cores // count)) for count in _counts(cores)]
    in_turn = [(2 * count, cores // count) for count in (1, *_counts(cores)) if count <= cores]
    return tuple(dict.fromkeys(shared + in_turn))


def _counts(cores: int) -> list[int]:
    """Instances: powers of 2 from 2 to one a core."""
    return [2, *(1 << power for power in range(2, cores.bit_length()) if 1 << power <= cores)]


def _delays(spec: DeploymentSpec) -> list[int]:
    limit_ms = min(latency_limits(spec.slo).values(), default=float("inf"))
    return [delay for delay in DELAYS_US if delay * SHARE_OF_LIMIT <= limit_ms * 1000]

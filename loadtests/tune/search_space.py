"""The serving settings that a search may try.

Contract: values from the command line replace the defaults, which follow from the spec, the target and
the number of cores:

- layouts of the target onnxruntime on a CPU: 2, 4, ... instances that share the cores, up to one per core; and twice as
  many instances as the cores can run, which take turns: while one half computes, the other holds the next batches. A
  single instance is never tried: with two that take turns, the next batch is always ready.
- layouts of the other targets: 1, 2, 3 and 4 instances per GPU.
- batch sizes: those of the measured curve; without one, powers of 4, opt and max of the batch axis.
- queue delays: none, and up to a quarter of the tightest latency limit of the SLO (`tune` tries only none on the
  embedded Triton).
- CUDA graphs on and off for the target tensorrt, unless deploy.toml names the batches to capture.

Example:
    SearchSpace.of(spec, "onnxruntime", cores=2).combined(default, sizes=[1, 2, 4, 8])
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from deepseek.spec import BATCH, DeploymentSpec, InputError, Target, TunedBatching, TunedTarget
from deepseek.spec.checks import Table
from deepseek.spec.files.batching_plan import batching_of
from deepseek.spec.files.measured_batches import read_measured
from deepseek.spec.objectives import latency_limits

DELAYS_US = (0, 200, 1000, 5000)
SHARE_OF_LIMIT = 4  # a request may wait for its batch at most a quarter of its latency limit
MOST_GPU_INSTANCES = 4
Values = tuple[int, ...] | None
"""From the command line; None: the search chooses."""


class ServingSettings(Table):
    """The settings that a search varies: batching, instances, threads, CUDA graphs."""

    max_batch: int
    """Most rows that Triton joins into one batch."""
    max_queue_delay_us: int
    instances: int
    threads: int | None = None
    """Per instance; None: the runtime chooses, or the target has no such setting."""
    cuda_graphs: bool | None = None
    """Only for the target `tensorrt`."""

    @classmethod
    def of(cls, spec: DeploymentSpec, target: Target, cores: int) -> "ServingSettings":
        """The settings that `make engine` serves for a spec, on a machine with `cores`."""
        spec = spec.for_target(target)
        batching, plan = spec.batching, batching_of(spec, read_measured(spec.name, target))
        shared = max(1, cores // batching.instances) if target == "onnxruntime" else None
        return cls(
            max_batch=plan.preferred_batch or spec.max_served_batch,
            max_queue_delay_us=batching.max_queue_delay_us,
            instances=batching.instances,
            threads=batching.threads or shared,
            cuda_graphs=spec.tensorrt.cuda_graphs if target == "tensorrt" else None,
        )

    def tuned(self, measured: str = "") -> TunedTarget:
        """The settings as an entry of tuned.toml; `measured` is its note on how they were measured."""
        kept = {"max_queue_delay_us", "instances", "threads", *(("max_batch",) if self.limits_requests else ())}
        batching = TunedBatching(preferred_batch=self.max_batch, **self.model_dump(include=kept))
        return TunedTarget(measured=measured, batching=batching, cuda_graphs=self.cuda_graphs)

    @property
    def limits_requests(self) -> bool:
        """Whether the server refuses requests of more rows than a batch.

        Without a queue delay Triton keeps to the preferred batch, so callers may send more rows. With one, only
        `max_batch` limits what it joins.
        """
        return self.max_queue_delay_us > 0

    def __str__(self) -> str:
        threads = "" if self.threads is None else f" x {self.threads} thread{'s' * (self.threads > 1)}"
        graphs = ", CUDA graphs" if self.cuda_graphs else ""
        instances = f"{self.instances} instance{'s' * (self.instances > 1)}{threads}"
        return f"{instances}, batches of {self.max_batch}, delay {self.max_queue_delay_us} us{graphs}"


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    layouts: tuple[tuple[int, int | None], ...]
    """Instances, threads per instance."""
    max_batch: tuple[int, ...]
    delays_us: tuple[int, ...]
    cuda_graphs: tuple[bool | None, ...]

    @classmethod
    def of(
        cls,
        spec: DeploymentSpec,
        target: Target,
        cores: int,
        *,
        max_batch: Values = None,
        delays_us: Values = None,
        instances: Values = None,
        threads: Values = None,
    ) -> "SearchSpace":
        """The space for a target; InputError if a given value is out of range."""
        axis, most = spec.axes[BATCH], spec.for_target(target).max_served_batch
        _check("--max-batch", max_batch, axis.min, most)
        _check("--delay-us", delays_us, 0, 10_000_000)
        _check("--instances", instances, 1, 1024)
        _check("--threads", threads, 1, 1024)
        if threads and target != "onnxruntime":
            raise InputError(f"--threads: applies only to the target onnxruntime, not to {target}")
        powers = {4**power for power in range(most.bit_length())}
        sizes = {size for size in powers | {axis.opt, most} if axis.min <= size <= most}
        choose_graphs = target == "tensorrt" and not spec.tensorrt.cuda_graph_batches
        graphs = spec.tensorrt.cuda_graphs if target == "tensorrt" else None
        limit_ms = min(latency_limits(spec.slo.all_objectives()).values(), default=float("inf"))
        delays = (delay for delay in DELAYS_US if delay * SHARE_OF_LIMIT <= limit_ms * 1000)
        return cls(
            layouts=_layouts(target, cores, instances, threads),
            max_batch=max_batch or tuple(sorted(sizes)),
            delays_us=delays_us or tuple(delays),
            cuda_graphs=(False, True) if choose_graphs else (graphs,),
        )

    def combined(self, default: ServingSettings, sizes: Sequence[int]) -> list[ServingSettings]:
        """Every combination of layouts, these batch sizes, and delays."""
        return [
            _changed(default, instances=layout[0], threads=layout[1], max_batch=size, max_queue_delay_us=delay)
            for layout, size, delay in product(self.layouts, sizes, self.delays_us)
        ]

    def varied(self, default: ServingSettings) -> list[ServingSettings]:
        """The default with one value changed: the layout, the batch size, CUDA graphs or the delay."""
        found = [_changed(default, instances=count, threads=threads) for count, threads in self.layouts]
        found += [_changed(default, max_batch=size) for size in self.max_batch]
        found += [_changed(default, cuda_graphs=graphs) for graphs in self.cuda_graphs]
        found += [_changed(default, max_queue_delay_us=delay) for delay in self.delays_us]
        return [each for each in dict.fromkeys(found) if each != default]


def _changed(settings: ServingSettings, **changes: int | bool | None) -> ServingSettings:
    return settings.model_copy(update=changes)


def _check(flag: str, values: Values, least: int, most: int) -> None:
    for value in values or ():
        if not least <= value <= most:
            raise InputError(f"{flag}: seen {value}; allowed: {least} to {most}")


def _layouts(target: Target, cores: int, instances: Values, threads: Values) -> tuple[tuple[int, int | None], ...]:
    if target != "onnxruntime":
        return tuple((count, None) for count in instances or range(1, MOST_GPU_INSTANCES + 1))
    counts = [2, *(1 << power for power in range(2, cores.bit_length()) if 1 << power <= cores)]
    if threads:
        return tuple(product(instances or counts, threads))
    shared = [(count, max(1, cores // count)) for count in instances or counts]
    if instances:
        return tuple(shared)
    take_turns = [(2 * count, cores // count) for count in (1, *counts) if count <= cores]
    return tuple(dict.fromkeys(shared + take_turns))

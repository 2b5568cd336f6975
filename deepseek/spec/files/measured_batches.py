"""How long batches take on the machine that serves, and the plan that is made of it.

Contract: the stage `measure-batches` writes `MeasuredBatches` to `build/<name>/batches-<target>.json`. `batching_plan`
makes a `BatchingPlan` of it, which `publish` stores in the version's manifest. The plan's class stands here, so that a
change of the arithmetic in `batching_plan` leaves manifests and graphs as they are.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field

from deepseek.precisions import Precision
from deepseek.spec.checks import Table, checked
from deepseek.spec.deployment import DeploymentSpec, build_dir
from deepseek.spec.machine.cpu import Cpu
from deepseek.targets import Target

# CPU time beside the model, Triton 2.51.
SERVER_MS = 0.3  # of a batch: the recommender in batches of 4 and of 16
REQUEST_MS = 0.05  # of a request in a batch: two layers with one input and one output, 512 requests of one row


class BatchTime(Table):
    """One point of the curve."""

    rows: int = Field(ge=1)
    ms: float = Field(gt=0, allow_inf_nan=False)
    """Median time of a batch while the other instances run one too."""


class MeasuredBatches(Table):
    """How long batches take with the layout that serves."""

    schema_version: Literal[1] = 1
    precision: Precision
    skipped: str = ""
    """Why nothing was measured."""
    instances: int = Field(ge=1)
    threads: int = Field(ge=1)
    """Per instance."""
    at_once: int = Field(ge=1)
    """Batches that run at the same time: fewer than `instances` if these have more threads than there are cores."""
    cpu: Cpu
    sizes: dict[str, int] = {}
    """The other axes, at their `opt`."""
    times: tuple[BatchTime, ...] = ()
    """Ascending; ends after the first batch that takes too long for the SLO."""

    def fits(self, spec: DeploymentSpec, precision: str | None) -> bool:
        """Whether it was measured with this layout and precision. `spec` is the result of `for_target`."""
        threads = spec.batching.threads or max(1, self.cpu.cores // spec.batching.instances)
        layout = (spec.batching.instances, threads, precision or self.precision)
        return bool(self.times) and layout == (self.instances, self.threads, self.precision)

    def ms_of(self, rows: int) -> float:
        """Time of a batch, by the next larger measured size; beyond the largest, in proportion to it."""
        larger = next((point for point in self.times if point.rows >= rows), None)
        last = self.times[-1]
        return larger.ms if larger else last.ms * rows / last.rows

    @property
    def turns(self) -> float:
        """Factor by which a batch slows down while all instances are busy: they share the cores."""
        return self.instances / self.at_once

    def rows_per_s(self, rows: int) -> float:
        """Rows per second of the server, in batches of `rows` that one request holds."""
        return 1000 * self.at_once * rows / (self.ms_of(rows) + SERVER_MS)

    def joined_ms(self, rows: int, rows_each: int = 1) -> float:
        """Time of a batch that joins requests of `rows_each`, with what it costs the server."""
        return self.ms_of(rows) + self.server_ms(rows, rows_each)

    def server_ms(self, rows: int, rows_each: int = 1) -> float:
        """Time of the server itself for a batch that joins requests of `rows_each`."""
        return SERVER_MS + REQUEST_MS * rows / rows_each

    def requests_per_s(self, rows: int, rows_each: int = 1) -> float:
        """Requests per second of the server, in batches of `rows`."""
        return 1000 * self.at_once * rows / rows_each / self.joined_ms(rows, rows_each)


class BatchingPlan(Table):
    """Batching and queue of a version, and where each value comes from."""

    preferred_batch: int | None = None
    """Most rows that Triton joins; None: up to `max_batch`."""
    run_rows: int | None = None
    """Fewest rows of a part; None: all that Triton joins run at once, and all rows of a larger request."""
    queue_timeout_ms: int
    max_queue_size: int
    reasons: dict[str, str]
    """By key: the arithmetic, or who set the value."""
    measured: MeasuredBatches | None = None
    """The measurement behind the values; None if every value is set by hand or a default."""


def batches_path(name: str, target: Target) -> Path:
    """Path of the measurement."""
    return build_dir(name) / f"batches-{target}.json"


def read_measured(name: str, target: Target) -> MeasuredBatches | None:
    """The measurement in the build folder; None if there is none. Raises InputError in one line if it is damaged."""
    path = batches_path(name, target)
    return checked(MeasuredBatches, path.read_bytes(), path) if path.is_file() else None

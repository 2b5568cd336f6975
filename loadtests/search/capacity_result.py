"""The result of a capacity search, as stored in `build/<model>/capacity.json`.

Example:
    Capacity.load(capacity_path("recommender"), "recommender").capacity_rps
"""

from pathlib import Path
from typing import Any, ClassVar, Literal

from deepseek_client import ModelMetadata
from pydantic import Field

from deepseek.spec import ExitCode, Target, build_dir, variables_for
from deepseek.spec.checks import Table
from loadtests.search.highest_rate import GENERATOR, SAMPLES, TIME, TRIALS, UNDECIDED, WALK
from loadtests.search.rate_trial import RateTrial
from loadtests.search.result_file import SavedResult


class ServerSettings(Table):
    """How the server runs the model; null if the server does not report it."""

    max_batch: int | None = None
    """Rows of the largest request."""
    preferred_batch: int | None = None
    """Rows that Triton joins; null: up to `max_batch`."""
    instances: int | None = None
    threads: int | None = None
    """Per instance; 0: the cores divided by the instances."""
    max_queue_delay_us: int | None = None

    @classmethod
    def of(cls, served: ModelMetadata) -> "ServerSettings":
        threads = served.parameters.get("threads") or served.parameters.get("intra_op_thread_count")
        return cls(
            max_batch=served.max_batch_size,
            preferred_batch=max(served.preferred_batch_sizes, default=None),
            instances=served.instances,
            threads=int(threads) if threads else None,
            max_queue_delay_us=served.max_queue_delay_us,
        )


class Capacity(SavedResult):
    made_by: ClassVar[str] = "make capacity"
    schema_version: Literal[1] = 1
    model: str
    target: Target
    precision: str | None
    """Of the served model; null if the server does not report it."""
    served_versions: tuple[str, ...] = ()
    url: str
    protocol: str
    """grpc, http, or the OpenAI route."""
    objectives: tuple[str, ...]
    trials: tuple[RateTrial, ...] = ()
    """In chronological order."""
    capacity_rps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """The highest rate that meets every objective; a lower bound if `limited_by` is "generator"."""
    first_failing_rps: float | None = None
    """The lowest rate above `capacity_rps` that failed."""
    confirmed: bool = False
    """Longer runs confirmed `capacity_rps`."""
    limited_by: str
    """The objectives that fail above `capacity_rps`; or generator, samples, time, trials, walk."""
    required_rps: float | None = None
    """The rate that the SLO asks for."""
    settings: ServerSettings = ServerSettings()
    machine: dict[str, Any] = {}
    """The load generator's; also the server's if the URL is local."""
    versions: dict[str, str] = {}
    started: str
    """UTC."""

    @property
    def exit_code(self) -> ExitCode:
        """0: found, confirmed and as high as the SLO asks. 1: no rate holds, or a run violated the SLO at its own rate
        or below. 3: inconclusive. A capacity is a lower bound, so the SLO may hold above it."""
        held = any(trial.outcome == "holds" for trial in self.trials)
        if self.limited_by in UNDECIDED or (held and not self.confirmed):
            return ExitCode.INVALID
        if self.capacity_rps is None:
            return ExitCode.GATE_FAILED
        asked_rps = self.required_rps or 0
        if self.capacity_rps >= asked_rps:
            return ExitCode.PASS
        counted = {(each.phase, each.rate_rps): each for each in self.trials}.values()  # repetitions replace the first
        violated = any(each.violated and self.capacity_rps < each.rate_rps <= asked_rps for each in counted)
        return ExitCode.GATE_FAILED if violated else ExitCode.INVALID

    @property
    def sentence(self) -> str:
        rate = "" if self.capacity_rps is None else f"{self.capacity_rps:g}/s"
        if self.limited_by in UNDECIDED:
            return self._undecided(rate)
        if not rate and self.exit_code == ExitCode.INVALID:
            return f"capacity inconclusive: every longer run to confirm a rate failed ({self.limited_by})"
        if not rate:
            return f"no rate holds, down to {min(each.rate_rps for each in self.trials):g}/s: {self.limited_by}"
        wanted = f"; the SLO asks for {self.required_rps:g}/s" if self.required_rps else ""
        if self.exit_code == ExitCode.INVALID:
            how = f"make loadtest verdict {variables_for(self.model)} UNTIL_DECIDED=1"
            wanted += f", which is neither proved nor violated; decide with: {how}"
        fails = f" (fails at {self.first_failing_rps:g}/s)" if self.first_failing_rps else ""
        return f"capacity {rate}, limited by {self.limited_by}{fails}{wanted}"

    def _undecided(self, rate: str) -> str:
        proved = f"at least {rate}" if self.confirmed else f"about {rate}, not confirmed"
        least = proved if rate else "inconclusive"
        if self.limited_by == GENERATOR:
            return f"capacity {least}; the generator, not the server, is the limit: see the invalid trials"
        if not rate and (failed := [trial for trial in self.trials if trial.outcome == "fails"]):
            lowest = min(failed, key=lambda trial: trial.rate_rps)
            least = f"inconclusive: {lowest.rate_rps:g}/s fails ({lowest.reason}), and no rate holds so far"
        why = {
            SAMPLES: "too few samples",
            WALK: f"the confirmation ended before it met the limit; start again from there (RATE={rate[:-2]})",
            TIME: "the limit on time was reached; raise BUDGET_S=",
            TRIALS: "the limit on trials was reached; raise MAX_TRIALS=",
        }
        return f"capacity {least}: {why[self.limited_by]}"


def capacity_path(model: str) -> Path:
    return build_dir(model) / "capacity.json"

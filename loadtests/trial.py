"""One trial of a rate: an open-loop run at it, judged by what the SLO asks for at that rate.

Contract: a trial is a run as `loadtests.run` makes it, judged by `loadtests.slo`; its folder is kept, so that it can be
judged or drawn again. What an objective means at a rate that is not the SLO's own (`slo_at`):

- latencies and errors: as they stand.
- those bound to a rate (`p50_ms < 10 @ 200 rps`): what holds at a rate holds at every lower one, so they are asked of
  all rates up to their own, and of none above.
- rate and throughput: the server keeps up with the rate of the trial, less the errors that the SLO allows and what may
  be under way when the trial ends.
- quality: no load changes it; see `quality_of`.

Example:
    trials = Trials(spec=spec, settings=settings, served=served, folder=folder, console=console)
    trials(120.0, "bisect", duration_s=10, seed=3).outcome      # "holds"
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tritonclient.grpc
import tritonclient.http
from deepseek_client import InferenceClient, InferenceError, ModelMetadata
from rich.console import Console

from deepseek.spec import DeploymentSpec, InputError, InvalidMeasurement, Objective, SloSpec
from deepseek.spec.checks import Table
from loadtests.limits import in_flight_for, latency_limits, samples_needed
from loadtests.measure import measure
from loadtests.quality import of_served
from loadtests.results import Run, Settings
from loadtests.slo import Verdict, judge

Phase = Literal["bracket", "bisect", "confirm"]
Outcome = Literal["holds", "fails", "invalid", "inconclusive"]
OUTCOMES: dict[Verdict, Outcome] = {
    "holds": "holds",
    "violated": "fails",
    "invalid": "invalid",
    "inconclusive": "inconclusive",
}
KEEPS_UP = "throughput"  # what the objective on the trial's own rate is called
OVERLOADED = 0.8  # of the rate: no stall of a machine costs a fifth of a trial
SAMPLES = 2  # times what a percentile needs at least: that many prove it only where all lie within the limit
LONG_TRIAL_S = 60.0  # is not made longer for that
DEFAULT_START_RPS = 50.0  # of a search, where the SLO names no rate
UNKNOWN_LATENCY_S = 1.0  # may be under way at the end, where the SLO bounds no latency


class Trial(Table):
    """What one trial found; a percentile that only failures reached is null, as is one of a trial never sent."""

    rate_rps: float
    phase: Phase
    outcome: Outcome
    achieved_rps: float
    p50_ms: float | None
    """Of the intended latency, as `p99_ms`."""
    p99_ms: float | None
    error_rate: float
    duration_s: float
    failed: tuple[str, ...] = ()
    """Objectives that were violated."""
    problems: tuple[str, ...] = ()
    """Why the trial is invalid."""
    run: str = ""
    """The run's folder; empty where nothing was sent, since the generator cannot at this rate."""

    @property
    def sent(self) -> bool:
        """There is something to be shown of it."""
        return bool(self.run)

    @property
    def overloaded(self) -> bool:
        """It failed beyond doubt: a queue grew all the time, or most requests were refused."""
        return self.outcome == "fails" and self.achieved_rps < OVERLOADED * self.rate_rps


def bound_rates(slo: SloSpec) -> list[float]:
    """Rates that an objective on latency or errors is bound to, ascending."""
    lines = [line for line in slo.all_objectives() if line.kind in ("ms", "error_rate")]
    return sorted({line.rate_rps for line in lines if line.rate_rps is not None})


def required_rps(slo: SloSpec) -> float | None:
    """The rate that the SLO itself asks the service to hold; None where it names none."""
    lines = slo.all_objectives()
    asked = [line.limit for line in lines if line.kind == "throughput"] + bound_rates(slo)
    return max(asked, default=None)


def slo_at(slo: SloSpec, rate_rps: float, duration_s: float) -> SloSpec:
    """What a trial of so many seconds at this rate is judged by."""
    lines = []
    for text in slo.objectives:
        line = Objective.parse(text)
        if line.kind in ("ms", "error_rate") and (line.rate_rps is None or rate_rps <= line.rate_rps):
            lines.append(re.sub(r"\s*@\s*[\d.]+\s*rps\s*$", "", text))
    errors = [line for line in slo.all_objectives() if line.kind == "error_rate"]
    asked = [line for line in errors if line.rate_rps is None or rate_rps <= line.rate_rps]
    unbounded = {} if asked else {"max_error_rate": 1.0}  # else the default would come back for lines that are left out
    at_rate = slo.model_copy(update={"rate_rps": rate_rps, "objectives": tuple(lines), **unbounded})
    allowed = min(line.limit for line in asked or errors)
    under_way_s = max(latency_limits(at_rate).values(), default=UNKNOWN_LATENCY_S * 1000) / 1000
    kept = max(0.01, 1 - allowed - under_way_s / duration_s)
    return at_rate.model_copy(update={"rate_rps": rate_rps * kept})


def seconds_needed(slo: SloSpec, rate_rps: float) -> float:
    """Seconds in which this rate gives enough samples for every percentile of the SLO."""
    percents = [line.percent for line in slo.all_objectives() if line.percent is not None]
    least_s = max(map(samples_needed, percents), default=1) / rate_rps
    return max(least_s, min(SAMPLES * least_s, LONG_TRIAL_S))


def quality_of(spec: DeploymentSpec, settings: Settings, served: ModelMetadata) -> tuple[list[str], list[str]]:
    """Quality objectives that are violated, and those that nothing measured for what is served."""
    known = of_served(spec.name, spec.precision.metric, served, settings.protocol, settings.target)
    violated, unknown = [], []
    for text, line in ((text, Objective.parse(text)) for text in spec.slo.objectives):
        if line.kind != "quality":
            continue
        if (found := known.get(line.measure)) is None:
            unknown.append(text)
        else:
            limit = line.limit * found["baseline"] if line.of_baseline else line.limit
            if not replace(line, limit=limit).holds(found["seen"]):
                violated.append(f"{text} (seen {found['seen']:.4f}, {found['source']})")
    return violated, unknown


class Served(Table):
    """How the server runs the model; null where it does not say."""

    max_batch: int | None = None
    instances: int | None = None
    threads: int | None = None
    """Of an instance; 0: the cores divided by the instances."""
    max_queue_delay_us: int | None = None


def served_settings(settings: Settings, served: ModelMetadata) -> Served:
    """What the server's configuration of the model says, where it may be read."""
    if settings.access:  # a gateway keeps it to itself
        return Served(max_batch=served.max_batch_size)
    client: Any = None
    try:
        if settings.protocol == "grpc":
            client = tritonclient.grpc.InferenceServerClient(settings.url)
            config = client.get_model_config(settings.model, as_json=True, client_timeout=2)["config"]
        else:
            client = tritonclient.http.InferenceServerClient(settings.url, connection_timeout=2, network_timeout=2)
            config = client.get_model_config(settings.model)
    except Exception:  # refusals look different behind every gateway; none may end the search
        return Served(max_batch=served.max_batch_size)
    finally:
        if client is not None:
            client.close()
    threads = served.parameters.get("threads") or served.parameters.get("intra_op_thread_count")
    delay_us = config.get("dynamic_batching", {}).get("max_queue_delay_microseconds", 0)
    return Served(
        max_batch=int(config.get("max_batch_size", 0)),
        instances=sum(int(group.get("count", 1)) for group in config.get("instance_group", ())) or None,
        threads=int(threads) if threads else None,
        max_queue_delay_us=int(delay_us) if "dynamic_batching" in config else None,
    )


@dataclass(frozen=True, kw_only=True)
class Trials:
    """Makes trials of one model on one server."""

    spec: DeploymentSpec
    """With the target's SLO in place."""
    settings: Settings
    """Of every trial, but for rate, length and seed."""
    served: ModelMetadata
    folder: Path
    """Where the runs are kept; not among the model's load tests, of which the latest is judged."""
    console: Console

    def __call__(self, rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial:
        """Runs and judges one."""
        settings = replace(self.settings, rate_rps=rate_rps, duration_s=duration_s, seed=seed)
        if reason := _beyond(settings, self.spec.slo):
            nothing: dict[str, Any] = {"achieved_rps": 0.0, "p50_ms": None, "p99_ms": None, "error_rate": 0.0}
            nothing |= {"outcome": "invalid", "problems": (reason,)}
            return Trial(rate_rps=rate_rps, phase=phase, duration_s=duration_s, **nothing)
        run = measure(settings, self.spec, self.served, self.console, self.folder)
        self._check_alive(run)
        return judged(run, slo_at(self.spec.slo, rate_rps, duration_s), phase)

    def _check_alive(self, run: Run) -> None:
        """A server that has gone fails at every rate, and has no capacity to be found."""
        lost = run.window.errors["Unreachable"] + run.window.errors["ConnectionLost"]
        if not lost or ready(self.settings):
            return
        raise InvalidMeasurement(
            f"{self.settings.model} at {self.settings.url} no longer answers, since the trial at "
            f"{run.settings.rate_rps:g}/s ({lost} of {run.window.planned} requests lost their connection or found "
            "none); see the server's log, start it again and repeat"
        )


def _beyond(settings: Settings, slo: SloSpec) -> str:
    """Why the generator cannot send at this rate, of which a search is to learn that it is the limit."""
    if settings.max_in_flight:  # as many as were asked for
        return ""
    try:
        in_flight_for(settings, slo)
    except InputError as error:
        return str(error)
    return ""


def ready(settings: Settings) -> bool:
    """Whether the model can still be asked."""
    try:
        with InferenceClient(
            settings.url, settings.protocol, timeout_s=settings.timeout_s, retries=2, **settings.access
        ) as client:
            return client.ready(settings.model)
    except InferenceError:
        return False


def judged(run: Run, slo: SloSpec, phase: Phase) -> Trial:
    """The trial that a run is."""
    judgement = judge(run, slo)
    latency = run.window.latency("intended")
    p50_ms, p99_ms = (latency.percentile_ms(percent) for percent in (50, 99))
    assert run.settings.rate_rps is not None
    return Trial(
        rate_rps=run.settings.rate_rps,
        phase=phase,
        outcome=OUTCOMES[judgement.verdict],
        achieved_rps=run.window.throughput_rps,
        p50_ms=p50_ms if math.isfinite(p50_ms) else None,
        p99_ms=p99_ms if math.isfinite(p99_ms) else None,
        error_rate=run.window.failed / run.window.planned if run.window.planned else 0.0,
        duration_s=run.settings.duration_s,
        failed=_names(judgement.objectives, "violated"),
        problems=judgement.problems,
        run=str(run.folder),
    )


def _names(objectives: Sequence, status: str) -> tuple[str, ...]:
    return tuple(KEEPS_UP if each.name == "rate_rps" else each.name for each in objectives if each.status == status)

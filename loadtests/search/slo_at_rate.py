"""Applies the objectives of an SLO to a trial at any rate.

- Upper limits, on latency and errors, apply as written.
- An objective that is bound to a rate (`p50_ms < 10 @ 200 rps`) applies at every rate up to its own: what holds at a
  rate also holds at every lower one. Above its rate it does not apply.
- Rate and throughput: the server must keep up with the rate of the trial, less the errors that the SLO allows and the
  requests that may be in flight when the trial ends.
- Quality does not depend on the load; `quality_of` checks it.

Example:
    slo_at(spec.slo, 120.0, duration_s=10).rate_rps      # 119.3
"""

import re

from deepseek_client import ModelMetadata

from deepseek.spec import DeploymentSpec, Objective, SloSpec
from deepseek.spec.objectives import SIGNS, formatted, latency_limits, requests_to_prove, samples_needed
from loadtests.load.task_metric import of_served
from loadtests.results.settings import LoadSettings

SAMPLES = 2  # times the minimum, with which a percentile holds only if every sample is within the limit
MOST_PROOFS = 5  # runs that may prove a rate, each a step lower; they share the error of the SLO's confidence
SPARE = 1.5  # times the requests that prove a rate if none is over a limit
LONG_TRIAL_S = 60.0  # no trial grows beyond this to get twice the minimum of samples
DEFAULT_IN_FLIGHT_S = 1.0  # seconds of requests in flight at the end, if the SLO has no latency limit


def bound_rates(slo: SloSpec) -> list[float]:
    """The rates to which upper limits are bound, ascending."""
    lines = [line for line in slo.all_objectives() if line.facts.from_above]
    return sorted({line.rate_rps for line in lines if line.rate_rps is not None})


def required_rps(slo: SloSpec) -> float | None:
    """The rate in requests/s that the SLO asks for; None if it names none."""
    asked = [line.limit for line in slo.all_objectives() if line.kind == "throughput"] + bound_rates(slo)
    return max(asked, default=None)


def error_limit_at(slo: SloSpec, rate_rps: float) -> float | None:
    """The tightest limit on errors that applies at a rate, as a share; None if none applies."""
    lines = [line for line in slo.all_objectives() if line.kind == "error_rate" and _applies(line, rate_rps)]
    return min((line.limit for line in lines), default=None)


def slo_at(slo: SloSpec, rate_rps: float, duration_s: float) -> SloSpec:
    """The SLO by which a trial of `duration_s` at `rate_rps` is judged."""
    lines = [
        re.sub(r"\s*@\s*[\d.]+\s*rps\s*$", "", text)
        for text in slo.objectives
        if (line := Objective.parse(text)).facts.from_above and _applies(line, rate_rps)
    ]
    limit = error_limit_at(slo, rate_rps)
    unbounded = {} if limit is not None else {"max_error_rate": 1.0}  # else the default limit would come back
    at_rate = slo.model_copy(update={"rate_rps": rate_rps, "objectives": tuple(lines), **unbounded})
    if limit is None:
        limit = min(line.limit for line in slo.all_objectives() if line.kind == "error_rate")
    in_flight_s = max(latency_limits(at_rate.all_objectives()).values(), default=DEFAULT_IN_FLIGHT_S * 1000) / 1000
    kept = max(0.01, 1 - limit - in_flight_s / duration_s)
    return at_rate.model_copy(update={"rate_rps": rate_rps * kept})


def _applies(line: Objective, rate_rps: float) -> bool:
    return line.rate_rps is None or rate_rps <= line.rate_rps


def seconds_needed(slo: SloSpec, rate_rps: float) -> float:
    """Seconds until this rate has given enough samples for every percentile of the SLO."""
    percents = [line.percent for line in slo.all_objectives() if line.percent is not None]
    least_s = max(map(samples_needed, percents), default=1) / rate_rps
    return max(least_s, min(SAMPLES * least_s, LONG_TRIAL_S))


def seconds_to_prove(slo: SloSpec, rate_rps: float) -> float:
    """Seconds after which this rate can be proved with confidence, even with a few requests over a limit."""
    lines = slo_at(slo, rate_rps, LONG_TRIAL_S).all_objectives()
    confidence = 1 - (1 - slo.confidence) / MOST_PROOFS
    return SPARE * max(requests_to_prove(line, rate_rps, confidence) or 1 for line in lines) / rate_rps


def quality_of(spec: DeploymentSpec, settings: LoadSettings, served: ModelMetadata) -> tuple[list[str], list[str]]:
    """The violated quality objectives, and those that were not measured for the served model."""
    known = of_served(spec.name, spec.precision.metric, served, settings.protocol, settings.target)
    violated, unknown = [], []
    for text, line in ((text, Objective.parse(text)) for text in spec.slo.objectives):
        if line.kind != "quality":
            continue
        if (found := known.get(line.measure)) is None:
            unknown.append(text)
        elif not line.against(found["baseline"]).holds(found["seen"]):
            violated.append(f"{text} (seen {found['seen']:.4f}, {found['source']})")
    return violated, unknown


def objective_lines(slo: SloSpec) -> tuple[str, ...]:
    """The SLO's objectives as text, those of its simple keys (`p99_ms`) first."""
    every = slo.all_objectives()
    simple = every[: len(every) - len(slo.objectives)]
    written = (f"{line.name} {SIGNS[line.relation]} {formatted(line.kind, line.limit)}" for line in simple)
    return (*written, *slo.objectives)

"""The judgement of one objective, and the verdict on all of them."""

import math
from dataclasses import dataclass
from typing import Literal

from deepseek.spec import ExitCode, Objective, Relation
from deepseek.spec.objectives import Kind
from loadtests.results.stretch import Distribution

ObjectiveStatus = Literal["holds", "violated", "inconclusive"]
SloStatus = Literal["holds", "violated", "inconclusive", "invalid"]
EXIT_CODES: dict[SloStatus, ExitCode] = {
    "holds": ExitCode.PASS,
    "violated": ExitCode.GATE_FAILED,
    "inconclusive": ExitCode.INVALID,
    "invalid": ExitCode.INVALID,
}


@dataclass(frozen=True, kw_only=True)
class JudgedObjective:
    name: str
    """Includes the rate at which it was judged, if the run had several."""
    kind: Kind
    """The unit of limit and seen."""
    relation: Relation
    limit: float
    seen: float
    status: ObjectiveStatus
    margin: float
    """Distance to the limit, as a share of the limit; negative if it is violated."""
    note: str = ""
    within: bool
    """Whether the measured value is inside the limit, however uncertain."""
    low: float = math.nan
    """Confidence bound: of the share of requests over the limit for percentiles and errors, else of `seen`."""
    high: float = math.nan
    offered: bool = True
    """Whether the load could reach the limit; a longer run of the same load decides nothing otherwise."""
    more_requests: int | None = None
    """About how many more requests would decide an inconclusive share; None if not known."""


@dataclass(frozen=True, kw_only=True)
class SloVerdict:
    verdict: SloStatus
    objectives: tuple[JudgedObjective, ...]
    problems: tuple[str, ...]
    """Why the measurement is invalid."""
    notes: tuple[str, ...]


def value_of(latency: Distribution, line: Objective) -> float:
    """The figure in ms that an objective limits; inf if it falls on a failed request (a mean ignores those)."""
    if line.percent is not None:
        return latency.percentile_ms(line.percent)
    if latency.failed and (line.measure == "max_ms" or latency.failed == latency.total):
        return math.inf
    return latency.mean_ms if line.measure == "mean_ms" else latency.max_ms

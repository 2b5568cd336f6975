"""Objectives: the lines of an SLO, and the table `[slo]` that holds them.

Examples of lines: `p99_ms < 50`, `p50_ms < 10 @ 200 rps`, `error_rate < 0.1%`, `ndcg@10 >= 0.99 * baseline`.
"""

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Literal

from pydantic import Field, field_validator

from deepseek.spec.checks import Table

Relation = Literal["<", "<=", ">", ">="]
Kind = Literal["ms", "error_rate", "throughput", "quality"]
SIGNS: dict[Relation, str] = {"<": "<", "<=": "≤", ">": ">", ">=": "≥"}
_OBJECTIVE = re.compile(
    r"(?P<measure>[^\s<>=]+)\s*(?P<relation><=|>=|<|>)\s*(?P<limit>\d+\.?\d*|\.\d+)\s*(?P<unit>%|ms|rps)?"
    r"(?P<baseline>\s*\*\s*baseline)?(\s*@\s*(?P<rate>\d+\.?\d*)\s*rps)?"
)
_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)_ms")
CONFIDENCE = 0.95  # of a verdict
BURST_S = 0.2  # assumed length of a burst of slow answers that a run has not shown
THROUGHPUT_S = 10  # shortest run that proves a throughput: its bounds are Student's t over the seconds
RATE_TOLERANCE = 0.01  # allowed shortfall of a rate: the share that the load generator itself may lose
# As shares of the p99. One bound is the p99 itself, so that the histogram counts the requests that met it.
_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 10)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One line of an SLO: `p99_ms < 50`, `p50_ms < 10 @ 200 rps`, `error_rate < 0.1%`, `throughput >= 150`,
    `ndcg@10 >= 0.99 * baseline`."""

    name: str
    """A key of deploy.toml such as `p99_ms`, or the line's measure."""
    measure: str
    relation: Relation
    limit: float
    """In ms, as a share, in requests/s, or in the metric's own unit; with `of_baseline`, as a share of the baseline."""
    of_baseline: bool = False
    rate_rps: float | None = None
    """The request rate at which it must hold. None: the SLO's `rate_rps`; for throughput, the limit itself."""

    @property
    def percent(self) -> float | None:
        """99 for p99_ms; None if the measure is not a percentile."""
        found = _PERCENTILE.fullmatch(self.measure)
        return float(found[1]) if found else None

    @property
    def allowed_share(self) -> float | None:
        """The share of requests that may be over the limit, from 0 to 1; None if it allows none or all of them."""
        share = self.limit if self.kind == "error_rate" else None if self.percent is None else 1 - self.percent / 100
        return share if share and share < 1 else None

    @property
    def kind(self) -> Kind:
        """Kind of the measure: a latency, a share, a rate, or the model's task metric."""
        return next(kind for kind, facts in KINDS.items() if facts.has(self.measure))

    @property
    def facts(self) -> "KindFacts":
        """The row of KINDS for its kind."""
        return KINDS[self.kind]

    def against(self, baseline: float) -> "Objective":
        """The same with a limit in the metric's own unit, for this value of the baseline."""
        return replace(self, limit=self.limit * baseline, of_baseline=False) if self.of_baseline else self

    def holds(self, seen: float) -> bool:
        """Whether a measured value meets the objective; NaN never does."""
        relations = {"<": seen < self.limit, "<=": seen <= self.limit}
        return {**relations, ">": seen > self.limit, ">=": seen >= self.limit}[self.relation]

    @classmethod
    def parse(cls, text: str) -> "Objective":
        """Parses a line. Raises ValueError in one line if it is not an objective."""
        found = _OBJECTIVE.fullmatch(text.strip())
        if found is None:
            example = "p50_ms < 10 @ 200 rps, error_rate < 0.1%, ndcg@10 >= 0.99 * baseline"
            raise ValueError(f"seen {text!r}; an objective is <measure> <relation> <limit>, such as {example}")
        self = cls(
            name=found["measure"],
            measure=found["measure"],
            relation=found["relation"],  # type: ignore[arg-type]
            limit=float(found["limit"]) / (100 if found["unit"] == "%" else 1),
            of_baseline=found["baseline"] is not None,
            rate_rps=float(found["rate"]) if found["rate"] else None,
        )
        if fault := self._fault(found["unit"]):
            raise ValueError(f"seen {text!r}; {fault}")
        return self

    def _fault(self, unit: str | None) -> str | None:
        """Why the objective makes no sense; None if it does."""
        facts = self.facts
        if (self.relation[0] == "<") != facts.from_above:
            return facts.wrong_side(self)
        if not math.isfinite(self.limit) or not math.isfinite(self.rate_rps or 0):
            return "a number in it is too large"
        if unit is not None and unit != facts.unit:
            return f"{self.measure} does not take the unit {unit}"
        if fault := facts.fault(self):
            return fault
        if self.of_baseline and not facts.has_baseline:
            return "only a quality metric has a baseline (fp32 PyTorch)"
        if self.rate_rps is not None and (not facts.of_load or self.rate_rps <= 0):
            return "a rate must be above 0, and applies only to " + MEASURES
        return None


def _wrong_side(line: Objective) -> str:
    return f"{line.measure} needs {'an upper limit: < or <=' if line.facts.from_above else 'a lower limit: > or >='}"


def _unknown_measure(line: Objective) -> str:
    meant = f"; did you mean {line.measure}_ms?" if _PERCENTILE.fullmatch(f"{line.measure}_ms") else ""
    return f"{line.measure} is not one of {MEASURES}, and a quality metric needs a lower limit: > or >={meant}"


def _latency_fault(line: Objective) -> str | None:
    if line.limit <= 0:
        return "a latency limit must be above 0"
    return None if line.percent is None or 0 < line.percent < 100 else "a percentile must be between 0 and 100"


def _error_rate_fault(line: Objective) -> str | None:
    if line.limit >= 1:  # 1 would let every request fail
        return "a share must be below 1, or 100%; one per cent is 1%"
    below_zero = line.limit == 0 and line.relation == "<"
    return "a share cannot be below 0; to allow no errors: error_rate <= 0" if below_zero else None


def _throughput_fault(line: Objective) -> str | None:
    if line.limit <= (line.rate_rps or math.inf):
        return None
    return f"throughput cannot exceed the request rate: set the rate to {line.limit:g} rps or more, or leave it out"


@dataclass(frozen=True, kw_only=True)
class KindFacts:
    """Facts about a kind of objective that all rooms share; each room measures it by the kind's name."""

    measures: tuple[str, ...]
    """Names of its measures, as messages show them; empty: any other name."""
    from_above: bool
    """Lower is better: a limit is an upper limit."""
    of_load: bool = True
    """It depends on load, so a line may give a rate."""
    has_baseline: bool = False
    unit: str | None = None
    """The unit that a line may write after its limit."""
    meaning: str
    """The measure, in words."""
    fault: Callable[[Objective], str | None] = lambda line: None
    """Why a line's numbers make no sense; None if they do."""
    wrong_side: Callable[[Objective], str] = _wrong_side
    """Message for a line with a limit on the wrong side."""
    figure: Callable[[float], str]
    """Formats a value with its unit."""

    def has(self, measure: str) -> bool:
        """Whether a measure is of this kind."""
        shown = "p<percent>_ms" if _PERCENTILE.fullmatch(measure) else measure
        return shown in self.measures or not self.measures


# To add a kind of objective, add a row here, and a function in `JUDGES` of `loadtests/slo/judge.py`.
# A line has the kind of the first row that has its measure.
KINDS: dict[Kind, KindFacts] = {
    "ms": KindFacts(
        measures=("p<percent>_ms", "mean_ms", "max_ms"),
        from_above=True,
        unit="ms",
        meaning="latency",
        fault=_latency_fault,
        figure=lambda value: f"{value:.2f} ms" if value < 10 else f"{value:.1f} ms",
    ),
    "error_rate": KindFacts(
        measures=("error_rate",),
        from_above=True,
        unit="%",
        meaning="requests that fail",
        fault=_error_rate_fault,
        figure=lambda value: f"{value:.3%}",
    ),
    "throughput": KindFacts(
        measures=("throughput",),
        from_above=False,
        unit="rps",
        meaning="successful responses per second",
        fault=_throughput_fault,
        figure=lambda value: f"{value:.1f}/s" if abs(value) >= 1 or not value else f"{value:.2g}/s",
    ),
    "quality": KindFacts(
        measures=(),
        from_above=False,
        of_load=False,
        has_baseline=True,
        meaning="task metric of the served model",
        wrong_side=_unknown_measure,
        figure=lambda value: f"{value:.4f}",
    ),
}
MEASURES = ", ".join(name for facts in KINDS.values() for name in facts.measures)
"""The measures that any model has."""


def formatted(kind: Kind, value: float) -> str:
    """A value with its unit; "-" for NaN, "never" for infinity."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else "never"
    return KINDS[kind].figure(value)


def samples_needed(percent: float) -> int:
    """The minimum of independent requests that prove a percentile: all of them are within the limit."""
    return _samples(1 - percent / 100, CONFIDENCE)


def requests_needed(share: float, rate_rps: float, confidence: float = CONFIDENCE) -> int:
    """The number of requests that prove a share below `share` at a rate, if none is over the limit."""
    return math.ceil(_samples(share, confidence) * max(1.0, BURST_S * rate_rps))


def requests_to_prove(line: Objective, rate_rps: float, confidence: float = CONFIDENCE) -> int | None:
    """The number of requests that prove an objective at a rate, if every one is answered within its limit.

    None if one request decides, as on a maximum, or no number does, as at a rate below a throughput.
    """
    if line.kind != "throughput":
        return requests_needed(line.allowed_share, rate_rps, confidence) if line.allowed_share else None
    spare = 1 - (1 - RATE_TOLERANCE) * line.limit / rate_rps
    if spare <= 0:
        return None
    # The bound counts one request as lost, and those in flight at both ends: one on average.
    return math.ceil(max(THROUGHPUT_S * rate_rps, NormalDist().inv_cdf(confidence) * math.sqrt(1 + 2) / spare))


def _samples(share: float, confidence: float) -> int:
    return math.ceil(round(math.log(1 - confidence) / math.log1p(-share), 9))


def histogram_bounds_ms(p99_ms: float, limits_ms: Iterable[float] = ()) -> list[float]:
    """Ascending bounds of a latency histogram: shares of the p99, and each latency in the SLO, rounded to 1 ns."""
    return sorted({round(bound, 6) for bound in (*(share * p99_ms for share in _BOUNDS), *limits_ms)})


def latency_limits(lines: Iterable[Objective]) -> dict[float, float]:
    """Percentile -> tightest limit in ms, of the objectives that are not tied to a rate."""
    found: dict[float, float] = {}
    for line in lines:
        if line.percent is not None and line.rate_rps is None:
            found[line.percent] = min(line.limit, found.get(line.percent, math.inf))
    return found


def p99_limits(objectives: Iterable[str], rate_rps: float) -> list[float]:
    """Limits on p99, in ms, that lines of an SLO set at a rate; accepts the notations of deploy.toml and of reports."""
    found = []
    for line in objectives:
        try:
            objective = Objective.parse(line.replace("≤", "<=").replace("≥", ">="))
        except ValueError:  # not an objective for latency
            continue
        if objective.percent == 99 and (objective.rate_rps is None or objective.rate_rps >= rate_rps):
            found.append(objective.limit)
    return found


class SloSpec(Table):
    """Objectives of the service. `make loadtest verdict` judges them at `rate_rps`."""

    p50_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit for the median latency."""
    p95_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit for the 95th percentile of latency."""
    p99_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Limit for the 99th percentile of latency."""
    rate_rps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Requests per second that the load test sends, and that the service must sustain."""
    max_error_rate: float = Field(0.01, ge=0, le=1)
    """Share of the requests that may fail: errors, refusals and timeouts."""
    confidence: float = Field(CONFIDENCE, ge=0.5, lt=1)
    """Confidence of each verdict: an objective holds, or is violated, only if the bound of this confidence says so."""
    objectives: tuple[str, ...] = ()
    """More objectives, one string each: `p99.9_ms < 80`, `p50_ms < 10 @ 200 rps`, `error_rate < 0.1%`,
    `throughput >= 150`, `ndcg@10 >= 0.99 * baseline` (the `precision.metric`, relative to fp32 PyTorch)."""

    @field_validator("objectives")
    @classmethod
    def _parses(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            Objective.parse(line)
        return lines

    def all_objectives(self) -> list[Objective]:
        """Objectives of the simple keys, then of `objectives`. An error-rate line there replaces the default limit."""
        lines = [Objective.parse(line) for line in self.objectives]
        found = [
            Objective(name=name, measure=name, relation="<=", limit=limit)
            for name in SloSpec.model_fields
            if KINDS["ms"].has(name) and (limit := getattr(self, name)) is not None
        ]
        if self.rate_rps is not None:
            found.append(Objective(name="rate_rps", measure="throughput", relation=">=", limit=self.rate_rps))
        if "max_error_rate" in self.model_fields_set or all(line.kind != "error_rate" for line in lines):
            found.append(
                Objective(name="max_error_rate", measure="error_rate", relation="<=", limit=self.max_error_rate)
            )
        return found + lines

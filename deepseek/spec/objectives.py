"""Objectives: the lines of an SLO, and the table `[slo]` that holds them.

Examples of lines: `p99_ms < 50`, `p50_ms < 10 @ 200 rps`, `error_rate < 0.1%`, `ndcg@10 >= 0.99 * baseline`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from deepseek.spec.checks import Table

Relation = Literal["<", "<=", ">", ">="]
_OBJECTIVE = re.compile(
    r"(?P<measure>[^\s<>=]+)\s*(?P<relation><=|>=|<|>)\s*(?P<limit>\d+\.?\d*|\.\d+)\s*(?P<unit>%|ms|rps)?"
    r"(?P<baseline>\s*\*\s*baseline)?(\s*@\s*(?P<rate>\d+\.?\d*)\s*rps)?"
)
_PERCENTILE = re.compile(r"p(\d+(?:\.\d+)?)_ms")
MEASURES = "p<percent>_ms, mean_ms, max_ms, error_rate, throughput"
# Shares of the p99: a bound is the p99 itself, so that the histogram tells how many met it.
_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 4, 10)
_UNITS = {"ms": (None, "ms"), "error_rate": (None, "%"), "throughput": (None, "rps"), "quality": (None,)}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """One line of an SLO: `p99_ms < 50`, `p50_ms < 10 @ 200 rps`, `error_rate < 0.1%`, `throughput >= 150`,
    `ndcg@10 >= 0.99 * baseline`."""

    name: str
    """As deploy.toml has it: a key such as `p99_ms`, or the line's measure."""
    measure: str
    relation: Relation
    limit: float
    """In ms, as a share, in requests/s, or of the quality metric (with `of_baseline` a share of the baseline)."""
    of_baseline: bool = False
    rate_rps: float | None = None
    """The rate at which it must hold; None: at the SLO's own, of throughput where its limit is asked for."""

    @property
    def percent(self) -> float | None:
        """99 of p99_ms; None where no percentile is meant."""
        found = _PERCENTILE.fullmatch(self.measure)
        return float(found[1]) if found else None

    @property
    def kind(self) -> Literal["ms", "error_rate", "throughput", "quality"]:
        """What is measured: a latency, a share, a rate, or the model's task metric."""
        if self.percent is not None or self.measure in ("mean_ms", "max_ms"):
            return "ms"
        return self.measure if self.measure in ("error_rate", "throughput") else "quality"  # type: ignore[return-value]

    def holds(self, seen: float) -> bool:
        """Whether a measured value keeps to it; nothing does that is not a number."""
        relations = {"<": seen < self.limit, "<=": seen <= self.limit}
        return {**relations, ">": seen > self.limit, ">=": seen >= self.limit}[self.relation]

    @classmethod
    def parse(cls, text: str) -> Objective:
        """The objective that a line states; ValueError in one line where it states none."""
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
        """What makes no sense of it."""
        upper = self.kind in ("ms", "error_rate")
        if self.kind == "quality" and self.relation[0] == "<":
            meant = f"; did you mean {self.measure}_ms?" if _PERCENTILE.fullmatch(f"{self.measure}_ms") else ""
            return f"{self.measure} is none of {MEASURES}, and a quality metric is bounded from below: > or >={meant}"
        if (self.relation[0] == "<") != upper:
            return f"{self.measure} is bounded from {'above: < or <=' if upper else 'below: > or >='}"
        if not math.isfinite(self.limit) or not math.isfinite(self.rate_rps or 0):
            return "a number in it is too large"
        if self.kind == "ms" and self.limit <= 0:
            return "a latency is more than 0"
        if unit not in _UNITS[self.kind]:
            return f"{self.measure} is not given in {unit}"
        if self.percent is not None and not 0 < self.percent < 100:
            return "a percentile lies between 0 and 100"
        if self.kind == "error_rate" and self.limit > 1:
            return "a share is at most 1, or 100%"
        if self.kind == "error_rate" and self.limit == 0 and self.relation == "<":
            return "no share is below 0; where nothing may fail: error_rate <= 0"
        if self.kind != "quality" and self.of_baseline:
            return "only a quality metric has a baseline (fp32 PyTorch)"
        if self.rate_rps is not None and (self.kind == "quality" or self.rate_rps <= 0):
            return "a rate, of more than 0, belongs to what load changes: " + MEASURES
        if self.kind == "throughput" and self.limit > (self.rate_rps or math.inf):
            return f"nobody answers more than is asked: the rate is {self.limit:g} rps or more, or is left out"
        return None


def histogram_bounds_ms(p99_ms: float, limits_ms: Iterable[float] = ()) -> list[float]:
    """Bounds of a latency histogram, ascending: shares of the p99, and each latency that the SLO names, to the ns."""
    return sorted({round(bound, 6) for bound in (*(share * p99_ms for share in _BOUNDS), *limits_ms)})


class SloSpec(Table):
    """Objectives of the service, judged by `loadtests.slo` at `rate_rps`."""

    p50_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Latency that half of the requests keep."""
    p95_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Latency that 95 of 100 keep."""
    p99_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Latency that 99 of 100 keep."""
    rate_rps: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Requests/s that are sent, and answered."""
    max_error_rate: float = Field(0.001, ge=0, le=1)
    """Share of the requests that may fail: errors, refusals, time-outs."""
    objectives: tuple[str, ...] = ()
    """Further ones, a line each: "p99.9_ms < 80", "p50_ms < 10 @ 200 rps", "error_rate < 0.1%", "throughput >= 150",
    "ndcg@10 >= 0.99 * baseline" (`precision.metric`, against fp32 PyTorch)."""

    @field_validator("objectives")
    @classmethod
    def _parses(cls, lines: tuple[str, ...]) -> tuple[str, ...]:
        for line in lines:
            Objective.parse(line)
        return lines

    def all_objectives(self) -> list[Objective]:
        """Those of the simple keys, then the lines. A line on errors takes the place of the default limit."""
        lines = [Objective.parse(line) for line in self.objectives]
        found = [
            Objective(name=name, measure=name, relation="<=", limit=limit)
            for name in ("p50_ms", "p95_ms", "p99_ms")
            if (limit := getattr(self, name)) is not None
        ]
        if self.rate_rps is not None:
            found.append(Objective(name="rate_rps", measure="throughput", relation=">=", limit=self.rate_rps))
        if "max_error_rate" in self.model_fields_set or all(line.kind != "error_rate" for line in lines):
            limit = self.max_error_rate
            found.append(Objective(name="max_error_rate", measure="error_rate", relation="<=", limit=limit))
        return found + lines

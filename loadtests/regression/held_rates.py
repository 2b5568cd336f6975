"""Judges which rates a version holds, from all its runs together.

Contract: at each rate the runs of a version are judged as one run, by the verdict of a load test, with its confidence.
A maximum is left out: one slow answer would decide, and a stall of the machine makes one.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deepseek.spec import Objective, SloSpec
from loadtests.results.run import Run
from loadtests.search.slo_at_rate import slo_at
from loadtests.slo.generator_health import generator_problems
from loadtests.slo.judge import judge
from loadtests.slo.judged_objectives import SloVerdict


def step(run: Run, rate_rps: float) -> Run:
    """The part of a run at one rate, as a run whose seconds count from 0."""
    return _as_one([run], rate_rps)


def problems_at(run: Run, rate_rps: float, slo: SloSpec) -> list[str]:
    """Why a run is invalid at this rate (the generator was the limit); empty if it is valid."""
    part = step(run, rate_rps)
    return generator_problems(part, slo_at(slo, rate_rps, part.settings.duration_s), compared=True)


def _as_one(runs: Sequence[Run], rate_rps: float) -> Run:
    """The parts of several runs at one rate, one after the other; of the generators' figures, the busiest's."""
    stretches = [stretch for run in runs if (stretch := run.at_rate(rate_rps)) is not None]
    seconds = [second for stretch in stretches for second in stretch.seconds]
    duration_s = sum(stretch.duration_s for stretch in stretches)
    busiest = max(runs, key=lambda run: run.generator.get("thread_cpu", 0))
    settings = replace(busiest.settings, rate_rps=rate_rps, shape=None, duration_s=duration_s)
    numbered = tuple(replace(second, second=place) for place, second in enumerate(seconds))
    return replace(busiest, settings=settings, seconds=numbered, lengths={})


@dataclass(frozen=True, kw_only=True)
class HeldRates:
    """The verdict on a version at each rate, lowest first."""

    at: Mapping[float, SloVerdict]

    @classmethod
    def of(cls, runs: Sequence[Run], rates_rps: Sequence[float], slo: SloSpec, looks: int) -> "HeldRates":
        """Judges the runs at each rate; `looks` verdicts share the error of the SLO's confidence."""
        lasting = [text for text in slo.objectives if Objective.parse(text).measure != "max_ms"]
        slo = slo.model_copy(update={"objectives": tuple(lasting)})
        return cls(at={rate: _verdict(runs, rate, slo, looks) for rate in sorted(rates_rps)})

    @property
    def highest_rps(self) -> float:
        """The highest rate that holds, as all lower ones do; nan if the lowest does not hold."""
        highest = math.nan
        for rate, verdict in self.at.items():
            if verdict.verdict != "holds":
                break
            highest = rate
        return highest

    def reasons(self, up_to_rps: float = math.inf) -> Iterator[str]:
        for rate, verdict in self.at.items():
            open_ = [each for each in verdict.objectives if each.status == verdict.verdict]
            why = [*verdict.problems[:1], *(f"{each.name} {each.status}: {each.note}".rstrip(": ") for each in open_)]
            if rate <= up_to_rps and verdict.verdict != "holds":
                yield f"at {rate:g}/s {why[0]}"


def _verdict(runs: Sequence[Run], rate_rps: float, slo: SloSpec, looks: int) -> SloVerdict:
    one = _as_one(runs, rate_rps)
    # Answers that are still under way when a run leaves this rate are missing once in each run.
    shortest_s = min(step(run, rate_rps).settings.duration_s for run in runs)
    return judge(replace(one, settings=replace(one.settings, looks=looks)), slo_at(slo, rate_rps, shortest_s))

"""The result of one open-loop run at one rate.

Example:
    RateTrial(rate_rps=120, phase="bisect", outcome="holds", achieved_rps=119.4, ...)
"""

import math
from typing import Literal

from pydantic import Field

from deepseek.spec import SloSpec
from deepseek.spec.checks import Table
from deepseek.spec.objectives import samples_needed
from loadtests.results.run import Run
from loadtests.slo.judge import judge
from loadtests.slo.judged_objectives import SloVerdict

Phase = Literal["bracket", "bisect", "confirm", "prove"]
TrialOutcome = Literal["holds", "fails", "invalid", "inconclusive"]
OVERLOADED = 0.8  # of the rate answered: a stall of the machine costs less than a fifth of a trial


class RateTrial(Table):
    """One trial; a percentile is null if nothing was sent or if it falls on a failed request."""

    rate_rps: float = Field(gt=0)
    phase: Phase
    outcome: TrialOutcome
    achieved_rps: float = Field(0.0, ge=0)
    p50_ms: float | None = None
    """Of the intended latency, like `p99_ms`."""
    p99_ms: float | None = None
    error_rate: float = 0.0
    duration_s: float
    failed: tuple[str, ...] = ()
    """The objectives that it misses."""
    violated: bool = False
    """The verdict on it is violated, with its confidence."""
    problems: tuple[str, ...] = ()
    """Why the trial is invalid."""
    run: str = ""
    """The run's folder; empty if the load generator cannot send at this rate."""

    @classmethod
    def of_run(cls, run: Run, slo: SloSpec, phase: Phase) -> "RateTrial":
        """Judges a run by `slo`, which must be the SLO at the rate of the run (`slo_at`)."""
        assert run.settings.rate_rps is not None
        judgement, latency = judge(run, slo), run.window.latency("intended")
        outcome, missed = _proved(judgement) if phase == "prove" else _by_sample(judgement, slo, latency.total)
        p50_ms, p99_ms = (latency.percentile_ms(percent) for percent in (50, 99))
        return cls(
            rate_rps=run.settings.rate_rps,
            phase=phase,
            outcome=outcome,
            achieved_rps=run.window.throughput_rps,
            p50_ms=p50_ms if math.isfinite(p50_ms) else None,
            p99_ms=p99_ms if math.isfinite(p99_ms) else None,
            error_rate=run.window.failed / run.window.planned if run.window.planned else 0.0,
            duration_s=run.settings.duration_s,
            failed=tuple("throughput" if name == "rate_rps" else name for name in missed),  # the trial's own rate
            violated=judgement.verdict == "violated",
            problems=judgement.problems,
            run=str(run.folder),
        )

    @property
    def sent(self) -> bool:
        return bool(self.run)

    @property
    def overloaded(self) -> bool:
        """Whether a fifth of the requests or more went unanswered: more than a stall of the machine explains."""
        return self.outcome == "fails" and self.achieved_rps < OVERLOADED * self.rate_rps

    @property
    def reason(self) -> str:
        """Why the trial does not hold; empty if it holds."""
        return ", ".join(self.failed) or "; ".join(self.problems[:1]) or (self.outcome != "holds") * self.outcome


def _by_sample(judgement: SloVerdict, slo: SloSpec, requests: int) -> tuple[TrialOutcome, list[str]]:
    """The outcome of a trial by its sample alone, and the objectives that it misses.

    Trials only guide the search, so they may be short. With fewer requests than a percentile has at all, they are
    inconclusive.
    """
    if judgement.verdict == "invalid":
        return "invalid", []
    least = max((samples_needed(line.percent) for line in slo.all_objectives() if line.percent), default=1)
    missed = [each.name for each in judgement.objectives if not each.within]
    if requests < least:
        missed = [name for name in missed if not name.startswith("p")]
        return ("fails" if missed else "inconclusive"), missed
    return ("fails" if missed else "holds"), missed


def _proved(judgement: SloVerdict) -> tuple[TrialOutcome, list[str]]:
    """The outcome by the verdict, with its confidence, and the violated objectives."""
    missed = [each.name for each in judgement.objectives if each.status == "violated"]
    return ("fails" if judgement.verdict == "violated" else judgement.verdict), missed

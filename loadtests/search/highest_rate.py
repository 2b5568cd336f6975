"""The search for the highest rate that holds: bracket, bisect, confirm.

Contract: independent of any server. `try_rate` runs the trials, and the search depends on their outcomes alone. Rates
have three significant digits.

- Bracket: up from `start_rps` to the first rate that does not hold, or down to the first that does. Below an overloaded
  trial the step is larger: the next rate is the one that the server answered.
- Bisect geometrically, until the highest rate that holds and the lowest that does not are within `resolution`, or
  within two steps of `resolution` if a confirmation follows.
- Confirm with runs three times as long that walk around the limit: one `resolution` up after a run that holds, one
  down after a run that does not, until the walk has turned four times. The result is the geometric mean of the turning
  points, less half a step. The walk averages over many runs, where a single run depends on what else the machine did
  in that half minute (the up-and-down method, Dixon and Mood, 1948).

Before the confirmation, a trial that does not hold is repeated once, and the repetition counts: one stall of the
machine spoils a p99, and a false failure would end the search far too low. An overloaded trial (a fifth of the requests
or more unanswered) counts at once. An inconclusive trial is repeated for twice as long.

`stops_rps` are the rates that objectives are bound to. The search tries no rate above a stop until the stop has held:
the objective does not apply above it, so a search that skipped the stop would miss the violation.

With `proof_s`, the verdict then proves the result: runs that are long enough for its confidence, at the rate found and
then each a step lower, until one holds with confidence. The trials before only guide the search, by their samples.

If the load generator was the limit, the search continues below that rate, and the result is a lower bound.

Example:
    RateSearch(SearchPlan(start_rps=100, duration_s=10), try_rate).run()    # HighestRate(capacity_rps=412.0, ...)
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtests.search.rate_trial import Phase, RateTrial
from loadtests.search.slo_at_rate import MOST_PROOFS

STEP, LARGEST_STEP = 2.0, 16.0  # factors of the bracket
TURNS, LONGEST_WALK = 4, 15  # turning points that end the confirming walk; the most steps it takes
CONFIRM_LONGER = 3  # length of a confirming run, in trials
LOWEST_RPS, HIGHEST_RPS = 0.1, 1e6
GENERATOR, SAMPLES, TIME, TRIALS, WALK = "generator", "samples", "time", "trials", "walk"
UNDECIDED = (GENERATOR, SAMPLES, TIME, TRIALS, WALK)
"""Values of `HighestRate.limited_by` for a search that did not end at a failing objective."""


TryRate = Callable[[float, Phase, float, int], RateTrial]
"""Runs one trial: rate in requests/s, phase, seconds, seed of the arrivals."""


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    start_rps: float
    duration_s: float
    """Minimum length of a trial."""
    stops_rps: tuple[float, ...] = ()
    """Rates that must hold before a higher one is tried."""
    resolution: float = 1.05
    confirm: bool = True
    """False: the search ends after the bisection, to one step of `resolution`."""
    max_trials: int = 30
    max_s: float = 1800
    proof_s: Callable[[float], float] | None = None
    """Seconds of a run at a rate that can prove the rate; None: the rate is not proved."""
    needed_s: Callable[[float], float] = lambda rate_rps: 0
    """Seconds that a trial at a rate needs for enough samples."""


@dataclass(frozen=True, kw_only=True)
class HighestRate:
    capacity_rps: float | None
    first_failing_rps: float | None
    confirmed: bool
    limited_by: str
    """The objectives that fail above `capacity_rps`, or one of UNDECIDED."""


class _Ended(Exception):
    """The plan's limit on time or trials was reached."""


def rounded(rate_rps: float) -> float:
    """Rounds a rate to three significant digits."""
    return float(f"{rate_rps:.3g}")


@dataclass
class RateSearch:
    """One search; `trials` holds every trial so far, also after an exception."""

    plan: SearchPlan
    try_rate: TryRate
    clock: Callable[[], float] = time.monotonic
    show: Callable[[RateTrial], None] = lambda trial: None
    """Called after each trial."""
    trials: list[RateTrial] = field(default_factory=list)
    _counted: list[RateTrial] = field(default_factory=list)
    """The trials that count: the last one of each repetition."""
    _low: float | None = None
    _high: RateTrial | None = None

    def __post_init__(self) -> None:
        self._ends_at = self.clock() + self.plan.max_s

    def run(self) -> HighestRate:
        """Searches until the rate is found or a limit of the plan is reached."""
        try:
            self._bracket()
            if self._low is None:
                return self._found(None, confirmed=False)
            self._bisect(self.plan.resolution ** (2 if self.plan.confirm else 1))
            return self._proved(self._confirm() if self.plan.confirm else self._found(self._low, confirmed=False))
        except _Ended as bound:
            found = self._found(self._best(), confirmed=False, limited_by=str(bound))
            try:
                return found if self.trials and self.trials[-1].phase == "prove" else self._proved(found)
            except _Ended:
                return found

    def _bracket(self) -> None:
        start = rounded(min(self.plan.start_rps, HIGHEST_RPS))
        rate = min(self._stop, start)
        while rate <= HIGHEST_RPS:
            self._try(rate, "bracket")
            if self._low is None:
                if (rate := rounded(self._lower(rate))) < self._lowest:
                    return
            elif self._high:
                return
            else:
                rate = min(self._stop, max(start, rounded(rate * STEP)))

    @property
    def _lowest(self) -> float:
        return min(LOWEST_RPS, rounded(self.plan.start_rps))

    @property
    def _stop(self) -> float:
        """The lowest stop that has not held yet."""
        held = {trial.rate_rps for trial in self.trials if trial.outcome == "holds"}
        return min((stop for stop in self.plan.stops_rps if stop not in held), default=math.inf)

    def _lower(self, rate_rps: float) -> float:
        """The next rate below one that does not hold: one step down, or what an overloaded server answered."""
        tried = self.trials[-1]
        hint = tried.achieved_rps if tried.overloaded else rate_rps
        return max(rate_rps / LARGEST_STEP, min(rate_rps / STEP, hint))  # the answered rate may be tiny

    def _bisect(self, within: float) -> None:
        while self._low and self._high and self._high.rate_rps > self._low * within:
            middle = rounded(math.sqrt(self._low * self._high.rate_rps))
            if not self._low < middle < self._high.rate_rps:
                return
            self._try(middle, "bisect")

    def _confirm(self) -> HighestRate:
        """Walks around the limit with longer runs until the walk has turned often enough."""
        level, turns, steps = 0, list[int](), list[bool]()
        while len(turns) < TURNS and len(steps) < LONGEST_WALK and self._at(level) >= self._lowest:
            steps.append(self._judged(min(self._stop, self._at(level)), "confirm").outcome == "holds")
            if steps[-2:] in ([True, False], [False, True]):
                turns.append(level)
            level += 1 if steps[-1] else -1
        if not any(steps):
            return self._found(None, confirmed=False)
        held = max(each.rate_rps for each in self._counted if each.phase == "confirm" and each.outcome == "holds")
        if len(turns) < 2:  # the limit is above the end of the walk
            return self._found(held, confirmed=False, limited_by=WALK)
        # The mean lies between a rate that holds and one that does not: half a step lower holds.
        best = self._at(sum(turns) / len(turns) - 0.5)
        if best >= self._stop:
            best = max(each.rate_rps for each in self._counted if each.outcome == "holds")
        above = [each for each in self._counted if each.outcome != "holds" and each.rate_rps > best]
        if above:  # the lowest is the limit; if two trials share that rate, the failed one
            self._high = min(above, key=lambda each: (each.rate_rps, each.outcome != "fails"))
        return self._found(best, confirmed=True)

    def _proved(self, found: HighestRate) -> HighestRate:
        """The highest rate, from the one found down, at which the verdict holds with confidence."""
        start_rps, proof_s = found.capacity_rps, self.plan.proof_s
        if proof_s is None or start_rps is None or found.confirmed != self.plan.confirm:
            return found
        if not found.confirmed:  # short runs alone find too much
            start_rps /= self.plan.resolution
        proof = self._prove(start_rps, proof_s)
        if proof.outcome == "holds":
            return self._found(proof.rate_rps, confirmed=True, limited_by=found.limited_by)
        return self._found(None, confirmed=False, limited_by=_limit_of(proof))

    def _prove(self, rate_rps: float, proof_s: Callable[[float], float]) -> RateTrial:
        """The first proof that holds, at this rate or a few steps lower; else the last one."""
        for step in range(MOST_PROOFS):
            rate = max(self._lowest, rounded(rate_rps / self.plan.resolution**step))
            trial = self._trial(rate, "prove", math.ceil(max(self.plan.duration_s, proof_s(rate))))
            self._counted.append(trial)
            if trial.outcome == "holds":
                break
        return trial

    def _at(self, level: float) -> float:
        """The rate that is `level` steps above the one that the bisection found."""
        assert self._low is not None
        return rounded(self._low * self.plan.resolution**level)

    def _judged(self, rate_rps: float, phase: Phase) -> RateTrial:
        """The trial that counts at this rate: the first, or its repetition."""
        least_s = self.plan.duration_s * (CONFIRM_LONGER if phase == "confirm" else 1)
        duration_s = math.ceil(max(least_s, self.plan.needed_s(rate_rps)))
        trial = self._trial(rate_rps, phase, duration_s)
        counts = trial.outcome == "holds" or trial.overloaded or (trial.outcome == "fails" and phase == "confirm")
        if not counts:
            trial = self._trial(rate_rps, phase, duration_s * (2 if trial.outcome == "inconclusive" else 1))
        self._counted.append(trial)
        return trial

    def _try(self, rate_rps: float, phase: Phase) -> None:
        """Tries a rate and moves the lower or upper bound of the search."""
        trial = self._judged(rate_rps, phase)
        if trial.outcome == "holds":
            self._low = max(rate_rps, self._low or 0)
        else:
            self._high = trial

    def _trial(self, rate_rps: float, phase: Phase, duration_s: float) -> RateTrial:
        if len(self.trials) >= self.plan.max_trials:
            raise _Ended(TRIALS)
        proof_s = self.plan.proof_s if phase != "prove" and not self.plan.confirm else None
        if self.clock() + duration_s + (proof_s(rate_rps) if proof_s else 0) > self._ends_at:
            raise _Ended(TIME)  # a search of short runs leaves the time that the proof takes
        trial = self.try_rate(rate_rps, phase, duration_s, len(self.trials))
        self.trials.append(trial)
        self.show(trial)
        return trial

    def _best(self) -> float | None:
        """The highest rate that held, below every rate at which a confirming run failed."""
        longer = [each for each in self.trials if each.phase in ("confirm", "prove") and each.outcome == "fails"]
        refuted = min((each.rate_rps for each in longer), default=math.inf)
        held = [each.rate_rps for each in self.trials if each.outcome == "holds" and each.rate_rps < refuted]
        return max(held, default=None)

    def _found(self, capacity_rps: float | None, *, confirmed: bool, limited_by: str = "") -> HighestRate:
        failing = [trial.rate_rps for trial in self._counted if trial.outcome == "fails"]
        above = [rate for rate in failing if capacity_rps is None or rate > capacity_rps]
        return HighestRate(
            capacity_rps=capacity_rps,
            first_failing_rps=min(above, default=None),
            confirmed=confirmed,
            limited_by=limited_by or self._limit(),
        )

    def _limit(self) -> str:
        if self._high is None:  # even HIGHEST_RPS held, more than any generator sends
            return GENERATOR
        return _limit_of(self._high)


def _limit_of(trial: RateTrial) -> str:
    """Why a trial does not hold: its objectives, or what kept it from a result."""
    reason = {"invalid": GENERATOR, "inconclusive": SAMPLES}.get(trial.outcome)
    return reason or ", ".join(trial.failed)

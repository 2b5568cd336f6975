"""The search for the highest rate that holds: bracket geometrically, bisect, confirm.

Contract: pure of any server; `attempt` makes the trials, and the search is decided by what they find alone, so that one
which was cut off is taken up by giving it the same trials again. Rates have three significant digits.

- Bracket: from `start_rps` in steps of 2 up to the first rate that does not hold, or down to the first that does (in
  larger steps from an overloaded server, by what it answered).
- Bisect, geometrically, until what holds and what does not are within two steps of `resolution` of one another.
- Confirm with runs three times as long (or as long as their samples need), which walk around the knee: one `resolution`
  up after a run that holds, one down after one that does not, until the walk has turned four times. The capacity is the
  (geometric) middle of its turning points less half a step: on a quiet machine the rate that held each time while the
  next one failed. A machine that others use is faster now and slower then; what the walk crosses again and again is the
  knee over that time, where a single run has the luck of its half minute (Dixon and Mood's up-and-down method, 1948).
  Where the bisection was misled, the walk leads away from there.

A trial of the first two that does not hold is repeated once, and the repetition counts: one stall of the machine spoils
a p99, and a rate wrongly taken for failing would end the search far too low, whereas one wrongly taken for holding is
walked down from. An overloaded trial (a fifth of the rate or more was not answered) counts at once: no accident does
that. An inconclusive one is repeated for twice as long.

No rate above one that an objective is bound to (`stops_rps`) is tried before that one has held: above it the objective
is not asked for, so that a search which had passed it would run off to the next knee.

Where the generator was the limit, the search goes on below it, and the answer is "at least".

Example:
    Search(Plan(start_rps=100, duration_s=10), attempt).run()    # Found(capacity_rps=412.0, ...)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from loadtests.trial import Phase, Trial

GROWTH, LARGEST_STEP = 2.0, 16.0
TURNS, LONGEST_WALK = 4, 15  # of the confirming walk
CONFIRM_LONGER = 3  # times a trial
LOWEST_RPS, HIGHEST_RPS = 0.1, 1e6
GENERATOR, SAMPLES, TIME, TRIALS, INTERRUPTED = "generator", "samples", "time", "trials", "interrupted"
UNDECIDED = (GENERATOR, SAMPLES, TIME, TRIALS, INTERRUPTED)
"""What `Found.limited_by` says where it was not the server's failing that ended the search."""


class Attempt(Protocol):
    """Makes one trial."""

    def __call__(self, rate_rps: float, phase: Phase, duration_s: float, seed: int) -> Trial: ...


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where to look and how long."""

    start_rps: float
    duration_s: float
    """Least length of a trial."""
    stops_rps: tuple[float, ...] = ()
    """Rates that have to hold before a higher one is tried."""
    resolution: float = 1.05
    confirm: bool = True
    """False: bisected to one step of `resolution`, and no more."""
    max_trials: int = 30
    max_s: float = 1800
    needed_s: Callable[[float], float] = lambda rate_rps: 0
    """How long a trial has to be for its samples, by its rate."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What the search ended with."""

    capacity_rps: float | None
    first_failing_rps: float | None
    confirmed: bool
    limited_by: str
    """Objectives that fail above it, or one of UNDECIDED."""


class _Ended(Exception):
    """A bound was reached."""


def rounded(rate_rps: float) -> float:
    """To three significant digits."""
    return float(f"{rate_rps:.3g}")


@dataclass
class Search:
    """One search; `trials` holds what was tried so far, whatever ends it."""

    plan: Plan
    attempt: Attempt
    clock: Callable[[], float] = time.monotonic
    trials: list[Trial] = field(default_factory=list)
    _counted: list[Trial] = field(default_factory=list)
    """Those that were not repeated."""
    _low: float | None = None
    _high: Trial | None = None

    def run(self) -> Found:
        """To its end or to a bound of the plan."""
        self._ends_at = self.clock() + self.plan.max_s
        try:
            self._bracket()
            if self._low is None:
                return self._found(None, confirmed=False)
            self._bisect(self.plan.resolution ** (2 if self.plan.confirm else 1))
            return self._confirm() if self.plan.confirm else self._found(self._low, confirmed=False)
        except _Ended as bound:
            return self._found(self._best(), confirmed=False, limited_by=str(bound))

    def _bracket(self) -> None:
        rate = min(self._stop, rounded(min(self.plan.start_rps, HIGHEST_RPS)))
        while self._lowest <= rate <= HIGHEST_RPS:
            self._try(rate, "bracket")
            if self._low is None:
                rate = rounded(self._lower(rate))
            elif self._high:
                return
            else:
                rate = min(self._stop, rounded(rate * GROWTH))

    @property
    def _lowest(self) -> float:
        return min(LOWEST_RPS, rounded(self.plan.start_rps))

    @property
    def _stop(self) -> float:
        """The lowest stop that has not held yet."""
        held = {trial.rate_rps for trial in self.trials if trial.outcome == "holds"}
        return min((stop for stop in self.plan.stops_rps if stop not in held), default=math.inf)

    def _lower(self, rate_rps: float) -> float:
        """The next rate to try below one that does not hold: what an overloaded server answered, if that is less."""
        tried = self.trials[-1]
        hint = tried.achieved_rps if tried.overloaded else rate_rps
        return max(rate_rps / LARGEST_STEP, min(rate_rps / GROWTH, hint))  # under overload it may answer far too little

    def _bisect(self, within: float) -> None:
        while self._low and self._high and self._high.rate_rps > self._low * within:
            middle = rounded(math.sqrt(self._low * self._high.rate_rps))
            if not self._low < middle < self._high.rate_rps:
                return
            self._try(middle, "bisect")

    def _confirm(self) -> Found:
        """The rate that also holds for long: walks until it has turned often enough."""
        assert self._low is not None
        level, turns, steps = 0, list[int](), list[bool]()
        while len(turns) < TURNS and len(steps) < LONGEST_WALK and self._at(level) >= self._lowest:
            steps.append(self._judged(min(self._stop, self._at(level)), "confirm").outcome == "holds")
            if steps[-2:] in ([True, False], [False, True]):
                turns.append(level)
            level += 1 if steps[-1] else -1
        if not any(steps):
            return self._found(None, confirmed=False)
        held = max(each.rate_rps for each in self._counted if each.phase == "confirm" and each.outcome == "holds")
        if len(turns) < 2:  # the knee is farther up than the walk came
            return self._found(held, confirmed=False, limited_by=TRIALS)
        # The middle is between a rate that holds and one that does not: half a step lower is what holds.
        best = self._at(sum(turns) / len(turns) - 0.5)
        if best >= self._stop:
            best = max(each.rate_rps for each in self._counted if each.outcome == "holds")
        above = [each for each in self._counted if each.outcome != "holds" and each.rate_rps > best]
        if above:  # the lowest is what limits; a failure rather than a trial of the same rate that proved nothing
            self._high = min(above, key=lambda each: (each.rate_rps, each.outcome != "fails"))
        return self._found(best, confirmed=True)

    def _at(self, level: float) -> float:
        """The rate so many steps above what the bisection found."""
        assert self._low is not None
        return rounded(self._low * self.plan.resolution**level)

    def _judged(self, rate_rps: float, phase: Phase) -> Trial:
        """A trial of a rate, or its repetition, where the first one does not count."""
        least_s = self.plan.duration_s * (CONFIRM_LONGER if phase == "confirm" else 1)
        duration_s = math.ceil(max(least_s, self.plan.needed_s(rate_rps)))
        trial = self._trial(rate_rps, phase, duration_s)
        counts = trial.outcome == "holds" or trial.overloaded or (trial.outcome == "fails" and phase == "confirm")
        if not counts:
            trial = self._trial(rate_rps, phase, duration_s * (2 if trial.outcome == "inconclusive" else 1))
        self._counted.append(trial)
        return trial

    def _try(self, rate_rps: float, phase: Phase) -> None:
        """Moves a bound of the search."""
        trial = self._judged(rate_rps, phase)
        if trial.outcome == "holds":
            self._low = max(rate_rps, self._low or 0)
        else:
            self._high = trial

    def _trial(self, rate_rps: float, phase: Phase, duration_s: float) -> Trial:
        if len(self.trials) >= self.plan.max_trials:
            raise _Ended(TRIALS)
        if self.clock() + duration_s > self._ends_at:
            raise _Ended(TIME)
        # Each trial has arrivals of its own, so that no unlucky ones come twice; the same search has the same.
        trial = self.attempt(rate_rps, phase, duration_s, len(self.trials))
        self.trials.append(trial)
        return trial

    def _best(self) -> float | None:
        """The highest rate that held and that no longer run has refuted, where the search did not come to its end."""
        longer = [each for each in self.trials if each.phase == "confirm" and each.outcome == "fails"]
        refuted = min((each.rate_rps for each in longer), default=math.inf)
        held = [each.rate_rps for each in self.trials if each.outcome == "holds" and each.rate_rps < refuted]
        return max(held, default=None)

    def _found(self, capacity_rps: float | None, *, confirmed: bool, limited_by: str = "") -> Found:
        failing = [trial.rate_rps for trial in self._counted if trial.outcome == "fails"]
        above = [rate for rate in failing if capacity_rps is None or rate > capacity_rps]
        return Found(
            capacity_rps=capacity_rps,
            first_failing_rps=min(above, default=None),
            confirmed=confirmed,
            limited_by=limited_by or self._limit(),
        )

    def _limit(self) -> str:
        if self._high is None:  # HIGHEST_RPS held, which no generator sends
            return GENERATOR
        reason = {"invalid": GENERATOR, "inconclusive": SAMPLES}.get(self._high.outcome)
        return reason or ", ".join(self._high.failed)

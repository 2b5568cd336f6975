"""The search itself: settings are varied one at a time from the best so far, the best is held against the default.

Contract: everything that is measured goes through the journal, so that a search that was cut off goes on where it was.
A setting is measured in three steps, each stopping it where it has fallen behind: its throughput in a closed loop, its
latency at the reference rate (the same for all), and its capacity, from the best one's upwards. Pairs measure both
sides anew, by a bisection of their own around what the search found, so that no lucky trial of the search counts twice.
No rate above one that an objective is bound to is tried before that one has held. What the time cut off is not kept.

Example:
    best = tuner.search()
    gain, better = verdict(tuner.confirm(best))
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from deepseek.spec import InputError, InvalidMeasurement
from loadtests.contender import Contender, Place, contender
from loadtests.journal import Journal
from loadtests.local_server import NotServed
from loadtests.search import rounded
from loadtests.slo import formatted
from loadtests.space import Space
from loadtests.trial import Trial, bound_rates
from loadtests.tuning import Gain, Pair, Setting, TriedSetting, gains

GROWTH = 1.25  # of the rate, on the way up
SLACK = 1.1  # how far a short closed loop may be below what a server can do
SHARE_OF_CAPACITY = 0.8  # of the default's, or the first's that answers: the rate at which latencies are compared
LEAST_SHARE = 1 / 64  # of the throughput: a service whose SLO holds at less is not to be tuned but changed
LEAST_GAIN, LEAST_P99_GAIN = 1.02, 1.05  # smaller ones are not worth a change
NOT_WORSE = 0.95
LEAST_PAIRS = 3
SPAN = 1.4  # of a pair's search, both ways from what the search found; then further out, where all lies on one side
MOST_TRIES = 2  # of a pair, where runs say nothing of the server


class TimeUp(Exception):
    """The budget does not allow another measurement; says why, where it is not simply over."""


@dataclass
class Tuner:
    """One search over one space."""

    place: Place
    default: Setting
    space: Space
    journal: Journal
    users: int
    pairs: int
    ends_at: float
    """On `time.monotonic()`."""
    confirm_s: float
    """Kept of the time for the pairs."""
    resolution: float = 1.05
    """Rates are pinned down to this factor; settings closer to one another are the same until pairs say otherwise."""

    cut_short: bool = False
    """The time was up before all was tried."""
    left_out: str = ""
    """Why the last of the pairs that were left out says nothing."""
    _rates: dict[Setting, dict[float, Trial]] = field(default_factory=dict)
    """What the search knows of a setting, by rate."""

    @property
    def probes(self) -> int:
        """Halvings that bring a pair's search from its span down to the resolution."""
        return max(1, math.ceil(math.log2(2 * math.log(SPAN) / math.log(self.resolution))))

    # -- one setting -----------------------------------------------------------------------------

    def try_setting(self, setting: Setting) -> TriedSetting:
        """What the journal has of a setting, or a new measurement."""
        if setting in self.journal.tried:
            return self.journal.tried[setting]
        if time.monotonic() > self.ends_at - self.confirm_s and setting != self.default:
            raise TimeUp
        with self.place.console.status(str(setting)):
            try:
                with contender(setting, self.place, "trial") as served:
                    tried = self._measured(served)
            except NotServed as error:
                if setting == self.default:
                    raise InputError(f"the default setting is not served: {error}") from None
                tried = TriedSetting(settings=setting, stopped_early=True, reason=f"not served: {error}")
            except TimeUp as error:
                if setting != self.default:
                    raise
                raise InvalidMeasurement(f"too little time for the default: {error}; --max-s gives it longer") from None
            except (InputError, InvalidMeasurement) as error:
                if setting == self.default:
                    raise
                tried = TriedSetting(settings=setting, stopped_early=True, reason=str(error))
        self.journal.add(tried)
        self.place.console.print(line_of(tried), soft_wrap=True)
        return tried

    def _measured(self, served: Contender) -> TriedSetting:
        throughput = served.throughput_rps(self.users, self.place.least_s)
        tried = TriedSetting(settings=served.setting, throughput_rps=throughput)
        if not throughput:
            return tried.model_copy(update={"stopped_early": True, "reason": "answers nothing"})
        first = self.journal.reference_rps is None
        if first:
            tried = self._with_first_capacity(served, tried)
            reference = rounded(SHARE_OF_CAPACITY * (tried.capacity_rps or throughput / 2))
            self.journal.set_reference(reference, served.machine)
        tried = self._at_reference(served, tried)
        return tried if first else self._with_capacity(served, tried)

    def _at_reference(self, served: Contender, tried: TriedSetting) -> TriedSetting:
        """With its latency at the reference rate, where it answers so many at all."""
        assert self.journal.reference_rps is not None
        if tried.throughput_rps * SLACK < self.journal.reference_rps:
            return tried
        trial = self._try_rate(served, self.journal.reference_rps, seed=1000)
        return tried.model_copy(update={"p50_ms": trial.p50_ms, "p99_ms": trial.p99_ms})

    def _with_first_capacity(self, served: Contender, tried: TriedSetting) -> TriedSetting:
        """Of the default, or where it holds no rate: nothing is known yet but the throughput."""
        rate, trial = tried.throughput_rps * 0.6, None
        while rate > tried.throughput_rps * LEAST_SHARE:
            trial = self._held(served, rounded(rate))
            if trial.outcome == "holds":
                return self._climbed(served, tried, trial.rate_rps)
            rate = trial.rate_rps / 2
        assert trial is not None
        if trial.outcome == "invalid" and served.setting == self.default:
            raise InvalidMeasurement(f"the load generator is the limit at every rate: {'; '.join(trial.problems)}")
        why = ", ".join(trial.failed) or trial.outcome
        return tried.model_copy(update={"reason": f"holds no rate down to {trial.rate_rps:g}/s: {why}"})

    def _with_capacity(self, served: Contender, tried: TriedSetting) -> TriedSetting:
        """Of a setting that has to be as good as the best so far; stopped where it is not."""
        floor = max((each.capacity_rps or 0 for each in self.journal.tried.values()), default=0) / self.resolution
        if floor == 0:
            return self._with_first_capacity(served, tried)
        why = f"answers {tried.throughput_rps:.1f}/s at most, the best so far holds {floor * self.resolution:.1f}/s"
        trial = None
        if tried.throughput_rps * SLACK >= floor:
            trial = self._held(served, rounded(floor), twice=tried.throughput_rps >= floor * SLACK)
            if trial.outcome == "holds":
                return self._climbed(served, tried, trial.rate_rps)
            why = f"at {trial.rate_rps:g}/s {trial.outcome}: {', '.join((*trial.failed, *trial.problems[:1]))}"
        return tried.model_copy(
            update={"stopped_early": True, "reason": why, "at_least": trial is not None and trial.outcome == "invalid"}
        )

    def _climbed(self, served: Contender, tried: TriedSetting, low: float) -> TriedSetting:
        """Capacity from a rate that holds: upwards until one does not, then by bisection."""
        high, at_least, growth = None, False, max(GROWTH, self.resolution)
        while high is None or high > low * self.resolution:
            trial = self._held(served, rounded(low * growth if high is None else (low * high) ** 0.5))
            if trial.outcome == "holds":
                low = trial.rate_rps
            else:
                high, at_least = trial.rate_rps, trial.outcome == "invalid"
        return tried.model_copy(update={"capacity_rps": low, "at_least": at_least})

    def _held(self, served: Contender, rate_rps: float, *, twice: bool = False) -> Trial:
        """A trial, repeated once where it does not hold: one stall of the machine spoils a p99.

        One that is overloaded counts at once, unless `twice`: where the closed loop has shown that it can be more.
        """

        def attempt(rate_rps: float) -> Trial:
            trial = self._try_rate(served, rate_rps, seed=0)
            again = trial.outcome != "holds" and (twice or not trial.overloaded)
            return self._try_rate(served, rate_rps, seed=1) if again else trial

        return self._up_to(rate_rps, self._rates.setdefault(served.setting, {}), attempt)

    def _up_to(self, rate_rps: float, known: dict[float, Trial], attempt: Callable[[float], Trial]) -> Trial:
        """A trial of the rate, or of the lowest one below it that an objective is bound to and that does not hold."""
        stops = [stop for stop in bound_rates(self.place.spec.slo) if stop < rate_rps]
        for rate in (*stops, rate_rps):
            if rate not in known:
                known[rate] = attempt(rate)
            if known[rate].outcome != "holds":
                return known[rate]
        return known[rate_rps]

    def _try_rate(self, served: Contender, rate_rps: float, seed: int) -> Trial:
        """One run, where the time allows it."""
        trial_s, left_s = served.trial_s(rate_rps), self.ends_at - time.monotonic()
        if trial_s > left_s:
            raise TimeUp(f"a trial at {rate_rps:.3g}/s takes {trial_s:.0f} s, {max(left_s, 0):.0f} s are left")
        return served.try_rate(rate_rps, seed)

    # -- the search ------------------------------------------------------------------------------

    def search(self) -> TriedSetting:
        """Varies one thing at a time from the best so far until a round finds nothing new; returns the best."""
        self.try_setting(self.default)
        try:
            count = 0
            while count < len(self.journal.tried):
                count = len(self.journal.tried)
                for part in self.space.parts:
                    for setting in self.space.varied(self.best().settings, part):
                        self.try_setting(setting)
        except TimeUp as error:
            why = f" ({error})" if str(error) else ""
            if self.journal.reference_rps is None:
                raise InvalidMeasurement(
                    f"the time was up before a setting that answers was measured{why}; --max-s gives it longer"
                ) from None
            self.cut_short = True
            self.place.console.print(f"the search ends here{why}: the rest of the time is for the confirmation")
        if self.journal.reference_rps is None:
            raise InvalidMeasurement(
                f"none of the settings tried ({len(self.journal.tried)}) answers anything to {self.users} users within "
                f"{self.place.least_s:g} s: fewer --users, a longer --least-s or a longer --timeout-s (it is "
                f"{self.place.settings.timeout_s:g} s) may help"
            )
        return self.best()

    def best(self) -> TriedSetting:
        """Of the settings within noise of the highest capacity the one with the lowest p99; in doubt the default."""
        tried = self.journal.tried
        top = max(each.capacity_rps or 0 for each in tried.values())
        level = [each for each in tried.values() if top and (each.capacity_rps or 0) * self.resolution >= top]
        best = min(level, key=lambda each: each.p99_ms or math.inf, default=tried[self.default])
        default = tried[self.default]
        same = (default.p99_ms or math.inf) <= (best.p99_ms or math.inf) * LEAST_P99_GAIN
        return default if default in level and same else best

    # -- the confirmation ------------------------------------------------------------------------

    def confirm(self, best: TriedSetting) -> list[Pair]:
        """Pairs of default and best, in the order ABBA, both served all the while."""
        found = self.journal.pairs.setdefault(best.settings, [])
        default = self.journal.tried[self.default]
        if len(found) >= self.pairs:
            return found
        with (
            contender(self.default, self.place, "default") as a,
            contender(best.settings, self.place, "best") as b,
        ):
            sides = ((a, self._guess(default)), (b, self._guess(best)))
            trials = self.probes + 1 + len(bound_rates(self.place.spec.slo))
            pair_s = sum(trials * served.trial_s(rate) for served, rate in sides)
            tries = itertools.count(len(found))
            while len(found) < self.pairs and time.monotonic() + pair_s < self.ends_at:
                if (index := next(tries)) >= MOST_TRIES * self.pairs:
                    break
                try:
                    pair = self._pair(sides, index)
                except TimeUp:
                    break
                except InvalidMeasurement as error:
                    self.left_out = str(error)
                    self.place.console.print(f"pair left out: {error}", soft_wrap=True)
                    continue
                self.journal.add_pair(best.settings, pair)
                self.place.console.print(f"pair {len(found)} of {self.pairs}: {_pair_line(pair)}", soft_wrap=True)
        return found

    def _guess(self, tried: TriedSetting) -> float:
        assert self.journal.reference_rps is not None
        return tried.capacity_rps or self.journal.reference_rps

    def _pair(self, sides: tuple[tuple[Contender, float], ...], index: int) -> Pair:
        figures: dict[int, tuple[float, float | None]] = {}
        with self.place.console.status(f"default and best in turn, {self.pairs} pairs"):
            for side in (0, 1) if index % 2 == 0 else (1, 0):
                served, guess = sides[side]
                figures[side] = self._rate_and_p99(served, guess, seed=100 * (index + 1))
        (default_rps, default_p99), (best_rps, best_p99) = figures[0], figures[1]
        return Pair(default_rps=default_rps, best_rps=best_rps, default_p99_ms=default_p99, best_p99_ms=best_p99)

    def _rate_and_p99(self, served: Contender, guess_rps: float, seed: int) -> tuple[float, float | None]:
        """The rate that holds, looked for around the guess, and the p99 at the reference rate.

        Raises InvalidMeasurement where a run says nothing of the server.
        """
        assert self.journal.reference_rps is not None
        known: dict[float, Trial] = {}

        def attempt(rate_rps: float) -> Trial:
            return self._decided(served, rate_rps, seed + len(known))

        # Moved by up to half of what the last halving leaves: the steps' error then differs from pair to pair, and the
        # interval of the gain has it in.
        guess_rps *= SPAN ** (random.Random(f"{seed} {served.setting}").uniform(-1, 1) / 2**self.probes)
        low, high, held, failed, probes = guess_rps / SPAN, guess_rps * SPAN, False, False, self.probes
        while probes:
            trial = self._up_to(rounded((low * high) ** 0.5), known, attempt)
            if trial.outcome == "holds":
                low, held = trial.rate_rps, True
            else:
                high, failed = trial.rate_rps, True
            probes -= 1
            if low >= high or (not probes and held != failed):  # it lies beyond the span
                if not held and self.journal.tried[served.setting].capacity_rps is None:
                    low = high  # no rate holds, as the search found: it is this at most
                    break
                low, high, probes = (low, low * SPAN**2, self.probes) if held else (high / SPAN**2, high, self.probes)
        return (low * high) ** 0.5, attempt(self.journal.reference_rps).p99_ms

    def _decided(self, served: Contender, rate_rps: float, seed: int) -> Trial:
        """A trial that holds or fails; one that is neither is repeated once."""
        for change in (0, 50):
            trial = self._try_rate(served, rate_rps, seed + change)
            if trial.outcome in ("holds", "fails"):
                return trial
        raise InvalidMeasurement(f"{served.setting} at {rate_rps:g}/s: {', '.join(trial.problems) or trial.outcome}")


def verdict(pairs: list[Pair]) -> tuple[Gain, bool]:
    """The gain that counts, and whether it is one."""
    found = gains(pairs)
    capacity, p99 = found["capacity_rps"], found.get("p99_ms")
    if capacity.low >= LEAST_GAIN:
        return capacity, True
    if p99 is not None and p99.low >= LEAST_P99_GAIN and capacity.low >= NOT_WORSE:
        return p99, True
    return capacity, False


def line_of(tried: TriedSetting) -> str:
    """One setting while the search goes on."""
    found = f"{tried.throughput_rps:.1f}/s in flight, p99 {shown_ms(tried.p99_ms)}, holds {shown_capacity(tried)}"
    return f"{tried.settings}: {found}{f'  ({tried.reason})' if tried.reason else ''}"


def _pair_line(pair: Pair) -> str:
    latency = f"p99 {shown_ms(pair.default_p99_ms)} and {shown_ms(pair.best_p99_ms)}"
    return f"{pair.default_rps:.1f}/s and {pair.best_rps:.1f}/s hold, {latency}"


def shown_ms(value: float | None) -> str:
    """A latency for people."""
    return "-" if value is None else formatted("ms", value)


def shown_capacity(tried: TriedSetting) -> str:
    """The rate that holds, for people."""
    if tried.capacity_rps is None:
        return "-"
    return f"{'≥ ' if tried.at_least else ''}{tried.capacity_rps:g}/s"

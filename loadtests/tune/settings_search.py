"""The search: expects a p99 of every setting, and compares the few that could win with the default.

Contract: a setting may win in two ways: with a lower p99 at the usual rate (the SLO's, or a share of what the default
answers in a closed loop), and then at the high rate, about the highest at which the default meets the SLO. A lower p99
there leaves room for a higher rate. The expected p99 comes from measured batches, or from one short run of each setting
where there is no curve. The best at a rate is compared if it is expected to be better by PRACTICAL_GAIN there and not
as much worse at the other rate. A comparison sends the same arrivals to the default and the setting in turn, with both
servers up, until `loadtests.tune.sequential_test` settles it. The confidence holds for all comparisons of a search
together.

Example:
    facts = SettingsSearch(conditions=conditions, default=default, space=space, cores=2).run()
    facts["conclusion"]
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from deepseek.spec import InputError, InvalidMeasurement
from deepseek.spec.files.batching_plan import tail_limit_ms
from loadtests.load.measure import START_S
from loadtests.search.highest_rate import GENERATOR, SAMPLES, TIME, TRIALS, RateSearch, rounded
from loadtests.search.slo_at_rate import required_rps
from loadtests.tune.candidate_server import USERS, CandidateServer, NotValid, TuneConditions, candidate_server
from loadtests.tune.predicted_latency import BUSY, Curves
from loadtests.tune.search_space import SearchSpace, ServingSettings
from loadtests.tune.sequential_test import LEAST_PAIRS, PRACTICAL_GAIN, nominal_level
from loadtests.tune.tune_result import Compared, ExpectedSettings

CONFIDENCE = 0.95  # of all comparisons together
MOST_DROPPED = 3  # pairs of a comparison that say nothing
USUAL_SHARE = 0.7  # of what the default answers in a closed loop: the usual rate if the SLO names none
SCREENING_SHARE = 0.4  # of the time left, to run each setting once if there is no curve
RESOLUTION = 1.1  # of the search for a rate that can be proved
UNPROVED = {
    TIME: "out of time: raise --max-s",
    TRIALS: "too many trials",
    SAMPLES: "too close to the limit",
    GENERATOR: "the load generator was the limit",
}
Rate = Literal["p99_ms", "high_p99_ms"]


@dataclass(kw_only=True)
class SettingsSearch:
    conditions: TuneConditions
    default: ServingSettings
    space: SearchSpace
    cores: int
    sizes: tuple[int, ...] | None = None
    """Batch sizes to try; None: those of the curve."""
    most_pairs: int = 24
    """Of a comparison."""
    usual_rps: float = 0.0
    high_rps: float = 0.0
    predicted: bool = True
    expected: list[ExpectedSettings] = field(default_factory=list)
    comparisons: list[Compared] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Searches; returns the fields of the result (`TuneResult`) that the search decides."""
        with ExitStack() as stack:
            try:
                server = stack.enter_context(candidate_server(self.default, self.conditions, "default"))
            except (InputError, InvalidMeasurement) as error:
                raise type(error)(f"the default settings: {error}") from None
            if not (throughput_rps := server.throughput_rps()):
                raise InvalidMeasurement(
                    f"the default settings: no answer to {USERS} users within {self.conditions.least_s:g} s: try a "
                    f"longer --least-s or --timeout-s (now {self.conditions.settings.timeout_s:g} s)"
                )
            self.usual_rps = rounded(required_rps(self.conditions.spec.slo) or USUAL_SHARE * throughput_rps)
            answers = f"the default answers {throughput_rps:.3g}/s to {USERS} users"
            self._say(f"{answers}; p99 counts at {self.usual_rps:g}/s")
            curves = None
            if self.conditions.settings.target == "onnxruntime":
                layouts = [self.default, *self.space.combined(self.default, [self.default.max_batch])]
                curves = Curves.measured(self.conditions, layouts, self.cores)
            if curves is None:
                self._screen(server, throughput_rps)
            else:
                self._predict(curves.as_fast_as(self.default, throughput_rps, USERS))
            found, machine, published = self._compare_contenders(server), dict(server.runner.machine), server.published
            versions = machine.pop("versions", {}) | dict(published.versions)
            found |= {"precision": published.precision, "versions": versions, "machine": machine}
            found |= {"usual_rps": self.usual_rps, "high_rps": self.high_rps, "predicted": self.predicted}
            return found | {"expected": tuple(self.expected), "comparisons": tuple(self.comparisons)}

    def _predict(self, curves: Curves) -> None:
        """What the curves promise of each setting that keeps the throughput."""
        self._say(f"served, rows take {curves.slower:.2g} times as long as in measured batches")
        self.high_rps = rounded(curves.highest_rps(self.default, tail_limit_ms(self.conditions.spec.slo)))
        all_ = [self.default, *self.space.combined(self.default, self.sizes or curves.sizes)]
        for each in dict.fromkeys((self.default, *curves.keeping_throughput(all_))):
            usual, high = (curves.p99_ms(each, rate_rps) for rate_rps in (self.usual_rps, self.high_rps))
            self.expected.append(ExpectedSettings(settings=each, p99_ms=usual, high_p99_ms=high))

    def _screen(self, server: CandidateServer, throughput_rps: float) -> None:
        self.predicted, self.high_rps = False, rounded(BUSY * throughput_rps)
        ends_at = time.monotonic() + SCREENING_SHARE * self.conditions.left_s
        self.expected.append(self._screened(server))
        for each in self.space.varied(self.default):
            if time.monotonic() > ends_at:
                self._say("not every setting was tried: raise --max-s")
                break
            try:
                with candidate_server(each, self.conditions, "candidate") as other:
                    self.expected.append(self._screened(other))
            except (InputError, InvalidMeasurement) as error:
                self._say(f"{each}: {error}")
                failed = ExpectedSettings(settings=each, p99_ms=None, high_p99_ms=None, reason=str(error))
                self.expected.append(failed)

    def _screened(self, server: CandidateServer) -> ExpectedSettings:
        """One block at each rate, after a closed loop, which also warms up."""
        throughput_rps = server.throughput_rps()
        try:
            usual, high = (server.p99_ms(rate, seed=1000) for rate in (self.usual_rps, self.high_rps))
        except NotValid as error:
            raise InvalidMeasurement(str(error)) from None
        self._say(f"{server.settings}: {throughput_rps:.4g}/s to {USERS} users, p99 {usual:.3g} and {high:.3g} ms")
        return ExpectedSettings(settings=server.settings, p99_ms=usual, high_p99_ms=high)

    def _contender(self, rate: Rate) -> ServingSettings | None:
        """The setting that promises the lowest p99 at a rate, if that is worth a comparison."""
        default, *others = self.expected
        other: Rate = "high_p99_ms" if rate == "p99_ms" else "p99_ms"

        def gain(each: ExpectedSettings, at: Rate) -> float:
            return (getattr(default, at) or 0.0) / (getattr(each, at) or float("inf"))

        good = [e for e in others if gain(e, rate) >= PRACTICAL_GAIN and gain(e, other) * PRACTICAL_GAIN >= 1]
        # Settings that promise about the same are in the order of the space: the simplest comes first.
        return max(good, key=lambda each: round(gain(each, rate), 1)).settings if good else None

    def _compare_contenders(self, server: CandidateServer) -> dict[str, Any]:
        """Compares them one by one until one is better; then proves a rate of it."""
        rates: dict[Rate, float] = {"p99_ms": self.usual_rps}
        if self.high_rps > self.usual_rps:  # else the default meets the SLO not even at the usual rate
            rates["high_p99_ms"] = self.high_rps
        planned = [(best, rate_rps) for rate, rate_rps in rates.items() if (best := self._contender(rate)) is not None]
        if not planned:
            by = "measured batches" if self.predicted else "one run each"
            said = f"none of {len(self.expected) - 1} other settings could be better by {PRACTICAL_GAIN - 1:.0%}"
            return {"conclusion": f"the default stays: by {by}, {said}"}
        level = nominal_level((1 - CONFIDENCE) / len(planned), self.most_pairs)
        for settings, rate_rps in planned:
            self._say(f"worth comparing at {rate_rps:g}/s: {settings}")
            share_s = self.conditions.left_s / (len(planned) - len(self.comparisons))
            compared, proved = Compared(settings=settings, rate_rps=rate_rps, confidence=CONFIDENCE), None
            try:
                with candidate_server(settings, self.conditions, "candidate") as other:
                    compared = self._compared(server, other, compared, level, time.monotonic() + share_s)
                    self._say(f"{settings}: {compared.result}")
                    proved = self._proof(other) if compared.outcome == "better" else None
            except (InputError, InvalidMeasurement) as error:
                compared = compared.model_copy(update={"note": str(error)})
            self.comparisons.append(compared)
            if proved is not None:
                return {"best": settings, "proved_rps": proved[0], "conclusion": f"{settings}: {compared}; {proved[1]}"}
        return {"conclusion": self._nothing_proved()}

    def _compared(
        self, default: CandidateServer, other: CandidateServer, found: Compared, level: float, ends_at: float
    ) -> Compared:
        """Measures pairs until they are settled, or the time or the number of pairs is up."""
        pairs, dropped, rate_rps = list[tuple[float, float]](), 0, found.rate_rps
        while len(pairs) < self.most_pairs and found.outcome == "undecided":
            if time.monotonic() + self.conditions.pair_s(rate_rps) > ends_at:
                return found.model_copy(update={"note": UNPROVED[TIME]})
            seed = len(pairs) + dropped
            order = (default, other) if seed % 2 == 0 else (other, default)
            try:
                p99_ms = {each.settings: each.p99_ms(rate_rps, seed) for each in order}
                if min(p99_ms.values()) >= 1000 * self.conditions.settings.timeout_s:
                    raise NotValid(f"neither answers 99 % of {rate_rps:g}/s")
            except NotValid as error:
                dropped += 1
                self._say(f"pair dropped: {error}")
                if dropped == MOST_DROPPED:
                    return found.model_copy(update={"note": str(error)})
                continue
            pairs.append((p99_ms[default.settings], p99_ms[other.settings]))
            self._say(f"pair {len(pairs)} at {rate_rps:g}/s: p99 {pairs[-1][0]:.3g} and {pairs[-1][1]:.3g} ms")
            found = found.judged(tuple(pairs), level)
        return found

    def _proof(self, server: CandidateServer) -> tuple[float | None, str]:
        """A rate of the best setting at which the verdict holds, or None; and the result in words."""
        slo, late_s = self.conditions.spec.slo, self.conditions.settings.warmup_s + START_S  # of the last run
        bounds = {"resolution": RESOLUTION, "max_s": self.conditions.left_s - late_s}
        plan = server.runner.plan(
            start_rps=self.high_rps, duration_s=self.conditions.least_s, confirm=False, prove=True, **bounds
        )
        try:
            found = RateSearch(plan, server.runner).run()
            why = UNPROVED.get(found.limited_by, found.limited_by)
            if found.confirmed:
                return found.capacity_rps, f"{found.capacity_rps:g}/s hold with {slo.confidence:.0%} confidence"
        except InvalidMeasurement as error:
            why = str(error)
        return None, f"no rate was proved to hold with {slo.confidence:.0%} confidence ({why})"

    def _nothing_proved(self) -> str:
        """The conclusion; InvalidMeasurement if no comparison had enough pairs."""
        if all(len(each.pairs) < LEAST_PAIRS for each in self.comparisons):
            each = self.comparisons[-1]
            raise InvalidMeasurement(f"{each.settings}: not compared ({len(each.pairs)} pairs): {each.note}")
        nearest = max(self.comparisons, key=lambda each: each.ratio or 0.0)
        return f"nothing is proved better than the default; nearest: {nearest.settings}: {nearest.result}"

    def _say(self, text: str) -> None:
        self.conditions.console.print(text, soft_wrap=True)

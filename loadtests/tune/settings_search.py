"""The search: varies one serving setting at a time, starting from the best so far.

Contract: a candidate is measured in three steps, and each may stop it early: throughput in a closed loop, latency at
the reference rate (the same for all candidates), and the highest rate that holds, upwards from the best so far.

Example:
    best = search.run()
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from deepseek.spec import InputError, InvalidMeasurement, PublishedManifest
from loadtests.search.highest_rate import GENERATOR, TIME, RateSearch, rounded
from loadtests.search.local_server import NotServed
from loadtests.tune.candidate_server import CandidateServer, TimeUp, TuneConditions, candidate_server
from loadtests.tune.search_space import PARTS, SearchSpace, ServingSettings
from loadtests.tune.tune_result import MeasuredSettings

STEP_UP = 1.25  # factor of the rate, on the way up
START_SHARE = 0.6  # of the throughput: the first rate tried with the default
LEAST_SHARE = 1 / 64  # of the throughput: if the SLO needs a lower rate, tuning cannot help
SLACK = 1.1  # a short closed loop may measure this factor less than the server can do
REFERENCE_SHARE = 0.8  # of the default's capacity: the rate at which latencies are compared
LEAST_P99_GAIN = 1.05  # a smaller gain does not justify a change


@dataclass(kw_only=True)
class SettingsSearch:
    """One search over one space."""

    conditions: TuneConditions
    default: ServingSettings
    space: SearchSpace
    users: int
    confirm_s: float
    """Time reserved for the confirmation."""
    resolution: float = 1.05
    """Precision of the rates, as a factor; candidates within it of each other count as equal."""
    measured: dict[ServingSettings, MeasuredSettings] = field(default_factory=dict)
    reference_rps: float = 0.0
    """The rate at which latencies are compared; set when the default is measured."""
    machine: dict[str, Any] = field(default_factory=dict)
    published: PublishedManifest | None = None
    """The manifest of the default."""
    cut_short: bool = False
    """The time ran out before every candidate was tried."""

    def run(self) -> MeasuredSettings:
        """Varies one part at a time from the best so far until a round tries nothing new; returns the best."""
        with self._default_served() as server:
            self._keep(self._measured(server))
            self.published, self.machine = server.published, dict(server.runner.machine)
        try:
            count = 0
            while count < len(self.measured):
                count = len(self.measured)
                for part in PARTS:
                    for settings in self.space.varied(self.best().settings, part):
                        if settings not in self.measured:
                            self._keep(self._candidate(settings))
        except TimeUp as error:
            self.cut_short = True
            why = f" ({error})" if str(error) else ""
            self.conditions.console.print(f"the search stops here{why}: the remaining time is for the confirmation")
        return self.best()

    @contextmanager
    def _default_served(self) -> Iterator[CandidateServer]:
        try:
            with candidate_server(self.default, self.conditions, "candidate") as server:
                yield server
        except TimeUp as error:
            raise InvalidMeasurement(f"too little time for the default: {error}; raise --max-s") from None
        except NotServed as error:
            raise InputError(f"the default settings: not served: {error}") from None
        except (InputError, InvalidMeasurement) as error:
            raise type(error)(f"the default settings: {error}") from None

    def best(self) -> MeasuredSettings:
        """The candidate with the lowest p99 among those within noise of the highest rate; the default on a tie."""
        default, top = self.measured[self.default], self._best_rps()
        level = [each for each in self.measured.values() if top and (each.capacity_rps or 0) * self.resolution >= top]
        best = min(level, key=lambda each: each.p99_ms or math.inf, default=default)
        same = (default.p99_ms or math.inf) <= (best.p99_ms or math.inf) * LEAST_P99_GAIN
        return default if default in level and same else best

    def _best_rps(self) -> float:
        return max((each.capacity_rps or 0 for each in self.measured.values()), default=0)

    def _keep(self, measured: MeasuredSettings) -> None:
        self.measured[measured.settings] = measured
        self.conditions.console.print(str(measured), soft_wrap=True)

    def _candidate(self, settings: ServingSettings) -> MeasuredSettings:
        if time.monotonic() > self.conditions.ends_at - self.confirm_s:
            raise TimeUp
        try:
            with (
                self.conditions.console.status(str(settings)),
                candidate_server(settings, self.conditions, "candidate") as server,
            ):
                return self._measured(server)
        except NotServed as error:
            return MeasuredSettings(settings=settings, reason=f"not served: {error}")
        except (InputError, InvalidMeasurement) as error:
            return MeasuredSettings(settings=settings, reason=str(error))

    def _measured(self, server: CandidateServer) -> MeasuredSettings:
        least_s, is_default = self.conditions.least_s, server.settings == self.default
        throughput = server.throughput_rps(self.users, least_s)
        measured = MeasuredSettings(settings=server.settings, throughput_rps=throughput)
        if not throughput and is_default:
            raise InvalidMeasurement(
                f"no answer to {self.users} users within {least_s:g} s: try fewer --users, a longer --least-s or a "
                f"longer --timeout-s (now {self.conditions.settings.timeout_s:g} s)"
            )
        if not throughput:
            return _stopped(measured, "answers nothing")
        if not is_default:
            return self._with_capacity(server, self._with_latency(server, measured))
        measured = self._with_capacity(server, measured)
        self.reference_rps = rounded(REFERENCE_SHARE * (measured.capacity_rps or throughput / 2))
        return self._with_latency(server, measured)

    def _with_latency(self, server: CandidateServer, measured: MeasuredSettings) -> MeasuredSettings:
        """Adds the latency at the reference rate, if the throughput reaches it."""
        if measured.throughput_rps * SLACK < self.reference_rps:
            return measured
        trial = server.try_rate(self.reference_rps, seed=1000)
        return measured.model_copy(update={"p50_ms": trial.p50_ms, "p99_ms": trial.p99_ms})

    def _with_capacity(self, server: CandidateServer, measured: MeasuredSettings) -> MeasuredSettings:
        """Adds the highest rate that holds; stops a candidate below the best so far."""
        floor_rps, throughput_rps = self._best_rps() / self.resolution, measured.throughput_rps
        if throughput_rps * SLACK < floor_rps:
            holds = f"the best so far holds {self._best_rps():.1f}/s"
            return _stopped(measured, f"answers {throughput_rps:.1f}/s at most, {holds}")
        plan = server.plan(
            floor_rps or START_SHARE * throughput_rps,
            lowest_rps=floor_rps or LEAST_SHARE * throughput_rps,
            step_up=max(STEP_UP, self.resolution),
            resolution=self.resolution,
        )
        search = RateSearch(plan, server.runner)
        found = search.run()
        if found.limited_by == TIME:
            raise TimeUp("out of time while measuring a capacity")
        last, at_least = search.trials[-1], found.limited_by == GENERATOR
        if found.capacity_rps is None and at_least and measured.settings == self.default:
            raise InvalidMeasurement(f"the load generator is the limit at every rate: {last.reason}")
        if found.capacity_rps is None:
            measured = _stopped(measured, f"at {last.rate_rps:g}/s {last.outcome}: {last.reason}")
        return measured.model_copy(update={"capacity_rps": found.capacity_rps, "at_least": at_least})


def _stopped(measured: MeasuredSettings, reason: str) -> MeasuredSettings:
    return measured.model_copy(update={"reason": reason})

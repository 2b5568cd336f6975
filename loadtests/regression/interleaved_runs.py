"""Measures a baseline and a candidate in turn, on real servers on this machine.

Contract: both servers run at once, on different ports, and only one gets requests at a time. Runs alternate in the
order ABBA, with the same arrivals within a pair, so that other load on the machine affects both alike. A run holds one
rate for the latencies, then a rate a little below the baseline's capacity, which a search finds first.

Example:
    for baseline_run, candidate_run in interleaved((baseline, candidate), plan, folder, Console()): ...
"""

import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement
from deepseek.spec.objectives import formatted
from deepseek.spec.processes.child_server import NotServed
from loadtests.load.measure import START_S
from loadtests.regression.compared_version import VARIABLES, ComparedVersion
from loadtests.regression.comparison import LEAST_PAIRS
from loadtests.regression.held_rates import problems_at
from loadtests.results.run import Run
from loadtests.results.schedule import segments_of
from loadtests.results.settings import LoadSettings
from loadtests.search.highest_rate import UNDECIDED, RateSearch, rounded
from loadtests.search.local_server import LocalServer, local_server
from loadtests.search.slo_at_rate import bound_rates
from loadtests.search.trial_runner import DEFAULT_START_RPS, TrialRunner, ready

LATENCY_SHARE = 0.3  # of a run; the rate near the capacity gets the rest: its verdict needs minutes in all
BUSY = 0.7  # of the baseline's capacity: the rate for latencies if the SLO's own rate is above BUSIEST of it
BUSIEST = 0.85
SEARCH_SHARE = 1 / 3  # of the time, at most, for the baseline's capacity


@dataclass(frozen=True, kw_only=True)
class InterleavedPlan:
    spec: DeploymentSpec
    """With the SLO of the target."""
    settings: LoadSettings
    """For every run; URL, rates, length and seed are set for each."""
    server: str
    """Command template for `local_server`."""
    rate_rps: float | None
    """For the latencies; None: the SLO's rate if it is well below the baseline's capacity, else a share of that."""
    duration_s: float
    """Length of a run, all its rates together."""
    pairs: int
    max_s: float
    """Time limit of the whole measurement; it reduces the number of pairs if needed."""
    capacity: bool = True
    slack: float = 0.10
    """How much lower the candidate's capacity may be, as a share."""

    def shape(self, capacity_rps: float | None) -> str:
        """The shape of each run: one rate for the latencies, then the one that the candidate must hold."""
        asked = self.rate_rps or self.spec.slo.rate_rps
        if capacity_rps is None:
            if asked is None:
                raise InputError("no rate to measure at: give --rate, or set rate_rps in [slo] of deploy.toml")
            return f"{asked:.15g}x{max(1, round(self.duration_s))}"
        if self.rate_rps is None and (asked is None or asked > BUSIEST * capacity_rps):
            asked = rounded(BUSY * capacity_rps)
        highest = rounded(capacity_rps / (1 + self.slack))
        # A rate that an objective is bound to is one more: the objective does not apply above it.
        rates = {highest, *(rate for rate in bound_rates(self.spec.slo) if rate < highest)} - {asked}
        if not rates:
            return f"{asked:.15g}x{max(1, round(self.duration_s))}"
        latency_s = max(1, round(LATENCY_SHARE * self.duration_s))
        each_s = max(1, round((1 - LATENCY_SHARE) * self.duration_s / len(rates)))
        return ", ".join([f"{asked:.15g}x{latency_s}", *(f"{rate:.15g}x{each_s}" for rate in sorted(rates))])

    @property
    def pair_s(self) -> float:
        """About how long a pair takes."""
        return 2 * (self.duration_s + self.settings.warmup_s + START_S)

    def pairs_in(self, left_s: float) -> int:
        """The number of pairs that fit into the time, at most `pairs`; InputError if too few fit for an interval."""
        fit = int(left_s / self.pair_s)
        if fit < LEAST_PAIRS:
            needed_s = math.ceil(self.max_s - left_s + LEAST_PAIRS * self.pair_s)
            raise InputError(
                f"--max-s {self.max_s:g}: {LEAST_PAIRS} pairs need about {needed_s} s; raise it (BUDGET_S=) or lower "
                "--duration-s"
            )
        return min(self.pairs, fit)


@dataclass(frozen=True, kw_only=True)
class ServedVersion:
    version: ComparedVersion
    server: LocalServer
    runner: TrialRunner

    def run(self, shape: str, seed: int) -> Run:
        """One run; GateFailed (candidate) or InvalidMeasurement (baseline) if the server died."""
        duration_s = float(sum(segment.duration_s for segment in segments_of(shape)))
        try:
            run = self.runner.run(shape=shape, duration_s=duration_s, seed=seed)
        except InvalidMeasurement:
            self._check_alive()
            raise
        self._check_alive()
        return run

    def _check_alive(self) -> None:
        if self.server.child.process.poll() is None and ready(self.runner.settings):
            return
        with suppress(subprocess.TimeoutExpired):  # the launcher notices a moment later and logs the reason
            self.server.child.process.wait(5)
        reason = self.server.child.last_words or "it no longer answers"
        raise _down(self.version, f"died under load: {reason} (log: {self.server.child.log})")


def _down(version: ComparedVersion, what: str) -> Exception:
    """The error for a version that is down: a candidate is worse, without a baseline the comparison is invalid."""
    text = f"{VARIABLES[version.role]}{version.given} {what}"
    return GateFailed(text) if version.role == "candidate" else InvalidMeasurement(text)


def serve(
    stack: ExitStack, version: ComparedVersion, plan: InterleavedPlan, folder: Path, console: Console
) -> ServedVersion:
    """Starts the server of a version; it runs until the stack closes."""
    place = folder / version.role
    repository = version.lay_out(place)
    stack.callback(shutil.rmtree, repository, ignore_errors=True)
    try:
        server = stack.enter_context(local_server(plan.server, repository, place, plan.settings))
    except NotServed as error:
        raise _down(version, f"is not served: {error}") from None
    try:
        runner = TrialRunner.at(plan.spec, server.settings, place / "runs", console)
    except InputError as error:
        if version.role == "baseline":  # the inputs or deploy.toml are wrong; a passing baseline rules that out
            raise
        raise _down(version, f"does not answer like the baseline: {error}") from None
    return ServedVersion(version=version, server=server, runner=runner)


def capacity_of(baseline: ServedVersion, plan: InterleavedPlan, left_s: float, console: Console) -> float | None:
    """About the baseline's capacity, by short runs; None, with a printed note, if no rate holds.

    Of the time that is left, it leaves enough for the pairs, and for one more since a search may end late.
    """
    slo = plan.spec.slo
    runner = replace(baseline.runner, folder=baseline.runner.folder.with_name("search"))
    bounds = runner.plan(
        start_rps=min([*bound_rates(slo), plan.rate_rps or slo.rate_rps or DEFAULT_START_RPS]),
        duration_s=max(2.0, plan.duration_s / 3),
        resolution=1.1,
        confirm=False,
        max_trials=20,
        max_s=min(plan.max_s * SEARCH_SHARE, left_s - (LEAST_PAIRS + 1) * plan.pair_s),
    )
    console.print("searching for the baseline's capacity")
    found = RateSearch(bounds, runner).run()
    if found.capacity_rps is None:
        console.print(f"note: capacity is not compared: the baseline holds no rate ({found.limited_by})")
    else:
        least = "at least" if found.limited_by in UNDECIDED else "about"
        console.print(f"the baseline holds its SLO up to {least} {found.capacity_rps:g}/s ({found.limited_by})")
    return found.capacity_rps


def measure_pairs(
    versions: tuple[ServedVersion, ServedVersion], shape: str, pairs: int, ends_at: float, console: Console
) -> Iterator[tuple[Run, Run]]:
    """Runs the pairs in the order ABBA, so that drift affects both alike.

    A pair in which the generator was the limit is repeated once, if that leaves time for LEAST_PAIRS.
    """
    rate, slo = segments_of(shape)[0].rate_rps, versions[0].runner.spec.slo
    began_at, measured = time.monotonic(), 0

    def fit(more: int) -> bool:
        """Whether there is time for more pairs, as long as those before."""
        now_at = time.monotonic()
        return now_at + more * (now_at - began_at) / measured <= ends_at

    for pair in range(pairs):
        if pair >= LEAST_PAIRS and not fit(1):
            return
        for attempt in range(2):
            order = versions if pair % 2 == 0 else versions[::-1]
            made = {served.version.role: served.run(shape, pair) for served in order}
            found = (made["baseline"], made["candidate"])
            why = [problem for run in found for problem in problems_at(run, rate, slo)[:1]]
            shown = ", ".join(f"{role} {_p99(run, rate)}" for role, run in made.items())
            console.print(f"pair {pair + 1} of {pairs}: p99 at {rate:g}/s {shown}{f'  ({why[0]})' if why else ''}")
            measured += 1
            if not why or attempt or not fit(max(1, LEAST_PAIRS - pair)):
                break
        yield found


def _p99(run: Run, rate_rps: float) -> str:
    stretch = run.at_rate(rate_rps)
    assert stretch is not None
    return formatted("ms", stretch.latency("intended").percentile_ms(99))


def interleaved(
    versions: tuple[ComparedVersion, ComparedVersion], plan: InterleavedPlan, folder: Path, console: Console
) -> list[tuple[Run, Run]]:
    """Serves both versions and measures them; keeps the runs in `folder`."""
    ends_at = time.monotonic() + plan.max_s
    plan.pairs_in(plan.max_s * (1 - SEARCH_SHARE if plan.capacity else 1))  # fails before anything is started
    with ExitStack() as stack:
        baseline, candidate = (serve(stack, version, plan, folder, console) for version in versions)
        left_s = ends_at - time.monotonic()
        shape = plan.shape(capacity_of(baseline, plan, left_s, console) if plan.capacity else None)
        pairs = plan.pairs_in(ends_at - time.monotonic())
        console.print(f"{pairs} pairs of {shape} (requests/s x seconds); runs: {folder}", soft_wrap=True)
        return list(measure_pairs((baseline, candidate), shape, pairs, ends_at, console))

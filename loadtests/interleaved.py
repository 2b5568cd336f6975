"""Measures two sides in turn on real servers of this machine.

Contract: both servers are up at once, on ports of their own, and only one is asked at a time. Runs alternate, ABBA,
with the same arrivals within a pair, so that what else the machine does falls on both alike. A run holds one rate for
the latencies, then climbs a ladder of rates around the base's capacity, which is looked for first.

Example:
    for base, new in interleaved((base, new), how, folder, Console()): ...     # two runs a pair
"""

from __future__ import annotations

import math
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek_client import ModelMetadata
from rich.console import Console

from deepseek.spec import DeploymentSpec, GateFailed, InputError, InvalidMeasurement
from loadtests.check import check
from loadtests.local_server import LocalServer, NotServed, local_server
from loadtests.measure import measure
from loadtests.regression import LEAST_PAIRS, problems_at
from loadtests.results import Run, Settings
from loadtests.schedule import segments_of
from loadtests.search import UNDECIDED, Plan, Search, rounded
from loadtests.sides import Side
from loadtests.slo import formatted
from loadtests.trial import DEFAULT_START_RPS, Trials, bound_rates, ready, seconds_needed

LADDER = (0.75, 0.84, 0.94, 1.05, 1.17, 1.3)  # of the base's capacity
LATENCY_SHARE = 0.3  # of a run; the ladder has the rest
BUSY = 0.7  # of the base's capacity: where latencies are compared, if the SLO's own rate is more than BUSIEST of it
BUSIEST = 0.85
SEARCH_SHARE = 1 / 3  # of the time, at most, for the base's capacity
START_S = 3.5  # about, of the load generator, for each run


@dataclass(frozen=True, kw_only=True)
class How:
    """What is measured, alike on both sides."""

    spec: DeploymentSpec
    """With the target's SLO in place."""
    settings: Settings
    """Of every run, but for URL, rates, length and seed."""
    server: str
    """Command, as `local_server` takes it."""
    rate_rps: float | None
    """Of the latencies; None: the SLO's, where the base can hold it with some room."""
    duration_s: float
    """Of a run, ladder included."""
    pairs: int
    max_s: float
    """Fewer pairs are made where not all fit."""
    capacity: bool = True


@dataclass(frozen=True, kw_only=True)
class Served:
    """A side that is up."""

    side: Side
    server: LocalServer
    settings: Settings
    """Of every run, but for rates and seed."""
    spec: DeploymentSpec
    metadata: ModelMetadata
    folder: Path

    def run(self, shape: str, seed: int, console: Console) -> Run:
        """One run; a side that has died is no measurement."""
        settings = replace(self.settings, users=None, shape=shape, duration_s=_seconds(shape), seed=seed)
        try:
            run = measure(settings, self.spec, self.metadata, console, self.folder / "runs")
        except InvalidMeasurement:
            self._check_alive()
            raise
        self._check_alive()
        return run

    def _check_alive(self) -> None:
        if self.server.process.poll() is None and ready(self.settings):
            return
        with suppress(subprocess.TimeoutExpired):  # the launcher notices a moment later, and says why
            self.server.process.wait(5)
        reason = self.server.last_words or "it no longer answers"
        raise _down(self.side, f"died under load: {reason} (log: {self.server.log})")


def _down(side: Side, what: str) -> Exception:
    """A new side that is not there is worse; without a base there is nothing to hold it against."""
    text = f"{side.name.upper()}={side.given} {what}"
    return GateFailed(text) if side.name == "new" else InvalidMeasurement(text)


def serve(stack: ExitStack, side: Side, how: How, folder: Path) -> Served:
    """Starts one side's server; it is up as long as the stack."""
    place = folder / side.name
    repository = side.lay_out(place)
    stack.callback(shutil.rmtree, repository, ignore_errors=True)
    protocol, model = how.settings.protocol, how.settings.model
    try:
        server = stack.enter_context(local_server(how.server, repository, place, protocol=protocol, model=model))
    except NotServed as error:
        raise _down(side, f"is not served: {error}") from None
    settings = replace(how.settings, url=server.url, users=1)
    try:
        metadata = check(settings, how.spec)
    except InputError as error:
        if side.name == "base":  # the inputs or deploy.toml may be at fault; once the base has passed they are not
            raise
        raise _down(side, f"does not answer as the base does: {error}") from None
    return Served(side=side, server=server, settings=settings, spec=how.spec, metadata=metadata, folder=place)


def base_capacity(base: Served, how: How, console: Console) -> float | None:
    """Where the ladder goes; None, with a note, where there is no such rate."""
    slo, stops = base.spec.slo, tuple(bound_rates(base.spec.slo))
    settings, folder = replace(base.settings, users=None), base.folder / "search"
    trials = Trials(spec=base.spec, settings=settings, served=base.metadata, folder=folder, console=console)
    plan = Plan(
        start_rps=min([*stops, how.rate_rps or slo.rate_rps or DEFAULT_START_RPS]),
        duration_s=max(2.0, how.duration_s / 3),
        stops_rps=stops,
        resolution=1.1,
        confirm=False,
        max_trials=20,
        max_s=how.max_s * SEARCH_SHARE,
        needed_s=lambda rate_rps: seconds_needed(slo, rate_rps),
    )
    console.print("looking for the capacity of base, around which the ladder is laid")
    found = Search(plan, trials).run()
    if found.capacity_rps is None:
        console.print(f"note: base has no capacity to compare: no rate holds ({found.limited_by})")
    else:
        least = "at least" if found.limited_by in UNDECIDED else "about"
        console.print(f"base holds its SLO up to {least} {found.capacity_rps:g}/s ({found.limited_by})")
    return found.capacity_rps


def shape_of(how: How, capacity_rps: float | None) -> str:
    """What each run sends: one rate for the latencies, then the ladder."""
    asked = how.rate_rps or how.spec.slo.rate_rps
    if capacity_rps is None:
        if asked is None:
            raise InputError("no rate to measure at: give --rate, or rate_rps in [slo]")
        return f"{asked:g}x{max(1, round(how.duration_s))}"
    if how.rate_rps is None and (asked is None or asked > BUSIEST * capacity_rps):
        asked = rounded(BUSY * capacity_rps)
    rungs = [rate for rate in _ladder(capacity_rps, bound_rates(how.spec.slo), asked) if rate != asked]
    rung_s = max(1, round((1 - LATENCY_SHARE) * how.duration_s / len(LADDER)))
    latency_s = max(1, round(LATENCY_SHARE * how.duration_s))
    return ", ".join([f"{asked:g}x{latency_s}", *(f"{rate:g}x{rung_s}" for rate in rungs)])


def _ladder(capacity_rps: float, stops_rps: list[float], asked_rps: float | None) -> list[float]:
    """Rates around the capacity; one that an objective is bound to takes the place of the first rung beyond it.

    Above it the objective is not asked for, and a side that breaks it there would seem to hold. At `asked_rps` all is
    asked anyway.
    """
    rungs = [rounded(share * capacity_rps) for share in LADDER]
    for stop in stops_rps:
        beyond = [rung for rung in rungs if rung > stop and rung not in stops_rps]
        if stop != asked_rps and stop not in rungs and beyond:
            rungs[rungs.index(beyond[0])] = stop
    return rungs


def pairs_in_time(how: How, left_s: float) -> int:
    """As many as asked for, or as fit."""
    pair_s = 2 * (how.duration_s + how.settings.warmup_s + START_S)
    fit = int(left_s / pair_s)
    if fit < LEAST_PAIRS:
        needed_s = math.ceil(how.max_s - left_s + LEAST_PAIRS * pair_s)
        raise InputError(
            f"--max-s {how.max_s:g}: {LEAST_PAIRS} pairs need about {needed_s} s in all; or a shorter --duration-s"
        )
    return min(how.pairs, fit)


def _seconds(shape: str) -> float:
    return float(sum(segment.duration_s for segment in segments_of(shape)))


def measure_pairs(
    base: Served, new: Served, shape: str, pairs: int, ends_at: float, console: Console
) -> Iterator[tuple[Run, Run]]:
    """ABBA: what drifts falls on both alike. A pair that the generator spoiled is made once more, in time."""
    rate, slo = segments_of(shape)[0].rate_rps, base.spec.slo
    for pair in range(pairs):
        if pair >= LEAST_PAIRS and time.monotonic() > ends_at:
            return
        for attempt in range(2):
            order = (base, new) if pair % 2 == 0 else (new, base)
            made = {served.side.name: served.run(shape, pair, console) for served in order}
            found = (made["base"], made["new"])
            why = [problem for run in found for problem in problems_at(run, rate, slo)[:1]]
            shown = ", ".join(f"{name} {_p99(run, rate)}" for name, run in made.items())
            console.print(f"pair {pair + 1} of {pairs}: p99 at {rate:g}/s {shown}{f'  ({why[0]})' if why else ''}")
            if not why or attempt or time.monotonic() > ends_at:
                break
        yield found


def _p99(run: Run, rate_rps: float) -> str:
    stretch = run.at_rate(rate_rps)
    assert stretch is not None
    return formatted("ms", stretch.latency("intended").percentile_ms(99))


def interleaved(sides: tuple[Side, Side], how: How, folder: Path, console: Console) -> list[tuple[Run, Run]]:
    """Serves both and measures them; the runs are kept in `folder`."""
    ends_at = time.monotonic() + how.max_s
    pairs_in_time(how, how.max_s * (1 - SEARCH_SHARE if how.capacity else 1))  # said before anything is started
    with ExitStack() as stack:
        base, new = (serve(stack, side, how, folder) for side in sides)
        capacity = base_capacity(base, how, console) if how.capacity else None
        shape = shape_of(how, capacity)
        pairs = pairs_in_time(how, ends_at - time.monotonic())
        console.print(f"{pairs} pairs of {shape} (requests/s x seconds); runs: {folder}", soft_wrap=True)
        return list(measure_pairs(base, new, shape, pairs, ends_at, console))

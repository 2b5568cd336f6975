"""Predicts the p99 of serving settings from measured batches, without serving them.

Contract: a prediction is the p99 of a simulated queue under Poisson arrivals of one row each: an instance that is free
takes up to `max_batch` waiting requests, waits for a core if all are busy, and computes as long as the curve says, and
BATCH_MS more. What the default answers in a closed loop says how much slower the served model is than the measured one.
Predictions rank settings and promise nothing. A curve belongs to the batches that run at once and their threads:
layouts that share these share a curve.

Example:
    curves = Curves.measured(conditions, default, layouts)
    curves.p99_ms(settings, 120.0)
"""

from __future__ import annotations

import heapq
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from deepseek.spec import InputError, TunedFile
from deepseek.spec.checks import checked
from deepseek.spec.files.measured_batches import KEPT_THROUGHPUT, MeasuredBatches
from loadtests.load.child_process import our_environment
from loadtests.search.local_server import last_line
from loadtests.tune.candidate_server import TuneConditions
from loadtests.tune.search_space import ServingSettings

ARRIVALS = 5000  # of a simulated queue
BATCH_MS = 0.3  # Triton's time for a batch: with it, the recommender's curve gives the 2.08 times the throughput of
# single rows that docs/benchmarks.md has for dynamic batching
FIRST = 200  # arrivals that find an empty server, left out
KEPT = KEPT_THROUGHPUT - 0.02  # of the best throughput; curves are measured to about 2 %
BUSY = 0.9  # of the throughput: beyond, a short run measures how its queue grows
STEPS = 10  # of the bisection for a rate: to a thousandth of the throughput


@dataclass(frozen=True)
class Curves:
    """Curves by batches at once and threads of each."""

    of: dict[tuple[int, int], MeasuredBatches]
    cores: int
    slower: float = 1.0
    """Times that a batch takes longer than measured."""

    @classmethod
    def measured(cls, conditions: TuneConditions, settings: Iterable[ServingSettings], cores: int) -> Curves | None:
        """Measures a curve for each kind of layout, in about ten seconds each; None if the target has none."""
        found = cls({}, cores)
        for each in settings:
            key = found._key(each)
            if key not in found.of:
                with conditions.console.status(f"measuring batches: {key[0]} at once, {key[1]} threads each"):
                    curve = _measured(each, conditions)
                if not curve.times:
                    return None
                found.of[key] = curve
        return found

    def _key(self, settings: ServingSettings) -> tuple[int, int]:
        """Batches at once, threads: instances with more threads than cores take turns."""
        threads = settings.threads or max(1, self.cores // settings.instances)
        return min(settings.instances, max(1, self.cores // threads)), threads

    def as_fast_as(self, settings: ServingSettings, throughput_rps: float) -> Curves:
        """The same curves on a machine that answers so many requests/s with these settings."""
        return replace(self, slower=self.slower * self.throughput_rps(settings) / throughput_rps)

    @property
    def sizes(self) -> list[int]:
        """The measured batch sizes, ascending."""
        return sorted({point.rows for curve in self.of.values() for point in curve.times})

    def throughput_rps(self, settings: ServingSettings) -> float:
        """The most requests/s."""
        at_once, _ = self._key(settings)
        return max(at_once * rows / batch_s for rows, batch_s in enumerate(self._batches_s(settings), start=1))

    def _batches_s(self, settings: ServingSettings) -> list[float]:
        """Seconds of a batch of 1, 2, ... rows."""
        curve = self.of[self._key(settings)]
        return [self.slower * (curve.ms_of(rows) + BATCH_MS) / 1000 for rows in range(1, settings.max_batch + 1)]

    def keeping_throughput(self, settings: Iterable[ServingSettings]) -> list[ServingSettings]:
        """Those that keep KEPT of the best throughput of them."""
        found = {each: self.throughput_rps(each) for each in settings}
        best = max(found.values(), default=0.0)
        return [each for each, throughput in found.items() if throughput >= KEPT * best]

    def p99_ms(self, settings: ServingSettings, rate_rps: float) -> float:
        """The predicted p99 in ms at a rate."""
        at_once, _ = self._key(settings)
        most, batch_s = settings.max_batch, self._batches_s(settings)
        arrived = np.random.default_rng(0).exponential(1 / rate_rps, ARRIVALS).cumsum().tolist()
        free, cores, taken, waited = [0.0] * settings.instances, [0.0] * at_once, 0, list[float]()
        while taken < ARRIVALS:
            formed = max(heapq.heappop(free), arrived[taken])
            if settings.max_queue_delay_us and taken + most <= ARRIVALS:
                full = arrived[taken + most - 1]
                formed = max(formed, min(full, arrived[taken] + settings.max_queue_delay_us / 1e6))
            rows = 1
            while rows < most and taken + rows < ARRIVALS and arrived[taken + rows] <= formed:
                rows += 1
            done = max(formed, heapq.heappop(cores)) + batch_s[rows - 1]
            heapq.heappush(free, done)
            heapq.heappush(cores, done)
            waited += [done - each for each in arrived[taken : taken + rows]]
            taken += rows
        return 1000 * float(np.percentile(waited[FIRST:], 99))

    def highest_rps(self, settings: ServingSettings, limit_ms: float | None) -> float:
        """The highest rate up to BUSY with a predicted p99 within the limit, if there is one."""
        low, high = 0.0, BUSY * self.throughput_rps(settings)
        if limit_ms is None or self.p99_ms(settings, high) <= limit_ms:
            return high
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.p99_ms(settings, middle) <= limit_ms else (low, middle)
        return low or high


def _measured(settings: ServingSettings, conditions: TuneConditions) -> MeasuredBatches:
    """The curve with this layout, measured in a process of its own, as the build does it."""
    load, folder = conditions.settings, conditions.folder
    tuned, path = folder / "curve.toml", folder / "curve.json"
    folder.mkdir(parents=True, exist_ok=True)
    TunedFile(targets={load.target: settings.tuned()}).write(tuned)
    command = [sys.executable, "-m", "cli", "measure-batches", "--model", load.model, "--models", load.models]
    command += ["--target", load.target, "--tuned", str(tuned), "--output", str(path)]
    command += ["--precision", conditions.precision] if conditions.precision else []
    run = subprocess.run(command, capture_output=True, text=True, env=our_environment())
    if run.returncode:
        raise InputError(last_line(run.stderr) or f"measure-batches ended with status {run.returncode}")
    curve = checked(MeasuredBatches, path.read_bytes(), path)
    for each in (tuned, path):
        each.unlink()
    return curve
